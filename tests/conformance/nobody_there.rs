//! Where nobody is, or nobody who answers, nothing passes.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use isthmus::conformance::{Options, Report, Role, Row, Unmet};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::world::{SECOND, SUITE, examine};

const UNRECOGNIZED: &str = r#"{"errcode":"M_UNRECOGNIZED","error":"no"}"#;

/// What answers each request.
#[derive(Clone, Copy)]
enum Target {
    /// Nobody listens.
    Absent,
    /// Each connection is closed.
    Silent,
    /// A proxy without a server behind it.
    Proxy,
    /// A server that knows none of the endpoints.
    Stranger,
    /// A server that knows everything and says nothing.
    Yes,
}

impl Target {
    fn answer(self) -> Option<(&'static str, &'static str, &'static str)> {
        match self {
            Self::Absent | Self::Silent => None,
            Self::Proxy => Some(("502 Bad Gateway", "text/html", "<h1>nobody</h1>")),
            Self::Stranger => Some(("404 Not Found", "application/json", UNRECOGNIZED)),
            Self::Yes => Some(("200 OK", "application/json", "{}")),
        }
    }

    async fn listen(self, listener: tokio::net::TcpListener) {
        while let Ok((mut connection, _)) = listener.accept().await {
            let Some((status, kind, body)) = self.answer() else { continue };
            tokio::spawn(async move {
                let mut asked = Vec::new();
                while !asked.windows(4).any(|end| end == b"\r\n\r\n") {
                    match connection.read_buf(&mut asked).await {
                        Ok(count) if count > 0 => {}
                        _ => return,
                    }
                }
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
                );
                drop(connection.write_all(answer.as_bytes()).await);
                drop(connection.shutdown().await);
            });
        }
    }
}

async fn look(target: Target, as_hub: bool) -> Report {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = socket.local_addr().unwrap();
    socket.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(socket).unwrap();
    let listening = match target {
        Target::Absent => {
            drop(listener);
            None
        }
        _ => Some(tokio::spawn(target.listen(listener))),
    };
    let role = match as_hub {
        true => Role::Hub { invite: "@alice:there.example".try_into().unwrap() },
        false => Role::Participant { room: "!room:there.example".try_into().unwrap() },
    };
    let options = Options {
        target: "there.example".try_into().unwrap(),
        url: Some(format!("http://{address}").parse().unwrap()),
        role,
        name: SUITE.try_into().unwrap(),
        second: Some(SECOND.try_into().unwrap()),
        user: "conformance".to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        signing_key: None,
        custom_ca: Vec::new(),
        allow_private_networks: true,
        patience: Duration::from_secs(1),
        limit: Duration::from_secs(10),
        only: Vec::new(),
    };
    let report = examine(TcpListener::bind("127.0.0.1:0").unwrap(), options).await;
    listening.into_iter().for_each(|listening| listening.abort());
    report
}

fn endpoints(letter: &str, first: u8, last: u8) -> Vec<String> {
    (first..=last).map(|number| format!("LM-{letter}-{number:03}")).collect()
}

/// What needs no answer before it, of the checks that have the suite as the hub.
fn of_hub() -> Vec<String> {
    [endpoints("H", 60, 74), endpoints("H", 1, 1), endpoints("H", 6, 6), endpoints("H", 10, 10)].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_server_that_does_not_answer_nothing_passes() {
    for target in [Target::Absent, Target::Silent] {
        let report = look(target, false).await;
        assert_eq!(report.counts().0, 0);
        let (failed, skipped) = (report.failed(), report.skipped());
        assert!(endpoints("T", 20, 33).iter().all(|id| failed.contains(&id.as_str())), "{failed:?}");
        assert!(endpoints("T", 4, 5).iter().all(|id| skipped.contains(&id.as_str())), "{skipped:?}");
        let report = look(target, true).await;
        assert_eq!((report.failed(), report.counts().0), (of_hub().iter().map(String::as_str).collect(), 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_without_a_server_is_told_from_a_server() {
    // That its name was not looked for is said once.
    let report = look(Target::Proxy, true).await;
    assert_eq!((report.failed(), report.counts().0), (vec!["LM-H-074"], 0));
    assert!(report.summary().contains("(LM-H-074: ") && report.summary().contains("502"), "{}", report.summary());
    let report = look(Target::Proxy, false).await;
    assert!(report.failed().contains(&"LM-A-015"), "{:?}", report.failed());
    // That it answers in UTF-8 is true of it.
    let passed: Vec<&str> = report.rows.iter().filter(|row| row.outcome.is_ok()).map(|row| row.id).collect();
    assert!(passed.iter().all(|id| *id == "LM-T-005"), "{passed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_the_endpoints_lacks_each() {
    let report = look(Target::Stranger, true).await;
    let failed: Vec<String> = endpoints("H", 60, 73);
    assert_eq!((report.failed(), report.counts().0), (failed.iter().map(String::as_str).collect(), 0));
    let report = look(Target::Stranger, false).await;
    let failed = report.failed();
    assert!(endpoints("T", 20, 33).iter().all(|id| failed.contains(&id.as_str())), "{failed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_says_yes_to_everything_passes_nothing() {
    let passed = |report: Report| -> Vec<&str> {
        report.rows.iter().filter(|row| row.outcome.is_ok()).map(|row| row.id).collect()
    };
    assert_eq!(passed(look(Target::Yes, true).await), Vec::<&str>::new());
    // How its answers are written is as it should be.
    assert_eq!(passed(look(Target::Yes, false).await), ["LM-T-004", "LM-T-005"]);
}

#[test]
fn a_run_in_which_nothing_passed_is_not_good() {
    let row = |id, outcome| Row { id, section: "", title: "", outcome, took_ms: 1 };
    let skipped = || row("LM-H-001", Err(Unmet::Skip("the target has no invite".to_owned())));
    let nothing = Report { rows: vec![skipped()] };
    assert!(!nothing.is_good() && nothing.json("there.example")["good"] == false);
    assert!(nothing.summary().contains("0 passed, 0 failed, 1 skipped"), "{}", nothing.summary());
    assert!(nothing.summary().contains("(LM-H-001: the target has no invite)"), "{}", nothing.summary());
    assert!(Report { rows: vec![skipped(), row("LM-H-010", Ok(()))] }.is_good());
}
