//! `/servers`

use axum::Json;
use axum::extract::{Path, State};
use ruma::ServerName;
use serde::Serialize;
use utoipa::ToSchema;

use super::ApiError;
use crate::admin::Admin;
use crate::refusal::Refusal;

/// The servers for which something waits or to which the last transaction failed.
#[derive(Serialize, ToSchema)]
pub(super) struct Servers {
    servers: Vec<Server>,
}

/// A server that the gateway sends to.
#[derive(Serialize, ToSchema)]
pub(super) struct Server {
    /// Its name.
    server_name: String,
    /// Whether the last transaction arrived.
    reachable: bool,
    /// How many events wait for it.
    waiting: i64,
    /// Failures in a row.
    failures: i64,
    /// When it is tried again, in milliseconds since the epoch; 0 when now.
    retry_at: i64,
    /// The last failure.
    error: Option<String>,
}

/// The servers for which something waits or to which the last transaction failed.
#[utoipa::path(get, path = "/servers", responses((status = 200, body = Servers)))]
pub(super) async fn list(State(admin): State<Admin>) -> Result<Json<Servers>, Refusal> {
    let queues = admin.context.outbound.status().await?.into_iter().map(|queue| Server {
        server_name: queue.destination.to_string(),
        reachable: queue.failures == 0,
        waiting: queue.waiting,
        failures: queue.failures,
        retry_at: queue.retry_at,
        error: queue.last_error,
    });
    Ok(Json(Servers { servers: queues.collect() }))
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
