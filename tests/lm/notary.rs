//! Notaries: what a server gives of others' keys, and what it believes of others about them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Json;
use axum::response::IntoResponse as _;
use http::StatusCode;
use isthmus::clock::ManualClock;
use isthmus::event::{Object, sign_object};
use isthmus::identity::{SigningKey, Validity};
use isthmus::store::server_keys;
use ruma::ServerName;
use serde_json::{Value, json};

use super::world::{Node, World};

const NOW: i64 = 1_795_226_877_068;
const HOUR: i64 = 3600 * 1000;
const DAY: i64 = 24 * HOUR;

/// What a notary answers to `GET query/SERVER`.
async fn query(notary: &Node, server: &str, minimum: Option<i64>) -> Vec<Value> {
    let minimum = minimum.map(|minimum| format!("?minimum_valid_until_ts={minimum}")).unwrap_or_default();
    let response = reqwest::get(notary.url(&format!("/_matrix/key/v2/query/{server}{minimum}"))).await.unwrap();
    assert_eq!(response.status(), 200);
    keys(response.json().await.unwrap())
}

/// And to `POST query`.
async fn query_many(notary: &Node, server_keys: Value) -> Vec<Value> {
    let request = super::http::http().post(notary.url("/_matrix/key/v2/query"));
    let response = request.json(&json!({ "server_keys": server_keys })).send().await.unwrap();
    assert_eq!(response.status(), 200);
    keys(response.json().await.unwrap())
}

fn keys(mut answer: Value) -> Vec<Value> {
    match answer["server_keys"].take() {
        Value::Array(keys) => keys,
        other => panic!("{other}"),
    }
}

fn key_ids(answers: &[Value]) -> Vec<&str> {
    let mut ids: Vec<_> = answers.iter().flat_map(|keys| keys["verify_keys"].as_object().unwrap().keys()).collect();
    ids.sort();
    ids.into_iter().map(String::as_str).collect()
}

/// A server's answer about its keys.
fn answer(server: &ServerName, key: &SigningKey, valid_until_ts: i64) -> Object {
    let answer = json!({
        "server_name": server,
        "valid_until_ts": valid_until_ts,
        "verify_keys": { key.id(): { "key": key.public_base64() } },
        "old_verify_keys": {},
    });
    let mut answer = answer.as_object().unwrap().clone();
    sign_object(&mut answer, server.as_str(), key);
    answer
}

/// Has `node` answer to whoever asks for `path` with this, or with nothing; counts the questions.
fn answers(node: &Node, path: &'static str, answer: Option<Value>) -> Arc<AtomicUsize> {
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    node.meddle(move |request, next| {
        let (answer, counter) = (answer.clone(), counter.clone());
        async move {
            if !request.uri().path().starts_with(path) {
                return next.run(request).await;
            }
            counter.fetch_add(1, Ordering::SeqCst);
            match answer {
                Some(answer) => Json(answer).into_response(),
                None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
            }
        }
    });
    count
}

const KEYS: &str = "/_matrix/key/v2/server";
const QUERY: &str = "/_matrix/key/v2/query";

#[tokio::test]
async fn a_notary_asks_once_signs_and_remembers_what_it_was_told() {
    let clock = ManualClock::new(NOW);
    let (world, [notary, a]) = World::with_clock(["notary.example", "a.example"], clock.clone()).await;
    let first = SigningKey::generate();
    let count = answers(&a, KEYS, Some(Value::Object(answer(&a.name, &first, NOW + DAY))));
    let asked = (0..20).map(|_| query(&notary, "a.example", None));
    for told in futures::future::join_all(asked).await {
        assert_eq!(key_ids(&told), [first.id()]);
        let signatures = told[0]["signatures"].as_object().unwrap();
        assert!(signatures["a.example"][first.id()].is_string());
        assert!(signatures["notary.example"][notary.context.signing_key.id()].is_string());
    }
    assert_eq!(count.load(Ordering::SeqCst), 1, "asked once for all, and what it said is kept");
    // Anybody may ask for anybody's, so nothing is written down until the notary needs the keys itself.
    let store = &notary.context.store;
    assert!(server_keys::load(store, &a.name).await.unwrap().is_none());
    assert!(server_keys::answers(store, &a.name).await.unwrap().is_empty());
    notary.context.keyring.server_keys(&a.name).await.unwrap();
    assert_eq!(count.swap(1, Ordering::SeqCst), 2);
    // After half of its time it is asked again.
    clock.advance(DAY / 2 - 1);
    query(&notary, "a.example", None).await;
    assert_eq!(count.load(Ordering::SeqCst), 1);
    clock.advance(1);
    query(&notary, "a.example", None).await;
    assert_eq!(count.load(Ordering::SeqCst), 2);

    // A new key, without a word of the old one: both are given to those to whom they are of use.
    clock.advance(2 * DAY);
    let now = NOW + DAY / 2 + 2 * DAY;
    let second = SigningKey::generate();
    answers(&a, KEYS, Some(Value::Object(answer(&a.name, &second, now + DAY))));
    assert_eq!(key_ids(&query(&notary, "a.example", None).await), [second.id()]);
    let mut both = [first.id(), second.id()];
    both.sort_unstable();
    assert_eq!(key_ids(&query(&notary, "a.example", Some(NOW + DAY)).await), both);
    assert_eq!(key_ids(&query(&notary, "a.example", Some(NOW + DAY + 1)).await), [second.id()]);
    // Nobody is told to be valid for longer than the server has said.
    assert!(query(&notary, "a.example", Some(now + DAY + 1)).await.is_empty());

    // The server is gone for good, and the notary starts anew.
    answers(&a, KEYS, None);
    clock.advance(30 * DAY);
    let notary = world.restart(notary).await;
    assert!(query(&notary, "a.example", None).await.is_empty());
    assert_eq!(key_ids(&query(&notary, "a.example", Some(0)).await), both);
    let wanted =
        |key: &SigningKey, minimum| json!({ "a.example": { key.id(): { "minimum_valid_until_ts": minimum } } });
    assert_eq!(key_ids(&query_many(&notary, wanted(&first, NOW)).await), [first.id()]);
    assert!(query_many(&notary, wanted(&first, now)).await.is_empty());
    assert_eq!(key_ids(&query_many(&notary, wanted(&second, now)).await), [second.id()]);
    assert!(query_many(&notary, wanted(&SigningKey::generate(), 0)).await.is_empty());
}

#[tokio::test]
async fn a_notary_answers_for_several_and_for_itself_and_not_for_those_who_prove_nothing() {
    let clock = ManualClock::new(NOW);
    let names = ["notary.example", "a.example", "b.example", "c.example"];
    let (_world, [notary, a, b, c]) = World::with_clock(names, clock).await;
    // Signed by somebody else; and for another name.
    let (key, other) = (SigningKey::generate(), SigningKey::generate());
    let mut forged = answer(&b.name, &key, NOW + DAY);
    forged.insert("verify_keys".to_owned(), json!({ other.id(): { "key": other.public_base64() } }));
    answers(&b, KEYS, Some(Value::Object(forged)));
    answers(&c, KEYS, Some(Value::Object(answer(&a.name, &key, NOW + DAY))));
    let none = json!({ "minimum_valid_until_ts": 0 });
    let told = query_many(
        &notary,
        json!({ "a.example": {}, "b.example": { "ed25519:1": none }, "c.example": {}, "notary.example": {} }),
    )
    .await;
    let names: Vec<_> = told.iter().map(|keys| keys["server_name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a.example", "notary.example"]);
    assert_eq!(key_ids(&told).len(), 2);
    assert!(query_many(&notary, json!({})).await.is_empty());
    for path in ["/a%20b", "/a.example?minimum_valid_until_ts=soon", "/%ff"] {
        let response = reqwest::get(notary.url(&format!("{QUERY}{path}"))).await.unwrap();
        assert_eq!(response.status(), 400, "{path}");
        assert_eq!(response.json::<Value>().await.unwrap()["errcode"], "M_BAD_JSON");
    }
}

#[tokio::test]
async fn a_server_that_is_away_is_known_by_a_notary() {
    let clock = ManualClock::new(NOW);
    let names = ["notary.example", "g.example", "a.example", "late.example"];
    let (_world, [notary, g, a, late]) = World::with_notary(names, clock.clone(), Some("notary.example")).await;
    assert_eq!(query(&notary, "a.example", None).await.len(), 1);
    answers(&a, KEYS, None);
    // What it signs is believed, though it cannot be asked.
    a.get(&g, "/_matrix/federation/v1/query/profile?user_id=@u:g.example").await.unwrap();
    let known = g.context.keyring.server_keys(&a.name).await.unwrap();
    assert!(known.current.contains_key(a.context.signing_key.id()));
    // A week at most, whatever is said.
    assert!(known.valid_until_ts <= NOW + 7 * DAY);
    // What it signed in its time can be checked when its keys have run out, also by one who asks only then.
    clock.advance(10 * DAY);
    let id = a.context.signing_key.id();
    let at = |ts| isthmus::identity::Validity::At(ts);
    for node in [&g, &late] {
        let ring = &node.context.keyring;
        assert!(ring.keys_for(&a.name, &[id], at(NOW)).await.is_ok_and(|keys| keys.contains_key(id)));
        let now = isthmus::identity::Validity::Now;
        assert!(!ring.keys_for(&a.name, &[id], now).await.is_ok_and(|keys| keys.contains_key(id)));
    }
}

#[tokio::test]
async fn hc_08_a_notary_is_believed_only_with_both_signatures_and_contradicts_nothing() {
    let clock = ManualClock::new(NOW);
    let names = ["notary.example", "g.example", "a.example", "known.example"];
    let (_world, [notary, g, a, known]) = World::with_notary(names, clock.clone(), Some("notary.example")).await;
    answers(&a, KEYS, None);
    let key = SigningKey::generate();
    let signed = |mut answer: Object, by: &SigningKey| {
        sign_object(&mut answer, "notary.example", by);
        json!({ "server_keys": [answer] })
    };
    let by = &notary.context.signing_key;
    let good = answer(&a.name, &key, NOW + DAY);
    let mut tampered = good.clone();
    tampered.insert("valid_until_ts".to_owned(), json!(NOW + 2 * DAY));
    for bad in [
        json!({ "server_keys": [good.clone()] }),
        signed(good.clone(), &SigningKey::generate()),
        signed(tampered, by),
        signed(answer(&known.name, &key, NOW + DAY), by),
        json!({ "server_keys": {} }),
        json!({}),
    ] {
        answers(&notary, QUERY, Some(bad.clone()));
        assert!(g.context.keyring.server_keys(&a.name).await.is_err(), "{bad}");
        clock.advance(HOUR);
    }
    answers(&notary, QUERY, Some(signed(good, by)));
    assert!(g.context.keyring.server_keys(&a.name).await.is_ok());

    // A key that is known stays what it is, whatever a notary says of its ID.
    let id = known.context.signing_key.id().to_owned();
    let own = g.context.keyring.server_keys(&known.name).await.unwrap();
    let now = NOW + 6 * HOUR;
    let another = SigningKey::from_seed(id.trim_start_matches("ed25519:"), SEED).unwrap();
    let forged = answer(&known.name, &another, now + 9 * DAY);
    answers(&notary, QUERY, Some(signed(forged, by)));
    answers(&known, KEYS, None);
    clock.advance(2 * DAY);
    let after = g.context.keyring.server_keys(&known.name).await.unwrap();
    assert_eq!(after.current, own.current);

    // Nor is one added or put out of use of which no key vouches that is known.
    let ring = &g.context.keyring;
    let again = async |told: Object| {
        answers(&notary, QUERY, Some(signed(told, by)));
        clock.advance(DAY);
        ring.server_keys(&known.name).await.unwrap()
    };
    let [second, third] = [(); 2].map(|()| SigningKey::generate());
    assert_eq!(*again(answer(&known.name, &second, now + 9 * DAY)).await, *own);
    let mut vouched = answer(&known.name, &second, now + 9 * DAY);
    sign_object(&mut vouched, known.name.as_str(), &known.context.signing_key);
    let after = again(vouched).await;
    assert!(after.current.contains_key(second.id()) && after.current.len() == 1);
    assert_eq!(after.old[&id].1, own.valid_until_ts, "good for what is from its time");
    // While the new key's time lasts nothing takes its place, and the old one does not come back.
    let refused = async |told: Object, wanted: &SigningKey| {
        answers(&notary, QUERY, Some(signed(told, by)));
        clock.advance(HOUR);
        let found = ring.keys_for(&known.name, &[wanted.id(), second.id()], Validity::Now).await.unwrap();
        assert_eq!(found.keys().collect::<Vec<_>>(), [second.id()]);
    };
    let mut next = answer(&known.name, &third, now + 9 * DAY);
    sign_object(&mut next, known.name.as_str(), &second);
    refused(next, &third).await;
    let back = json!({
        "server_name": known.name,
        "valid_until_ts": now + 9 * DAY,
        "verify_keys": {
            second.id(): { "key": second.public_base64() },
            id.as_str(): { "key": known.context.signing_key.public_base64() },
        },
    });
    let mut back = back.as_object().unwrap().clone();
    sign_object(&mut back, known.name.as_str(), &second);
    sign_object(&mut back, known.name.as_str(), &known.context.signing_key);
    refused(back, &known.context.signing_key).await;
}

const SEED: &str = "YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1";
