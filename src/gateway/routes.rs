//! What other servers can ask, under its stable and its unstable names. A path that both protocols have is answered by the
//! side that the room is on.

use std::time::Instant;

use axum::extract::{Path, Query, RawQuery, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use http::StatusCode;
use ruma::{OwnedRoomId, OwnedUserId, RoomId, UserId};
use serde::Deserialize;
use serde_json::{Value, json};

use super::signed::{self, Signed, SignedBody, SignedTransaction};
use super::transaction::{self, Dialect};
use crate::admin::metrics;
use crate::dag::Dag;
use crate::event::{Family, RoomVersion, parse_event_id};
use crate::federation::{Begun, ByteBudget, Context, Lines, Transactions, Underway};
use crate::identity::Side;
use crate::lm::Lm;
use crate::refusal::Refusal;
use crate::seam::SharedBetween;

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
    pub unproved: ByteBudget,
    /// Other requests that are worked on.
    pub underway: Underway,
}

impl Federation {
    /// The routes' state over these parts.
    pub fn new(context: Context, lm: Lm, dag: Dag, between: SharedBetween) -> Self {
        let transactions = Transactions::new(context.store.clone(), context.clock.clone());
        Self {
            context,
            lm,
            dag,
            between,
            transactions,
            lines: Lines::default(),
            unproved: ByteBudget::new(signed::UNPROVED_LIMIT),
            underway: Underway::default(),
        }
    }
}

type Answer = Result<Json<Value>, Refusal>;

/// Where the LM endpoints are found under the names that the peers use today.
const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";

/// All endpoints of the server-to-server APIs, Matrix and LM.
pub fn federation_routes(federation: Federation) -> Router {
    let federated = |path: &str| format!("/_matrix/federation{path}");
    let mut router = Router::new()
        .route("/_matrix/key/v2/server", get(own_keys))
        .route("/_matrix/key/v2/server/{key_id}", get(own_keys))
        .route("/.well-known/matrix/server", get(well_known))
        .route(&federated("/v1/version"), get(version))
        .route(&federated("/v1/send/{txn_id}"), put(send_matrix))
        .route(&federated("/v1/query/directory"), get(query_directory))
        .route(&federated("/v1/query/profile"), get(query_profile))
        .route(&federated("/v1/make_join/{room_id}/{user_id}"), get(make_join))
        .route(&federated("/v2/send_join/{room_id}/{event_id}"), put(send_join_matrix))
        .route(&federated("/v1/make_leave/{room_id}/{user_id}"), get(make_leave))
        .route(&federated("/v2/send_leave/{room_id}/{event_id}"), put(send_leave_matrix))
        .route(&federated("/v1/make_knock/{room_id}/{user_id}"), get(make_knock))
        .route(&federated("/v1/send_knock/{room_id}/{event_id}"), put(send_knock_matrix))
        .route(&federated("/v2/invite/{room_id}/{event_id}"), put(invite_matrix))
        .route(&federated("/v1/event/{event_id}"), get(event_matrix))
        .route(&federated("/v1/event_auth/{room_id}/{event_id}"), get(event_auth))
        .route(&federated("/v1/state/{room_id}"), get(state))
        .route(&federated("/v1/state_ids/{room_id}"), get(state_ids))
        .route(&federated("/v1/backfill/{room_id}"), get(backfill))
        .route(&federated("/v1/get_missing_events/{room_id}"), post(get_missing_events))
        .route(&federated("/v1/publicRooms"), get(public_rooms).post(search_public_rooms))
        .route(&federated("/v1/user/devices/{user_id}"), get(user_devices))
        .route(&federated("/v1/user/keys/query"), post(keys_query))
        .route(&federated("/v1/user/keys/claim"), post(keys_claim));
    // The draft gives its endpoints version numbers of their own; the peers serve them under the unstable prefix.
    for (stable, name, handler) in [
        ("v2", "/send/{txn_id}", put(send_lm)),
        ("v3", "/send_join/{txn_id}", post(send_join_lm)),
        ("v3", "/send_leave/{txn_id}", post(send_leave_lm)),
        ("v3", "/send_knock/{txn_id}", post(send_knock_lm)),
        ("v3", "/invite/{txn_id}", post(invite_lm)),
        ("v2", "/event/{event_id}", get(event_lm)),
        ("v2", "/backfill/{room_id}", get(backfill)),
    ] {
        router = router
            .route(&format!("/_matrix/federation/{stable}{name}"), handler.clone())
            .route(&format!("{UNSTABLE}{name}"), handler);
    }
    router = router.route(&format!("{UNSTABLE}/query/directory"), get(query_directory_lm));
    router.fallback(unrecognized).method_not_allowed_fallback(wrong_method).with_state(federation)
}

async fn unrecognized() -> Response {
    error(StatusCode::NOT_FOUND, "M_UNRECOGNIZED", "there is no such endpoint")
}

async fn wrong_method() -> Response {
    error(StatusCode::METHOD_NOT_ALLOWED, "M_UNRECOGNIZED", "the endpoint does not take this method")
}

fn error(status: StatusCode, errcode: &str, error: &str) -> Response {
    (status, Json(json!({ "errcode": errcode, "error": error }))).into_response()
}

fn parse<T>(what: &str, text: &str) -> Result<T, Refusal>
where
    for<'a> T: TryFrom<&'a str, Error: std::fmt::Display>,
{
    T::try_from(text).map_err(|error| {
        let shown: String = text.chars().take(60).collect();
        Refusal::malformed(what, format!("{shown:?}: {error}"))
    })
}

/// The side that a room is on.
async fn side_of(federation: &Federation, room_id: &RoomId) -> Result<Side, Refusal> {
    if federation.lm.knows(room_id).await? {
        Ok(Side::Lm)
    } else if federation.dag.knows(room_id).await? {
        Ok(Side::Matrix)
    } else {
        Err(Refusal::UnknownRoom(room_id.to_string()))
    }
}

async fn own_keys(State(federation): State<Federation>) -> Json<Value> {
    Json(Value::Object(federation.context.keyring.own_keys()))
}

async fn well_known(State(federation): State<Federation>) -> Response {
    match federation.context.config.delegated() {
        Some(server) => Json(json!({ "m.server": server })).into_response(),
        None => error(StatusCode::NOT_FOUND, "M_NOT_FOUND", "the configuration delegates this name to no other"),
    }
}

async fn version() -> Json<Value> {
    Json(json!({ "server": { "name": "isthmus", "version": env!("CARGO_PKG_VERSION") } }))
}

async fn send_matrix(state: State<Federation>, txn_id: Path<String>, transaction: SignedTransaction) -> Answer {
    send(state, txn_id, transaction, Dialect::Matrix).await
}

async fn send_lm(state: State<Federation>, txn_id: Path<String>, transaction: SignedTransaction) -> Answer {
    send(state, txn_id, transaction, Dialect::Lm).await
}

async fn send(
    State(federation): State<Federation>,
    Path(txn_id): Path<String>,
    transaction: SignedTransaction,
    dialect: Dialect,
) -> Answer {
    // Stable and unstable name are the same endpoint; the Matrix one is another.
    let endpoint = match dialect {
        Dialect::Matrix => "v1/send",
        Dialect::Lm => "v2/send",
    };
    let protocol = match dialect {
        Dialect::Matrix => Side::Matrix,
        Dialect::Lm => Side::Lm,
    };
    let start = Instant::now();
    let taken = take(&federation, endpoint, &txn_id, &transaction, dialect).await;
    let result = match &taken {
        Ok((_, true)) => "ok",
        Ok((_, false)) => "replayed",
        Err(_) => "refused",
    };
    metrics::inbound_transaction(protocol, result, start.elapsed());
    taken.map(|(answer, _)| Json(answer))
}

/// The answer to a transaction, and whether it is a new one.
async fn take(
    federation: &Federation,
    endpoint: &str,
    txn_id: &str,
    transaction: &SignedTransaction,
    dialect: Dialect,
) -> Result<(Value, bool), Refusal> {
    let origin = &transaction.origin;
    let _turn = federation.lines.enter(origin, transaction.raw.len()).await?;
    match federation.transactions.begin(origin, endpoint, txn_id).await? {
        Begun::Answered(answer) => Ok((answer, false)),
        Begun::Process(processing) => {
            let answer = transaction::receive(federation, transaction, dialect).await?;
            Ok((processing.finish(answer).await?, true))
        }
    }
}

#[derive(Deserialize)]
struct DirectoryQuery {
    room_alias: Option<String>,
}

async fn query_directory(state: State<Federation>, query: Query<DirectoryQuery>, signed: Signed) -> Answer {
    directory(state, query, signed, None).await
}

/// Under the LM prefix, so that it is certain that the LM room is meant.
async fn query_directory_lm(state: State<Federation>, query: Query<DirectoryQuery>, signed: Signed) -> Answer {
    directory(state, query, signed, Some(Side::Lm)).await
}

async fn directory(
    State(federation): State<Federation>,
    Query(query): Query<DirectoryQuery>,
    signed: Signed,
    side: Option<Side>,
) -> Answer {
    let alias = query.room_alias.ok_or_else(|| Refusal::malformed("room_alias", "missing"))?;
    let target = federation.between.alias(&alias, Some(&signed.origin), side).await?;
    Ok(Json(json!({ "room_id": target.room_id, "servers": target.servers })))
}

#[derive(Deserialize)]
struct ProfileQuery {
    user_id: Option<String>,
    field: Option<String>,
}

async fn query_profile(
    State(federation): State<Federation>,
    Query(query): Query<ProfileQuery>,
    _signed: Signed,
) -> Answer {
    let user_id: OwnedUserId = parse("user_id", &query.user_id.unwrap_or_default())?;
    let profile = federation.between.profile(side_of_user(&user_id), &user_id).await?;
    let mut body = serde_json::Map::new();
    for (name, value) in [("displayname", profile.displayname), ("avatar_url", profile.avatar_url)] {
        if let Some(value) = value.filter(|_| query.field.as_deref().is_none_or(|field| field == name)) {
            body.insert(name.to_owned(), Value::String(value));
        }
    }
    Ok(Json(Value::Object(body)))
}

/// On which side a user of the gateway's name is seen: `@mx_*` exists on LM only, everybody else on Matrix.
fn side_of_user(user_id: &UserId) -> Side {
    if user_id.localpart().starts_with("mx_") { Side::Lm } else { Side::Matrix }
}

async fn make_join(
    State(federation): State<Federation>,
    Path((room_id, user_id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    signed: Signed,
) -> Answer {
    let (room_id, user_id): (OwnedRoomId, OwnedUserId) = (parse("room ID", &room_id)?, parse("user ID", &user_id)?);
    let versions: Vec<String> = pairs(&query, "ver");
    let answer = match side_of(&federation, &room_id).await? {
        Side::Lm => federation.lm.make_join(&signed.origin, &room_id, &user_id, &versions).await?,
        Side::Matrix => federation.dag.make_join(&signed.origin, &room_id, &user_id, &versions).await?,
    };
    Ok(Json(answer))
}

/// All values of a repeated query parameter.
fn pairs(query: &Option<String>, name: &str) -> Vec<String> {
    let query = query.as_deref().unwrap_or_default();
    url::form_urlencoded::parse(query.as_bytes())
        .filter(|(key, _)| key == name)
        .map(|(_, value)| value.into_owned())
        .collect()
}

async fn send_join_matrix(
    State(federation): State<Federation>,
    Path((room_id, event_id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    signed: SignedBody,
) -> Answer {
    let room_id: OwnedRoomId = parse("room ID", &room_id)?;
    let event_id = parse_event_id("event ID", &event_id)?;
    let omit_members = pairs(&query, "omit_members").iter().any(|value| value == "true");
    let answer = match side_of(&federation, &room_id).await? {
        Side::Lm => federation.lm.send_join(&signed.origin, signed.body).await?,
        Side::Matrix => {
            federation.dag.send_join(&signed.origin, &room_id, &event_id, signed.body, omit_members).await?
        }
    };
    Ok(Json(answer))
}

async fn send_join_lm(State(federation): State<Federation>, Path(_): Path<String>, signed: SignedBody) -> Answer {
    Ok(Json(federation.lm.send_join(&signed.origin, signed.body).await?))
}

async fn make_leave(
    State(federation): State<Federation>,
    Path((room_id, user_id)): Path<(String, String)>,
    signed: Signed,
) -> Answer {
    let (room_id, user_id): (OwnedRoomId, OwnedUserId) = (parse("room ID", &room_id)?, parse("user ID", &user_id)?);
    let answer = match side_of(&federation, &room_id).await? {
        Side::Lm => federation.lm.make_leave(&signed.origin, &room_id, &user_id).await?,
        Side::Matrix => federation.dag.make_leave(&signed.origin, &room_id, &user_id).await?,
    };
    Ok(Json(answer))
}

async fn send_leave_matrix(
    State(federation): State<Federation>,
    Path((room_id, event_id)): Path<(String, String)>,
    signed: SignedBody,
) -> Answer {
    let room_id: OwnedRoomId = parse("room ID", &room_id)?;
    let event_id = parse_event_id("event ID", &event_id)?;
    let answer = match side_of(&federation, &room_id).await? {
        Side::Lm => federation.lm.send_leave(&signed.origin, signed.body).await?,
        Side::Matrix => federation.dag.send_leave(&signed.origin, &room_id, &event_id, signed.body).await?,
    };
    Ok(Json(answer))
}

async fn send_leave_lm(State(federation): State<Federation>, Path(_): Path<String>, signed: SignedBody) -> Answer {
    Ok(Json(federation.lm.send_leave(&signed.origin, signed.body).await?))
}

async fn make_knock(
    State(federation): State<Federation>,
    Path((room_id, user_id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    signed: Signed,
) -> Answer {
    let (room_id, user_id): (OwnedRoomId, OwnedUserId) = (parse("room ID", &room_id)?, parse("user ID", &user_id)?);
    let versions: Vec<String> = pairs(&query, "ver");
    let answer = match side_of(&federation, &room_id).await? {
        Side::Lm => federation.lm.make_knock(&signed.origin, &room_id, &user_id, &versions).await?,
        Side::Matrix => federation.dag.make_knock(&signed.origin, &room_id, &user_id, &versions).await?,
    };
    Ok(Json(answer))
}

async fn send_knock_matrix(
    State(federation): State<Federation>,
    Path((room_id, event_id)): Path<(String, String)>,
    signed: SignedBody,
) -> Answer {
    let room_id: OwnedRoomId = parse("room ID", &room_id)?;
    let event_id = parse_event_id("event ID", &event_id)?;
    let answer = match side_of(&federation, &room_id).await? {
        Side::Lm => federation.lm.send_knock(&signed.origin, signed.body).await?,
        Side::Matrix => federation.dag.send_knock(&signed.origin, &room_id, &event_id, signed.body).await?,
    };
    Ok(Json(answer))
}

async fn send_knock_lm(State(federation): State<Federation>, Path(_): Path<String>, signed: SignedBody) -> Answer {
    Ok(Json(federation.lm.send_knock(&signed.origin, signed.body).await?))
}

async fn invite_matrix(
    State(federation): State<Federation>,
    Path((room_id, event_id)): Path<(String, String)>,
    signed: SignedBody,
) -> Answer {
    let room_id: OwnedRoomId = parse("room ID", &room_id)?;
    let event_id = parse_event_id("event ID", &event_id)?;
    let version = signed.body.get("room_version").and_then(Value::as_str).unwrap_or_default();
    match RoomVersion::parse(version).map(RoomVersion::family) {
        Some(Family::Log) => Ok(Json(federation.lm.invited(&signed.origin, signed.body).await?)),
        Some(Family::Graph) => {
            Ok(Json(federation.dag.invited(&signed.origin, &room_id, &event_id, signed.body).await?))
        }
        None => Err(Refusal::IncompatibleRoomVersion(version.to_owned())),
    }
}

async fn invite_lm(State(federation): State<Federation>, Path(_): Path<String>, signed: SignedBody) -> Answer {
    Ok(Json(federation.lm.invited(&signed.origin, signed.body).await?))
}

async fn event_matrix(State(federation): State<Federation>, Path(event_id): Path<String>, signed: Signed) -> Answer {
    let event_id = parse_event_id("event ID", &event_id)?;
    Ok(Json(federation.dag.get_event(&signed.origin, &event_id).await?))
}

async fn event_lm(State(federation): State<Federation>, Path(event_id): Path<String>, signed: Signed) -> Answer {
    let event_id = parse_event_id("event ID", &event_id)?;
    Ok(Json(federation.lm.get_event(&signed.origin, &event_id).await?))
}

async fn event_auth(
    State(federation): State<Federation>,
    Path((room_id, event_id)): Path<(String, String)>,
    signed: Signed,
) -> Answer {
    let room_id: OwnedRoomId = parse("room ID", &room_id)?;
    let event_id = parse_event_id("event ID", &event_id)?;
    Ok(Json(federation.dag.event_auth(&signed.origin, &room_id, &event_id).await?))
}

#[derive(Deserialize)]
struct StateQuery {
    event_id: Option<String>,
}

async fn state(
    federation: State<Federation>,
    room_id: Path<String>,
    query: Query<StateQuery>,
    signed: Signed,
) -> Answer {
    state_at(federation, room_id, query, signed, false).await
}

async fn state_ids(
    federation: State<Federation>,
    room_id: Path<String>,
    query: Query<StateQuery>,
    signed: Signed,
) -> Answer {
    state_at(federation, room_id, query, signed, true).await
}

async fn state_at(
    State(federation): State<Federation>,
    Path(room_id): Path<String>,
    Query(query): Query<StateQuery>,
    signed: Signed,
    ids: bool,
) -> Answer {
    let room_id: OwnedRoomId = parse("room ID", &room_id)?;
    let event_id = query.event_id.map(|id| parse_event_id("event_id", &id)).transpose()?;
    let answer = match side_of(&federation, &room_id).await? {
        Side::Lm => federation.lm.get_state(&signed.origin, &room_id, event_id.as_deref(), ids).await?,
        Side::Matrix => {
            let event_id = event_id.ok_or_else(|| Refusal::malformed("event_id", "missing"))?;
            federation.dag.get_state(&signed.origin, &room_id, &event_id, ids).await?
        }
    };
    Ok(Json(answer))
}

async fn backfill(
    State(federation): State<Federation>,
    Path(room_id): Path<String>,
    RawQuery(query): RawQuery,
    signed: Signed,
) -> Answer {
    let room_id: OwnedRoomId = parse("room ID", &room_id)?;
    let from = pairs(&query, "v").iter().map(|id| parse_event_id("v", id)).collect::<Result<Vec<_>, _>>()?;
    let limit = pairs(&query, "limit").pop().ok_or_else(|| Refusal::malformed("limit", "missing"))?;
    let limit: i64 = limit.parse().map_err(|_| Refusal::malformed("limit", format!("{limit:?} is not an integer")))?;
    let first = from.first().ok_or_else(|| Refusal::malformed("v", "missing"))?;
    let answer = match side_of(&federation, &room_id).await? {
        Side::Lm => federation.lm.backfill(&signed.origin, &room_id, first, limit).await?,
        Side::Matrix => federation.dag.backfill(&signed.origin, &room_id, &from, limit).await?,
    };
    Ok(Json(answer))
}

async fn get_missing_events(
    State(federation): State<Federation>,
    Path(room_id): Path<String>,
    signed: SignedBody,
) -> Answer {
    let room_id: OwnedRoomId = parse("room ID", &room_id)?;
    Ok(Json(federation.dag.get_missing_events(&signed.origin, &room_id, signed.body).await?))
}

#[derive(Deserialize)]
struct PublicRoomsQuery {
    limit: Option<i64>,
    since: Option<String>,
}

async fn public_rooms(
    State(federation): State<Federation>,
    Query(query): Query<PublicRoomsQuery>,
    _signed: Signed,
) -> Answer {
    Ok(Json(federation.dag.public_rooms(query.limit, query.since.as_deref()).await?))
}

async fn search_public_rooms(State(federation): State<Federation>, signed: SignedBody) -> Answer {
    let limit = signed.body.get("limit").and_then(Value::as_i64);
    let since = signed.body.get("since").and_then(Value::as_str);
    Ok(Json(federation.dag.public_rooms(limit, since).await?))
}

async fn user_devices(State(federation): State<Federation>, Path(user_id): Path<String>, _signed: Signed) -> Answer {
    let user_id: OwnedUserId = parse("user ID", &user_id)?;
    // Unknown users are unknown here too. Ghosts have no devices: encrypted rooms are not bridged.
    federation.between.profile(side_of_user(&user_id), &user_id).await?;
    Ok(Json(json!({ "user_id": user_id, "stream_id": 0, "devices": [] })))
}

async fn keys_query(_signed: SignedBody) -> Answer {
    Ok(Json(json!({ "device_keys": {} })))
}

async fn keys_claim(_signed: SignedBody) -> Answer {
    Ok(Json(json!({ "one_time_keys": {} })))
}
