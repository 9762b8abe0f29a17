//! What operators look at: metrics, health, the admin API.

mod api;
mod health;
pub mod metrics;
mod page;

use axum::extract::State;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::header;

pub use self::health::{CatchingUp, Failing, Files, Health, Held, HubFaults, Outbound, Status, Uncorrected, Waiting};
use crate::appservice::Appservice;
use crate::bridge::Bridge;
use crate::dag::Dag;
use crate::federation::Context;
use crate::lm::Lm;
use crate::media::Media;

/// What the admin listener stands in front of; clones share it.
#[derive(Clone)]
pub struct Admin {
    /// What everything shares.
    pub context: Context,
    /// The linear side.
    pub lm: Lm,
    /// The graph side.
    pub dag: Dag,
    /// The bridge.
    pub bridge: Bridge,
    /// The appservice, when there is a homeserver.
    pub appservice: Option<Appservice>,
    /// Files of both sides.
    pub media: Media,
}

impl Admin {
    /// Everything on the admin listener. What the Synapse calls is there too: it is the one listener without TLS, and a
    /// Synapse checks certificates of appservices against the system's authorities alone.
    pub fn routes(self) -> Router {
        let appservice = self.appservice.as_ref().map(Appservice::routes).unwrap_or_default();
        Router::new()
            .route("/", get(status_page))
            .route("/health", get(health))
            .route("/metrics", get(show_metrics))
            .merge(api::routes(&self))
            .with_state(self)
            .merge(appservice)
            .layer(from_fn_with_state("admin", metrics::track))
    }
}

async fn health(State(admin): State<Admin>) -> Response {
    let health = admin.health().await;
    (health.status.code(), Json(health)).into_response()
}

async fn show_metrics(State(admin): State<Admin>) -> Response {
    admin.health().await;
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics::render()).into_response()
}

async fn status_page(State(admin): State<Admin>) -> Response {
    let page = page::render(&admin.health().await);
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], page).into_response()
}
