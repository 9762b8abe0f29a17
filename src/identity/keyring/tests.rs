//! The key ring against servers that answer well, badly, often and not at all.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ruma::server_name;

use super::*;
use crate::clock::{Clock, ManualClock};
use crate::event::verify_object;
use crate::store::testing::{both_databases, both_stores};

const NOW: i64 = 1_795_226_877_068;
const DAY: i64 = 24 * 3600 * 1000;

/// Servers with the answers that they give; what is not there cannot be reached.
#[derive(Default)]
struct Servers {
    answers: Mutex<HashMap<OwnedServerName, Object>>,
    fetches: AtomicUsize,
    notaries_asked: AtomicUsize,
}

#[async_trait]
impl KeyFetcher for Servers {
    async fn fetch_keys(&self, server: &ServerName) -> Result<Object, Refusal> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        tokio::task::yield_now().await;
        let answer = self.answers.lock().unwrap().get(server).cloned();
        answer.ok_or_else(|| Refusal::Remote { server: server.to_string(), problem: "down".to_owned() })
    }

    async fn ask_notary(&self, notary: &ServerName, _: &ServerName, _: i64) -> Result<Object, Refusal> {
        self.notaries_asked.fetch_add(1, Ordering::SeqCst);
        Err(Refusal::Remote { server: notary.to_string(), problem: "down".to_owned() })
    }
}

impl Servers {
    fn set(&self, server: &ServerName, answer: Object) {
        self.answers.lock().unwrap().insert(server.to_owned(), answer);
    }

    fn take_down(&self, server: &ServerName) {
        self.answers.lock().unwrap().remove(server);
    }

    fn fetches(&self) -> usize {
        self.fetches.load(Ordering::SeqCst)
    }
}

fn answer(server: &ServerName, keys: &[&SigningKey], old: Value, valid_until_ts: i64) -> Object {
    let mut answer = Object::new();
    answer.insert("server_name".to_owned(), json!(server));
    answer.insert("valid_until_ts".to_owned(), json!(valid_until_ts));
    let current: Object = keys.iter().map(|key| (key.id().to_owned(), json!({ "key": key.public_base64() }))).collect();
    answer.insert("verify_keys".to_owned(), Value::Object(current));
    answer.insert("old_verify_keys".to_owned(), old);
    for key in keys {
        sign_object(&mut answer, server.as_str(), key);
    }
    answer
}

fn keyring(servers: &Arc<Servers>, store: &Store, clock: &Arc<ManualClock>) -> Keyring {
    let own = Arc::new(SigningKey::generate());
    Keyring::new(server_name!("g.example").to_owned(), own, servers.clone(), store.clone(), clock.clone())
}

fn hub() -> &'static ServerName {
    server_name!("hub.example")
}

async fn has(ring: &Keyring, id: &str, validity: Validity) -> bool {
    ring.keys_for(hub(), &[id], validity).await.is_ok_and(|keys| keys.contains_key(id))
}

#[tokio::test]
async fn hc_06_validity_is_capped_and_old_keys_serve_old_events_only() {
    both_stores(|store| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let (key, old) = (SigningKey::generate(), SigningKey::generate());
        let old_keys = json!({ old.id(): { "key": old.public_base64(), "expired_ts": NOW - DAY } });
        servers.set(hub(), answer(hub(), &[&key], old_keys, NOW + 365 * DAY));
        let ring = keyring(&servers, &store, &clock);
        assert!(has(&ring, key.id(), Validity::Now).await);
        assert_eq!(ring.server_keys(hub()).await.unwrap().valid_until_ts, NOW + 7 * DAY);
        assert!(has(&ring, key.id(), Validity::At(NOW + 7 * DAY)).await);
        assert!(!has(&ring, key.id(), Validity::At(NOW + 8 * DAY)).await);
        assert!(has(&ring, old.id(), Validity::At(NOW - 2 * DAY)).await);
        assert!(!has(&ring, old.id(), Validity::At(NOW)).await);
        assert!(!has(&ring, old.id(), Validity::Now).await);
        // Out of date and not to be had: no request is believed, events from its time are.
        clock.advance(8 * DAY);
        servers.take_down(hub());
        assert!(!has(&ring, key.id(), Validity::Now).await);
        assert!(has(&ring, key.id(), Validity::At(NOW)).await);
    })
    .await;
}

#[tokio::test]
async fn a_server_whose_answer_is_out_of_date_is_left_alone_like_one_that_does_not_answer() {
    both_stores(|store| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let key = SigningKey::generate();
        servers.set(hub(), answer(hub(), &[&key], json!({}), NOW - 1));
        let ring = keyring(&servers, &store, &clock);
        for _ in 0..20 {
            assert!(!has(&ring, key.id(), Validity::Now).await);
            assert!(!has(&ring, "ed25519:other", Validity::Now).await);
        }
        assert_eq!(servers.fetches(), 1);
        let error = ring.keys_for(hub(), &[key.id()], Validity::Now).await.unwrap_err();
        assert!(error.to_string().contains("valid_until_ts"), "{error}");
        // What was made while it was valid can be checked all the same.
        assert!(has(&ring, key.id(), Validity::At(NOW - 2)).await);
        servers.set(hub(), answer(hub(), &[&key], json!({}), NOW + DAY));
        clock.advance(RETRY_MS);
        assert!(has(&ring, key.id(), Validity::Now).await);
        assert_eq!(servers.fetches(), 2);
        // The same of one whose answers are valid for a moment only.
        servers.set(hub(), answer(hub(), &[&key], json!({}), NOW + DAY + 2));
        clock.advance(DAY + 1 - RETRY_MS);
        for _ in 0..20 {
            assert!(has(&ring, key.id(), Validity::Now).await);
        }
        clock.advance(2);
        for _ in 0..20 {
            assert!(!has(&ring, key.id(), Validity::Now).await);
        }
        assert_eq!(servers.fetches(), 3);
    })
    .await;
}

#[tokio::test]
async fn hc_07_answers_that_prove_nothing_are_refused() {
    both_stores(|store| async move {
        let (key, other) = (SigningKey::generate(), SigningKey::generate());
        let good = answer(hub(), &[&key], json!({}), NOW + DAY);
        let with = |field: &str, value: Value| {
            let mut bad = good.clone();
            bad.insert(field.to_owned(), value);
            sign_object(&mut bad, hub().as_str(), &key);
            bad
        };
        let mut unsigned = good.clone();
        unsigned.remove("signatures");
        let mut tampered = good.clone();
        tampered.insert("valid_until_ts".to_owned(), json!(NOW + 2 * DAY));
        let both = json!({ key.id(): { "key": key.public_base64() }, other.id(): { "key": other.public_base64() } });
        let many: Object = (0..60).map(|n| (format!("ed25519:k{n}"), json!({ "key": key.public_base64() }))).collect();
        for (bad, reason) in [
            (unsigned, "missing"),
            (tampered, "does not verify"),
            (with("server_name", json!("evil.example")), "evil.example"),
            (with("server_name", json!("x".repeat(60_000))), "server_name"),
            (with("verify_keys", both), other.id()),
            (with("verify_keys", json!({})), "no ed25519 key"),
            (with("verify_keys", json!({ key.id(): { "key": "AAAA" } })), "3 bytes"),
            (with("verify_keys", Value::Object(many)), "60 entries"),
            (with("verify_keys", json!({ format!("ed25519:{}", "a".repeat(100)): { "key": "AAAA" } })), "malformed"),
            (with("valid_until_ts", json!("soon")), "valid_until_ts"),
        ] {
            let servers = Arc::new(Servers::default());
            servers.set(hub(), bad);
            let ring = keyring(&servers, &store, &ManualClock::new(NOW));
            let error = ring.server_keys(hub()).await.unwrap_err();
            assert!(matches!(&error, KeyringError::Rejected { .. }) && error.to_string().contains(reason), "{error}");
            // It is remembered for a while, so it must not hold what the server chose without a bound.
            assert!(error.to_string().len() < 500, "{error}");
        }
    })
    .await;
}

#[tokio::test]
async fn hc_08_what_one_server_says_of_another_overwrites_nothing() {
    both_stores(|store| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let (key, forged) = (SigningKey::generate(), SigningKey::generate());
        let evil = server_name!("evil.example");
        servers.set(hub(), answer(hub(), &[&key], json!({}), NOW + DAY));
        let ring = keyring(&servers, &store, &clock);
        assert!(has(&ring, key.id(), Validity::Now).await);
        // Signed by the key that it brings, and for longer.
        servers.set(evil, answer(hub(), &[&forged], json!({}), NOW + 7 * DAY));
        assert!(matches!(ring.server_keys(evil).await, Err(KeyringError::Rejected { .. })));
        // The hub's name leads to somebody else, who cannot sign as the hub: once its keys are out of date it is asked again.
        let mut unproved = answer(hub(), &[&key], json!({}), NOW + 7 * DAY);
        unproved.insert("verify_keys".to_owned(), json!({ forged.id(): { "key": forged.public_base64() } }));
        servers.set(hub(), unproved);
        clock.advance(2 * DAY);
        assert!(!has(&ring, forged.id(), Validity::Now).await);
        // Neither in memory nor in the database anything has changed: what was signed in its time stays verifiable.
        servers.take_down(hub());
        for ring in [ring, keyring(&servers, &store, &clock)] {
            assert!(has(&ring, key.id(), Validity::At(NOW)).await);
            assert!(!has(&ring, forged.id(), Validity::At(NOW)).await);
        }
    })
    .await;
}

#[tokio::test]
async fn hc_09_leaked_keys_are_refused() {
    both_stores(|store| async move {
        let (servers, key) = (Arc::new(Servers::default()), SigningKey::generate());
        servers.set(hub(), answer(hub(), &[&key], json!({}), NOW + DAY));
        let trust = Trust { denied: BTreeSet::from([key.public_base64()]), ..Trust::default() };
        let own = Arc::new(SigningKey::generate());
        let name = server_name!("g.example").to_owned();
        let ring = Keyring::with_trust(name, own, servers, store, ManualClock::new(NOW), trust);
        assert!(ring.server_keys(hub()).await.unwrap_err().to_string().contains("leaked"));
    })
    .await;
}

#[tokio::test]
async fn hc_10_a_stampede_fetches_once_and_a_dead_server_is_left_alone() {
    both_stores(|store| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let key = SigningKey::generate();
        servers.set(hub(), answer(hub(), &[&key], json!({}), NOW + DAY));
        let ring = keyring(&servers, &store, &clock);
        let wanted = [key.id()];
        let asked = (0..1000).map(|_| ring.keys_for(hub(), &wanted, Validity::Now));
        assert!(futures::future::join_all(asked).await.iter().all(|keys| keys.as_ref().unwrap().len() == 1));
        assert_eq!(servers.fetches(), 1);
        // A key ID that the server does not have makes it be asked again, but not for each request.
        clock.advance(REFETCH_MS);
        for _ in 0..10 {
            assert!(!has(&ring, "ed25519:nobody", Validity::Now).await);
        }
        assert_eq!(servers.fetches(), 2);
        let dead = server_name!("dead.example");
        for _ in 0..10 {
            assert!(matches!(ring.server_keys(dead).await, Err(KeyringError::Unreachable { .. })));
        }
        assert_eq!(servers.fetches(), 3);
        clock.advance(RETRY_MS);
        assert!(ring.server_keys(dead).await.is_err());
        assert_eq!(servers.fetches(), 4);
        // It is left alone for twice as long each time, but not for ever.
        for (minutes, fetches) in [(1, 5), (2, 6), (4, 7), (8, 8), (15, 9), (15, 10)] {
            clock.advance(minutes * 60_000 - 1);
            assert!(ring.server_keys(dead).await.is_err());
            assert_eq!(servers.fetches(), fetches - 1, "{minutes}");
            clock.advance(1);
            assert!(ring.server_keys(dead).await.is_err());
            assert_eq!(servers.fetches(), fetches, "{minutes}");
        }
        // A clock that was set back must not keep it away until then.
        clock.advance(-DAY);
        assert!(ring.server_keys(dead).await.is_err());
        assert_eq!(servers.fetches(), 11);
        // Once it has answered, what failed before does not count.
        servers.set(dead, answer(dead, &[&key], json!({}), NOW + DAY));
        clock.advance(15 * 60_000);
        assert!(ring.server_keys(dead).await.is_ok());
        assert_eq!(servers.fetches(), 12);
    })
    .await;
}

#[tokio::test]
async fn what_an_old_answer_does_not_name_may_be_a_new_key() {
    both_stores(|store| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let (key, new) = (SigningKey::generate(), SigningKey::generate());
        servers.set(hub(), answer(hub(), &[&key], json!({}), NOW + DAY));
        let ring = keyring(&servers, &store, &clock);
        assert!(has(&ring, key.id(), Validity::Now).await);
        servers.set(hub(), answer(hub(), &[&key, &new], json!({}), NOW + DAY));
        let verdict = async |id: &str| {
            let found = ring.keys_for(hub(), &[id], Validity::Now).await.unwrap();
            let event = json!({ "signatures": { hub(): { id: "" } } });
            let event = event.as_object().unwrap();
            (found.len(), ring.knows_better_than(event, hub(), Some(&found)).await.is_ok())
        };
        // Asked a moment ago: the server has no such key. Later it may, and cannot be asked yet; then it is.
        assert_eq!(verdict(new.id()).await, (0, true));
        clock.advance(REFETCH_MS / 2);
        assert_eq!(verdict(new.id()).await, (0, false));
        assert_eq!(verdict(key.id()).await, (1, true));
        clock.advance(REFETCH_MS / 2);
        assert_eq!(verdict(new.id()).await, (1, true));
        assert_eq!(verdict("ed25519:nobody").await, (0, true));
        assert_eq!(servers.fetches(), 2);
    })
    .await;
}

#[tokio::test]
async fn hc_20_of_a_key_that_a_server_itself_names_it_is_asked_at_once() {
    both_stores(|store| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let (key, new) = (SigningKey::generate(), SigningKey::generate());
        servers.set(hub(), answer(hub(), &[&key], json!({}), NOW + DAY));
        let ring = keyring(&servers, &store, &clock);
        assert!(has(&ring, key.id(), Validity::Now).await);
        let found = async |id: &str| {
            let event = json!({ "signatures": { hub(): { id: "" } } });
            let keys = ring.keys_for_own_event(event.as_object().unwrap(), hub(), Validity::At(NOW)).await.unwrap();
            keys[hub()].len()
        };
        clock.advance(FRESH_MS - 1);
        assert_eq!((found(new.id()).await, servers.fetches()), (0, 1), "it was asked a moment ago");
        clock.advance(1);
        let asked = futures::future::join_all((0..50).map(|_| found(new.id()))).await;
        assert_eq!((asked.iter().sum::<usize>(), servers.fetches()), (0, 2), "all wait for one answer");
        servers.set(hub(), answer(hub(), &[&key, &new], json!({}), NOW + DAY));
        clock.advance(10_000);
        assert_eq!((found(key.id()).await, servers.fetches()), (1, 2));
        assert_eq!((found(new.id()).await, servers.fetches()), (1, 3));
    })
    .await;
}

#[tokio::test]
async fn hc_06_an_event_dated_ahead_is_proved_by_a_key_in_use_where_a_hub_gives_it_its_place() {
    both_stores(|store| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let (key, old) = (SigningKey::generate(), SigningKey::generate());
        let old_keys = json!({ old.id(): { "key": old.public_base64(), "expired_ts": NOW - DAY } });
        servers.set(hub(), answer(hub(), &[&key], old_keys, NOW + DAY));
        let ring = keyring(&servers, &store, &clock);
        assert!(has(&ring, key.id(), Validity::InLog(NOW + 30 * DAY)).await);
        assert!(has(&ring, key.id(), Validity::InLog(i64::MAX)).await);
        assert!(has(&ring, old.id(), Validity::InLog(NOW - 2 * DAY)).await);
        // A key out of use is in use no more by what an event says.
        assert!(!has(&ring, old.id(), Validity::InLog(NOW + 30 * DAY)).await);
        assert!(!has(&ring, old.id(), Validity::InLog(NOW)).await);
    })
    .await;
}

#[tokio::test]
async fn a_right_signature_by_a_key_of_another_time_is_told_from_a_forged_one() {
    both_stores(|store| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let key = SigningKey::generate();
        servers.set(hub(), answer(hub(), &[&key], json!({}), NOW + DAY));
        let ring = keyring(&servers, &store, &clock);
        let (far, signers) = (NOW + 30 * DAY, [hub().to_owned()]);
        let mut event = Object::from_iter([("origin_server_ts".to_owned(), json!(far))]);
        sign_object(&mut event, hub().as_str(), &key);
        let mut forged = event.clone();
        forged.insert("more".to_owned(), json!(true));
        for _ in 0..5 {
            // No newer answer could say otherwise: the server is not asked again, and there is a verdict on the event.
            clock.advance(REFETCH_MS / 2);
            let found = ring.keys_for_event(&event, &signers, Validity::At(far)).await.unwrap();
            assert!(found[hub()].is_empty());
            ring.knows_better_than(&event, hub(), found.get(hub())).await.unwrap();
            let verdict = async |event: &Object| {
                let is_right = |keys: &VerifyKeys| verify_object(event, hub().as_str(), &keys[hub()]).is_ok();
                ring.out_of_time(event, far, &found, is_right).await
            };
            let refusal = verdict(&event).await.unwrap();
            let text = refusal.to_string();
            assert_eq!(refusal.code(), "key_out_of_time");
            for named in [hub().as_str(), key.id(), &far.to_string(), &(NOW + DAY).to_string()] {
                assert!(text.contains(named), "{text} does not name {named}");
            }
            assert_eq!(verdict(&forged).await, None);
        }
        assert_eq!(servers.fetches(), 1);
    })
    .await;
}

#[tokio::test]
async fn what_a_server_answers_is_learned_also_when_nobody_waits_for_it() {
    both_stores(|store| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let key = SigningKey::generate();
        servers.set(hub(), answer(hub(), &[&key], json!({}), NOW + DAY));
        let ring = keyring(&servers, &store, &clock);
        // Asked, and given up at once.
        assert!(ring.server_keys(hub()).now_or_never().is_none());
        while ring.inner.lookups.get(hub()).await.is_none() {
            tokio::task::yield_now().await;
        }
        assert!(has(&ring, key.id(), Validity::Now).await);
        assert_eq!(servers.fetches(), 1);
    })
    .await;
}

#[tokio::test]
async fn keys_outlive_a_restart_a_rotation_and_their_server() {
    both_databases(|url| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let (first, second) = (SigningKey::generate(), SigningKey::generate());
        servers.set(hub(), answer(hub(), &[&first], json!({}), NOW + DAY));
        let store = Store::open(&url).await.unwrap();
        assert!(has(&keyring(&servers, &store, &clock), first.id(), Validity::Now).await);
        // Rotated, and the server does not list the old key.
        clock.advance(2 * DAY);
        servers.set(hub(), answer(hub(), &[&second], json!({}), clock.now_ms() + DAY));
        let ring = keyring(&servers, &store, &clock);
        assert!(has(&ring, second.id(), Validity::Now).await);
        assert!(has(&ring, first.id(), Validity::At(NOW)).await);
        assert!(!has(&ring, first.id(), Validity::At(NOW + 2 * DAY)).await);
        store.close().await;
        servers.take_down(hub());
        let store = Store::open(&url).await.unwrap();
        let ring = keyring(&servers, &store, &clock);
        assert!(has(&ring, second.id(), Validity::Now).await);
        assert!(has(&ring, first.id(), Validity::At(NOW)).await);
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn our_own_answer_is_one_that_a_key_ring_takes() {
    both_stores(|store| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let ours = keyring(&servers, &store, &clock);
        let g = server_name!("g.example");
        let checked = ServerKeys::check(&ours.own_keys(), g, NOW, &BTreeSet::new()).unwrap();
        assert!(!checked.linearized && checked.valid_until_ts == NOW + OWN_VALIDITY_MS);
        let id = ours.inner.own.id();
        assert_eq!(ours.keys_for(g, &[id], Validity::Now).await.unwrap().len(), 1);
        assert_eq!(servers.fetches(), 0);
    })
    .await;
}

#[tokio::test]
async fn our_own_key_is_published_as_an_old_one_after_a_new_one_was_made() {
    both_stores(|store| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let first = keyring(&servers, &store, &clock);
        first.remember_own().await.unwrap();
        clock.advance(DAY);
        let second = keyring(&servers, &store, &clock);
        second.remember_own().await.unwrap();
        let (g, before) = (server_name!("g.example"), first.inner.own.id());
        let id = [before];
        assert_eq!(second.keys_for(g, &id, Validity::At(NOW)).await.unwrap().len(), 1);
        assert!(second.keys_for(g, &id, Validity::At(NOW + 2 * DAY)).await.unwrap().is_empty());
        assert!(second.keys_for(g, &id, Validity::Now).await.unwrap().is_empty());
        // It expired when it was first missed, and stays so.
        clock.advance(DAY);
        let third = keyring(&servers, &store, &clock);
        third.remember_own().await.unwrap();
        let published = ServerKeys::check(&third.own_keys(), g, clock.now_ms(), &BTreeSet::new()).unwrap();
        assert_eq!(published.old.get(before).map(|(_, expired_ts)| *expired_ts), Some(NOW + DAY));
        assert_eq!((published.current.len(), published.old.len()), (1, 2));
    })
    .await;
}

#[tokio::test]
async fn no_notary_is_asked_for_those_who_ask_for_others() {
    both_stores(|store| async move {
        let (servers, clock) = (Arc::new(Servers::default()), ManualClock::new(NOW));
        let own = Arc::new(SigningKey::generate());
        let trust = Trust { notaries: vec![server_name!("n.example").to_owned()], ..Trust::default() };
        let name = server_name!("g.example").to_owned();
        let ring = Keyring::with_trust(name, own, servers.clone(), store, clock.clone(), trust);
        let query = KeyQuery { server: hub().to_owned(), keys: BTreeMap::new(), minimum_valid_until_ts: NOW };
        for _ in 0..20 {
            if ring.would_ask_for(&query).await.unwrap() {
                ring.refresh(&query).await;
            }
        }
        assert_eq!((servers.fetches(), servers.notaries_asked.load(Ordering::SeqCst)), (1, 0));
        // That it is away for others keeps nobody from finding it.
        assert!(ring.server_keys(hub()).await.is_err());
        assert_eq!((servers.fetches(), servers.notaries_asked.load(Ordering::SeqCst)), (2, 1));
    })
    .await;
}

#[test]
fn the_recorded_answers_of_peers_are_taken() {
    let recorded: HashMap<OwnedServerName, Object> =
        serde_json::from_str(include_str!("../../../tests/vectors/eigen-keys.json")).unwrap();
    assert!(!recorded.is_empty());
    for (server, answer) in recorded {
        let keys = ServerKeys::check(&answer, &server, NOW, &BTreeSet::new()).unwrap();
        assert!(keys.linearized && keys.current.len() == 1);
    }
}
