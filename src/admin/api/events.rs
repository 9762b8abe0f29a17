//! `/events`

use axum::Json;
use axum::extract::{Path, State};

use super::ApiError;
use crate::admin::Admin;
use crate::bridge::Explanation;
use crate::event::parse_event_id;
use crate::refusal::Refusal;

/// Where an event is on both sides, or why it is not.
#[utoipa::path(
    get, path = "/events/{event_id}", params(("event_id" = String, Path)),
    responses((status = 200, body = Object), (status = 404, body = ApiError))
)]
pub(super) async fn explain(
    State(admin): State<Admin>,
    Path(event_id): Path<String>,
) -> Result<Json<Explanation>, Refusal> {
    let event_id = parse_event_id("event ID", &event_id)?;
    let explanation = admin.bridge.explain(&event_id).await?;
    explanation.map(Json).ok_or_else(|| Refusal::NotFound(format!("the event {event_id}")))
}
