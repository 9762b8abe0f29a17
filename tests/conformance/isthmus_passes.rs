//! isthmus passes its own suite.

use isthmus::conformance::Role;

use super::world::{accept, examine, options, room_of, target};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn isthmus_passes_as_a_hub() {
    let (_world, node, socket) = target("hub.example").await;
    let room = room_of(&node, "public").await;
    let report = examine(socket, options(&node, Role::Participant { room })).await;
    println!("{}", report.summary());
    assert_eq!(report.failed(), Vec::<&str>::new());
    // There is no TLS on loopback, and in a public room nobody knocks.
    assert_eq!(report.skipped(), ["LM-T-001", "LM-T-002", "LM-T-003", "LM-M-023"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn isthmus_passes_as_a_participant() {
    let (_world, node, socket) = target("spoke.example").await;
    let examining = examine(socket, options(&node, Role::Hub { invite: node.user("alice") }));
    let report = tokio::select! {
        report = examining => report,
        () = accept(&node) => unreachable!("it stays in the room"),
    };
    println!("{}", report.summary());
    assert_eq!(report.failed(), Vec::<&str>::new());
    assert_eq!(report.skipped(), Vec::<&str>::new());
}
