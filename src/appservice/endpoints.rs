//! What the Synapse calls. <https://spec.matrix.org/v1.17/application-service-api/#homeserver---application-service-api>

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use http::StatusCode;
use serde::Deserialize;
use serde_json::error::Category;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::event::{Pushed, View, work};
use super::{Appservice, Bearer, thirdparty};
use crate::admin::metrics::METRICS;
use crate::refusal::Refusal;
use crate::store::appservice as rows;

/// How large a transaction may be: 100 events with what the homeserver adds to them.
const LIMIT: usize = 32 << 20;

pub(super) type Answer = Result<Json<Value>, Refusal>;

/// The endpoints, on whichever listener they are put.
pub(super) fn routes(appservice: Appservice) -> Router {
    let app = |path: &str| format!("/_matrix/app/v1{path}");
    Router::new()
        .route(&app("/transactions/{txn_id}"), put(transaction))
        // Localparts may hold slashes, which Synapse does not escape.
        .route(&app("/users/{*user_id}"), get(user))
        .route(&app("/rooms/{*alias}"), get(alias))
        .route(&app("/ping"), post(ping))
        .route(&app("/thirdparty/protocol/{protocol}"), get(thirdparty::protocol))
        .route(&app("/thirdparty/location/{protocol}"), get(thirdparty::location))
        .route(&app("/thirdparty/location"), get(thirdparty::location_of_alias))
        .route(&app("/thirdparty/user/{protocol}"), get(thirdparty::user))
        .route(&app("/thirdparty/user"), get(thirdparty::user_of_ghost))
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(LIMIT))
        .layer(from_fn_with_state(appservice.clone(), authenticate))
        .with_state(appservice)
}

async fn authenticate(State(appservice): State<Appservice>, request: Request, next: Next) -> Response {
    let refuse = |status: StatusCode, errcode: &str, problem: &str| {
        tracing::warn!(path = request.uri().path(), error = problem, "a request to the appservice was refused");
        error(status, errcode, problem)
    };
    let bearer = appservice.inner.registration.hs_token.check(request.headers());
    appservice.inner.status.called(bearer == Bearer::Right);
    match bearer {
        Bearer::Right => next.run(request).await,
        Bearer::Wrong => refuse(StatusCode::FORBIDDEN, "M_FORBIDDEN", "this is not the hs_token of the registration"),
        Bearer::Missing => refuse(StatusCode::UNAUTHORIZED, "M_UNAUTHORIZED", "the hs_token is missing"),
    }
}

async fn wrong_method() -> Response {
    error(StatusCode::METHOD_NOT_ALLOWED, "M_UNRECOGNIZED", "the endpoint does not take this method")
}

fn error(status: StatusCode, errcode: &str, error: &str) -> Response {
    (status, Json(json!({ "errcode": errcode, "error": error }))).into_response()
}

#[derive(Deserialize)]
struct Transaction {
    #[serde(default)]
    events: Vec<Box<RawValue>>,
}

async fn transaction(
    State(appservice): State<Appservice>,
    Path(txn_id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Answer {
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            Refusal::TooLarge { what: "transaction", size: LIMIT.saturating_add(1), limit: LIMIT }
        }
        _ => Refusal::NotJson(rejection.body_text()),
    })?;
    let transaction: Transaction = serde_json::from_slice(&body).map_err(|error| match error.classify() {
        Category::Data => Refusal::malformed("transaction", error.to_string()),
        _ => Refusal::NotJson(error.to_string()),
    })?;
    let inner = &appservice.inner;
    let chats = inner.chats.load();
    let view = View { homeserver: &inner.homeserver_name, bot: &inner.bot, chats: &chats };
    let mut fingerprint = Sha256::new();
    let mut jobs = Vec::new();
    let (mut malformed, mut ignored) = (0, 0);
    for raw in &transaction.events {
        // One bad event must not stop those after it.
        let Ok(event) = serde_json::from_str::<Pushed>(raw.get()) else {
            malformed += 1;
            fingerprint.update(raw.get());
            continue;
        };
        fingerprint.update(&event.event_id);
        fingerprint.update("\n");
        match work(view, &event).map(|work| serde_json::to_vec(&work)) {
            Some(Ok(job)) => jobs.push(job),
            _ => ignored += 1,
        }
    }
    METRICS.appservice_events.with_label_values(&["malformed"]).inc_by(malformed);
    METRICS.appservice_events.with_label_values(&["ignored"]).inc_by(ignored);
    let fingerprint = data_encoding::HEXLOWER.encode(&fingerprint.finalize());
    let (store, now) = (inner.base.store.clone(), inner.base.clock.now_ms());
    let is_new = inner
        .base
        .store
        .write(move |tx| {
            Box::pin(async move { rows::take_transaction(&store, tx, &txn_id, &fingerprint, &jobs, now).await })
        })
        .await?;
    METRICS.appservice_transactions.with_label_values(&[if is_new { "ok" } else { "replayed" }]).inc();
    inner.news.notify_one();
    Ok(Json(json!({})))
}

async fn user(State(appservice): State<Appservice>, Path(user_id): Path<String>) -> Answer {
    if user_id == appservice.inner.bot.as_str() {
        return Ok(Json(json!({})));
    }
    Err(Refusal::NotFound(format!("user {user_id}")))
}

async fn alias(State(appservice): State<Appservice>, Path(alias): Path<String>) -> Answer {
    match appservice.inner.aliases.query(&alias).await {
        Ok(()) => Ok(Json(json!({}))),
        Err(error) => Err(Refusal::NotFound(format!("{alias}: {error}"))),
    }
}

#[derive(Deserialize)]
struct Ping {
    transaction_id: Option<String>,
}

async fn ping(State(appservice): State<Appservice>, body: Bytes) -> Json<Value> {
    let ping: Option<Ping> = serde_json::from_slice(&body).ok();
    appservice.inner.status.received(ping.and_then(|ping| ping.transaction_id).as_deref());
    Json(json!({}))
}
