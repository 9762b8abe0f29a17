//! The admin API: what operators and the command line do with portals. JSON over HTTP, with a bearer token.

mod events;
mod media;
mod portals;
mod servers;
#[cfg(test)]
mod tests;

use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequest, FromRequestParts, Query, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{MethodRouter, get, post, put};
use axum::{Json, Router};
use http::StatusCode;
use http::request::Parts;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi, ToSchema};

use super::Admin;
use crate::appservice::{Bearer, Token};
use crate::refusal::Refusal;

/// Where the API is.
const PREFIX: &str = "/_isthmus/admin/v1";

/// Every route: its path after the prefix, its methods, what answers.
fn table() -> Vec<(&'static str, &'static [&'static str], MethodRouter<Admin>)> {
    vec![
        ("/portals", &["get", "post"], get(portals::list).post(portals::make)),
        ("/portals/{portal_id}", &["get", "delete"], get(portals::show).delete(portals::remove)),
        ("/portals/{portal_id}/invite", &["post"], post(portals::invite)),
        ("/portals/{portal_id}/power", &["put"], put(portals::power)),
        ("/portals/{portal_id}/announce", &["post"], post(portals::announce)),
        ("/portals/{portal_id}/hub", &["post"], post(portals::hand_over)),
        ("/portals/{portal_id}/resume", &["post"], post(portals::resume)),
        ("/portals/{portal_id}/repair", &["post"], post(portals::repair)),
        ("/portals/{portal_id}/log", &["get"], get(portals::log)),
        ("/events/{event_id}", &["get"], get(events::explain)),
        ("/media/forget", &["post"], post(media::forget)),
        ("/servers", &["get"], get(servers::list)),
        ("/servers/{server_name}/retry", &["post"], post(servers::retry)),
    ]
}

/// The API's document.
#[derive(OpenApi)]
#[openapi(
    info(title = "isthmus", description = "The admin API of the gateway."),
    servers((url = "/_isthmus/admin/v1")),
    security(("token" = [])),
    modifiers(&TokenScheme),
    paths(
        portals::list,
        portals::make,
        portals::show,
        portals::remove,
        portals::invite,
        portals::power,
        portals::announce,
        portals::hand_over,
        portals::resume,
        portals::repair,
        portals::log,
        events::explain,
        media::forget,
        servers::list,
        servers::retry,
    )
)]
struct Document;

struct TokenScheme;

impl Modify for TokenScheme {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        document.components.get_or_insert_default().add_security_scheme("token", scheme);
    }
}

/// The routes of the API. The document is there without a token.
pub(super) fn routes(admin: &Admin) -> Router<Admin> {
    let guard = Guard { token: admin.context.config.admin.token.clone().map(Token::new) };
    let mut api = Router::new();
    for (path, _, handler) in table() {
        api = api.route(&format!("{PREFIX}{path}"), handler);
    }
    api.layer(from_fn_with_state(guard, authenticate))
        .route(&format!("{PREFIX}/openapi.json"), get(|| async { Json(Document::openapi()) }))
}

#[derive(Clone)]
struct Guard {
    token: Option<Token>,
}

async fn authenticate(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let (status, errcode, error) = match guard.token.as_ref().map(|token| token.check(request.headers())) {
        Some(Bearer::Right) => return next.run(request).await,
        Some(Bearer::Wrong) => (StatusCode::FORBIDDEN, "M_FORBIDDEN", "this is not the configuration's `admin.token`"),
        Some(Bearer::Missing) => (StatusCode::UNAUTHORIZED, "M_MISSING_TOKEN", "the bearer token is missing"),
        None => (StatusCode::FORBIDDEN, "M_FORBIDDEN", "the admin API is off: the configuration has no `admin.token`"),
    };
    (status, Json(json!({ "errcode": errcode, "error": error }))).into_response()
}

/// What every refusal looks like.
#[derive(Serialize, ToSchema)]
struct ApiError {
    /// The Matrix error code.
    errcode: String,
    /// What is wrong, in a sentence.
    error: String,
}

/// A JSON body, refused with a reason.
struct Body<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let bytes = axum::body::Bytes::from_request(request, state)
            .await
            .map_err(|rejection| Refusal::malformed("the body", rejection.to_string()))?;
        let value: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|error| Refusal::NotJson(error.to_string()))?;
        T::deserialize(value).map(Self).map_err(|error| Refusal::malformed("the body", error.to_string()))
    }
}

/// Query parameters, refused with a reason.
struct Parameters<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Parameters<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let query: Result<Query<T>, QueryRejection> = Query::from_request_parts(parts, state).await;
        query
            .map(|Query(query)| Self(query))
            .map_err(|rejection| Refusal::malformed("the query", rejection.body_text()))
    }
}
