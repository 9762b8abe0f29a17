//! The commands that talk to a running gateway, over its admin listener.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::testbed::certificates::Authority;
use crate::support::testbed::gateway;

const BINARY: &str = env!("CARGO_BIN_EXE_isthmus");

/// The caches that are metered.
const CACHES: [&str; 11] = [
    "graph_acls",
    "graph_events",
    "graph_resolutions",
    "graph_states",
    "graph_whole_states",
    "log_events",
    "log_rooms",
    "server_keys",
    "srv",
    "transactions",
    "well_known",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn portals_are_made_listed_explained_and_removed_from_the_command_line() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let plan = gateway::Plan::new(&directory.path().join("g"), Path::new(BINARY), &authority).unwrap();
    let gateway = plan.start().await.unwrap();
    let run = |arguments: &[&str]| {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--config", "isthmus.toml"]).collect();
        gateway.plan().run(&arguments)
    };
    let shown = |arguments: &[&str]| -> Value { serde_json::from_str(&run(arguments).unwrap()).unwrap() };

    assert_eq!(run(&["portal", "list"]).unwrap().lines().count(), 1, "what would stand there");
    assert_eq!(shown(&["portal", "list", "--json"]), json!([]));
    let made = shown(&["portal", "create", "--name", "Tea", "--alias", "tea", "--join-rule", "public"]);
    assert_eq!((&made["portal_id"], &made["state"]), (&json!("p1"), &json!("active")));
    assert_eq!(made["alias"], format!("#tea:{}", gateway.server_name));
    let listed = run(&["portal", "list"]).unwrap();
    let [head, line] = listed.lines().collect::<Vec<_>>()[..] else { panic!("{listed}") };
    assert!(head.starts_with("PORTAL  KIND     STATE ") && line.starts_with("p1      created  active "), "{listed}");
    for (name, key) in [("MATRIX ROOM", "matrix_room_id"), ("LM ROOM", "lm_room_id"), ("ALIAS", "alias")] {
        let value = made[key].as_str().unwrap();
        assert_eq!(head.find(name), line.find(value), "{name} and {value} in one column: {listed}");
    }
    assert_eq!(shown(&["portal", "list", "--json"])[0]["portal_id"], "p1");
    let one = shown(&["portal", "show", "p1"]);
    assert_eq!((&one["lm_room_id"], &one["out_of_step"]), (&made["lm_room_id"], &json!(0)));
    assert_eq!(one["health"]["missing"]["count"], 0);

    let body = json!({ "body": "hello" });
    let said = gateway.admin(Method::POST, "/portals/p1/announce", Some(body)).await.unwrap();
    for (side, id) in [("matrix", &said["matrix_event_id"]), ("lm", &said["lm_event_id"])] {
        let explained = shown(&["explain", id.as_str().unwrap()]);
        assert_eq!((&explained["side"], &explained["portal_id"]), (&json!(side), &json!("p1")));
        assert_eq!(explained["status"], "local");
    }
    let metrics = gateway.metrics().await.unwrap();
    assert!(metrics.lines().any(|line| line.contains("portals{") && line.contains("active") && line.ends_with(" 1")));
    let value = |name: &str| {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|value| value.trim().parse::<f64>().ok())
    };
    for cache in CACHES {
        let lookups = |result| value(&format!("isthmus_cache_lookups_total{{cache=\"{cache}\",result=\"{result}\"}}"));
        assert!(lookups("hit").is_some() && lookups("miss").is_some(), "{cache} is not metered");
        assert!(
            value(&format!("isthmus_cache_entries{{cache=\"{cache}\"}}")).is_some(),
            "{cache} does not show its size"
        );
    }
    let metered = metrics.lines().filter(|line| line.starts_with("isthmus_cache_entries{")).count();
    assert_eq!(metered, CACHES.len(), "a cache is not in the list");
    assert!(value("isthmus_cache_lookups_total{cache=\"log_rooms\",result=\"hit\"}").is_some_and(|hits| hits > 0.0));
    assert_eq!(value("isthmus_lm_missing"), Some(0.0));

    for (arguments, problem) in [
        (&["portal", "show", "p7"][..], "the portal p7 was not found"),
        (&["portal", "remove", "p7"], "the portal p7 was not found"),
        (&["portal", "invite", "p1", "@lm_x_y:z"], "z"),
        (&["portal", "create", "--alias", "tea"], "leads to p1 already"),
        (&["explain", "$nothing"], "the event $nothing was not found"),
    ] {
        let error = run(arguments).unwrap_err().to_string();
        assert!(error.contains(problem), "{arguments:?}: {error}");
    }

    let removed = shown(&["portal", "remove", "p1"]);
    assert_eq!(removed["state"], "ended");
    assert!(run(&["portal", "list"]).unwrap().contains("\np1      created  ended "));
    let metrics = gateway.metrics().await.unwrap();
    let count = |state: &str| {
        let wanted = |line: &&str| line.contains("portals{") && line.contains(&format!("\"{state}\""));
        metrics.lines().find(wanted).and_then(|line| line.rsplit(' ').next()?.parse::<i64>().ok())
    };
    assert_eq!((count("active"), count("ended"), count("ending")), (Some(0), Some(1), Some(0)));
    // The name is free again.
    assert_eq!(shown(&["portal", "create", "--alias", "tea"])["portal_id"], "p2");
}

#[test]
fn a_configuration_is_written_where_there_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("isthmus.toml");
    let write = |file: &Path| {
        let output = std::process::Command::new(BINARY)
            .args(["generate-config", "--server-name", "lm.example.org", "--output"])
            .arg(file)
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    assert!(write(&file).0);
    std::fs::write(&file, "mine").unwrap();
    for (file, advice) in [
        (file.clone(), "): delete it, or name another file"),
        (directory.path().join("a/b"), "): make its folder first"),
    ] {
        let (done, said) = write(&file);
        assert!(!done && said.contains(advice), "{said}");
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
}

/// Who reads a long answer may have seen enough.
#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = std::process::Command::new(BINARY)
        .args(["generate-config", "--server-name", "lm.example.org"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap().as_str()), (Some(0), ""));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_gateway_serves_from_a_database_that_others_cannot_read() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let plan = gateway::Plan::new(&directory.path().join("g"), Path::new(BINARY), &authority).unwrap();
    let gateway = plan.start().await.unwrap();
    let mut looked_at = 0;
    for entry in std::fs::read_dir(directory.path().join("g")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().to_string_lossy().contains(".db") {
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
            looked_at += 1;
        }
    }
    assert!(looked_at >= 2, "the database and its log");
    let refused = gateway.plan().run(&["serve", "--config", "isthmus.toml"]).unwrap_err().to_string();
    assert!(refused.contains("another isthmus serves from this database: stop it first"), "{refused}");
}

#[test]
fn a_database_that_is_away_is_named_with_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let config = "server_name = \"g.example\"\n[database]\nurl = \"postgres://u:p@127.0.0.1:1/x\"\n";
    std::fs::write(directory.path().join("isthmus.toml"), config).unwrap();
    let output = std::process::Command::new(BINARY).arg("serve").current_dir(directory.path()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && said.contains("refused") && said.contains("start PostgreSQL, or correct"),
        "{said}"
    );
    assert!(!said.contains("u:p"), "{said}");
}

#[test]
fn a_gateway_that_waits_for_its_database_ends_when_it_is_told_to() {
    let directory = tempfile::tempdir().unwrap();
    let database = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = database.local_addr().unwrap();
    let config = format!("server_name = \"g.example\"\n[database]\nurl = \"postgres://u:p@{address}/x\"\n");
    std::fs::write(directory.path().join("isthmus.toml"), config).unwrap();
    let mut command = std::process::Command::new(BINARY);
    let mut child = command.arg("serve").current_dir(directory.path()).stdout(Stdio::null()).spawn().unwrap();
    let _unanswered = database.accept().unwrap();
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "neither killed by the signal nor out of patience");
}

/// Each in one sentence: what, why (once), and what to change.
#[test]
fn what_keeps_a_gateway_from_starting_is_said_with_what_to_change() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let [one, other] = ["a", "b"].map(|name| {
        let folder = directory.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        authority.issue(&folder).unwrap()
    });
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().map(|address| (address, taken)).unwrap();
    let seed = "ed25519 a_1 AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8\n";
    file("key", seed);
    file("empty", "");
    file("noise.db", &"noise ".repeat(3_000));
    let listens = |text: &str| format!("signing_key = \"key\"\n[listen]\n{text}\n");
    let tls = |certificate: &Path, key: &Path| {
        listens(&format!("address = \"127.0.0.1:0\"\ntls_certificate = {certificate:?}\ntls_private_key = {key:?}"))
    };
    for (config, found, advice) in [
        ("signing_key = \"no/key\"\n".to_owned(), "key: No such file or directory (os error 2)", "make its folder"),
        ("signing_key = \"empty\"\n".to_owned(), "empty: 0 words", "restore the file from a backup"),
        (listens(&format!("address = \"{}\"", taken.0)), "Address already in use (os error 98)", "stop it, or give"),
        (listens("address = \"192.0.2.1:8448\""), "Cannot assign requested address", "listen on 0.0.0.0"),
        (tls(&one.certificate, &other.key), "KeyMismatch", "give a PEM file"),
        (tls(&directory.path().join("empty"), &one.key), "empty with tls_private_key", "give a PEM file"),
        (
            "signing_key = \"key\"\n[federation]\ncustom_ca = [\"empty\"]\n".to_owned(),
            "in which there is no PEM certificate",
            "correct `federation.custom_ca`",
        ),
        (
            "signing_key = \"key\"\n[database]\nurl = \"sqlite://noise.db\"\n".to_owned(),
            "noise.db: (code: 26) file is not a database",
            "restore the file from a backup, or name another one",
        ),
    ] {
        let text = format!("server_name = \"g.example\"\n{config}[admin]\naddress = \"127.0.0.1:0\"\n");
        file("isthmus.toml", &text);
        let output = std::process::Command::new(BINARY).arg("serve").current_dir(directory.path()).output().unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        let said = log.lines().last().unwrap_or_default();
        assert!(!output.status.success() && said.starts_with("isthmus: "), "{text}\n{log}");
        assert_eq!((said.matches(found).count(), said.matches(advice).count()), (1, 1), "{text}\n{log}");
        assert!(!said.contains("AAECAwQ") && !log.contains("\"ERROR\""), "{log}");
    }
    drop(taken);
}

#[test]
fn no_configuration_is_written_that_would_be_refused() {
    for (url, name, problem) in [
        ("http://127.0.0.1:8008", "lm.example.org", "the same as `server_name`"),
        ("ftp://x", "example.org", "must begin with http:// or https://"),
    ] {
        let output = std::process::Command::new(BINARY)
            .args(["generate-config", "--server-name", "lm.example.org"])
            .args(["--homeserver-url", url, "--homeserver-name", name])
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && output.stdout.is_empty() && said.contains(problem), "{said}");
    }
}

/// Thousands of messages a second leave no space for a line about each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_writes_no_line_into_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let mut plan = gateway::Plan::new(&directory.path().join("g"), Path::new(BINARY), &authority).unwrap();
    plan.log("");
    let gateway = plan.start().await.unwrap();
    gateway.plan().run(&["portal", "create", "--name", "Tea", "--config", "isthmus.toml"]).unwrap();
    let log = || std::fs::read_to_string(gateway.log_file()).unwrap();
    let before = log();
    assert!(before.contains("\"INFO\"") && before.contains("room created"), "nothing is logged at all: {before}");
    for _ in 0..3 {
        let body = json!({ "body": "hello" });
        gateway.admin(Method::POST, "/portals/p1/announce", Some(body)).await.unwrap();
    }
    assert_eq!(log().strip_prefix(&before), Some(""));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_says_when_there_is_no_gateway() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let plan = gateway::Plan::new(&directory.path().join("g"), Path::new(BINARY), &authority).unwrap();
    let mut gateway = plan.start().await.unwrap();
    gateway.kill().unwrap();
    let error = gateway.plan().run(&["portal", "list", "--config", "isthmus.toml"]).unwrap_err().to_string();
    assert!(error.contains("start it with `isthmus serve`"), "{error}");
}

/// The binary, started with so many open files and, after the slash, so many that it may ask for.
fn limited(directory: &Path, soft: u32, hard: u32) -> PathBuf {
    let script = directory.join(format!("isthmus-{soft}-{hard}"));
    let text = format!("#!/bin/sh\nulimit -Sn {soft} && ulimit -Hn {hard} && exec {BINARY} \"$@\"\n");
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    script
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serve_asks_for_all_the_files_that_it_may_open_and_says_when_they_are_few() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let many = u32::try_from(most.min(4_096)).unwrap();
    for (name, soft, hard, few) in [("few", 300, 1_000, true), ("many", 400, many, many < 4_096)] {
        let binary = limited(directory.path(), soft, hard);
        let plan = gateway::Plan::new(&directory.path().join(name), &binary, &authority).unwrap();
        let gateway = plan.start().await.unwrap();
        let log = std::fs::read_to_string(gateway.log_file()).unwrap();
        let line = log.lines().find(|line| line.contains("connections may be open at once")).expect("a line of it");
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!((&line["fields"]["before"], &line["fields"]["limit"]), (&json!(soft), &json!(hard)));
        assert_eq!(line["level"], if few { "WARN" } else { "INFO" });
        let told = match gateway.plan().run(&["doctor", "--config", "isthmus.toml"]) {
            Ok(told) => told,
            // Something else is wrong with it.
            Err(told) => told.to_string(),
        };
        assert_eq!(told.contains("WARN  open files: only 1000 "), few, "{told}");
        assert_eq!(told.contains(&format!("pass  open files: a process may have {hard} ")), !few, "{told}");
    }
}
