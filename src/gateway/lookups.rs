//! What other servers look up about the gateway, its aliases and its users.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use ruma::{OwnedUserId, UserId};
use serde_json::{Map, Value, json};

use super::routes::{Answer, Federation, error};
use super::signed::{Asked, parse};
use crate::identity::Side;
use crate::refusal::Refusal;

/// The gateway's own keys.
pub(super) async fn own_keys(State(federation): State<Federation>) -> Json<Value> {
    Json(Value::Object(federation.context.keyring.own_keys()))
}

/// Where the gateway is, if the configuration says that it is not where its name leads.
pub(super) async fn well_known(State(federation): State<Federation>) -> Response {
    match federation.context.config.delegated() {
        Some(server) => Json(json!({ "m.server": server })).into_response(),
        None => error(StatusCode::NOT_FOUND, "M_NOT_FOUND", "the configuration delegates this name to no other"),
    }
}

/// What program this is.
pub(super) async fn version() -> Json<Value> {
    Json(json!({ "server": { "name": "isthmus", "version": env!("CARGO_PKG_VERSION") } }))
}

/// The room that an alias leads to; of a portal's two the one on `side`, where that is certain.
pub(super) async fn directory(federation: Federation, mut asked: Asked, side: Option<Side>) -> Answer {
    asked.waits(&federation)?;
    let alias = asked.value("room_alias").ok_or_else(|| Refusal::malformed("room_alias", "missing"))?;
    let target = federation.between.alias(&alias, Some(&asked.origin), side).await;
    // Homeservers tell their users of any other refusal that the gateway is broken.
    let target = target.map_err(|refusal| match refusal {
        refusal @ Refusal::NotFound(_) => refusal,
        refusal if refusal.is_transient() => refusal,
        refusal => Refusal::NotFound(format!("the alias {alias}: {refusal};")),
    })?;
    Ok(json!({ "room_id": target.room_id, "servers": target.servers }))
}

/// What a user is called.
pub(super) async fn profile(federation: Federation, asked: Asked) -> Answer {
    let user_id: OwnedUserId = parse("user_id", &asked.value("user_id").unwrap_or_default())?;
    let profile = federation.between.profile(side_of_user(&user_id), &user_id).await?;
    let field = asked.value("field");
    let mut body = Map::new();
    for (name, value) in [("displayname", profile.displayname), ("avatar_url", profile.avatar_url)] {
        if let Some(value) = value.filter(|_| field.as_deref().is_none_or(|field| field == name)) {
            body.insert(name.to_owned(), Value::String(value));
        }
    }
    Ok(Value::Object(body))
}

/// On which side a user of the gateway's name is seen: `@mx_*` exists on LM only, everybody else on Matrix.
pub(super) fn side_of_user(user_id: &UserId) -> Side {
    if user_id.localpart().starts_with("mx_") { Side::Lm } else { Side::Matrix }
}
