//! A participant that does as little as it can: its LPDUs are signed before the clock runs, and of what the hub sends it
//! only looks at the number in the content.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::Method;
use isthmus::event::{Lpdu, Object};
use isthmus::federation::authorization_header;
use isthmus::identity::SigningKey;
use ruma::OwnedServerName;
use serde_json::{Value, json};

use super::ear::{self, Ear, LM};
use super::gateway::Gateway;
use super::message;

pub struct Participant {
    name: OwnedServerName,
    user: String,
    key: Arc<SigningKey>,
    http: reqwest::Client,
    /// What came from the hub.
    pub ear: Arc<Ear>,
    sent_at: Mutex<HashMap<u64, Instant>>,
}

impl Participant {
    /// Listens, and joins all rooms of the hub.
    pub async fn join(number: usize, hub: &Gateway) -> Self {
        let name: OwnedServerName = ear::name(number).try_into().unwrap();
        let key = Arc::new(SigningKey::generate());
        let user = format!("@user:{name}");
        let ear = Ear::listen(&name, &key, true).await;
        // The benchmark is about the hub, which is reached without TLS.
        let http = reqwest::Client::builder().build().unwrap();
        let participant = Self { name, user, key, http, ear, sent_at: Mutex::default() };
        for room in &hub.rooms {
            let mut template = message(room, &participant.user, 0);
            template.insert("type".to_owned(), json!("m.room.member"));
            template.insert("state_key".to_owned(), json!(participant.user));
            template.insert("content".to_owned(), json!({ "membership": "join" }));
            let join = Lpdu::build(template, &hub.name, &participant.name, &participant.key).unwrap();
            let uri = format!("{LM}/send_join/join{}", rand::random::<u64>());
            participant.request(hub, Method::POST, &uri, join.json).await;
        }
        participant
    }

    /// Sends batches, one transaction at a time, until the time is up; how many LPDUs.
    pub async fn flood(&self, hub: &Gateway, mut prepared: Vec<Vec<Object>>, until: Instant) -> usize {
        let mut sent = 0;
        while Instant::now() < until {
            let Some(transaction) = prepared.pop() else {
                println!("(a participant had nothing left to send)");
                break;
            };
            sent += transaction.len();
            self.send(hub, transaction).await;
        }
        sent
    }

    /// The same, one batch every so often, remembering when.
    pub async fn pace(
        &self,
        hub: &Gateway,
        mut prepared: Vec<Vec<Object>>,
        (phase, pace): (Duration, Duration),
        until: Instant,
    ) -> usize {
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + phase, pace);
        let mut sent = 0;
        while Instant::now() < until {
            ticks.tick().await;
            let Some(transaction) = prepared.pop() else { break };
            let now = Instant::now();
            for lpdu in &transaction {
                let number = lpdu["content"]["n"].as_u64().unwrap();
                self.sent_at.lock().unwrap().insert(number, now);
            }
            sent += transaction.len();
            self.send(hub, transaction).await;
        }
        sent
    }

    /// Signed transactions, the first to send last; the numbers of each room grow.
    pub fn prepare(&self, hub: &Gateway, batch: usize, count: u64) -> Vec<Vec<Object>> {
        let lpdus: Vec<Object> = (0..count)
            .map(|number| {
                // A whole batch goes to one room, the next one to the next.
                let room = &hub.rooms[(number as usize / batch) % hub.rooms.len()];
                let template = message(room, &self.user, number);
                Lpdu::build(template, &hub.name, &self.name, &self.key).unwrap().json
            })
            .collect();
        let mut transactions: Vec<Vec<Object>> = lpdus.chunks(batch).map(<[Object]>::to_vec).collect();
        transactions.reverse();
        transactions
    }

    async fn send(&self, hub: &Gateway, pdus: Vec<Object>) {
        let uri = format!("{LM}/send/t{}", rand::random::<u64>());
        let mut body = Object::new();
        body.insert("pdus".to_owned(), Value::Array(pdus.into_iter().map(Value::Object).collect()));
        let answer = self.request(hub, Method::PUT, &uri, body).await;
        let failed = answer.get("failed_pdus").and_then(Value::as_object).is_some_and(|failed| !failed.is_empty());
        assert!(!failed, "{answer}");
    }

    async fn request(&self, hub: &Gateway, method: Method, uri: &str, body: Object) -> Value {
        let header = authorization_header(&self.name, &hub.name, &self.key, &method, uri, Some(&body));
        let request = self.http.request(method, format!("{}{uri}", hub.url)).header("authorization", header);
        let answer = request.json(&body).send().await.unwrap();
        let status = answer.status();
        let answer: Value = answer.json().await.unwrap();
        assert!(status.is_success(), "{status} {answer}");
        answer
    }

    /// How long the own messages took to come back, in milliseconds.
    pub fn echoes(&self) -> Vec<f64> {
        let sent_at = self.sent_at.lock().unwrap();
        self.ear.delays(&sent_at, |sender| sender == self.user)
    }

    /// When what was paced was sent.
    pub fn sent_at(&self) -> HashMap<u64, Instant> {
        self.sent_at.lock().unwrap().clone()
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        self.ear.close();
    }
}
