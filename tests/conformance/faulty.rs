//! A server with one fault. It is isthmus, with somebody between it and the suite who has its key: on the way in and back, where answers
//! are replaced or events are sent on that the server would not have taken, and on the way out, where what the server sends is changed and
//! signed anew.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http::request::Parts;
use isthmus::conformance::{Options, Report, Role, catalogue, run_on};
use isthmus::event::{Object, Redaction, VerifyKey, canonical_json, content_hash, redact, reference_hash, sign_object};
use isthmus::identity::SigningKey;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::world::{SECOND, SUITE, options, room};
use crate::lm::world::{Node, World};

/// A request as the fault sees it.
pub struct Seen {
    pub method: String,
    pub uri: String,
    pub body: Value,
    /// How many requests of the check came before it.
    pub nth: usize,
    /// The check that is being run.
    pub check: String,
}

/// An answer.
pub struct Reply {
    pub status: u16,
    pub kind: &'static str,
    pub body: Value,
    pub raw: Option<Vec<u8>>,
}

impl Reply {
    pub fn set(&mut self, status: u16, body: Value) {
        (self.status, self.body) = (status, body);
    }
}

/// What is wrong with the server.
#[derive(Clone, Copy)]
pub enum Fault {
    /// The answers to requests whose path has this in it are changed.
    Answers(&'static str, fn(&Seen, &mut Reply, &SigningKey)),
    /// GETs are let in only if they are signed without content.
    SignedWithoutContent,
    /// LPDUs that are bad on purpose are finished and sent on.
    TakesBad,
    /// LPDUs are answered with 200 and forgotten.
    Swallows,
    /// LPDUs of the first transaction of the check are sent on a second time, as other events.
    Repeats,
    /// What is sent on is changed; false drops it.
    Sends(fn(&mut Outgoing<'_>) -> bool),
    /// Messages that are sent on are changed, and what follows them follows them still.
    Events(fn(&mut Object, &str, &SigningKey)),
    /// A user of the hub's own says something once the suite has joined, and that is changed in the same way.
    Own(fn(&mut Object, &str, &SigningKey)),
}

/// A request of the server's to the suite.
pub struct Outgoing<'a> {
    pub uri: &'a mut String,
    pub body: &'a mut Value,
    pub to: &'a mut String,
    pub key: &'a SigningKey,
    pub hub: &'a str,
    /// How many requests of the check went out before it.
    pub nth: usize,
    /// Whether it is to be signed wrongly.
    pub forged: bool,
    /// Whether it is to be sent twice, the second time as another transaction.
    pub twice: bool,
    /// Whether the server is told that it has arrived before it has.
    pub early: bool,
}

impl Outgoing<'_> {
    /// Whether it is a request to this endpoint.
    pub fn is(&self, endpoint: &str) -> bool {
        self.uri.contains(&format!("/{endpoint}/"))
    }
}

pub fn is_message(event: &Object) -> bool {
    event.get("type").and_then(Value::as_str).is_some_and(|kind| kind.starts_with("im.isthmus.conformance."))
}

/// Hashes and signs what a hub has changed.
pub fn finish(event: &mut Object, hub: &str, key: &SigningKey) {
    let hash = content_hash(event);
    event["hashes"]["sha256"] = json!(hash);
    resign(event, hub, key);
}

pub fn resign(event: &mut Object, hub: &str, key: &SigningKey) {
    let mut signed = redact(event, Redaction::Draft);
    signed.remove("signatures");
    event["signatures"][hub] = json!({ key.id(): key.sign(&canonical_json(&signed)) });
}

/// Faults, and during which checks they are there.
pub type Faults = Vec<(&'static str, Fault)>;

struct Between {
    faults: Faults,
    /// In tiny runs a fault is there all the time.
    always: bool,
    current: Mutex<String>,
    asked: AtomicUsize,
    sent: AtomicUsize,
    suite: SocketAddr,
    key: Arc<SigningKey>,
    name: String,
    /// The IDs of events that were changed, and those that they have now.
    renamed: Mutex<BTreeMap<String, String>>,
    /// A user of the hub's is to speak, and has spoken.
    speak: Notify,
    spoken: Notify,
}

impl Between {
    fn fault(&self) -> (String, Vec<Fault>) {
        let current = self.current.lock().unwrap().clone();
        let there = self.faults.iter().filter(|(check, _)| self.always || *check == current).map(|(_, fault)| *fault);
        let there = there.collect();
        (current, there)
    }

    async fn asked(&self, request: Request, next: Next) -> Response {
        let (head, body) = request.into_parts();
        let bytes = to_bytes(body, 64 << 20).await.unwrap();
        let (check, faults) = self.fault();
        let seen = Seen {
            method: head.method.to_string(),
            uri: head.uri.to_string(),
            body: serde_json::from_slice(&bytes).unwrap_or_default(),
            nth: self.asked.fetch_add(1, Ordering::SeqCst),
            check,
        };
        let pdus = || seen.body["pdus"].as_array().into_iter().flatten().filter_map(Value::as_object);
        for fault in &faults {
            match fault {
                Fault::SignedWithoutContent if head.method == "GET" && self.signs_content(&head).await => {
                    let body = json!({ "errcode": "M_FORBIDDEN", "error": "the signature is not right" });
                    return answered(Reply { status: 401, kind: "application/json", body, raw: None });
                }
                Fault::TakesBad if seen.body.to_string().contains(&format!("{}.bad.", seen.check)) => {
                    let bad: Vec<Object> = pdus().cloned().collect();
                    self.append(bad).await;
                    return answered(Reply { status: 200, kind: "application/json", body: json!({}), raw: None });
                }
                // Before the first event that the suite waits for.
                Fault::Own(_) if seen.check == "LM-M-020" && seen.nth == 0 => {
                    self.speak.notify_one();
                    self.spoken.notified().await;
                }
                Fault::Swallows if pdus().next().is_some() => {
                    return answered(Reply { status: 200, kind: "application/json", body: json!({}), raw: None });
                }
                _ => {}
            }
        }
        let response = next.run(Request::from_parts(head, Body::from(bytes))).await;
        let status = response.status().as_u16();
        let text = to_bytes(response.into_body(), 64 << 20).await.unwrap();
        let mut reply = Reply {
            status,
            kind: "application/json",
            body: serde_json::from_slice(&text).unwrap_or_default(),
            raw: None,
        };
        let (_, faults) = self.fault();
        for fault in &faults {
            match fault {
                Fault::Answers(path, spoil) if seen.uri.contains(path) => spoil(&seen, &mut reply, &self.key),
                Fault::Repeats if seen.nth == 0 => self.append(pdus().cloned().collect()).await,
                _ => {}
            }
        }
        answered(reply)
    }

    /// Whether the suite has signed a request that has no body with an empty object as content.
    async fn signs_content(&self, head: &Parts) -> bool {
        let header = head.headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let quoted = |name: &str| header.split_once(&format!("{name}=\""))?.1.split('"').next();
        let (Some(origin), Some(id), Some(sig)) = (quoted("origin"), quoted("key"), quoted("sig")) else {
            return false;
        };
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let keys = client.get(format!("http://{}/_matrix/key/v2/server", self.suite)).header("host", origin);
        let keys: Value = keys.send().await.unwrap().json().await.unwrap();
        let Some(key) = keys["verify_keys"][id]["key"].as_str() else { return false };
        let message = json!({ "method": "GET", "uri": head.uri.to_string(), "origin": origin, "destination": self.name,
            "content": {} });
        VerifyKey::from_base64(key).unwrap().verify(&canonical_json(message.as_object().unwrap()), sig).is_ok()
    }

    /// Finishes LPDUs whatever they are and sends them to the suite.
    async fn append(&self, lpdus: Vec<Object>) {
        let pdus: Vec<Object> = lpdus
            .into_iter()
            .take(50)
            .map(|mut event| {
                event.insert("auth_events".to_owned(), json!([]));
                event.insert("prev_events".to_owned(), json!([format!("${}", self.sent.load(Ordering::SeqCst))]));
                for field in ["hashes", "signatures"] {
                    if !event.get(field).is_some_and(Value::is_object) {
                        event.insert(field.to_owned(), json!({}));
                    }
                }
                finish(&mut event, &self.name, &self.key);
                event
            })
            .collect();
        let uri = format!("/_matrix/federation/v2/send/between-{}", self.sent.fetch_add(1, Ordering::SeqCst));
        self.pass_on("PUT", &uri, json!({ "pdus": pdus }), SUITE, false).await;
    }

    async fn pass_on(&self, method: &str, uri: &str, body: Value, to: &str, forged: bool) -> (u16, Value) {
        let mut message = json!({ "method": method, "uri": uri, "origin": self.name, "destination": to });
        if !body.is_null() {
            message["content"] = body.clone();
        }
        let key = if forged { Arc::new(SigningKey::generate()) } else { self.key.clone() };
        let sig = key.sign(&canonical_json(message.as_object().unwrap()));
        let header =
            format!(r#"X-Matrix origin="{}",destination="{to}",key="{}",sig="{sig}""#, self.name, self.key.id());
        let request = reqwest::Client::builder().no_proxy().build().unwrap();
        let request = request.request(method.parse().unwrap(), format!("http://{}{uri}", self.suite));
        let mut request = request.header("host", to).header("authorization", header);
        if !body.is_null() {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        // At the end of a run nobody listens any more.
        match request.send().await {
            Ok(answer) => (answer.status().as_u16(), answer.json().await.unwrap_or_default()),
            Err(_) => (502, json!({})),
        }
    }

    /// Changes the events of a transaction so that each follows the one before it as that is now.
    fn change(&self, body: &mut Value, is_it: fn(&Object) -> bool, change: fn(&mut Object, &str, &SigningKey)) {
        let mut renamed = self.renamed.lock().unwrap();
        for event in body["pdus"].as_array_mut().into_iter().flatten() {
            let before = id_of(event);
            let event = event.as_object_mut().unwrap();
            if let Some(now) = event["prev_events"][0].as_str().and_then(|id| renamed.get(id)) {
                event.insert("prev_events".to_owned(), json!([now]));
                finish(event, &self.name, &self.key);
            }
            if is_it(event) {
                change(event, &self.name, &self.key);
            }
            renamed.insert(before, id_of(&Value::Object(event.clone())));
        }
    }

    async fn sending(self: Arc<Self>, request: Request) -> Response {
        let (head, body) = request.into_parts();
        let bytes = to_bytes(body, 64 << 20).await.unwrap();
        let mut to = head.headers["host"].to_str().unwrap().to_owned();
        let mut body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let mut uri = head.uri.to_string();
        let (_, faults) = self.fault();
        let nth = self.sent.fetch_add(1, Ordering::SeqCst);
        let (mut forged, mut twice, mut early) = (false, false, false);
        for fault in &faults {
            match fault {
                Fault::Events(change) => self.change(&mut body, is_message, *change),
                Fault::Own(change) => self.change(&mut body, |event| !event.contains_key("hub_server"), *change),
                _ => {}
            }
            if let Fault::Sends(spoil) = fault {
                let mut outgoing = Outgoing {
                    uri: &mut uri,
                    body: &mut body,
                    to: &mut to,
                    key: &self.key,
                    hub: &self.name,
                    nth,
                    forged: false,
                    twice: false,
                    early: false,
                };
                if !spoil(&mut outgoing) {
                    return answered(Reply { status: 200, kind: "application/json", body: json!({}), raw: None });
                }
                (forged, twice, early) = (outgoing.forged, outgoing.twice, outgoing.early);
            }
        }
        if early {
            tokio::spawn(async move { self.pass_on("PUT", &uri, body, &to, false).await });
            return answered(Reply { status: 200, kind: "application/json", body: json!({}), raw: None });
        }
        let (status, answer) = self.pass_on(head.method.as_str(), &uri, body.clone(), &to, forged).await;
        if twice {
            self.pass_on(head.method.as_str(), &format!("{uri}-again"), body, &to, false).await;
        }
        answered(Reply { status, kind: "application/json", body: answer, raw: None })
    }
}

fn answered(reply: Reply) -> Response {
    let body = reply.raw.unwrap_or_else(|| reply.body.to_string().into_bytes());
    Response::builder().status(reply.status).header("content-type", reply.kind).body(Body::from(body)).unwrap()
}

/// Runs the suite against a server with faults, each there during its own check.
pub async fn faulty(faults: Faults) -> Report {
    examine(faults, false, Vec::new(), true).await
}

/// Runs some checks against a server with one fault that is there all the time.
pub async fn always(fault: Fault, only: &[&str]) -> Report {
    always_all(&[fault], only).await
}

/// The same with several faults.
pub async fn always_all(faults: &[Fault], only: &[&str]) -> Report {
    let faults = faults.iter().map(|fault| ("", *fault)).collect();
    examine(faults, true, only.iter().map(|id| (*id).to_owned()).collect(), true).await
}

/// The same with the suite as the hub; the server's user accepts the invite and speaks.
pub async fn as_participant(faults: Faults, is_always: bool, only: &[&str]) -> Report {
    examine(faults, is_always, only.iter().map(|id| (*id).to_owned()).collect(), false).await
}

async fn examine(faults: Faults, always: bool, only: Vec<String>, is_hub: bool) -> Report {
    let suite_socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let suite = suite_socket.local_addr().unwrap();
    let way_out = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = way_out.local_addr().unwrap();
    let name = if is_hub { "hub.example" } else { "spoke.example" };
    let (_world, [node]) = World::with_others([name], &[(SUITE, address), (SECOND, address)]).await;
    let between = Arc::new(Between {
        faults,
        always,
        current: Mutex::default(),
        asked: AtomicUsize::new(0),
        sent: AtomicUsize::new(0),
        suite,
        key: node.context.signing_key.clone(),
        name: name.to_owned(),
        renamed: Mutex::default(),
        speak: Notify::new(),
        spoken: Notify::new(),
    });
    let out = between.clone();
    let routes = Router::new().fallback(move |request: Request| {
        let out = out.clone();
        async move { out.sending(request).await }
    });
    let serving = tokio::spawn(async move { axum::serve(way_out, routes).await.unwrap() });
    let way_in = between.clone();
    node.meddle(move |request, next| {
        let way_in = way_in.clone();
        async move { way_in.asked(request, next).await }
    });
    let role =
        if is_hub { Role::Participant { room: room(&node).await } } else { Role::Hub { invite: node.user("alice") } };
    let options = Options { only, limit: std::time::Duration::from_secs(5), ..options(&node, role) };
    let report = run(suite_socket, options, &between, &node, is_hub).await;
    serving.abort();
    report
}

async fn run(socket: TcpListener, options: Options, between: &Between, node: &Node, is_hub: bool) -> Report {
    let wanted = |id: &str| options.only.is_empty() || options.only.iter().any(|only| id.starts_with(only.as_str()));
    let stood_on = ["LM-M-010", "LM-M-020", "LM-H-010"];
    let order: Vec<&str> = catalogue()
        .iter()
        .map(|check| check.id)
        .filter(|id| id.starts_with("LM-H") != is_hub && (wanted(id) || stood_on.contains(id)))
        .collect();
    let begin = |id: &str| {
        id.clone_into(&mut between.current.lock().unwrap());
        between.asked.store(0, Ordering::SeqCst);
    };
    begin(order.first().unwrap());
    let clock = Arc::new(isthmus::clock::SystemClock);
    let examining = run_on(socket, options.clone(), clock, |row| {
        let next = order.iter().position(|id| *id == row.id).and_then(|place| order.get(place + 1));
        begin(next.unwrap_or(&""));
    });
    let people = async {
        let Role::Participant { room } = &options.role else { return super::world::accept(node).await };
        between.speak.notified().await;
        node.say(room, "bot", "of the hub's own").await;
        between.spoken.notify_one();
        std::future::pending().await
    };
    tokio::select! {
        report = examining => report.unwrap(),
        () = people => unreachable!("it stays in the room"),
    }
}

/// The ID of an event.
pub fn id_of(event: &Value) -> String {
    format!("${}", reference_hash(event.as_object().unwrap(), Redaction::Draft))
}

/// The keys of the server, signed anew after a change.
pub fn resigned_keys(body: &mut Value, hub: &str, key: &SigningKey) {
    let mut keys = body.as_object().cloned().unwrap_or_default();
    keys.remove("signatures");
    sign_object(&mut keys, hub, key);
    *body = Value::Object(keys);
}
