//! `isthmus doctor` names the cause of each thing that can be wrong, with a real Synapse.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use isthmus::clock::{Clock as _, ManualClock, SystemClock};
use isthmus::config::Config;
use isthmus::doctor::{Finding, Outcome, examine};

use crate::support::testbed::certificates::Authority;
use crate::support::testbed::process::free_port;
use crate::support::testbed::{gateway, synapse};

const BINARY: &str = env!("CARGO_BIN_EXE_isthmus");

async fn findings(config: &Path) -> Vec<Finding> {
    examine(&Config::load(config).unwrap(), Arc::new(SystemClock), |_| {}).await
}

fn shown(findings: &[Finding]) -> String {
    findings.iter().map(|finding| format!("{finding}\n")).collect()
}

/// That one check failed, and for this reason.
fn assert_cause(findings: &[Finding], cause: &str) {
    let failed: Vec<&Finding> = findings.iter().filter(|finding| finding.outcome == Outcome::Fail).collect();
    let all = shown(findings);
    assert!(failed.len() == 1 && failed[0].found.contains(cause), "only this should have failed: {cause}\n{all}");
    assert!(failed[0].fix.is_some(), "{all}");
}

struct House {
    directory: tempfile::TempDir,
    authority: Authority,
    ports: [u16; 2],
    gateway: gateway::Plan,
}

/// The gateway's registration as it stands.
fn same(text: String) -> String {
    text
}

impl House {
    fn build() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::new(directory.path()).unwrap();
        let ports = [free_port().unwrap(), free_port().unwrap()];
        let mut gateway = gateway::Plan::new(&directory.path().join("g"), Path::new(BINARY), &authority).unwrap();
        let synapse = synapse::Plan::at(&directory.path().join("s"), ports).unwrap();
        gateway.register_with(&synapse).unwrap();
        Self { directory, authority, ports, gateway }
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("g/isthmus.toml")
    }

    /// The configuration with another line in it.
    fn config_with(&self, from: &str, to: &str) -> PathBuf {
        let text = std::fs::read_to_string(self.config()).unwrap();
        assert!(text.contains(from), "{from} is not in\n{text}");
        let path = self.directory.path().join("g/other.toml");
        std::fs::write(&path, text.replace(from, to)).unwrap();
        path
    }

    /// The Synapse, with the registration as `change` makes it of the gateway's.
    async fn synapse(&self, change: Option<&dyn Fn(String) -> String>) -> synapse::Synapse {
        let theirs = self.directory.path().join("theirs.yaml");
        if let Some(change) = change {
            let ours = std::fs::read_to_string(self.directory.path().join("g/registration.yaml")).unwrap();
            std::fs::write(&theirs, change(ours)).unwrap();
        }
        let plan = synapse::Plan::at(&self.directory.path().join("s"), self.ports).unwrap();
        plan.start(&self.authority, change.map(|_| theirs.as_path())).await.unwrap()
    }
}

/// Another value of a key of the registration.
fn other(key: &'static str, value: &str) -> impl Fn(String) -> String {
    let value = value.to_owned();
    move |text| {
        let line = |line: &str| match line.starts_with(&format!("{key}: ")) {
            true => format!("{key}: {value}\n"),
            false => format!("{line}\n"),
        };
        text.lines().map(line).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_names_each_cause() {
    let house = House::build();
    assert_cause(&findings(&house.config()).await, "Synapse is not reachable");

    let synapse = house.synapse(None).await;
    assert_cause(&findings(&house.config()).await, "the registration is not loaded");
    drop(synapse);

    let synapse = house.synapse(Some(&same)).await;
    let found = findings(&house.config()).await;
    // Its only doubt is of the clock: all servers are on one machine.
    let doubts: Vec<&Finding> = found.iter().filter(|finding| finding.outcome != Outcome::Pass).collect();
    assert!(matches!(doubts[..], [Finding { check: "clock", outcome: Outcome::Warn, .. }]), "{}", shown(&found));
    let printed = house.gateway.run(&["doctor", "--config", "isthmus.toml"]).unwrap();
    assert!(printed.contains("pass  ping: ") && printed.contains("Nothing is wrong."), "{printed}");

    let late = ManualClock::new(SystemClock.now_ms() + 600_000);
    let found = examine(&Config::load(&house.config()).unwrap(), late, |_| {}).await;
    assert_cause(&found, "ahead of the homeserver's");

    let own = format!("[federation.resolve]\n{:?} = ", house.gateway.server_name);
    let elsewhere = house
        .config_with("[federation]\n", &format!("{own}\"http://127.0.0.1:{}\"\n[federation]\n", free_port().unwrap()));
    assert_cause(&findings(&elsewhere).await, "does not lead back to this gateway");
    let elsewhere =
        house.config_with("[federation]\n", &format!("{own}\"https://localhost:{}\"\n[federation]\n", house.ports[0]));
    assert_cause(&findings(&elsewhere).await, &format!("says that it is localhost:{}", house.ports[0]));
    let stranger = house.config_with("homeserver_name = \"localhost:", "homeserver_name = \"other.example:");
    let found = findings(&stranger).await;
    assert!(shown(&found).contains("FAIL  as_token: the homeserver's name is localhost:"), "{}", shown(&found));
    drop(synapse);

    let synapse = house.synapse(Some(&other("as_token", "other"))).await;
    assert_cause(&findings(&house.config()).await, "wrong as_token");
    drop(synapse);

    let synapse = house.synapse(Some(&other("hs_token", "other"))).await;
    assert_cause(&findings(&house.config()).await, "wrong hs_token");
    drop(synapse);

    let both = |text| other("hs_token", "other")(other("as_token", "another")(text));
    let synapse = house.synapse(Some(&both)).await;
    assert_cause(&findings(&house.config()).await, "with other tokens than");
    drop(synapse);

    let nobody = format!("http://127.0.0.1:{}", free_port().unwrap());
    let synapse = house.synapse(Some(&other("url", &nobody))).await;
    assert_cause(&findings(&house.config()).await, "it could not connect: ");
    drop(synapse);

    let registration = house.directory.path().join("g/registration.yaml");
    let right = std::fs::read_to_string(&registration).unwrap();
    std::fs::write(&registration, other("url", &nobody)(right.clone())).unwrap();
    let synapse = house.synapse(Some(&same)).await;
    assert_cause(&findings(&house.config()).await, &format!("wrong URL in the registration: {nobody} does not lead"));
    drop(synapse);
    std::fs::write(&registration, right).unwrap();

    let itself = format!("http://127.0.0.1:{}", house.ports[1]);
    let _synapse = house.synapse(Some(&other("url", &itself))).await;
    assert_cause(&findings(&house.config()).await, "got 404 from something that is not this gateway");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_names_causes_beside_a_gateway_that_runs() {
    let house = House::build();
    let config = house.config();
    let served = house.gateway.clone().start().await.unwrap();
    let nobody = format!("http://127.0.0.1:{}", free_port().unwrap());
    for (key, value, cause) in [
        ("as_token", "other", "wrong as_token"),
        ("hs_token", "other", "wrong hs_token"),
        ("url", nobody.as_str(), "it could not connect: "),
    ] {
        let _synapse = house.synapse(Some(&other(key, value))).await;
        assert_cause(&findings(&config).await, cause);
    }
    let _synapse = house.synapse(Some(&same)).await;
    let found = findings(&config).await;
    assert!(found.iter().all(|finding| finding.outcome != Outcome::Fail), "{}", shown(&found));
    drop(served);
}
