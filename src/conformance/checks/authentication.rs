//! The signatures of requests: every way to get them wrong, and every way of writing them that is right.

use serde_json::json;

use super::checks;
use crate::conformance::report::{Outcome, ensure, skip};
use crate::conformance::session::{Endpoint, NOWHERE, Session};
use crate::conformance::wire::{Answer, Ask, Signing};
use crate::conformance::{Check, Unmet};
use crate::identity::SigningKey;

pub(super) fn checks() -> Vec<Check> {
    checks![
        "LM-A-001", "int-transport-auth", "a request without Authorization is 401 M_FORBIDDEN", |s, _| refused(s, |_, _| Vec::new());
        "LM-A-002", "int-transport-auth", "another scheme is 401 M_FORBIDDEN", |s, _| refused(s, |_, _| vec!["Bearer something".to_owned()]);
        "LM-A-003", "int-transport-auth", "a header without its parameters is 401 M_FORBIDDEN", |s, _| refused(s, |s, _| {
            vec![format!("X-Matrix origin=\"{}\",destination=\"{}\"", s.first.name, s.target)]
        });
        "LM-A-004", "int-transport-auth", "a signature by another key is 401 M_FORBIDDEN", |s, _| refused(s, |_, signing| {
            vec![Signing { key: &SigningKey::generate(), ..signing }.header()]
        });
        "LM-A-005", "int-transport-auth", "a key ID that the origin does not publish is 401 M_FORBIDDEN", |s, _| refused(s, |_, signing| {
            vec![Signing { key_id: "ed25519:unknown", ..signing }.header()]
        });
        "LM-A-006", "int-api-self-key", "a key out of use is 401 M_FORBIDDEN", |s, _| refused(s, |s, signing| {
            vec![Signing { key: &s.first.old, key_id: s.first.old.id(), ..signing }.header()]
        });
        "LM-A-007", "int-transport-auth", "a request for another destination is 401 M_FORBIDDEN", |s, _| refused(s, |_, signing| {
            vec![Signing { destination: "elsewhere.invalid", ..signing }.header()]
        });
        "LM-A-008", "int-transport-auth", "a destination other than the signed one is 401 M_FORBIDDEN", |s, _| refused(s, |s, signing| {
            let (target, other) = (format!("\"{}\"", s.target), "\"elsewhere.invalid\"");
            vec![Signing { destination: "elsewhere.invalid", ..signing }.header().replace(other, &target)]
        });
        "LM-A-009", "int-transport-auth", "an origin other than the signed one is 401 M_FORBIDDEN", |s, _| refused(s, |s, signing| {
            let (own, other) = (format!("origin=\"{}\"", s.first.name), "origin=\"elsewhere.invalid\"");
            vec![Signing { origin: "elsewhere.invalid", ..signing }.header().replace(other, &own)]
        });
        "LM-A-010", "int-transport-auth", "a signature over another path is 401 M_FORBIDDEN", |s, _| refused(s, |_, signing| {
            let uri = format!("{}x", signing.uri);
            vec![Signing { uri: &uri, ..signing }.header()]
        });
        "LM-A-011", "int-transport-auth", "a signature over another method is 401 M_FORBIDDEN", |s, _| refused(s, |_, signing| {
            vec![Signing { method: "POST", ..signing }.header()]
        });
        "LM-A-012", "int-transport-auth", "a signature over another body is 401 M_FORBIDDEN", |s, _| refused(s, |_, signing| {
            vec![Signing { content: Some(&json!({ "pdus": [], "edus": [] })), ..signing }.header()]
        });
        "LM-A-013", "int-transport-auth", "a good header does not make up for a bad one", |s, _| refused(s, |_, signing| {
            vec![signing.header(), Signing { key: &SigningKey::generate(), ..signing }.header()]
        });
        "LM-A-014", "int-transport-auth", "GET is asked for a signature too", get_unsigned;
        "LM-A-015", "int-transport-auth", "a request signed as the draft has it is let in", |s, _| let_in(s, |header| header);
        "LM-A-016", "int-transport-auth", "parameters that are not known are ignored", |s, _| let_in(s, |header| format!("{header},colour=\"green\""));
        "LM-A-017", "int-transport-auth", "names of parameters are in any case", |s, _| let_in(s, |header| {
            header.replace("origin=", "Origin=").replace("sig=", "SIG=")
        });
        "LM-A-018", "int-transport-auth", "parameters are in any order, with spaces after the scheme", |s, _| let_in(s, |header| {
            let rest = header.trim_start_matches("X-Matrix ");
            let (origin, rest) = rest.split_once(',').unwrap_or((rest, ""));
            format!("X-Matrix   {rest},{origin}")
        });
        "LM-A-019", "int-transport-auth", "quoted values may have escapes", |s, _| let_in(s, |header| header.replace("ed25519:", "ed25519\\:"));
        "LM-A-020", "int-transport-auth", "two good headers are as good as one", two_good;
        "LM-A-021", "int-transport-auth", "a GET is signed with an empty object as its content", get_with_content;
    ]
}

/// Something that must be signed, and changes nothing.
fn trial(session: &Session) -> Result<Ask, Unmet> {
    Ok(Ask::put(session.path(Endpoint::Send, &session.txn())?, json!({ "pdus": [] })))
}

async fn refused(session: &Session, headers: impl for<'a> Fn(&'a Session, Signing<'a>) -> Vec<String>) -> Outcome {
    let ask = trial(session)?;
    let body = ask.body.clone().unwrap_or_default();
    let headers = headers(session, session.signing(&session.first, &ask, &body));
    session.ask_with(headers, ask).await?.is_error(401, "M_FORBIDDEN")
}

pub(super) async fn let_in(session: &Session, change: impl Fn(String) -> String) -> Outcome {
    let ask = trial(session)?;
    let header = change(session.sign(&session.first, &ask));
    let answer = session.ask_with(vec![header], ask).await?;
    answer.is_good()?;
    tells_apart(session, trial(session)?, &answer).await
}

/// That something is let in shows nothing of a server that lets everything in: skips where the same with a wrong signature is
/// answered with the status that it has with a right one.
async fn tells_apart(session: &Session, ask: Ask, right: &Answer) -> Outcome {
    let body = ask.body.clone().unwrap_or_else(|| json!({}));
    let signing = session.signing(&session.first, &ask, &body);
    let header = Signing { key: &SigningKey::generate(), ..signing }.header();
    let wrong = session.ask_with(vec![header], ask).await?;
    if wrong.status == right.status {
        return Err(skip(format!("what is wrongly signed is let in too: {wrong}")));
    }
    Ok(())
}

async fn two_good(session: &Session, _: &str) -> Outcome {
    let ask = trial(session)?;
    let header = session.sign(&session.first, &ask);
    let answer = session.ask_with(vec![header.clone(), header], ask).await?;
    answer.is_good()?;
    tells_apart(session, trial(session)?, &answer).await
}

async fn get_unsigned(session: &Session, _: &str) -> Outcome {
    session.ask_with(Vec::new(), Ask::get(NOWHERE)).await?.is_error(401, "M_FORBIDDEN")
}

async fn get_with_content(session: &Session, _: &str) -> Outcome {
    let (ask, content) = (Ask::get(NOWHERE), json!({}));
    let header = session.signing(&session.first, &ask, &content).header();
    let answer = session.ask_with(vec![header], ask.clone()).await?;
    ensure(
        answer.status != 401,
        "an answer other than 401 (other checks sign without content where that is let in)",
        || &answer,
    )?;
    tells_apart(session, ask, &answer).await
}
