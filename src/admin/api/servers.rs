//! `/servers`

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Path, State};
use ruma::ServerName;
use serde::Serialize;
use utoipa::ToSchema;

use super::ApiError;
use crate::admin::{Admin, Held};
use crate::federation::QueueStatus;
use crate::refusal::Refusal;
use crate::store::overview::{Peer, peers};

/// The servers with which rooms are shared, and those to which something could not be sent.
#[derive(Serialize, ToSchema)]
pub(super) struct Servers {
    servers: Vec<Server>,
}

/// A server that the gateway sends to.
#[derive(Serialize, ToSchema)]
pub(super) struct Server {
    /// Its name.
    server_name: String,
    /// `matrix`, `linearized` or both, by the rooms that are shared.
    speaks: Vec<&'static str>,
    /// In how many Matrix rooms it gets events.
    matrix_rooms: i64,
    /// In how many LM rooms that this gateway keeps it gets events.
    lm_rooms: i64,
    /// Of how many portals it is the hub.
    hub_of: i64,
    /// Whether the last transaction arrived.
    reachable: bool,
    /// How many events wait for it.
    waiting: i64,
    /// Failures in a row.
    failures: i64,
    /// Since when it has taken nothing, in milliseconds since the epoch; 0 when it does, or when that is not known.
    since: i64,
    /// Whether it answered the last transaction, and did not take it.
    answers: bool,
    /// When it is tried again, in milliseconds since the epoch; 0 when now.
    retry_at: i64,
    /// The last failure.
    error: Option<String>,
    /// Rooms of which something waits alone, because the server fails on one event of it.
    held: Vec<Held>,
}

/// The servers with which rooms are shared, and those to which something could not be sent.
#[utoipa::path(get, path = "/servers", responses((status = 200, body = Servers)))]
pub(super) async fn list(State(admin): State<Admin>) -> Result<Json<Servers>, Refusal> {
    let mut peers = peers(&admin.context.store).await?;
    let queues = admin.context.outbound.status().await?;
    let mut queues: BTreeMap<String, QueueStatus> =
        queues.into_iter().map(|queue| (queue.destination.to_string(), queue)).collect();
    for server in queues.keys() {
        peers.entry(server.clone()).or_default();
    }
    let servers = peers.into_iter().map(|(server_name, peer)| {
        let queue = queues.remove(&server_name);
        let Peer { matrix_rooms, lm_rooms, hub_of } = peer;
        let speaks = [(matrix_rooms > 0).then_some("matrix"), (lm_rooms > 0 || hub_of > 0).then_some("linearized")];
        Server {
            server_name,
            speaks: speaks.into_iter().flatten().collect(),
            matrix_rooms,
            lm_rooms,
            hub_of,
            reachable: queue.as_ref().is_none_or(|queue| queue.failures == 0),
            waiting: queue.as_ref().map_or(0, |queue| queue.waiting),
            failures: queue.as_ref().map_or(0, |queue| queue.failures),
            since: queue.as_ref().map_or(0, |queue| queue.since),
            answers: queue.as_ref().is_some_and(|queue| queue.answers),
            retry_at: queue.as_ref().map_or(0, |queue| queue.retry_at),
            held: queue.iter().flat_map(Held::of).collect(),
            error: queue.and_then(|queue| queue.last_error),
        }
    });
    Ok(Json(Servers { servers: servers.collect() }))
}

#[derive(Serialize, ToSchema)]
pub(super) struct Retried {}

/// Tries a server now, whatever its backoff.
#[utoipa::path(
    post, path = "/servers/{server_name}/retry", params(("server_name" = String, Path)),
    responses((status = 200, body = Retried), (status = 400, body = ApiError))
)]
pub(super) async fn retry(
    State(admin): State<Admin>,
    Path(server_name): Path<String>,
) -> Result<Json<Retried>, Refusal> {
    let server = ServerName::parse(&server_name)
        .map_err(|error| Refusal::malformed("server name", format!("{server_name:?}: {error}")))?;
    admin.context.outbound.retry(&server);
    Ok(Json(Retried {}))
}
