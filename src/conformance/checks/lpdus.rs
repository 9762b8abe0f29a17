//! LPDUs with one thing wrong each, none of which may get into the room.

use serde_json::{Value, json};

use super::checks;
use crate::conformance::Check;
use crate::conformance::report::{Outcome, ensure};
use crate::conformance::session::{Session, sealed, signed, signed_by};
use crate::event::{Object, canonical_json};
use crate::identity::SigningKey;

pub(super) fn checks() -> Vec<Check> {
    checks![
        "LM-L-001", "int-checking-signatures", "an LPDU that is signed by another key is not taken", |s, id| bad(s, id, |s, event| {
            signed_by(sealed(event, &s.first), s.first.name.as_str(), s.first.key.id(), &SigningKey::generate())
        });
        "LM-L-002", "int-checking-signatures", "an LPDU without its server's signature is not taken", |s, id| bad(s, id, |s, event| {
            signed_by(sealed(event, &s.first), "elsewhere.invalid", "ed25519:1", &SigningKey::generate())
        });
        "LM-L-003", "int-checking-signatures", "an LPDU that is signed with a key that nobody knows is not taken", |s, id| bad(s, id, |s, event| {
            signed_by(sealed(event, &s.first), s.first.name.as_str(), "ed25519:unknown", &SigningKey::generate())
        });
        "LM-L-004", "int-pdu", "an LPDU without signatures is not taken", |s, id| bad(s, id, |s, event| without(sealed(event, &s.first), "signatures"));
        "LM-L-005", "int-receiving-events", "what an LPDU with a wrong hash says is not sent on", |s, id| bad(s, id, |s, mut event| {
            event.insert("hashes".to_owned(), json!({ "lpdu": { "sha256": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA" } }));
            signed(event, &s.first)
        });
        "LM-L-006", "int-lpdu", "an LPDU without hashes is not taken", |s, id| bad(s, id, |s, event| signed(event, &s.first));
        "LM-L-007", "int-pdu", "a sender of the hub's own is not believed", |s, id| bad(s, id, |s, mut event| {
            event.insert("sender".to_owned(), json!(somebody_of_target(s)));
            sealed(event, &s.first)
        });
        "LM-L-008", "int-pdu", "a sender of a third server is not believed", |s, id| bad(s, id, |s, mut event| {
            event.insert("sender".to_owned(), json!("@somebody:elsewhere.invalid"));
            sealed(event, &s.first)
        });
        "LM-L-009", "int-pdu", "an LPDU for another hub is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "hub_server", Some(json!("elsewhere.invalid"))));
        "LM-L-010", "int-pdu", "an LPDU without hub_server is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "hub_server", None));
        "LM-L-011", "int-pdu", "an LPDU without type is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "type", None));
        "LM-L-012", "int-pdu", "an LPDU without sender is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "sender", None));
        "LM-L-013", "int-pdu", "an LPDU without room_id is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "room_id", None));
        "LM-L-014", "int-pdu", "an LPDU without content is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "content", None));
        "LM-L-015", "int-pdu", "an LPDU without origin_server_ts is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "origin_server_ts", None));
        "LM-L-016", "int-pdu", "content that is no object is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "content", Some(json!("text"))));
        "LM-L-017", "int-pdu", "an origin_server_ts that is no integer is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "origin_server_ts", Some(json!("now"))));
        "LM-L-018", "int-pdu", "a type that is no string is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "type", Some(json!(7))));
        "LM-L-019", "int-pdu", "a state_key that is no string is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "state_key", Some(json!(7))));
        "LM-L-020", "int-pdu", "a sender that is no user ID is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "sender", Some(json!(s.first.name))));
        "LM-L-021", "int-room-id", "a room ID that is none is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "room_id", Some(json!("room"))));
        "LM-L-022", "int-user-id", "a sender with upper-case letters is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "sender", Some(json!(format!("@CONFORMANCE:{}", s.first.name)))));
        "LM-L-023", "int-pdu", "a type of more than 255 characters is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "type", Some(json!("t".repeat(256)))));
        "LM-L-024", "int-pdu", "a state_key of more than 255 characters is not taken", |s, id| bad(s, id, |s, event| resealed(s, event, "state_key", Some(json!("k".repeat(256)))));
        "LM-L-025", "int-pdu", "an LPDU of more than 65,536 bytes is not taken", |s, id| bad(s, id, |s, event| grown(s, event, 65_700));
        "LM-L-026", "int-pdu", "an LPDU that passes 65,536 bytes with what the hub adds is not taken", |s, id| bad(s, id, |s, event| grown(s, event, 65_500));
        "LM-L-027", "int-pdu", "an LPDU that is no object is not taken, and does no harm", no_object;
        "LM-L-028", "int-lpdu", "an LPDU with prev_events is not taken as it is", |s, id| bad(s, id, |s, event| resealed(s, event, "prev_events", Some(json!(["$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"]))));
        "LM-L-029", "int-lpdu", "an LPDU with auth_events is not taken as it is", |s, id| bad(s, id, |s, event| resealed(s, event, "auth_events", Some(json!(["$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"]))));
        "LM-L-030", "int-lpdu", "an LPDU with a hash of the whole event is not taken", |s, id| bad(s, id, |s, event| {
            let mut event = sealed(event, &s.first);
            if let Some(hashes) = event.get_mut("hashes").and_then(Value::as_object_mut) {
                hashes.insert("sha256".to_owned(), json!("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"));
            }
            signed(event, &s.first)
        });
        "LM-L-031", "int-receiving-events", "a finished event of a participant's own making is not taken", |s, id| bad(s, id, own_pdu);
    ]
}

/// Sends an LPDU that `spoil` has spoilt, and looks that it is not sent on.
async fn bad(session: &Session, id: &str, spoil: impl Fn(&Session, Object) -> Object) -> Outcome {
    session.joined()?;
    let mark = session.bad_mark(id);
    let lpdu = spoil(session, session.message(&session.user, &mark));
    let answer = session.send(&session.first, vec![lpdu]).await?;
    ensure(answer.status < 500, "200, or an error of the 400s", || &answer)?;
    session.absent(id, &mark).await
}

/// Changes or removes a field, so that the event is right in everything else.
fn resealed(session: &Session, mut event: Object, field: &str, value: Option<Value>) -> Object {
    match value {
        Some(value) => event.insert(field.to_owned(), value),
        None => event.remove(field),
    };
    sealed(event, &session.first)
}

fn without(mut event: Object, field: &str) -> Object {
    event.remove(field);
    event
}

/// Whoever made the room, if that is a user of the target's.
fn somebody_of_target(session: &Session) -> String {
    let create = session.state_event("m.room.create", "");
    let creator = create.as_ref().and_then(|event| event.get("sender")).and_then(Value::as_str);
    creator.map_or_else(|| format!("@somebody:{}", session.target), str::to_owned)
}

/// Makes the sealed event so many bytes long.
fn grown(session: &Session, event: Object, size: usize) -> Object {
    let with = |length: usize| {
        let mut event = event.clone();
        if let Some(content) = event.get_mut("content").and_then(Value::as_object_mut) {
            content.insert("filling".to_owned(), json!("x".repeat(length)));
        }
        sealed(event, &session.first)
    };
    let empty = canonical_json(&with(0)).len();
    with(size.saturating_sub(empty))
}

async fn no_object(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let uri = session.path(crate::conformance::session::Endpoint::Send, &session.txn())?;
    for odd in [Value::Null, json!("event"), json!([])] {
        let ask =
            crate::conformance::wire::Ask::put(uri.clone() + &session.fresh().to_string(), json!({ "pdus": [odd] }));
        let answer = session.ask(&session.first, ask).await?;
        ensure(answer.status < 500, "200, or an error of the 400s", || &answer)?;
    }
    session.say(&session.first, &session.user, id).await.map(drop)
}

/// An event with everything that a hub adds, by a server that is not the hub.
fn own_pdu(session: &Session, mut event: Object) -> Object {
    event.remove("hub_server");
    let create = session.state_event("m.room.create", "").map(|event| crate::conformance::session::id_of(&event));
    event.insert("auth_events".to_owned(), json!([create]));
    event.insert("prev_events".to_owned(), json!([create]));
    let hash = crate::event::content_hash(&event);
    event.insert("hashes".to_owned(), json!({ "sha256": hash }));
    signed(event, &session.first)
}
