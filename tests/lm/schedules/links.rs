//! The links between the servers of a schedule: they can be cut, answers get lost on them, and they can be told to break what servers promise.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use isthmus::event::{Lpdu, Object, Redaction, canonical_json, redact};
use isthmus::federation::authorization_header;
use isthmus::identity::SigningKey;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use ruma::OwnedServerName;
use tokio::sync::oneshot;

/// What a network does that servers rely on being done rightly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Over a link that is cut, everything is said to have arrived.
    Swallows,
    /// What is sent to a hub is sent to it as another event as well, as by a server that does not know what it has sent.
    Repeats,
    /// Events come in the wrong order.
    Reverses,
    /// Events of a log come without their contents, which looks like a redaction.
    Empties,
}

/// Which servers cannot reach each other.
pub struct Links {
    pub cut: Mutex<BTreeSet<(String, String)>>,
    random: Mutex<StdRng>,
    fault: Option<Fault>,
    /// With which what was meddled with is signed again.
    keys: BTreeMap<OwnedServerName, Arc<SigningKey>>,
    agreed: Mutex<Option<Agreed>>,
}

/// What happens as soon as a server has agreed to keep a log, before the hub hears of it.
pub struct Agreed {
    /// The link of the two is cut.
    pub cuts: bool,
    /// Somebody is told.
    pub tells: oneshot::Sender<()>,
}

impl Links {
    /// All of them are there.
    pub fn new(seed: u64, fault: Option<Fault>, keys: BTreeMap<OwnedServerName, Arc<SigningKey>>) -> Arc<Self> {
        let random = Mutex::new(StdRng::seed_from_u64(!seed));
        Arc::new(Self { cut: Mutex::default(), random, fault, keys, agreed: Mutex::default() })
    }

    /// What is to happen when a server agrees next to keep a log.
    pub fn when_agreed(&self, agreed: Option<Agreed>) {
        *self.agreed.lock().unwrap() = agreed;
    }

    pub fn is_cut(&self, from: &str, to: &str) -> bool {
        let cut = self.cut.lock().unwrap();
        cut.contains(&(from.to_owned(), to.to_owned())) || cut.contains(&(to.to_owned(), from.to_owned()))
    }

    /// Where a link is cut, either the request does not arrive or its answer does not.
    pub async fn pass(&self, to: &str, request: Request, next: Next) -> Response {
        let header = request.headers().get("authorization").and_then(|header| header.to_str().ok()).unwrap_or_default();
        let from = header.split("origin=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or_default();
        if !self.is_cut(from, to) {
            let from = from.to_owned();
            let request = match self.fault {
                Some(fault) if request.uri().path().contains("/send/") => self.meddle(fault, &from, to, request).await,
                _ => request,
            };
            let agrees = request.uri().path().contains("/im.isthmus.hub/hub/");
            let response = next.run(request).await;
            if agrees && response.status().is_success() {
                self.agrees(&from, to);
            }
            return response;
        }
        if self.fault == Some(Fault::Swallows) {
            return axum::Json(serde_json::json!({})).into_response();
        }
        if self.random.lock().unwrap().gen_bool(0.5) {
            next.run(request).await;
        }
        StatusCode::SERVICE_UNAVAILABLE.into_response()
    }

    fn agrees(&self, from: &str, to: &str) {
        let Some(Agreed { cuts, tells }) = self.agreed.lock().unwrap().take() else { return };
        if cuts {
            self.cut.lock().unwrap().insert((from.to_owned(), to.to_owned()));
        }
        // Nobody may want to know.
        let _ = tells.send(());
    }

    /// A transaction as a bad network brings it.
    async fn meddle(&self, fault: Fault, from: &str, to: &str, request: Request) -> Request {
        let (mut parts, body) = request.into_parts();
        let body = axum::body::to_bytes(body, 1 << 24).await.unwrap();
        let mut body: Object = serde_json::from_slice(&body).unwrap();
        let key = &self.keys[from];
        if let Some(pdus) = body.get_mut("pdus").and_then(|pdus| pdus.as_array_mut()) {
            match fault {
                Fault::Swallows => {}
                Fault::Reverses => pdus.reverse(),
                Fault::Empties => {
                    for pdu in pdus.iter_mut().filter_map(|pdu| pdu.as_object_mut()) {
                        if pdu.contains_key("prev_events") {
                            *pdu = redact(pdu, Redaction::Draft);
                        }
                    }
                }
                Fault::Repeats => {
                    let lpdus: Vec<Object> = pdus.iter().filter_map(|pdu| pdu.as_object().cloned()).collect();
                    for mut again in lpdus.into_iter().filter(|pdu| !pdu.contains_key("prev_events")) {
                        let ts = again["origin_server_ts"].as_i64().unwrap();
                        again.insert("origin_server_ts".to_owned(), (ts + 1).into());
                        let [from, to] = [from, to].map(|name| OwnedServerName::try_from(name).unwrap());
                        pdus.push(serde_json::Value::Object(Lpdu::build(again, &to, &from, key).unwrap().json));
                    }
                    pdus.truncate(50);
                }
            }
        }
        let [origin, destination] = [from, to].map(|name| OwnedServerName::try_from(name).unwrap());
        let uri = parts.uri.path_and_query().unwrap().as_str().to_owned();
        let header = authorization_header(&origin, &destination, key, &parts.method, &uri, Some(&body));
        parts.headers.insert("authorization", header.parse().unwrap());
        parts.headers.remove("content-length");
        Request::from_parts(parts, axum::body::Body::from(canonical_json(&body)))
    }
}
