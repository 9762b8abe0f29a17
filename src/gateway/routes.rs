//! What other servers can ask, under its stable and its unstable names: one table, from which the router is made. A path that both
//! protocols have is answered by the side that the room is on.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, get, on};
use axum::{Json, Router};
use futures::stream;
use http::{Method, StatusCode, header};
use ruma::{OwnedServerName, RoomId, ServerName};
use serde_json::{Value, json};

use super::edus::EduBudgets;
use super::handshakes::Handshake::{Join, Knock, Leave};
use super::notary::{self, Anyone, Notary};
use super::signed::{Asked, Given, SignedTransaction};
use super::transaction::Dialect;
use super::unproved::Unproved;
use super::{devices, handshakes, lookups, media, reads, transaction};
use crate::dag::Dag;
use crate::event::Object;
use crate::federation::{Askers, Context, Large, Lines, Rate, Rates, Transactions, Underway};
use crate::identity::Side;
use crate::lm::{Lm, Part};
use crate::media::Media;
use crate::refusal::Refusal;
use crate::seam::{Graphs, NoDevices, SharedBetween, SharedDevices};

/// What the routes stand in front of.
#[derive(Clone)]
pub struct Federation {
    /// What everything shares.
    pub context: Context,
    /// The linear side.
    pub lm: Lm,
    /// The graph side.
    pub dag: Dag,
    /// The bridge.
    pub between: SharedBetween,
    /// Transactions that were answered.
    pub transactions: Transactions,
    /// Transactions that wait for earlier ones of their server.
    pub lines: Lines,
    /// The bytes of requests whose origin is not proved yet.
    pub unproved: Unproved,
    /// Requests that wait for their servers' keys.
    pub askers: Askers,
    /// What those may cause who ask for the keys of third servers.
    pub notary: Notary,
    /// How often servers ask.
    pub rates: Rates,
    /// The devices of the gateway's users.
    pub devices: SharedDevices,
    /// Other requests that are worked on.
    pub underway: Underway,
    /// Those of them that wait for a third server.
    pub waiting: Underway,
    /// How much servers have said besides events.
    pub edus: EduBudgets,
    /// When the log last told of events of rooms that are not known, in milliseconds.
    pub stray_told: Arc<AtomicI64>,
    /// Files of both sides.
    pub media: Media,
    /// The graphs of shared rooms, which the linear side holds weakly.
    pub graphs: Arc<dyn Graphs>,
}

impl Federation {
    /// The routes' state over these parts. The two sides get to know each other's part of shared rooms.
    pub fn new(context: Context, lm: Lm, dag: Dag, between: SharedBetween) -> Self {
        let graphs: Arc<dyn Graphs> = Arc::new(dag.clone());
        dag.set_logs(lm.logs());
        lm.set_graphs(&graphs);
        let transactions = Transactions::new(context.store.clone(), context.clock.clone());
        Self {
            media: Media::new(&context),
            context,
            lm,
            dag,
            between,
            transactions,
            lines: Lines::default(),
            unproved: Unproved::default(),
            askers: Askers::default(),
            notary: Notary::default(),
            rates: Rates::default(),
            devices: Arc::new(NoDevices),
            underway: Underway::default(),
            waiting: Underway::waiting(),
            edus: EduBudgets::default(),
            stray_told: Arc::default(),
            graphs,
        }
    }
}

/// What a handler of signed requests gives back.
pub(super) type Answer = Result<Value, Refusal>;

/// Where the LM endpoints are found under the names that the peers use today.
const UNSTABLE: &str = "/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";

/// Where servers are asked about changes of an LM room's hub (`docs/hub-transfer.md`).
const HUB: &str = "/unstable/im.isthmus.hub";

/// In what pieces a large answer goes out.
const PIECE: usize = 64 << 10;

/// One endpoint.
#[derive(Clone)]
pub struct Endpoint {
    /// The one method that it takes.
    pub method: Method,
    /// Its path, with the names of what varies in braces.
    pub path: String,
    /// What it takes with a request.
    pub takes: Takes,
    handler: MethodRouter<Federation>,
}

/// What an endpoint takes with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// Nothing: it answers everybody.
    Nothing,
    /// An object as the body: it answers everybody.
    OpenBody,
    /// A signature.
    Signature,
    /// A signature, and an object as the body.
    Body,
    /// A signature, and a transaction, which may be larger than other bodies.
    Transaction,
}

/// All endpoints of the server-to-server APIs, Matrix and LM, as a router.
pub fn federation_routes(federation: Federation) -> Router {
    let route = |router: Router<Federation>, endpoint: Endpoint| router.route(&endpoint.path, endpoint.handler);
    let router = federation_endpoints().into_iter().fold(Router::new(), route);
    router.fallback(unrecognized).method_not_allowed_fallback(wrong_method).with_state(federation)
}

/// All endpoints of the server-to-server APIs, Matrix and LM.
pub fn federation_endpoints() -> Vec<Endpoint> {
    let mut all = vec![
        Endpoint::open("/_matrix/key/v2/server", get(lookups::own_keys)),
        Endpoint::open("/_matrix/key/v2/server/{key_id}", get(lookups::own_keys)),
        Endpoint::anyone(Method::GET, "/_matrix/key/v2/query/{server_name}", notary::query_one),
        Endpoint::anyone(Method::POST, "/_matrix/key/v2/query", notary::query),
        Endpoint::open("/.well-known/matrix/server", get(lookups::well_known)),
        Endpoint::open("/_matrix/federation/v1/version", get(lookups::version)),
        Endpoint::transaction("/v1/send/{txn_id}", Dialect::Matrix),
        Endpoint::get("/v1/query/directory", |g, asked| lookups::directory(g, asked, None)),
        Endpoint::get("/v1/query/profile", lookups::profile),
        Endpoint::get("/v1/make_join/{room_id}/{user_id}", |g, asked| handshakes::make(Join, g, asked)),
        Endpoint::put("/v2/send_join/{room_id}/{event_id}", |g, given| handshakes::send(Join, g, given)),
        Endpoint::get("/v1/make_leave/{room_id}/{user_id}", |g, asked| handshakes::make(Leave, g, asked)),
        Endpoint::put("/v2/send_leave/{room_id}/{event_id}", |g, given| handshakes::send(Leave, g, given)),
        Endpoint::get("/v1/make_knock/{room_id}/{user_id}", |g, asked| handshakes::make(Knock, g, asked)),
        Endpoint::put("/v1/send_knock/{room_id}/{event_id}", |g, given| handshakes::send(Knock, g, given)),
        Endpoint::put("/v2/invite/{room_id}/{event_id}", handshakes::invite),
        Endpoint::get("/v1/event/{event_id}", reads::event),
        Endpoint::get("/v1/event_auth/{room_id}/{event_id}", reads::event_auth),
        Endpoint::get("/v1/state/{room_id}", |g, asked| reads::state(g, asked, false)),
        Endpoint::get("/v1/state_ids/{room_id}", |g, asked| reads::state(g, asked, true)),
        Endpoint::get("/v1/backfill/{room_id}", reads::backfill),
        Endpoint::post("/v1/get_missing_events/{room_id}", reads::missing_events),
        Endpoint::get("/v1/publicRooms", reads::public_rooms),
        Endpoint::post("/v1/publicRooms", reads::search_public_rooms),
        Endpoint::get("/v1/hierarchy/{room_id}", reads::hierarchy),
        Endpoint::file("/v1/media/download/{media_id}", media::download),
        Endpoint::file("/v1/media/thumbnail/{media_id}", media::thumbnail),
        Endpoint::get("/v1/user/devices/{user_id}", devices::devices),
        Endpoint::post("/v1/user/keys/query", devices::keys),
        Endpoint::post("/v1/user/keys/claim", devices::claim),
        // Under the LM prefix it is certain that the LM room is meant.
        Endpoint::get(&format!("{UNSTABLE}/query/directory"), |g, asked| lookups::directory(g, asked, Some(Side::Lm))),
    ];
    // The draft gives its endpoints version numbers of their own; the peers serve them under the unstable prefix.
    for prefix in ["/v3", UNSTABLE] {
        let at = |name: &str| format!("{prefix}{name}");
        all.extend([
            Endpoint::post(&at("/send_join/{txn_id}"), |g, given| handshakes::send_lm(Join, g, given)),
            Endpoint::post(&at("/send_leave/{txn_id}"), |g, given| handshakes::send_lm(Leave, g, given)),
            Endpoint::post(&at("/send_knock/{txn_id}"), |g, given| handshakes::send_lm(Knock, g, given)),
            Endpoint::post(&at("/invite/{txn_id}"), handshakes::invite_lm),
        ]);
    }
    all.push(Endpoint::get(&format!("{HUB}/ready/{{room_id}}"), handshakes::ready_for_hub));
    all.push(Endpoint::post(&format!("{HUB}/hub/{{txn_id}}"), handshakes::take_hub));
    for prefix in ["/v1", UNSTABLE] {
        all.push(Endpoint::get(&format!("{prefix}/user/{{user_id}}/device/{{device_id}}"), devices::device));
    }
    for prefix in ["/v2", UNSTABLE] {
        let at = |name: &str| format!("{prefix}{name}");
        all.extend([
            Endpoint::transaction(&at("/send/{txn_id}"), Dialect::Lm),
            Endpoint::get(&at("/event/{event_id}"), reads::event_lm),
            Endpoint::get(&at("/backfill/{room_id}"), reads::backfill_lm),
        ]);
    }
    all
}

impl Endpoint {
    /// One that answers everybody.
    fn open(path: &str, handler: MethodRouter<Federation>) -> Self {
        Self { method: Method::GET, path: path.to_owned(), takes: Takes::Nothing, handler }
    }

    /// One that answers everybody who says what is wanted.
    fn anyone<B, F, A>(method: Method, path: &str, answer: F) -> Self
    where
        B: Send + 'static,
        Anyone<B>: FromRequest<Federation, Rejection = Refusal>,
        F: Fn(Federation, Anyone<B>) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Answer> + Send + 'static,
    {
        let handler = move |State(federation): State<Federation>, asked: Anyone<B>| {
            let answer = answer(federation, asked);
            async { answer.await.map(Json) }
        };
        let (takes, filter) = match method {
            Method::GET => (Takes::Nothing, MethodFilter::GET),
            _ => (Takes::OpenBody, MethodFilter::POST),
        };
        Self { method, path: path.to_owned(), takes, handler: on(filter, handler) }
    }

    fn get<F, A>(path: &str, answer: F) -> Self
    where
        F: Fn(Federation, Asked) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Answer> + Send + 'static,
    {
        let (rate, is_large) = (rate_of(path), is_large(path));
        let handler = move |State(federation): State<Federation>, asked: Asked| {
            let limited = limited(&federation, &asked.origin, rate);
            let large = is_large.then(|| (federation.context.large.clone(), asked.origin.clone()));
            let answer = limited.map(|()| answer(federation, asked));
            async move { give(large, answer?.await?).await }
        };
        Self { method: Method::GET, path: federated(path), takes: Takes::Signature, handler: get(handler) }
    }

    /// One that gives a file.
    fn file<F, A>(path: &str, answer: F) -> Self
    where
        F: Fn(Federation, Asked) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Result<Response, Refusal>> + Send + 'static,
    {
        let rate = rate_of(path);
        let handler = move |State(federation): State<Federation>, asked: Asked| {
            let limited = limited(&federation, &asked.origin, rate);
            let answer = limited.map(|()| answer(federation, asked));
            async move { answer?.await }
        };
        Self { method: Method::GET, path: federated(path), takes: Takes::Signature, handler: get(handler) }
    }

    fn put<F, A>(path: &str, answer: F) -> Self
    where
        F: Fn(Federation, Given) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Answer> + Send + 'static,
    {
        Self::given(Method::PUT, MethodFilter::PUT, path, answer)
    }

    fn post<F, A>(path: &str, answer: F) -> Self
    where
        F: Fn(Federation, Given) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Answer> + Send + 'static,
    {
        Self::given(Method::POST, MethodFilter::POST, path, answer)
    }

    fn given<F, A>(method: Method, filter: MethodFilter, path: &str, answer: F) -> Self
    where
        F: Fn(Federation, Given) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Answer> + Send + 'static,
    {
        let (rate, is_large) = (rate_of(path), is_large(path));
        let handler = move |State(federation): State<Federation>, given: Given| {
            let limited = limited(&federation, &given.origin, rate);
            let large = is_large.then(|| (federation.context.large.clone(), given.origin.clone()));
            let answer = limited.map(|()| answer(federation, given));
            async move { give(large, answer?.await?).await }
        };
        Self { method, path: federated(path), takes: Takes::Body, handler: on(filter, handler) }
    }

    fn transaction(path: &str, dialect: Dialect) -> Self {
        let handler = move |State(federation): State<Federation>, transaction: SignedTransaction| async move {
            transaction::send(&federation, &transaction, dialect).await.map(Json)
        };
        let handler = on(MethodFilter::PUT, handler);
        Self { method: Method::PUT, path: federated(path), takes: Takes::Transaction, handler }
    }
}

/// With what an endpoint is counted together. The draft limits all but transactions, keys and look-ups.
fn rate_of(path: &str) -> Option<Rate> {
    let names = |parts: &[&str]| path.split('/').any(|segment| parts.contains(&segment));
    if path.split('/').any(|segment| segment.starts_with("make_") || segment.starts_with("send_")) {
        Some(Rate::Handshakes)
    } else if names(&["invite", "im.isthmus.hub"]) {
        Some(Rate::Invites)
    } else if names(&["media"]) {
        Some(Rate::Media)
    } else if names(&["user"]) {
        Some(Rate::Devices)
    } else if names(&["event", "event_auth", "state", "state_ids", "backfill", "get_missing_events", "hierarchy"]) {
        Some(Rate::Reads)
    } else {
        None
    }
}

/// Whether what an endpoint answers may be as large as a room.
fn is_large(path: &str) -> bool {
    path.split('/').any(|segment| matches!(segment, "state" | "state_ids" | "event_auth" | "send_join"))
}

/// Gives an answer. What may be large is written beside the tasks, and counted until it is taken.
async fn give(large: Option<(Large, OwnedServerName)>, answer: Value) -> Result<Response, Refusal> {
    let Some((large, origin)) = large else { return Ok(Json(answer).into_response()) };
    let written = tokio::task::spawn_blocking(move || serde_json::to_vec(&answer));
    let body = written.await.map_err(|error| Refusal::Internal(error.to_string()))?;
    let body = Bytes::from(body.map_err(|error| Refusal::Internal(error.to_string()))?);
    let held = large.hold(&origin, body.len()).await?;
    let length = body.len();
    // In pieces, so that it is known when the last of them is taken.
    let pieces = stream::unfold((body, held), |(mut rest, held)| async move {
        let piece = rest.split_to(rest.len().min(PIECE));
        (!piece.is_empty()).then_some((Ok::<_, Infallible>(piece), (rest, held)))
    });
    let headers = [(header::CONTENT_TYPE, "application/json".to_owned()), (header::CONTENT_LENGTH, length.to_string())];
    Ok((headers, Body::from_stream(pieces)).into_response())
}

fn limited(federation: &Federation, origin: &ServerName, rate: Option<Rate>) -> Result<(), Refusal> {
    rate.map_or(Ok(()), |rate| federation.rates.take(origin.as_str(), rate))
}

fn federated(path: &str) -> String {
    format!("/_matrix/federation{path}")
}

async fn unrecognized() -> Response {
    error(StatusCode::NOT_FOUND, "M_UNRECOGNIZED", "there is no such endpoint")
}

async fn wrong_method() -> Response {
    error(StatusCode::METHOD_NOT_ALLOWED, "M_UNRECOGNIZED", "the endpoint does not take this method")
}

pub(super) fn error(status: StatusCode, errcode: &str, error: &str) -> Response {
    (status, Json(json!({ "errcode": errcode, "error": error }))).into_response()
}

/// The side of a room that a server's request is for.
pub(super) async fn side_of(federation: &Federation, origin: &ServerName, room_id: &RoomId) -> Result<Side, Refusal> {
    match place_of(federation, room_id).await? {
        Some(Place::On(side)) => Ok(side),
        // LM servers see the log of a shared room, all others its graph. Not all LM servers say in their keys that they are.
        Some(Place::Shared) => match federation.lm.part_in(room_id, origin).await? {
            Some(Part::Log) => Ok(Side::Lm),
            Some(Part::Graph) | None => {
                let keys = federation.context.keyring.server_keys(origin).await;
                Ok(if keys.is_ok_and(|keys| keys.linearized) { Side::Lm } else { Side::Matrix })
            }
        },
        None => Err(Refusal::UnknownRoom(room_id.to_string())),
    }
}

/// Where a room is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// On one side.
    On(Side),
    /// It is a graph and a log.
    Shared,
}

impl Place {
    /// The side for an event that was sent: in a shared room an LPDU, which says nothing of what is before it, is the log's.
    pub fn side_for(self, event: &Object) -> Side {
        match self {
            Self::On(side) => side,
            Self::Shared if event.contains_key("auth_events") || event.contains_key("prev_events") => Side::Matrix,
            Self::Shared => Side::Lm,
        }
    }
}

/// Where a room is, if it is known here. One that is being joined comes last: what hubs call their rooms must not take away any
/// that is there.
pub(super) async fn place_of(federation: &Federation, room_id: &RoomId) -> Result<Option<Place>, Refusal> {
    Ok(if federation.lm.knows(room_id).await? {
        Some(if federation.lm.is_shared(room_id).await? { Place::Shared } else { Place::On(Side::Lm) })
    } else if federation.dag.knows(room_id).await? {
        Some(Place::On(Side::Matrix))
    } else if federation.dag.is_joining(room_id) {
        // Also for a shared room, which both are joining: what comes are events of its graph.
        Some(Place::On(Side::Matrix))
    } else {
        federation.lm.is_joining(room_id).then_some(Place::On(Side::Lm))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_draft_limits_is_limited() {
        let limited = |rate| {
            let paths = federation_endpoints().into_iter().map(|endpoint| endpoint.path);
            paths.filter(|path| rate_of(path) == rate).collect::<Vec<_>>()
        };
        for path in limited(None) {
            let free = ["/send/", "/query/", "/key/", "/version", "/.well-known/", "/publicRooms", "/key/v2/query"];
            assert!(free.iter().any(|part| path.contains(part)), "{path}");
        }
        assert_eq!(limited(Some(Rate::Handshakes)).len(), 3 + 3 + 2 * 3);
        assert_eq!(limited(Some(Rate::Invites)).len(), 3 + 2);
        assert_eq!(limited(Some(Rate::Devices)).len(), 3 + 2);
        assert_eq!(limited(Some(Rate::Media)).len(), 2);
    }
}
