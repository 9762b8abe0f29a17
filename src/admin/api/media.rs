//! `/media`

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ApiError, Body};
use crate::admin::Admin;
use crate::identity::{Medium, Side};
use crate::refusal::Refusal;

/// A file.
#[derive(Deserialize, ToSchema)]
pub(super) struct File {
    /// Its URI on either side: `mxc://SERVER/ID`, or `mxc://GATEWAY/ID`.
    uri: String,
}

/// What became of it.
#[derive(Serialize, ToSchema)]
pub(super) struct Forgotten {
    /// Whether it was kept.
    kept: bool,
}

/// Forgets a file that is kept. Who asks for it again gets it from where it is, as long as it is there.
#[utoipa::path(
    post, path = "/media/forget", request_body = File,
    responses((status = 200, body = Forgotten), (status = 400, body = ApiError))
)]
pub(super) async fn forget(State(admin): State<Admin>, Body(file): Body<File>) -> Result<Json<Forgotten>, Refusal> {
    let names = &admin.context.media;
    let mut kept = false;
    for medium in meant(names, &file.uri)? {
        kept |= admin.media.forget(&medium).await;
    }
    Ok(Json(Forgotten { kept }))
}

/// The files that a URI can mean: the source's own name does not say on which side it was said.
fn meant(names: &crate::identity::MediaNames, uri: &str) -> Result<Vec<Medium>, Refusal> {
    let found: Vec<Medium> = [Side::Matrix, Side::Lm]
        .into_iter()
        .filter_map(|to| names.medium(&names.across(uri, to)).or_else(|| names.medium(uri)))
        .collect();
    if found.is_empty() {
        return Err(Refusal::malformed("uri", format!("{uri:?} is no URI of a file that can cross")));
    }
    Ok(found)
}
