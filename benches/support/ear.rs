//! What a peer of the gateway listens with: it shows its keys, takes transactions, and only looks at the number in the
//! content of what comes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use axum::extract::State;
use axum::routing::{get, put};
use axum::{Json, Router};
use isthmus::event::{Object, sign_object};
use isthmus::identity::SigningKey;
use ruma::ServerName;
use serde_json::value::RawValue;
use serde_json::{Value, json};

/// How many peers there can be; the gateway is told where all of them are.
pub const MOST: usize = 8;
/// Where an LM server's endpoints are.
pub const LM: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";

/// The name of the peer with this number. LM knows no names that are addresses.
pub fn name(number: usize) -> String {
    format!("localhost:{}", 28_100 + number)
}

/// Where the server of a name listens.
pub fn address(name: &str) -> String {
    name.replace("localhost", "127.0.0.1")
}

#[derive(Default)]
struct Heard {
    /// Of each sender and room, the numbers in the order of their coming.
    numbers: HashMap<(String, String), Vec<(u64, Instant)>>,
    count: usize,
    /// What has no number.
    others: Vec<Object>,
}

pub struct Ear {
    keys: Object,
    heard: Mutex<Heard>,
    listener: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

/// What of the messages that came was wrong.
#[derive(Default, Clone, Copy)]
pub struct Order {
    /// How many different messages came.
    pub different: usize,
    /// How many came again.
    pub doubled: usize,
    /// How many came before one with a smaller number.
    pub misplaced: usize,
}

impl Order {
    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            different: self.different + other.different,
            doubled: self.doubled + other.doubled,
            misplaced: self.misplaced + other.misplaced,
        }
    }
}

impl Ear {
    /// Listens at the name's address.
    pub async fn listen(name: &ServerName, key: &SigningKey, linearized: bool) -> Arc<Self> {
        let mut keys = json!({
            "server_name": name, "valid_until_ts": 4_000_000_000_000_u64, "old_verify_keys": {},
            "verify_keys": { key.id(): { "key": key.public_base64() } },
        });
        if linearized {
            keys["m.linearized"] = json!(true);
        }
        let mut keys = keys.as_object().cloned().unwrap();
        sign_object(&mut keys, name.as_str(), key);
        let ear = Arc::new(Self { keys, heard: Mutex::default(), listener: Mutex::default() });
        let routes = Router::new()
            .route("/_matrix/key/v2/server", get(|State(ear): State<Arc<Self>>| async move { Json(ear.keys.clone()) }))
            .route(&format!("{LM}/send/{{txn}}"), put(hear))
            .route("/_matrix/federation/v1/send/{txn}", put(hear))
            .layer(axum::extract::DefaultBodyLimit::disable())
            .with_state(ear.clone());
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(address(name.as_str()).parse().unwrap()).unwrap();
        let listener = socket.listen(64).unwrap();
        let task = tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
        *ear.listener.lock().unwrap() = Some(task);
        ear
    }

    /// Stops listening.
    pub fn close(&self) {
        if let Some(listener) = self.listener.lock().unwrap().take() {
            listener.abort();
        }
    }

    /// How many messages came, of all senders.
    pub fn received(&self) -> usize {
        self.heard.lock().unwrap().count
    }

    /// When the last message came.
    pub fn last(&self) -> Option<Instant> {
        let heard = self.heard.lock().unwrap();
        heard.numbers.values().filter_map(|numbers| numbers.last()).map(|(_, at)| *at).max()
    }

    /// What came without a number.
    pub fn others(&self) -> Vec<Object> {
        self.heard.lock().unwrap().others.clone()
    }

    /// What of all that came was wrong.
    pub fn order(&self) -> Order {
        let mut order = Order::default();
        for numbers in self.heard.lock().unwrap().numbers.values() {
            order.misplaced += numbers.windows(2).filter(|pair| pair[0].0 > pair[1].0).count();
            let mut sorted: Vec<u64> = numbers.iter().map(|(number, _)| *number).collect();
            sorted.sort_unstable();
            sorted.dedup();
            order.different += sorted.len();
            order.doubled += numbers.len() - sorted.len();
        }
        order
    }

    /// How long after their sending messages came, in milliseconds, of the senders that are meant.
    pub fn delays(&self, sent_at: &HashMap<u64, Instant>, is_meant: impl Fn(&str) -> bool) -> Vec<f64> {
        let heard = self.heard.lock().unwrap();
        let numbers = heard.numbers.iter().filter(|((sender, _), _)| is_meant(sender)).flat_map(|(_, numbers)| numbers);
        numbers.filter_map(|(number, at)| Some(at.duration_since(*sent_at.get(number)?).as_secs_f64() * 1e3)).collect()
    }
}

#[derive(serde::Deserialize)]
struct Transaction {
    pdus: Vec<Box<RawValue>>,
}

#[derive(serde::Deserialize)]
struct Pdu {
    room_id: String,
    sender: String,
    content: Content,
}

#[derive(serde::Deserialize)]
struct Content {
    n: Option<u64>,
}

/// What is answered is right in either protocol: nothing failed.
async fn hear(State(ear): State<Arc<Ear>>, Json(transaction): Json<Transaction>) -> Json<Value> {
    let mut heard = ear.heard.lock().unwrap();
    let now = Instant::now();
    for raw in transaction.pdus {
        let pdu: Pdu = serde_json::from_str(raw.get()).unwrap();
        let Some(number) = pdu.content.n else {
            heard.others.push(serde_json::from_str(raw.get()).unwrap());
            continue;
        };
        heard.count += 1;
        heard.numbers.entry((pdu.sender, pdu.room_id)).or_default().push((number, now));
    }
    Json(json!({ "failed_pdus": {}, "pdus": {} }))
}
