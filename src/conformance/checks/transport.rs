//! TLS, HTTP, errors, and whether every endpoint is there.

use bytes::Bytes;
use http::Method;
use serde_json::json;

use super::authentication::let_in;
use super::checks;
use crate::conformance::Check;
use crate::conformance::ear::lock;
use crate::conformance::report::{Outcome, ensure, fail, skip};
use crate::conformance::session::{Endpoint, Presence, Session};
use crate::conformance::wire::{Answer, Ask};

/// A path that no server has.
const NOBODYS: &str = "/_matrix/federation/v1/conformance/nothing";
const KEYS: &str = "/_matrix/key/v2/server";
const EVENT_ID: &str = "%24AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

pub(super) fn checks() -> Vec<Check> {
    checks![
        "LM-T-001", "int-transport", "TLS 1.3 is spoken", tls_version;
        "LM-T-002", "int-transport", "HTTP/2 is spoken", http2;
        "LM-T-003", "int-tls", "the certificate is of a trusted authority and for the name", certificate;
        "LM-T-006", "int-unknown-endpoints", "an unknown path is 404 M_UNRECOGNIZED", |s, _| unknown(s, NOBODYS);
        "LM-T-007", "int-unknown-endpoints", "another method on a known path is 405 M_UNRECOGNIZED", wrong_method;
        "LM-T-008", "int-transport-requests-responses", "a path with a slash at its end is unknown", |s, _| unknown(s, "/_matrix/key/v2/server/");
        "LM-T-009", "int-transport-requests-responses", "a path with two slashes at its beginning is unknown", |s, _| unknown(s, "//_matrix/key/v2/server");
        "LM-T-010", "Malformed Requests", "a body that is no JSON is 400 M_NOT_JSON", not_json;
        "LM-T-011", "Malformed Requests", "a body of the wrong form is 400 M_BAD_JSON", bad_json;
        "LM-T-012", "Malformed Requests", "an invite without its event is 400 M_BAD_JSON", incomplete;
        "LM-T-020", "int-api-send-txn", "PUT send is there", |s, _| has(s, Endpoint::Send);
        "LM-T-021", "Event and State APIs", "GET event is there", |s, _| has(s, Endpoint::Event);
        "LM-T-022", "Event and State APIs", "GET backfill is there", |s, _| has(s, Endpoint::Backfill);
        "LM-T-023", "int-api-invite", "POST invite is there", |s, _| has(s, Endpoint::Invite);
        "LM-T-024", "int-api-send-join", "POST send_join is there", |s, _| has(s, Endpoint::SendJoin);
        "LM-T-025", "int-api-send-leave", "POST send_leave is there", |s, _| has(s, Endpoint::SendLeave);
        "LM-T-026", "int-api-send-knock", "POST send_knock is there", |s, _| has(s, Endpoint::SendKnock);
        "LM-T-027", "int-api-get-device", "GET user/…/device is there", |s, _| has(s, Endpoint::Device);
        "LM-T-028", "int-api-get-state", "GET state is there", |s, _| answers(s, "state");
        "LM-T-029", "Event and State APIs", "GET state_ids is there", |s, _| answers(s, "state_ids");
        "LM-T-030", "int-api-make-join", "GET make_join is there", |s, _| makes(s, "join");
        "LM-T-031", "int-api-make-leave", "GET make_leave is there", |s, _| makes(s, "leave");
        "LM-T-032", "int-api-make-knock", "GET make_knock is there", |s, _| makes(s, "knock");
        "LM-T-033", "int-transport-key-claim", "POST user/keys/claim is there", claim;
        "LM-D-001", "int-api-get-device", "the device of a user who is not there is 404 M_NOT_FOUND", no_device;
        "LM-D-002", "int-api-get-device", "a user of another server has no device here: 404 M_NOT_FOUND", foreign_device;
        "LM-D-003", "int-transport-key-claim", "keys of users who are not there are left out of the answer", claims_nothing;
        "LM-D-004", "int-transport-key-claim", "a claim without one_time_keys is 400 M_BAD_JSON", bad_claim;
    ]
}

/// That a participant has the endpoints that every server must have, and lets this one in.
pub(super) fn of_participant() -> Vec<Check> {
    checks![
        "LM-H-060", "int-api-send-txn", "PUT send is there", |s, _| has(s, Endpoint::Send);
        "LM-H-061", "Event and State APIs", "GET event is there", |s, _| has(s, Endpoint::Event);
        "LM-H-062", "Event and State APIs", "GET backfill is there", |s, _| has(s, Endpoint::Backfill);
        "LM-H-063", "int-api-invite", "POST invite is there", |s, _| has(s, Endpoint::Invite);
        "LM-H-064", "int-api-send-join", "POST send_join is there", |s, _| has(s, Endpoint::SendJoin);
        "LM-H-065", "int-api-send-leave", "POST send_leave is there", |s, _| has(s, Endpoint::SendLeave);
        "LM-H-066", "int-api-send-knock", "POST send_knock is there", |s, _| has(s, Endpoint::SendKnock);
        "LM-H-067", "int-api-get-device", "GET user/…/device is there", |s, _| has(s, Endpoint::Device);
        "LM-H-068", "int-api-get-state", "GET state is there", |s, _| answers(s, "state");
        "LM-H-069", "Event and State APIs", "GET state_ids is there", |s, _| answers(s, "state_ids");
        "LM-H-070", "int-api-make-join", "GET make_join is there", |s, _| makes(s, "join");
        "LM-H-071", "int-api-make-leave", "GET make_leave is there", |s, _| makes(s, "leave");
        "LM-H-072", "int-api-make-knock", "GET make_knock is there", |s, _| makes(s, "knock");
        "LM-H-073", "int-transport-key-claim", "POST user/keys/claim is there", claim;
        "LM-H-074", "int-transport-auth", "a request signed as the draft has it is let in", |s, _| let_in(s, |header| header);
    ]
}

/// What only the whole run shows.
pub(super) fn overall() -> Vec<Check> {
    checks![
        "LM-T-004", "int-transport-requests-responses", "every answer has the content type application/json", typed;
        "LM-T-005", "int-transport-requests-responses", "every answer is in UTF-8", utf8;
    ]
}

async fn tls_version(session: &Session, _: &str) -> Outcome {
    match session.client.tls_facts(&session.target).await {
        Ok(Some(facts)) => ensure(facts.version == "TLSv1_3", "TLSv1_3", || facts.version),
        Ok(None) => Err(skip("the target is reached without TLS")),
        Err(error) => Err(fail("a TLS handshake", error)),
    }
}

async fn http2(session: &Session, _: &str) -> Outcome {
    match session.client.tls_facts(&session.target).await {
        Ok(Some(facts)) => {
            ensure(facts.alpn.as_deref() == Some("h2"), "h2 is agreed on", || format!("{:?}", facts.alpn))
        }
        Ok(None) => Err(skip("the target is reached without TLS")),
        Err(error) => Err(fail("a TLS handshake", error)),
    }
}

async fn certificate(session: &Session, _: &str) -> Outcome {
    match session.client.tls_facts(&session.target).await {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(skip("the target is reached without TLS")),
        Err(error) => Err(fail("a certificate that verifies", error)),
    }
}

async fn unsigned(session: &Session, method: Method, uri: &str) -> Result<Answer, crate::conformance::Unmet> {
    session.ask_with(Vec::new(), Ask { method, uri: uri.to_owned(), body: None }).await
}

async fn unknown(session: &Session, uri: &str) -> Outcome {
    unsigned(session, Method::GET, uri).await?.is_error(404, "M_UNRECOGNIZED")
}

async fn wrong_method(session: &Session, _: &str) -> Outcome {
    unsigned(session, Method::DELETE, KEYS).await?.is_error(405, "M_UNRECOGNIZED")?;
    let uri = session.path(Endpoint::Send, "1")?;
    unsigned(session, Method::GET, &uri).await?.is_error(405, "M_UNRECOGNIZED")
}

async fn not_json(session: &Session, _: &str) -> Outcome {
    let ask = Ask::put(session.path(Endpoint::Send, &session.txn())?, json!({}));
    let header = session.sign(&session.first, &ask);
    let answer = session.ask_raw(vec![header], ask, Some(Bytes::from_static(b"this is no JSON"))).await?;
    answer.is_error(400, "M_NOT_JSON")
}

async fn bad_json(session: &Session, _: &str) -> Outcome {
    let ask = Ask::put(session.path(Endpoint::Send, &session.txn())?, json!({ "pdus": "none" }));
    session.ask(&session.first, ask).await?.is_error(400, "M_BAD_JSON")
}

async fn incomplete(session: &Session, _: &str) -> Outcome {
    let uri = session.path(Endpoint::Invite, &session.txn())?;
    let answer = session.ask(&session.first, Ask::post(uri, json!({ "room_version": "I.1" }))).await?;
    answer.is_error(400, "M_BAD_JSON")
}

async fn has(session: &Session, endpoint: Endpoint) -> Outcome {
    let expected = "an answer other than M_UNRECOGNIZED under the stable or the unstable name";
    match session.presence(endpoint) {
        Presence::Found { .. } => is_there(session, session.trial(endpoint)?).await,
        Presence::Silent { why, .. } => Err(fail(expected, why)),
        Presence::Absent => {
            Err(fail(expected, format!("none to {} nor to {}", endpoint.stable("…"), endpoint.unstable("…"))))
        }
    }
}

/// Passes when a request is answered by who knows its path: not as one is whose path nobody has.
async fn is_there(session: &Session, ask: Ask) -> Outcome {
    let nobodys = Ask { uri: NOBODYS.to_owned(), ..ask.clone() };
    let answer = session.ask(&session.first, ask).await?;
    let good = !answer.is_unrecognized() && !answer.is_of_proxy();
    ensure(good, "an answer other than M_UNRECOGNIZED", || &answer)?;
    match session.ask(&session.first, nobodys).await {
        Ok(other) if (other.status, &other.text) == (answer.status, &answer.text) => {
            Err(skip(format!("a path that nobody has is answered in the same way: {other}")))
        }
        _ => Ok(()),
    }
}

async fn answers(session: &Session, endpoint: &str) -> Outcome {
    let uri = format!("/_matrix/federation/v1/{endpoint}/%21nowhere%3Ainvalid?event_id={EVENT_ID}");
    is_there(session, Ask::get(uri)).await
}

async fn makes(session: &Session, change: &str) -> Outcome {
    is_there(session, session.make(change, "!nowhere:invalid", &session.user, &["I.1"])).await
}

const CLAIM: &str = "/_matrix/federation/v1/user/keys/claim";

async fn claim(session: &Session, _: &str) -> Outcome {
    is_there(session, Ask::post(CLAIM, json!({ "one_time_keys": {} }))).await
}

async fn no_device(session: &Session, _: &str) -> Outcome {
    let rest = format!("%40conformance-{}%3A{}/device/ABC", session.run, session.target.as_str().replace(':', "%3A"));
    let ask = Ask::get(session.path(Endpoint::Device, &rest)?);
    session.ask(&session.first, ask).await?.is_error(404, "M_NOT_FOUND")
}

async fn foreign_device(session: &Session, _: &str) -> Outcome {
    let rest = "%40somebody%3Aelsewhere.invalid/device/ABC";
    let ask = Ask::get(session.path(Endpoint::Device, rest)?);
    session.ask(&session.first, ask).await?.is_error(404, "M_NOT_FOUND")
}

async fn claims_nothing(session: &Session, _: &str) -> Outcome {
    let nobody = format!("@conformance-{}:{}", session.run, session.target);
    let algorithm = "m.mls.v1.key_package.dhkemx25519-aes128gcm-sha256-ed25519";
    let body =
        json!({ "one_time_keys": { nobody: { "ABC": algorithm }, "@a:elsewhere.invalid": { "ABC": algorithm } } });
    let answer = session.ask(&session.first, Ask::post(CLAIM, body)).await?;
    answer.is_good()?;
    let empty = answer.field("one_time_keys").and_then(|keys| keys.as_object()).is_some_and(|keys| keys.is_empty());
    ensure(empty, "an empty object one_time_keys", || &answer)
}

async fn bad_claim(session: &Session, _: &str) -> Outcome {
    session.ask(&session.first, Ask::post(CLAIM, json!({}))).await?.is_error(400, "M_BAD_JSON")
}

/// Of no answers nothing can be said.
fn has_answered(session: &Session) -> Outcome {
    if lock(&session.notes).has_answered { Ok(()) } else { Err(skip("the target has answered nothing")) }
}

async fn typed(session: &Session, _: &str) -> Outcome {
    has_answered(session)?;
    let wrong = lock(&session.notes).not_typed.first().cloned();
    ensure(wrong.is_none(), "application/json", || wrong.unwrap_or_default())
}

async fn utf8(session: &Session, _: &str) -> Outcome {
    has_answered(session)?;
    let wrong = lock(&session.notes).not_utf8.first().cloned();
    ensure(wrong.is_none(), "UTF-8", || wrong.unwrap_or_default())
}
