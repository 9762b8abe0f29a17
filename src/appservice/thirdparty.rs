//! Third-party look-ups: which LM servers rooms are bridged with, and what an LM alias or user is called here.
//! <https://spec.matrix.org/v1.17/application-service-api/#third-party-networks>

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::{Path, Query, State};
use ruma::{ServerName, UserId};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Appservice;
use super::endpoints::Answer;
use super::registration::PROTOCOL;
use crate::bridge::{lm_alias, of_alias};
use crate::refusal::Refusal;

/// How many LM servers are listed, and of how many portals.
const SERVERS: usize = 200;
const PORTALS: usize = 10_000;

/// The protocol, with a list of rooms for each LM server: clients offer them in the room directory.
pub(super) async fn protocol(State(appservice): State<Appservice>, Path(protocol): Path<String>) -> Answer {
    if protocol != PROTOCOL {
        return Err(Refusal::NotFound(format!("protocol {protocol}")));
    }
    let portals = appservice.inner.portals.first(PORTALS).await?;
    let hubs: BTreeSet<&str> = portals.iter().map(|portal| portal.lm_hub.as_str()).collect();
    let instance =
        |hub: &&str| json!({ "desc": format!("{hub} (Linearized Matrix)"), "fields": {}, "network_id": hub });
    let mut instances: Vec<Value> = hubs.iter().take(SERVERS).map(instance).collect();
    if instances.is_empty() {
        // Clients show no protocol without one.
        instances.push(json!({ "desc": "Linearized Matrix", "fields": {}, "network_id": PROTOCOL }));
    }
    Ok(Json(json!({
        "user_fields": ["user_id"],
        "location_fields": ["alias"],
        "icon": "",
        "field_types": {
            "alias": { "regexp": "#.+:.+", "placeholder": "#NAME:SERVER" },
            "user_id": { "regexp": "@.+:.+", "placeholder": "@NAME:SERVER" },
        },
        "instances": instances,
    })))
}

#[derive(Deserialize)]
pub(super) struct Location {
    alias: Option<String>,
}

/// Where an LM alias is found here.
pub(super) async fn location(
    State(appservice): State<Appservice>,
    Path(protocol): Path<String>,
    Query(query): Query<Location>,
) -> Answer {
    let wanted = query.alias.filter(|_| protocol == PROTOCOL);
    let found = wanted.as_deref().and_then(|alias| {
        let (name, server) = alias.strip_prefix('#')?.split_once(':')?;
        let server = ServerName::parse(server).ok()?;
        let here = format!("#{}:{}", of_alias(name, &server), appservice.inner.homeserver_name);
        Some(place(&here, alias))
    });
    Ok(Json(Value::Array(found.into_iter().collect())))
}

/// Which LM alias an alias of here stands for.
pub(super) async fn location_of_alias(
    State(appservice): State<Appservice>,
    Query(query): Query<Location>,
) -> Json<Value> {
    let found = query.alias.as_deref().and_then(|here| {
        let (localpart, server) = here.strip_prefix('#')?.split_once(':')?;
        let (alias, _) = lm_alias(localpart)?;
        (server == appservice.inner.homeserver_name).then(|| place(here, &alias))
    });
    Json(Value::Array(found.into_iter().collect()))
}

fn place(here: &str, alias: &str) -> Value {
    json!({ "alias": here, "protocol": PROTOCOL, "fields": { "alias": alias } })
}

#[derive(Deserialize)]
pub(super) struct User {
    user_id: Option<String>,
    userid: Option<String>,
}

/// What an LM user is called here.
pub(super) async fn user(
    State(appservice): State<Appservice>,
    Path(protocol): Path<String>,
    Query(query): Query<User>,
) -> Answer {
    let wanted = query.user_id.filter(|_| protocol == PROTOCOL).and_then(|user| UserId::parse(user).ok());
    let Some(user) = wanted else { return Ok(Json(json!([]))) };
    let ghost = appservice.inner.portals.ghost_of(&user).await?;
    Ok(Json(Value::Array(ghost.map(|ghost| person(&ghost, &user)).into_iter().collect())))
}

/// Which LM user somebody of here stands for.
pub(super) async fn user_of_ghost(State(appservice): State<Appservice>, Query(query): Query<User>) -> Answer {
    let Some(ghost) = query.userid.and_then(|ghost| UserId::parse(ghost).ok()) else { return Ok(Json(json!([]))) };
    let user = appservice.inner.portals.user_behind(&ghost).await?;
    Ok(Json(Value::Array(user.map(|user| person(&ghost, &user)).into_iter().collect())))
}

fn person(ghost: &UserId, user: &UserId) -> Value {
    json!({ "userid": ghost, "protocol": PROTOCOL, "fields": { "user_id": user } })
}
