//! A participant that does as little as it can: its LPDUs are signed before the clock runs, and of what the hub sends it
//! only looks at the number in the content.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::routing::{get, put};
use axum::{Json, Router};
use http::Method;
use isthmus::event::{Lpdu, Object, sign_object};
use isthmus::federation::authorization_header;
use isthmus::identity::SigningKey;
use ruma::{OwnedServerName, ServerName};
use serde_json::{Value, json};

use super::hub::Hub;
use super::message;

/// How many there can be; the hub is told all their addresses.
pub const MOST: usize = 8;
const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";
/// How many LPDUs are signed at once, out of the clock's sight.
const PREPARED: u64 = 60_000;

/// The address of the participant with this number.
pub fn address(number: usize) -> String {
    format!("127.0.0.1:{}", 28_100 + number)
}

/// What came from the hub.
#[derive(Default)]
struct Received {
    /// Of each sender and room, the numbers in the order of their coming.
    numbers: HashMap<(String, String), Vec<u64>>,
    count: usize,
    sent_at: HashMap<u64, Instant>,
    echoes: Vec<f64>,
}

pub struct Participant {
    name: OwnedServerName,
    user: String,
    key: Arc<SigningKey>,
    http: reqwest::Client,
    received: Arc<Mutex<Received>>,
    listener: tokio::task::JoinHandle<()>,
}

impl Participant {
    /// Listens, and joins all rooms of the hub.
    pub async fn join(number: usize, hub: &Hub) -> Self {
        let name: OwnedServerName = address(number).try_into().unwrap();
        let key = Arc::new(SigningKey::generate());
        let received = Arc::new(Mutex::new(Received::default()));
        let user = format!("@user:{name}");
        let listener = listen(&name, &key, &user, &received).await;
        // The benchmark is about the hub, which is reached without TLS.
        let http = reqwest::Client::builder().build().unwrap();
        let participant = Self { name, user, key, http, received, listener };
        for room in &hub.rooms {
            let mut template = message(room, &participant.user, 0);
            template.insert("type".to_owned(), json!("m.room.member"));
            template.insert("state_key".to_owned(), json!(participant.user));
            template.insert("content".to_owned(), json!({ "membership": "join" }));
            let join = Lpdu::build(template, &hub.name, &participant.name, &participant.key).unwrap();
            let uri = format!("{UNSTABLE}/send_join/join{}", rand::random::<u64>());
            participant.request(hub, Method::POST, &uri, join.json).await;
        }
        participant
    }

    /// Sends batches, one transaction at a time, until the time is up; how many LPDUs.
    pub async fn flood(&self, hub: &Hub, mut prepared: Vec<Vec<Object>>, until: Instant) -> usize {
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
    pub async fn pace(&self, hub: &Hub, mut prepared: Vec<Vec<Object>>, pace: Duration, until: Instant) -> usize {
        let mut ticks = tokio::time::interval(pace);
        let mut sent = 0;
        while Instant::now() < until {
            ticks.tick().await;
            let Some(transaction) = prepared.pop() else { break };
            let now = Instant::now();
            for lpdu in &transaction {
                let number = lpdu["content"]["n"].as_u64().unwrap();
                self.received.lock().unwrap().sent_at.insert(number, now);
            }
            sent += transaction.len();
            self.send(hub, transaction).await;
        }
        sent
    }

    /// Signed transactions, the first to send last; the numbers of each room grow.
    pub fn prepare(&self, hub: &Hub, batch: usize) -> Vec<Vec<Object>> {
        let most = if batch == 1 { PREPARED / 4 } else { PREPARED };
        let lpdus: Vec<Object> = (0..most)
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

    async fn send(&self, hub: &Hub, pdus: Vec<Object>) {
        let uri = format!("{UNSTABLE}/send/t{}", rand::random::<u64>());
        let mut body = Object::new();
        body.insert("pdus".to_owned(), Value::Array(pdus.into_iter().map(Value::Object).collect()));
        let answer = self.request(hub, Method::PUT, &uri, body).await;
        let failed = answer.get("failed_pdus").and_then(Value::as_object).is_some_and(|failed| !failed.is_empty());
        assert!(!failed, "{answer}");
    }

    async fn request(&self, hub: &Hub, method: Method, uri: &str, body: Object) -> Value {
        let header = authorization_header(&self.name, &hub.name, &self.key, &method, uri, Some(&body));
        let request = self.http.request(method, format!("{}{uri}", hub.url)).header("authorization", header);
        let answer = request.json(&body).send().await.unwrap();
        let status = answer.status();
        let answer: Value = answer.json().await.unwrap();
        assert!(status.is_success(), "{status} {answer}");
        answer
    }

    /// How many messages came, of all senders.
    pub fn received(&self) -> usize {
        self.received.lock().unwrap().count
    }

    /// How many different messages came, how many came again, and how many came before one with a smaller number.
    pub fn check(&self) -> (usize, usize, usize) {
        let received = self.received.lock().unwrap();
        let (mut different, mut doubled, mut misplaced) = (0, 0, 0);
        for numbers in received.numbers.values() {
            misplaced += numbers.windows(2).filter(|pair| pair[0] > pair[1]).count();
            let mut sorted = numbers.clone();
            sorted.sort_unstable();
            sorted.dedup();
            different += sorted.len();
            doubled += numbers.len() - sorted.len();
        }
        (different, doubled, misplaced)
    }

    /// How long the own messages took to come back, in milliseconds.
    pub fn echoes(&self) -> Vec<f64> {
        self.received.lock().unwrap().echoes.clone()
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

#[derive(Clone)]
struct Ear {
    keys: Arc<Object>,
    user: String,
    received: Arc<Mutex<Received>>,
}

async fn listen(
    name: &ServerName,
    key: &SigningKey,
    user: &str,
    received: &Arc<Mutex<Received>>,
) -> tokio::task::JoinHandle<()> {
    let json = json!({
        "server_name": name, "valid_until_ts": 4_000_000_000_000_u64, "old_verify_keys": {}, "m.linearized": true,
        "verify_keys": { key.id(): { "key": key.public_base64() } },
    });
    let mut keys = json.as_object().cloned().unwrap();
    sign_object(&mut keys, name.as_str(), key);
    let ear = Ear { keys: Arc::new(keys), user: user.to_owned(), received: received.clone() };
    let routes = Router::new()
        .route("/_matrix/key/v2/server", get(|State(ear): State<Ear>| async move { Json((*ear.keys).clone()) }))
        .route(&format!("{UNSTABLE}/send/{{txn}}"), put(hear))
        .layer(axum::extract::DefaultBodyLimit::disable())
        .with_state(ear);
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(name.as_str().parse().unwrap()).unwrap();
    let listener = socket.listen(64).unwrap();
    tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() })
}

#[derive(serde::Deserialize)]
struct Heard {
    pdus: Vec<HeardPdu>,
}

#[derive(serde::Deserialize)]
struct HeardPdu {
    room_id: String,
    sender: String,
    content: HeardContent,
}

#[derive(serde::Deserialize)]
struct HeardContent {
    n: Option<u64>,
}

async fn hear(State(ear): State<Ear>, Json(heard): Json<Heard>) -> Json<Value> {
    let mut received = ear.received.lock().unwrap();
    let now = Instant::now();
    for pdu in heard.pdus {
        let Some(number) = pdu.content.n else { continue };
        if pdu.sender == ear.user
            && let Some(sent_at) = received.sent_at.remove(&number)
        {
            received.echoes.push((now - sent_at).as_secs_f64() * 1e3);
        }
        received.count += 1;
        received.numbers.entry((pdu.sender, pdu.room_id)).or_default().push(number);
    }
    Json(json!({ "failed_pdus": {} }))
}
