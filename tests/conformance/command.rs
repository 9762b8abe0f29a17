//! `isthmus conformance` as a process.

use std::process::Output;

use serde_json::Value;

use super::world::{NOBODY, SUITE, room, target};

async fn run(arguments: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_isthmus"));
    command.arg("conformance").args(arguments).kill_on_drop(true).output().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_says_what_it_will_do_what_it_found_and_by_its_exit_code_whether_something_failed() {
    let (_world, node, socket) = target("hub.example").await;
    let (room, address, url) = (room(&node).await, socket.local_addr().unwrap().to_string(), node.url(""));
    drop(socket);
    let examine = async |name: &str, more: &[&str]| {
        let arguments = &["--target", node.name.as_str(), "--url", &url, "--room", room.as_str(), "--as", name][..];
        let limits = ["--listen", &address, "--only", "LM-A-0", "--limit", "10"];
        run(&[arguments, &limits[..], more].concat()).await
    };
    let good = examine(SUITE, &["--json"]).await;
    let told = String::from_utf8_lossy(&good.stderr).into_owned();
    let found: Value = serde_json::from_slice(&good.stdout).unwrap_or_else(|_| panic!("{told}"));
    assert!(good.status.success() && told.contains("This joins"), "{told}{found}");
    assert_eq!((&found["target"], &found["failed"]), (&Value::from("hub.example"), &Value::from(0)));
    assert!(found["passed"].as_u64().unwrap() > 20, "{found}");
    assert_eq!(found["checks"][0]["check"], "LM-A-001");

    // Nobody finds a server of this name, so nothing that it signs is believed.
    let bad = examine(NOBODY, &[]).await;
    let lines = String::from_utf8_lossy(&bad.stdout).into_owned();
    assert!(!bad.status.success(), "{lines}");
    assert!(lines.contains("SKIP  LM-A-001  ") && lines.contains("FAIL  LM-A-015  "), "{lines}");
    assert!(lines.contains("expected: 200 with a JSON object\n      found:    PUT "), "{lines}");
}

#[tokio::test]
async fn the_checks_are_listed_and_what_is_missing_is_named() {
    let listed = String::from_utf8(run(&["--list"]).await.stdout).unwrap();
    assert_eq!(listed.lines().count(), isthmus::conformance::catalogue().len());
    let refused = run(&["--target", "hub.example", "--as", SUITE]).await;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--room ROOM is needed"), "{refused:?}");
}
