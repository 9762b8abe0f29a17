//! The target's keys, and the target as a notary.

use std::collections::BTreeMap;

use http::Method;
use serde_json::{Value, json};

use super::checks;
use crate::conformance::report::{Outcome, ensure, fail, skip};
use crate::conformance::session::Session;
use crate::conformance::wire::{Answer, Ask};
use crate::conformance::{Check, Unmet};
use crate::event::{VerifyKey, verify_object};

pub(super) fn checks() -> Vec<Check> {
    checks![
        "LM-K-001", "int-api-self-key", "server_name is the server's", own_name;
        "LM-K-002", "int-signing", "there is an ed25519 key with a proper ID", own_key_ids;
        "LM-K-003", "int-signing-objects", "the answer is signed with every key that it holds", own_signatures;
        "LM-K-004", "int-transport-keys-validity", "valid_until_ts is an integer in the future", validity;
        "LM-K-005", "int-api-self-key", "m.linearized is a boolean, if it is there", linearized;
        "LM-K-006", "int-transport-auth", "where no authentication is asked for, its headers are ignored", ignores_headers;
        "LM-K-007", "int-api-notary-query", "the notary gives the keys of a server", notary;
        "LM-K-008", "int-api-notary-query", "the notary signs them", notary_signs;
        "LM-K-009", "int-api-notary-query", "of a server that it cannot reach the notary gives an empty list", notary_of_nobody;
        "LM-K-010", "int-api-notary-query", "keys that are not valid for long enough are left out", notary_minimum;
        "LM-K-011", "int-api-notary-query-bulk", "several servers can be asked for at once", bulk;
        "LM-K-012", "int-api-notary-query-bulk", "who asks for no server gets an empty list", bulk_of_none;
        "LM-K-013", "int-api-notary-query-bulk", "a query without server_keys is 400 M_BAD_JSON", bulk_bad;
    ]
}

async fn unsigned(session: &Session, ask: Ask) -> Result<Answer, Unmet> {
    session.ask_with(Vec::new(), ask).await
}

async fn own(session: &Session) -> Result<Value, Unmet> {
    let answer = unsigned(session, Ask::get("/_matrix/key/v2/server")).await?;
    answer.is_good()?;
    Ok(answer.json.unwrap_or_default())
}

async fn own_name(session: &Session, _: &str) -> Outcome {
    let keys = own(session).await?;
    ensure(keys.get("server_name") == Some(&json!(session.target)), session.target.as_str(), || &keys)
}

fn ids(keys: &Value) -> impl Iterator<Item = (&String, &Value)> {
    keys.get("verify_keys").and_then(Value::as_object).into_iter().flatten()
}

fn decoded(keys: &Value) -> BTreeMap<String, VerifyKey> {
    let key =
        |(id, key): (&String, &Value)| Some((id.clone(), VerifyKey::from_base64(key.get("key")?.as_str()?).ok()?));
    ids(keys).filter_map(key).collect()
}

async fn own_key_ids(session: &Session, _: &str) -> Outcome {
    let keys = own(session).await?;
    let proper = |id: &str| {
        id.strip_prefix("ed25519:").is_some_and(|version| {
            !version.is_empty() && version.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        })
    };
    let good =
        ids(&keys).count() > 0 && ids(&keys).all(|(id, _)| proper(id)) && decoded(&keys).len() == ids(&keys).count();
    ensure(good, "verify_keys with IDs ed25519:[A-Za-z0-9_]+ and keys of 32 bytes", || &keys)
}

async fn own_signatures(session: &Session, _: &str) -> Outcome {
    let keys = own(session).await?;
    let Some(object) = keys.as_object() else { return Err(fail("an object", &keys)) };
    ensure(!decoded(&keys).is_empty(), "verify_keys, and a signature by each of them", || &keys)?;
    for (id, key) in decoded(&keys) {
        let alone = BTreeMap::from([(id, key)]);
        verify_object(object, session.target.as_str(), &alone)
            .map_err(|problem| fail("a signature by each of verify_keys", format!("{problem}: {keys}")))?;
    }
    Ok(())
}

async fn validity(session: &Session, _: &str) -> Outcome {
    let keys = own(session).await?;
    let until = keys.get("valid_until_ts").and_then(Value::as_i64).unwrap_or_default();
    ensure(until > session.clock.now_ms(), "a time to come, in milliseconds", || &keys)
}

async fn linearized(session: &Session, _: &str) -> Outcome {
    let keys = own(session).await?;
    if ids(&keys).next().is_none() {
        return Err(skip(format!("there are no keys beside which it could be: {keys}")));
    }
    ensure(keys.get("m.linearized").is_none_or(Value::is_boolean), "a boolean, or nothing", || &keys)
}

async fn ignores_headers(session: &Session, _: &str) -> Outcome {
    let ask = Ask::get("/_matrix/key/v2/server");
    let answer = session.ask_with(vec!["X-Matrix nonsense".to_owned()], ask).await?;
    answer.is_good()?;
    ensure(answer.json.as_ref().is_some_and(|keys| ids(keys).next().is_some()), "the server's keys", || &answer)
}

fn listed(answer: &Answer) -> Result<Vec<Value>, Unmet> {
    if answer.is_unrecognized() {
        return Err(fail("a notary", answer));
    }
    answer.is_good()?;
    let list = answer.field("server_keys").and_then(Value::as_array).cloned();
    list.ok_or_else(|| fail("an array server_keys", answer))
}

async fn queried(session: &Session, server: &str, query: &str) -> Result<Vec<Value>, Unmet> {
    listed(&unsigned(session, Ask::get(format!("/_matrix/key/v2/query/{server}{query}"))).await?)
}

/// The suite's own keys in a notary's answer, signed by the suite.
fn ours(session: &Session, list: &[Value]) -> Result<Value, Unmet> {
    let name = session.first.name.as_str();
    let found = list.iter().find(|keys| {
        keys.get("server_name").and_then(Value::as_str) == Some(name)
            && keys.get("verify_keys").and_then(|keys| keys.get(session.first.key.id())).is_some()
    });
    let found = found.ok_or_else(|| fail(format!("the keys of {name}"), Value::from(list.to_vec())))?;
    let key =
        VerifyKey::from_base64(&session.first.key.public_base64()).map_err(|problem| skip(problem.to_string()))?;
    let own = BTreeMap::from([(session.first.key.id().to_owned(), key)]);
    let object = found.as_object().cloned().unwrap_or_default();
    verify_object(&object, name, &own).map_err(|problem| fail("the signature of the server itself", problem))?;
    Ok(found.clone())
}

async fn notary(session: &Session, _: &str) -> Outcome {
    let list = queried(session, session.first.name.as_str(), "").await?;
    ours(session, &list).map(drop)
}

async fn notary_signs(session: &Session, _: &str) -> Outcome {
    let list = queried(session, session.first.name.as_str(), "").await.map_err(|_| skip("it gives no keys"))?;
    let object = ours(session, &list).map_err(|_| skip("it gives no keys"))?.as_object().cloned().unwrap_or_default();
    let keys = decoded(&own(session).await?);
    verify_object(&object, session.target.as_str(), &keys)
        .map_err(|problem| fail(format!("a signature of {}", session.target), problem))
}

async fn notary_of_nobody(session: &Session, _: &str) -> Outcome {
    let list = queried(session, &format!("conformance-{}.invalid", session.run), "").await?;
    ensure(list.is_empty(), "an empty list", || Value::from(list.clone()))
}

async fn notary_minimum(session: &Session, _: &str) -> Outcome {
    // Whatever a server says, its keys are believed for seven days.
    let far = session.clock.now_ms().saturating_add(30 * 24 * 3_600_000);
    let query = format!("?minimum_valid_until_ts={far}");
    let list = queried(session, session.first.name.as_str(), &query).await?;
    ensure(list.is_empty(), "an empty list", || Value::from(list.clone()))?;
    let all = queried(session, session.first.name.as_str(), "").await?;
    ours(session, &all).map(drop).map_err(|_| skip("it gives no keys, whatever it is asked for"))
}

async fn bulk_query(session: &Session, body: Value) -> Result<Answer, Unmet> {
    unsigned(session, Ask { method: Method::POST, uri: "/_matrix/key/v2/query".to_owned(), body: Some(body) }).await
}

async fn bulk(session: &Session, _: &str) -> Outcome {
    let minimum = json!({ "minimum_valid_until_ts": session.clock.now_ms() });
    let body = json!({ "server_keys": { session.first.name.as_str(): { session.first.key.id(): minimum }, "nobody.invalid": {} } });
    let list = listed(&bulk_query(session, body).await?)?;
    ours(session, &list).map(drop)
}

async fn bulk_of_none(session: &Session, _: &str) -> Outcome {
    let list = listed(&bulk_query(session, json!({ "server_keys": {} })).await?)?;
    ensure(list.is_empty(), "an empty list", || Value::from(list.clone()))
}

async fn bulk_bad(session: &Session, _: &str) -> Outcome {
    let answer = bulk_query(session, json!({})).await?;
    if answer.is_unrecognized() {
        return Err(skip("there is no such query"));
    }
    answer.is_error(400, "M_BAD_JSON")
}
