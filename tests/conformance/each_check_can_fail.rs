//! Each check fails for a server that does the one thing wrong that it looks for, and no other check does.

use isthmus::conformance::{Report, catalogue};
use isthmus::event::Object;
use isthmus::identity::SigningKey;
use serde_json::{Value, json};

use super::faulty::Fault::{Answers, Events, Own, Repeats, Sends, Swallows, TakesBad};
use super::faulty::{
    Fault, Faults, Outgoing, Reply, always, always_all, as_participant, faulty, finish, resign, resigned_keys,
};
use super::world::{SECOND, SUITE};

const HUB: &str = "hub.example";

/// Lets everything pass.
const OK: Fault = Answers("", |_, reply, _| reply.set(200, json!({})));
/// Lets nothing pass.
const NO: Fault = Answers("", |_, reply, _| reply.set(403, json!({ "errcode": "M_FORBIDDEN", "error": "no" })));
const BROKEN: Fault = Answers("", |_, reply, _| reply.set(500, json!({ "errcode": "M_UNKNOWN", "error": "broken" })));
const UNRECOGNIZED: Fault = Answers("", |_, reply, _| {
    reply.set(404, json!({ "errcode": "M_UNRECOGNIZED", "error": "there is no such endpoint" }));
});

fn spoil_content(event: &mut Value) {
    event["content"] = json!({ "body": "something else" });
}

/// The last event of a list.
fn spoil_last(reply: &mut Reply, list: &str) {
    reply.body[list].as_array_mut().and_then(|events| events.last_mut()).into_iter().for_each(spoil_content);
}

/// Faults that are there while their check is run, and change nothing for the others.
pub fn passing_faults() -> Faults {
    let mut faults: Faults = vec![
        ("LM-T-006", OK),
        ("LM-T-007", UNRECOGNIZED),
        ("LM-T-008", OK),
        ("LM-T-009", OK),
        ("LM-T-010", OK),
        ("LM-T-011", OK),
        ("LM-T-012", OK),
        ("LM-T-028", UNRECOGNIZED),
        ("LM-T-029", UNRECOGNIZED),
        ("LM-T-030", UNRECOGNIZED),
        ("LM-T-031", UNRECOGNIZED),
        ("LM-T-032", UNRECOGNIZED),
        ("LM-T-033", UNRECOGNIZED),
        ("LM-D-001", OK),
        ("LM-D-002", OK),
        ("LM-D-003", Answers("", |_, reply, _| reply.set(200, json!({ "one_time_keys": { "@a:b": {} } })))),
        ("LM-D-004", OK),
        (
            "LM-K-001",
            Answers("key/v2/server", |_, reply, key| {
                reply.body["server_name"] = json!("other.example");
                resigned_keys(&mut reply.body, HUB, key);
            }),
        ),
        (
            "LM-K-002",
            Answers("key/v2/server", |_, reply, key| {
                let public = json!({ "key": key.public_base64() });
                reply.body["verify_keys"] = json!({ "ed25519:with:colon": public });
            }),
        ),
        (
            "LM-K-003",
            Answers("key/v2/server", |_, reply, _| reply.body["old_verify_keys"] = json!({ "ed25519:x": {} })),
        ),
        (
            "LM-K-004",
            Answers("key/v2/server", |_, reply, key| {
                reply.body["valid_until_ts"] = json!(1);
                resigned_keys(&mut reply.body, HUB, key);
            }),
        ),
        (
            "LM-K-005",
            Answers("key/v2/server", |_, reply, key| {
                reply.body["m.linearized"] = json!("yes");
                resigned_keys(&mut reply.body, HUB, key);
            }),
        ),
        ("LM-K-006", Answers("", |_, reply, _| reply.set(401, json!({ "errcode": "M_FORBIDDEN" })))),
        ("LM-K-007", Answers("", |_, reply, _| reply.set(200, json!({ "server_keys": [] })))),
        (
            "LM-K-008",
            Answers("key/v2/query", |_, reply, _| {
                for keys in reply.body["server_keys"].as_array_mut().into_iter().flatten() {
                    keys["signatures"].as_object_mut().unwrap().remove(HUB);
                }
            }),
        ),
        ("LM-K-009", Answers("", |_, reply, _| reply.set(200, json!({ "server_keys": [{}] })))),
        ("LM-K-010", Answers("", |_, reply, _| reply.set(200, json!({ "server_keys": [{}] })))),
        ("LM-K-011", Answers("", |_, reply, _| reply.set(200, json!({ "server_keys": [] })))),
        ("LM-K-012", Answers("", |_, reply, _| reply.set(200, json!({ "server_keys": [{}] })))),
        ("LM-K-013", OK),
        // Spoilt: the template of a join, while it is only looked at.
        ("LM-M-001", Answers("make_join", |_, reply, _| reply.body["sender"] = json!("@somebody:else.example"))),
        ("LM-M-002", Answers("make_join", |_, reply, _| reply.body["prev_events"] = json!([]))),
        (
            "LM-M-015",
            Answers("send_join", |seen, reply, _| {
                if seen.nth == 1 {
                    reply.body["event"]["origin_server_ts"] = json!(1);
                }
            }),
        ),
        ("LM-M-021", Answers("make_leave", |_, reply, _| reply.body["room_version"] = json!("other"))),
        (
            "LM-M-023",
            Answers("send_knock", |_, reply, _| {
                reply.body["stripped_state"][0]["event_id"] = json!("$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA");
            }),
        ),
        ("LM-M-030", Swallows),
        ("LM-M-031", Answers("send_leave", |_, reply, _| reply.body["more"] = json!(1))),
        ("LM-S-001", Swallows),
        (
            "LM-S-002",
            Answers("send", |seen, reply, _| {
                if seen.nth == 0 {
                    reply.body = json!({ "failed_pdus": { "$a": { "error": "no" } } });
                }
            }),
        ),
        (
            "LM-S-003",
            Answers("send", |seen, reply, _| {
                if seen.nth == 1 {
                    reply.body["failed_pdus"] = json!({ "$a": { "error": "once is enough" } });
                }
            }),
        ),
        ("LM-S-006", Swallows),
        ("LM-S-007", TakesBad),
        ("LM-S-008", OK),
        ("LM-S-009", NO),
        ("LM-S-010", NO),
        ("LM-S-011", NO),
        ("LM-S-013", NO),
        ("LM-S-014", Answers("send", |_, reply, _| reply.body = json!({ "failed_pdus": {} }))),
        ("LM-S-015", NO),
        ("LM-S-016", BROKEN),
        ("LM-S-017", NO),
        ("LM-S-018", NO),
        ("LM-L-027", BROKEN),
        ("LM-R-001", Answers("event", |_, reply, _| reply.body["origin_server_ts"] = json!(1))),
        ("LM-R-004", Answers("state", |_, reply, _| reply.body["pdus"] = json!([]))),
        ("LM-R-005", Answers("state", |_, reply, _| spoil_last(reply, "pdus"))),
        ("LM-R-006", Answers("state", |_, reply, _| reply.body["auth_chain"] = json!([]))),
        ("LM-R-007", Answers("state_ids", |_, reply, _| reply.body["pdu_ids"] = json!([]))),
        (
            "LM-R-013",
            Answers("backfill", |_, reply, _| {
                let first = reply.body["pdus"][0].clone();
                reply.body["pdus"] = json!([first, first, first, first]);
            }),
        ),
        (
            "LM-R-014",
            Answers("backfill", |_, reply, _| {
                reply.body["pdus"].as_array_mut().into_iter().for_each(|pdus| pdus.reverse())
            }),
        ),
        ("LM-R-015", Answers("backfill", |_, reply, _| spoil_last(reply, "pdus"))),
        ("LM-R-016", Answers("backfill", |_, reply, _| reply.body["pdus"] = json!([]))),
        ("LM-R-020", Answers("/event/", |_, reply, _| reply.body["content"] = json!({ "body": "still here" }))),
        ("LM-I-001", OK),
        ("LM-I-008", OK),
        ("LM-I-009", OK),
        (
            "LM-V-010",
            Answers("make_join", |_, reply, _| reply.set(403, json!({ "errcode": "M_FORBIDDEN", "error": "no" }))),
        ),
        ("LM-V-012", Sends(|out| *out.to != SECOND)),
        ("LM-V-013", Swallows),
        ("LM-V-014", Swallows),
        ("LM-V-015", Answers("/event/", |_, reply, _| reply.body["content"] = json!({}))),
        ("LM-V-016", Answers("/event/", |_, reply, _| reply.body["content"] = json!({ "body": "a secret" }))),
        (
            "LM-E-022",
            Sends(|out| {
                // Each attempt has an ID of its own.
                out.uri.push_str(&format!("-{}", out.nth));
                true
            }),
        ),
    ];
    // Whatever must be refused is let in.
    for check in catalogue() {
        let (letter, id) = (check.id.get(3..4).unwrap_or_default(), check.id);
        let listed = faults.iter().any(|(there, _)| *there == id);
        match letter {
            "A" if id <= "LM-A-014" => faults.push((id, OK)),
            "A" => faults.push((id, Answers("", |_, reply, _| reply.set(401, json!({ "errcode": "M_FORBIDDEN" }))))),
            "L" | "P" if !listed => faults.push((id, TakesBad)),
            "R" if !listed => faults.push((id, OK)),
            _ => {}
        }
    }
    for id in [
        "LM-M-003", "LM-M-004", "LM-M-005", "LM-M-006", "LM-M-007", "LM-M-008", "LM-M-022", "LM-M-024", "LM-M-025",
        "LM-M-026", "LM-M-032",
    ] {
        faults.push((id, OK));
    }
    for id in ["LM-M-016", "LM-M-017", "LM-M-018", "LM-M-019"] {
        faults.push((id, OK));
    }
    for id in ["LM-V-001", "LM-V-002", "LM-V-003", "LM-V-004", "LM-V-022", "LM-V-023", "LM-V-024"] {
        faults.push((id, OK));
    }
    for id in ["LM-V-005", "LM-V-017", "LM-V-025"] {
        faults.push((id, TakesBad));
    }
    faults
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_check_fails_for_a_fault_that_is_there_while_it_is_run() {
    let faults = passing_faults();
    let expected: Vec<&str> = faults.iter().map(|(check, _)| *check).collect();
    let report = faulty(faults).await;
    let otherwise = report.rows.iter().filter(|row| report.failed().contains(&row.id) != expected.contains(&row.id));
    let otherwise: String = otherwise.map(|row| format!("\n{row}")).collect();
    assert!(otherwise.is_empty(), "not as expected: {otherwise}");
}

/// An answer without what a check is about shows nothing, so it is no reason to let the check pass.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_check_passes_by_an_answer_that_says_nothing() {
    let mut silent =
        vec!["LM-K-003", "LM-K-005", "LM-K-006", "LM-M-002", "LM-M-015", "LM-M-031", "LM-R-006", "LM-R-007"];
    for check in catalogue() {
        let id = check.id;
        if ("LM-A-015"..="LM-A-021").contains(&id) || ("LM-T-020"..="LM-T-033").contains(&id) {
            silent.push(id);
        }
    }
    let report = faulty(silent.iter().map(|id| (*id, OK)).collect()).await;
    let passed = report.rows.iter().filter(|row| row.outcome.is_ok()).map(|row| row.id);
    assert_eq!(passed.filter(|id| silent.contains(id)).collect::<Vec<_>>(), Vec::<&str>::new());
    let failed: Vec<&str> = report.failed();
    assert!(failed.iter().all(|id| silent.contains(id)), "{failed:?}");
    // The same of a participant.
    let silent: Vec<&str> =
        catalogue().iter().map(|check| check.id).filter(|id| ("LM-H-060"..="LM-H-074").contains(id)).collect();
    let report = as_participant(silent.iter().map(|id| (*id, OK)).collect(), false, &["LM-H-06", "LM-H-07"]).await;
    these_failed(&[], &report);
    assert_eq!(report.skipped(), silent);
}

/// What is said to be not there, whatever it is.
fn nothing_there(path: &'static str) -> Fault {
    Answers(path, |_, reply, _| reply.set(404, json!({ "errcode": "M_NOT_FOUND", "error": "not here" })))
}

/// Of the checks that were asked for, those that passed.
fn passed(report: &Report, only: &[&str]) -> Vec<&'static str> {
    let rows = report.rows.iter().filter(|row| row.outcome.is_ok()).map(|row| row.id);
    rows.filter(|id| only.iter().any(|only| id.starts_with(only))).collect()
}

/// Who does not give what there is shows nothing by not giving what there is not, or what is bad.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_check_passes_for_a_participant_that_does_nothing() {
    let only = ["LM-H-02", "LM-H-031", "LM-H-032", "LM-H-033"];
    for idle in [nothing_there("/event/"), Swallows] {
        let report = as_participant(vec![("", idle)], true, &only).await;
        these_failed(&[], &report);
        assert_eq!(passed(&report, &only), [""; 0]);
        assert!(report.skipped().len() > 10, "{:?}", report.skipped());
    }
    // Who gives events takes them, or does not.
    let report = as_participant(vec![("LM-H-032", nothing_there("/event/"))], false, &["LM-H-020", "LM-H-032"]).await;
    these_failed(&["LM-H-032"], &report);
    let refuses = Answers("/invite/", |_, reply, _| reply.set(403, json!({ "errcode": "M_FORBIDDEN", "error": "no" })));
    let only = ["LM-H-00", "LM-H-010"];
    let report = as_participant(vec![("", refuses)], true, &only).await;
    assert_eq!(passed(&report, &only), [""; 0]);
    assert!(!report.failed().contains(&"LM-H-005") && report.failed().contains(&"LM-H-010"), "{:?}", report.failed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_check_passes_for_a_hub_to_which_nothing_is_there() {
    for (path, only) in [
        ("/event/", &["LM-R-002", "LM-R-003", "LM-V-001", "LM-V-022"][..]),
        ("/state/", &["LM-R-008", "LM-R-009", "LM-V-002", "LM-V-023"][..]),
        ("/state_ids/", &["LM-R-011", "LM-R-012", "LM-V-003"][..]),
        ("/backfill/", &["LM-R-017", "LM-R-018", "LM-R-019", "LM-V-004", "LM-V-024"][..]),
        ("/make_", &["LM-M-003", "LM-M-006", "LM-M-008"][..]),
        ("/send_", &["LM-M-024", "LM-M-025", "LM-M-026"][..]),
    ] {
        let report = always(nothing_there(path), only).await;
        assert_eq!(passed(&report, only), [""; 0], "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_check_passes_by_a_list_of_nothing() {
    let skipped = |report: &Report, expected: &[&str]| {
        let rows: String = report.rows.iter().map(|row| format!("\n{row}")).collect();
        assert_eq!(report.skipped(), expected, "{rows}");
    };
    let no_state = Answers("send_join", |_, reply, _| reply.body["state"] = json!([]));
    let only = ["LM-M-012", "LM-M-013", "LM-M-014", "LM-S-001", "LM-E-007"];
    let report = always(no_state, &only).await;
    // The join rules are not known either.
    these_failed(&["LM-M-012", "LM-M-013", "LM-M-014"], &report);
    skipped(&report, &["LM-M-020", "LM-E-007"]);
    let no_keys = Answers("key/v2/query", |_, reply, _| reply.set(200, json!({ "server_keys": [] })));
    let report = always(no_keys, &["LM-K-010"]).await;
    these_failed(&[], &report);
    skipped(&report, &["LM-K-010"]);
    let no_stripped = Answers("send_knock", |_, reply, _| reply.body["stripped_state"] = json!([]));
    let report = always(no_stripped, &["LM-M-023"]).await;
    these_failed(&[], &report);
    skipped(&report, &["LM-M-023"]);
    // A hub that lets in and then sends nothing.
    let sends_nothing = ["LM-E-012", "LM-E-014", "LM-E-015", "LM-E-021", "LM-E-024"];
    let report = always(Sends(|out| !out.is("send")), &sends_nothing).await;
    these_failed(&["LM-M-020"], &report);
    skipped(&report, &sends_nothing);
    // One that sends what its own users say, and nothing else.
    let own_alone = Sends(|out| {
        let pdus = if out.is("send") { out.body["pdus"].as_array_mut() } else { None };
        pdus.into_iter().for_each(|pdus| pdus.retain(|event| event.get("hub_server").is_none()));
        true
    });
    let report = always_all(&[Own(|_, _, _| {}), own_alone], &["LM-E-015"]).await;
    these_failed(&["LM-M-020"], &report);
    skipped(&report, &["LM-E-015"]);
}

/// Runs checks against a server whose one fault is there all the time; that one fails alone.
async fn alone(check: &str, fault: Fault, only: &[&str]) {
    let report = always(fault, only).await;
    these_failed(&[check], &report);
}

fn these_failed(expected: &[&str], report: &Report) {
    let rows: String = report.rows.iter().map(|row| format!("\n{row}")).collect();
    assert_eq!(report.failed(), expected, "{rows}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_endpoint_is_missed_alone() {
    macro_rules! missing {
        ($($check:literal $path:literal;)*) => {
            $(alone($check, Answers($path, |_, reply, _| reply.set(404, json!({ "errcode": "M_UNRECOGNIZED" }))), &["LM-T-02"]).await;)*
        };
    }
    missing! {
        "LM-T-020" "/send/";
        "LM-T-021" "/event/";
        "LM-T-022" "/backfill/";
        "LM-T-023" "/invite/";
        "LM-T-024" "/send_join/";
        "LM-T-025" "/send_leave/";
        "LM-T-026" "/send_knock/";
        "LM-T-027" "/device/";
    }
}

/// Whatever else would be looked at there is skipped, so nothing but this tells that it is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_a_participant_lacks_is_missed_alone() {
    macro_rules! missing {
        ($($check:literal $path:literal $only:expr;)*) => {
            $(of_participant(&[$check], Answers($path, |_, reply, _| reply.set(404, json!({ "errcode": "M_UNRECOGNIZED" }))), $only).await;)*
        };
    }
    missing! {
        "LM-H-060" "/send/" &["LM-H-06"];
        "LM-H-061" "/event/" &["LM-H-06"];
        "LM-H-062" "/backfill/" &["LM-H-06"];
        "LM-H-063" "/invite/" &[];
        "LM-H-064" "/send_join/" &["LM-H-06"];
        "LM-H-065" "/send_leave/" &["LM-H-06"];
        "LM-H-066" "/send_knock/" &["LM-H-06"];
        "LM-H-067" "/device/" &["LM-H-06"];
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_that_is_answered_wrongly_fails_alone() {
    let only = ["LM-M-011", "LM-M-012", "LM-M-013", "LM-M-014"];
    alone("LM-M-010", Answers("send_join", |_, reply, _| reply.set(500, json!({}))), &["LM-M-010"]).await;
    alone("LM-M-011", Answers("send_join", |_, reply, _| spoil_content(&mut reply.body["event"])), &only).await;
    let with_join = Answers("send_join", |_, reply, _| {
        let event = reply.body["event"].clone();
        reply.body["state"].as_array_mut().into_iter().for_each(|state| state.push(event.clone()));
    });
    // Nothing else needs the join rules, by which the join is allowed.
    these_failed(&["LM-M-012", "LM-M-014"], &always(with_join, &only).await);
    alone(
        "LM-M-013",
        Answers("send_join", |_, reply, _| {
            reply.body["state"].as_array_mut().into_iter().for_each(|state| spoil_content(&mut state[2]))
        }),
        &only,
    )
    .await;
    alone("LM-M-014", Answers("send_join", |_, reply, _| reply.body["auth_chain"] = json!([])), &only).await;
    alone("LM-M-020", Swallows, &["LM-M-020"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_knock_that_is_answered_wrongly_fails_alone() {
    let only = ["LM-M-022", "LM-M-023"];
    let of_another = Answers("make_knock", |_, reply, _| {
        if reply.status == 200 {
            reply.body["sender"] = json!("@somebody:else.example");
        }
    });
    alone("LM-M-022", of_another, &only).await;
    let any_version = Answers("make_knock", |_, reply, _| {
        if reply.status == 400 {
            reply.set(200, json!({}));
        }
    });
    alone("LM-M-022", any_version, &only).await;
    alone("LM-M-023", Answers("send_leave", |_, reply, _| reply.set(403, json!({}))), &only).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_answer_that_is_written_wrongly_is_seen_alone() {
    // One at which nothing else is looked at.
    let typed = Answers("/send/", |seen, reply, _| {
        if seen.nth == 1 {
            reply.kind = "text/plain";
        }
    });
    alone("LM-T-004", typed, &["LM-S-005", "LM-T-004", "LM-T-005"]).await;
    let encoded = Answers("/send/", |seen, reply, _| {
        if seen.nth == 1 {
            reply.raw = Some(b"{\"error\":\"\xff\"}".to_vec());
        }
    });
    alone("LM-T-005", encoded, &["LM-S-005", "LM-T-004", "LM-T-005"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_processed_twice_or_in_another_order_is_seen_alone() {
    alone("LM-S-004", Repeats, &["LM-S-004"]).await;
    alone("LM-S-005", Repeats, &["LM-S-005"]).await;
    let backwards = Sends(|out| {
        out.body["pdus"].as_array_mut().into_iter().for_each(|pdus| pdus.reverse());
        true
    });
    alone("LM-S-012", backwards, &["LM-S-012"]).await;
}

/// What makes a hub send something, and the checks of what it sends.
const SENT: &[&str] = &["LM-S-006", "LM-E-00", "LM-E-01", "LM-E-020", "LM-E-021", "LM-E-023", "LM-E-024"];

async fn sent(expected: &[&str], fault: Fault) {
    let report = always(fault, SENT).await;
    these_failed(expected, &report);
}

/// Changes every message.
async fn message(expected: &[&str], change: fn(&mut Object, &str, &SigningKey)) {
    sent(expected, Events(change)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_is_made_wrongly_fails_alone() {
    // What the participant has hashed and signed cannot be changed without its hash, or its signature, telling of it too.
    message(&["LM-E-001", "LM-E-006", "LM-E-009"], |event, hub, key| {
        event.remove("origin_server_ts");
        finish(event, hub, key);
    })
    .await;
    message(&["LM-E-002", "LM-E-006", "LM-E-009"], |event, hub, key| {
        event.insert("state_key".to_owned(), json!("k".repeat(256)));
        finish(event, hub, key);
    })
    .await;
    message(&["LM-E-003", "LM-E-006", "LM-E-015"], |event, hub, key| {
        event.insert("depth".to_owned(), json!(1));
        finish(event, hub, key);
    })
    .await;
    message(&["LM-E-004", "LM-E-006"], |event, hub, key| {
        event["content"]["filling"] = json!("x".repeat(66_000));
        finish(event, hub, key);
    })
    .await;
    message(&["LM-E-005"], |event, hub, key| {
        event["hashes"]["sha256"] = json!("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA");
        resign(event, hub, key);
    })
    .await;
    message(&["LM-E-006"], |event, hub, key| {
        event["content"]["more"] = json!("of the hub's own");
        finish(event, hub, key);
    })
    .await;
    message(&["LM-E-007", "LM-E-009", "LM-E-010"], |event, hub, key| {
        event.remove("hub_server");
        finish(event, hub, key);
    })
    .await;
    message(&["LM-E-008"], |event, hub, key| {
        let signature = SigningKey::generate().sign(b"something else");
        event["signatures"][hub] = json!({ key.id(): signature });
    })
    .await;
    message(&["LM-E-009"], |event, _, _| event["signatures"][SUITE] = json!({})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_is_placed_wrongly_fails_alone() {
    message(&["LM-E-006", "LM-E-009", "LM-E-010"], |event, hub, key| {
        event.insert("hub_server".to_owned(), json!("other.example"));
        finish(event, hub, key);
    })
    .await;
    message(&["LM-E-011"], |event, hub, key| {
        let prev = event["prev_events"][0].clone();
        event.insert("prev_events".to_owned(), json!([prev, "$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"]));
        finish(event, hub, key);
    })
    .await;
    message(&["LM-E-012"], |event, hub, key| {
        event.insert("prev_events".to_owned(), json!(["$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"]));
        finish(event, hub, key);
    })
    .await;
    message(&["LM-E-013"], |event, hub, key| {
        event["auth_events"].as_array_mut().unwrap().pop();
        finish(event, hub, key);
    })
    .await;
    message(&["LM-E-006", "LM-E-015"], |event, hub, key| {
        event.insert("colour".to_owned(), json!("green"));
        finish(event, hub, key);
    })
    .await;
    // An event of the hub's own may have more than the schema asks for, but not what the schema rules out.
    let own = Own(|event, hub, key| {
        event.insert("com.example.colour".to_owned(), json!("green"));
        event.insert("depth".to_owned(), json!(1));
        finish(event, hub, key);
    });
    sent(&["LM-E-003"], own).await;
}

/// Makes a transaction too large.
fn fill(body: &mut Value) {
    for events in body["pdus"].as_array_mut().into_iter().filter(|events| !events.is_empty()) {
        let first = events[0].clone();
        events.resize(51, first);
    }
}

/// Changes every request that goes out.
async fn request(expected: &[&str], change: fn(&mut Outgoing<'_>) -> bool) {
    sent(expected, Sends(change)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_is_sent_wrongly_fails_alone() {
    request(&["LM-E-014"], |out| {
        out.twice = true;
        true
    })
    .await;
    request(&["LM-E-020"], |out| {
        out.forged = true;
        true
    })
    .await;
    request(&["LM-E-021"], |out| {
        fill(out.body);
        true
    })
    .await;
    // What overtakes another comes in another order too.
    let early = Sends(|out| {
        out.early = out.is("send");
        true
    });
    alone("LM-E-023", early, &["LM-E-023"]).await;
    request(&["LM-E-024"], |out| {
        if out.is("send") {
            "/_matrix/federation/v2/send/same".clone_into(out.uri);
        }
        true
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invites_that_are_passed_on_wrongly_fail_alone() {
    let only = ["LM-I-002", "LM-I-003", "LM-I-004", "LM-I-005", "LM-I-006", "LM-I-007"];
    alone("LM-I-002", Answers("/invite/", |_, reply, _| reply.set(403, json!({}))), &["LM-I-002"]).await;
    let fault = Answers("/invite/", |_, reply, _| {
        reply.body["pdu"]["signatures"].as_object_mut().into_iter().for_each(|all| drop(all.remove(SECOND)))
    });
    alone("LM-I-003", fault, &only).await;
    let empty = Answers("/invite/", |_, reply, _| reply.body["pdu"]["signatures"][SECOND] = json!({}));
    alone("LM-I-003", empty, &only).await;
    let invite = |change: fn(&mut Outgoing<'_>) -> bool| Sends(change);
    alone(
        "LM-I-004",
        invite(|out| {
            if out.is("invite") {
                out.body["event"]["hashes"]["sha256"] = json!("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA");
            }
            true
        }),
        &["LM-I-002", "LM-I-004", "LM-I-005"],
    )
    .await;
    alone(
        "LM-I-005",
        invite(|out| {
            if out.is("invite") {
                out.body["room_version"] = json!("other");
            }
            true
        }),
        &only,
    )
    .await;
    alone(
        "LM-I-006",
        invite(|out| {
            if out.is("invite") {
                out.body["invite_room_state"] = json!([{ "type": "m.room.create", "event_id": "$a" }]);
            }
            true
        }),
        &only,
    )
    .await;
    alone(
        "LM-I-007",
        invite(|out| !(out.is("send") && out.body.to_string().contains("\"membership\":\"invite\""))),
        &only,
    )
    .await;
    alone("LM-I-010", Answers("make_leave", |_, reply, _| reply.set(403, json!({}))), &["LM-I-002", "LM-I-010"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_server_that_is_treated_wrongly_is_seen_alone() {
    alone(
        "LM-V-011",
        Answers("send_join", |seen, reply, _| {
            if seen.body["sender"].as_str().is_some_and(|sender| sender.ends_with(SECOND)) {
                reply.set(403, json!({}));
            }
        }),
        &["LM-V-011"],
    )
    .await;
    alone(
        "LM-V-020",
        Sends(|out| !(*out.to == SECOND && out.body.to_string().contains("\"membership\":\"leave\""))),
        &["LM-V-011", "LM-V-020"],
    )
    .await;
    // It is told of everything, whatever it was sent for.
    alone(
        "LM-V-021",
        Sends(|out| {
            if out.is("send") && out.body.to_string().contains(".LM-V-021.") {
                SECOND.clone_into(out.to);
            }
            true
        }),
        &["LM-V-011", "LM-V-020", "LM-V-021"],
    )
    .await;
}

/// Runs checks of a participant with one fault that is there all the time.
async fn of_participant(expected: &[&str], fault: Fault, only: &[&str]) {
    let report = as_participant(vec![("", fault)], true, only).await;
    these_failed(expected, &report);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_participant_that_answers_wrongly_fails_at_that_check() {
    let mut faults: Faults = vec![
        (
            "LM-H-020",
            Answers("/send/", |_, reply, _| reply.body = json!({ "failed_pdus": { "$a": { "error": "no" } } })),
        ),
        (
            "LM-H-021",
            Answers("/send/", |seen, reply, _| {
                if seen.nth == 1 {
                    reply.body["more"] = json!(1);
                }
            }),
        ),
        ("LM-H-022", NO),
        ("LM-H-023", NO),
        ("LM-H-030", Answers("/send/", |_, reply, _| reply.body = json!({ "failed_pdus": {} }))),
        ("LM-H-034", Answers("/send/", |_, reply, _| reply.body = json!({ "failed_pdus": {} }))),
        ("LM-H-035", Answers("/send/", |_, reply, _| reply.body = json!({ "failed_pdus": {} }))),
        ("LM-H-036", Answers("/send/", |_, reply, _| reply.body = json!({ "failed_pdus": {} }))),
        ("LM-H-068", UNRECOGNIZED),
        ("LM-H-069", UNRECOGNIZED),
        ("LM-H-070", UNRECOGNIZED),
        ("LM-H-071", UNRECOGNIZED),
        ("LM-H-072", UNRECOGNIZED),
        ("LM-H-073", UNRECOGNIZED),
        ("LM-H-074", NO),
        ("LM-H-031", Answers("/send/", |_, reply, _| reply.set(500, json!({})))),
        ("LM-H-032", Answers("/send/", |_, reply, _| reply.set(500, json!({})))),
    ];
    for id in [
        "LM-H-001", "LM-H-002", "LM-H-003", "LM-H-004", "LM-H-005", "LM-H-006", "LM-H-040", "LM-H-041", "LM-H-042",
        "LM-H-043", "LM-H-044", "LM-H-045", "LM-H-046", "LM-H-047",
    ] {
        faults.push((id, OK));
    }
    for id in ["LM-H-024", "LM-H-025", "LM-H-026", "LM-H-027", "LM-H-028", "LM-H-029", "LM-H-033"] {
        faults.push((id, Answers("/event/", |_, reply, _| reply.set(200, json!({})))));
    }
    let mut expected: Vec<&str> = faults.iter().map(|(check, _)| *check).collect();
    let report = as_participant(faults, false, &[]).await;
    expected.sort_by_key(|id| report.rows.iter().position(|row| row.id == *id));
    these_failed(&expected, &report);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_participant_that_asks_or_says_something_wrongly_fails_alone() {
    let only = ["LM-H-01", "LM-H-05"];
    of_participant(&["LM-H-010"], Answers("/invite/", |_, reply, _| reply.set(403, json!({}))), &["LM-H-010"]).await;
    of_participant(
        &["LM-H-011"],
        Answers("/invite/", |_, reply, _| {
            reply.body["pdu"]["signatures"]["spoke.example"] = json!({});
        }),
        &["LM-H-011"],
    )
    .await;
    of_participant(
        &["LM-H-012"],
        Sends(|out| {
            if out.is("make_join") {
                let bare = out.uri.split('?').next().unwrap_or_default().to_owned();
                *out.uri = bare;
            }
            true
        }),
        &only,
    )
    .await;
    of_participant(
        // Redaction keeps what it adds, so the signature is wrong too.
        &["LM-H-013", "LM-H-016"],
        Sends(|out| {
            if out.is("send_join") {
                out.body["auth_events"] = json!([]);
            }
            true
        }),
        &["LM-H-01"],
    )
    .await;
    of_participant(
        &["LM-H-014", "LM-H-015", "LM-H-016"],
        Sends(|out| {
            if out.is("send_join") {
                out.body["hub_server"] = json!("other.example");
            }
            true
        }),
        &["LM-H-01"],
    )
    .await;
    of_participant(
        &["LM-H-015"],
        Sends(|out| {
            if out.is("send_join") {
                out.body["content"]["more"] = json!(1);
            }
            true
        }),
        &["LM-H-01"],
    )
    .await;
    of_participant(
        &["LM-H-016"],
        Sends(|out| {
            if out.is("send_join") {
                out.body["signatures"] = json!({});
            }
            true
        }),
        &["LM-H-01"],
    )
    .await;
    of_participant(
        &["LM-H-050"],
        Sends(|out| {
            if out.is("send") {
                out.body["pdus"][0]["prev_events"] = json!([]);
            }
            true
        }),
        &only,
    )
    .await;
    of_participant(
        &["LM-H-051"],
        Sends(|out| {
            out.forged = true;
            true
        }),
        &only,
    )
    .await;
    of_participant(
        &["LM-H-052"],
        Sends(|out| {
            if out.is("send") {
                fill(out.body);
            }
            true
        }),
        &only,
    )
    .await;
}

/// As existing servers do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_takes_gets_as_matrix_has_them_is_looked_at_all_the_same() {
    let report = always(Fault::SignedWithoutContent, &["LM-A", "LM-R"]).await;
    assert_eq!(report.failed(), ["LM-A-021"]);
    let passed = report.rows.iter().filter(|row| row.outcome.is_ok() && row.id.starts_with("LM-R")).count();
    assert!(passed > 10, "{passed}");
}
