//! isthmus passes its own suite.

use isthmus::conformance::{Options, Role, Unmet};

use super::world::{NOBODY, accept, examine, options, room_of, target};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn isthmus_passes_as_a_hub() {
    let (_world, node, socket) = target("hub.example").await;
    let room = room_of(&node, "public").await;
    let report = examine(socket, options(&node, Role::Participant { room: room.clone() })).await;
    println!("{}", report.summary());
    assert_eq!(report.failed(), Vec::<&str>::new());
    // There is no TLS on loopback.
    assert_eq!(report.skipped(), ["LM-T-001", "LM-T-002", "LM-T-003"]);
    let rules =
        node.lm.state(&room).await.unwrap().get("m.room.join_rules", "").unwrap().content()["join_rule"].clone();
    assert_eq!(rules, "public", "all is as it was");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_find_the_suite_is_told_so_once() {
    let (_world, node, socket) = target("hub.example").await;
    let room = room_of(&node, "public").await;
    // Nobody is where this name leads.
    let name = NOBODY.try_into().unwrap();
    let options = Options { name, second: None, ..options(&node, Role::Participant { room }) };
    let report = examine(socket, options).await;
    assert_eq!(report.failed(), ["LM-A-015"]);
    let why = report.rows.iter().filter_map(|row| match &row.outcome {
        Err(Unmet::Skip(why)) => Some((row.id, why)),
        _ => None,
    });
    let (told, other): (Vec<_>, Vec<_>) =
        why.partition(|(_, why)| why.contains("has not asked the suite for the keys"));
    assert!(told.len() > 200, "{told:?}");
    assert!(other.iter().all(|(id, _)| id.starts_with("LM-T-00")), "{other:?}");
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
