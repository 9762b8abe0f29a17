//! A homeserver in a graph room of the gateway's that does as little as it can: its transactions are built, signed and
//! written before the clock runs, one of them is in flight at a time, and of what comes it only looks at the number.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Method;
use isthmus::event::Object;
use isthmus::federation::authorization_header;
use isthmus::identity::SigningKey;
use ruma::canonical_json::try_from_json_map;
use ruma::room_version_rules::RoomVersionRules;
use ruma::serde::Base64;
use ruma::signatures::{KeyPair, Signature, hash_and_sign_event, reference_hash};
use ruma::{CanonicalJsonObject, OwnedServerName};
use serde_json::{Value, json};

use super::ear::{self, Ear};
use super::gateway::Gateway;
use super::message;

/// The version of the rooms.
const VERSION: &str = "12";
const RULES: RoomVersionRules = RoomVersionRules::V12;

pub struct Homeserver {
    name: OwnedServerName,
    user: String,
    key: Arc<SigningKey>,
    http: reqwest::Client,
    room: String,
    /// What came from the gateway.
    pub ear: Arc<Ear>,
    /// What its next event follows, and how deep that is.
    tip: (String, i64),
    /// What allows its messages.
    auth_events: Vec<String>,
}

/// A transaction as it goes over the wire.
pub struct Transaction {
    uri: String,
    authorization: String,
    body: Vec<u8>,
    numbers: Vec<u64>,
}

struct Signer<'a>(&'a SigningKey);

impl KeyPair for Signer<'_> {
    fn sign(&self, message: &[u8]) -> Signature {
        let signature = Base64::<ruma::serde::base64::Standard>::parse(self.0.sign(message)).unwrap();
        Signature::new(self.0.id().try_into().unwrap(), signature.into_inner())
    }
}

impl Homeserver {
    /// Listens, and joins a room of the gateway.
    pub async fn join(number: usize, gateway: &Gateway, room: &str) -> Self {
        let name: OwnedServerName = ear::name(number).try_into().unwrap();
        let key = Arc::new(SigningKey::generate());
        let ear = Ear::listen(&name, &key, false).await;
        let http = reqwest::Client::builder().build().unwrap();
        let user = format!("@user:{name}");
        let mut server = Self {
            name,
            user,
            key,
            http,
            room: room.to_owned(),
            ear,
            tip: (String::new(), 0),
            auth_events: Vec::new(),
        };
        server.handshake(gateway).await;
        server
    }

    async fn handshake(&mut self, gateway: &Gateway) {
        let (room, user) = (self.room.clone(), self.user.clone());
        let uri = format!("/_matrix/federation/v1/make_join/{room}/{user}?ver={VERSION}");
        let header = authorization_header(&self.name, &gateway.name, &self.key, &Method::GET, &uri, None);
        let request = self.http.get(format!("{}{uri}", gateway.url)).header("authorization", header);
        let made: Value = request.send().await.unwrap().json().await.unwrap();
        assert_eq!(made["room_version"], VERSION, "{made}");
        let (join, event) = self.sign(made["event"].as_object().cloned().unwrap());
        let uri = format!("/_matrix/federation/v2/send_join/{room}/{join}");
        let body = serde_json::to_value(&event).unwrap().as_object().cloned().unwrap();
        let answer = self.put(gateway, &self.sealed(gateway, uri, &body, Vec::new())).await;
        let levels = answer["state"].as_array().unwrap().iter().find(|event| event["type"] == "m.room.power_levels");
        let levels = try_from_json_map(levels.unwrap().as_object().cloned().unwrap()).unwrap();
        self.auth_events = vec![id_of(&levels), join.clone()];
        self.tip = (join, made["event"]["depth"].as_i64().unwrap());
    }

    /// Waits for the member event of the user across, so that what comes next follows it.
    pub async fn meet(&mut self, user_part: &str) {
        loop {
            let others = self.ear.others();
            let sent_by = |event: &&Object| event["sender"].as_str().is_some_and(|sender| sender.contains(user_part));
            if let Some(event) = others.iter().find(sent_by) {
                let event = try_from_json_map(event.clone()).unwrap();
                self.tip = (id_of(&event), event["depth"].as_integer().unwrap().into());
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Transactions, the first to send last: a chain of messages that goes on from what was prepared before.
    pub fn prepare(&mut self, gateway: &Gateway, batch: usize, numbers: std::ops::Range<u64>) -> Vec<Transaction> {
        let mut events = Vec::new();
        for number in numbers {
            let mut event = message(&self.room, &self.user, number);
            let depth = self.tip.1 + 1;
            event.insert("depth".to_owned(), json!(depth));
            event.insert("prev_events".to_owned(), json!([self.tip.0]));
            event.insert("auth_events".to_owned(), json!(self.auth_events));
            let (id, event) = self.sign(event);
            self.tip = (id, depth);
            events.push((number, serde_json::to_value(event).unwrap()));
        }
        let transaction = |events: &[(u64, Value)]| {
            let uri = format!("/_matrix/federation/v1/send/t{}", rand::random::<u64>());
            let pdus: Vec<&Value> = events.iter().map(|(_, event)| event).collect();
            let body = json!({ "origin": self.name, "origin_server_ts": 1_700_000_000_000_u64, "pdus": pdus });
            let numbers = events.iter().map(|(number, _)| *number).collect();
            self.sealed(gateway, uri, body.as_object().unwrap(), numbers)
        };
        let mut transactions: Vec<_> = events.chunks(batch).map(transaction).collect();
        transactions.reverse();
        transactions
    }

    /// Sends transactions, one at a time, until the time is up or there are no more; how many events.
    pub async fn flood(&self, gateway: &Gateway, mut prepared: Vec<Transaction>, until: Instant) -> usize {
        let mut sent = 0;
        while Instant::now() < until {
            let Some(transaction) = prepared.pop() else { break };
            sent += transaction.numbers.len();
            self.send(gateway, &transaction).await;
        }
        sent
    }

    /// The same, one transaction every so often; when each event was sent.
    pub async fn pace(
        &self,
        gateway: &Gateway,
        mut prepared: Vec<Transaction>,
        pace: Duration,
        until: Instant,
    ) -> HashMap<u64, Instant> {
        let mut ticks = tokio::time::interval(pace);
        let mut sent_at = HashMap::new();
        while Instant::now() < until {
            ticks.tick().await;
            let Some(transaction) = prepared.pop() else { break };
            let now = Instant::now();
            sent_at.extend(transaction.numbers.iter().map(|number| (*number, now)));
            self.send(gateway, &transaction).await;
        }
        sent_at
    }

    async fn send(&self, gateway: &Gateway, transaction: &Transaction) {
        let answer = self.put(gateway, transaction).await;
        let results = answer["pdus"].as_object().unwrap();
        assert_eq!(results.len(), transaction.numbers.len(), "{answer}");
        assert!(results.values().all(|result| result.get("error").is_none()), "{answer}");
    }

    async fn put(&self, gateway: &Gateway, transaction: &Transaction) -> Value {
        let request = self.http.put(format!("{}{}", gateway.url, transaction.uri));
        let request = request.header("authorization", &transaction.authorization);
        let request = request.header("content-type", "application/json").body(transaction.body.clone());
        let answer = request.send().await.unwrap();
        let status = answer.status();
        let answer: Value = answer.json().await.unwrap();
        assert!(status.is_success(), "{status} {answer}");
        answer
    }

    fn sealed(&self, gateway: &Gateway, uri: String, body: &Object, numbers: Vec<u64>) -> Transaction {
        let authorization = authorization_header(&self.name, &gateway.name, &self.key, &Method::PUT, &uri, Some(body));
        Transaction { uri, authorization, body: serde_json::to_vec(body).unwrap(), numbers }
    }

    fn sign(&self, event: Object) -> (String, CanonicalJsonObject) {
        let mut event = try_from_json_map(event).unwrap();
        hash_and_sign_event(self.name.as_str(), &Signer(&self.key), &mut event, &RULES.redaction).unwrap();
        (id_of(&event), event)
    }
}

impl Drop for Homeserver {
    fn drop(&mut self) {
        self.ear.close();
    }
}

fn id_of(event: &CanonicalJsonObject) -> String {
    format!("${}", reference_hash(event, &RULES).unwrap())
}
