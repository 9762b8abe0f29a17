//! What other servers ask about the devices of the gateway's users, in the draft's shape and in Matrix's.
//! Source: draft-ralston-mimi-linearized-matrix-04, sections `int-api-get-device` and `int-transport-key-claim`;
//! <https://spec.matrix.org/v1.16/server-server-api/#end-to-end-encryption>

use ruma::{OwnedUserId, UserId};
use serde_json::{Map, Value, json};

use super::lookups::side_of_user;
use super::routes::{Answer, Federation};
use super::signed::{Asked, Given};
use crate::event::Object;
use crate::refusal::Refusal;
use crate::seam::Device;

/// How many users, and devices of all of them, one request may name.
const NAMED: usize = 1000;

/// One device.
pub(super) async fn device(federation: Federation, asked: Asked) -> Answer {
    let (user_id, device_id) = (asked.user_id()?, asked.segment("device_id"));
    exists(&federation, &user_id).await?;
    let device = federation.devices.device(&user_id, device_id).await?;
    let shown: String = device_id.chars().take(60).collect();
    let device = device.ok_or_else(|| Refusal::NotFound(format!("device {shown:?} of {user_id}")))?;
    Ok(Value::Object(device.object))
}

/// A user's devices, as Matrix has it.
pub(super) async fn devices(federation: Federation, asked: Asked) -> Answer {
    let user_id = asked.user_id()?;
    exists(&federation, &user_id).await?;
    let devices = federation.devices.devices(&user_id).await?.into_iter();
    let devices: Vec<_> =
        devices.map(|Device { device_id, object }| json!({ "device_id": device_id, "keys": object })).collect();
    Ok(json!({ "user_id": user_id, "stream_id": 0, "devices": devices }))
}

/// The keys of devices, as Matrix has it: of all of a user's, or of those that are named.
pub(super) async fn keys(federation: Federation, given: Given) -> Answer {
    let mut found = Map::new();
    for (user_id, wanted) in users(&given.body, "device_keys")? {
        let wanted = wanted.as_array().ok_or_else(|| Refusal::malformed("device_keys", "holds what is no list"))?;
        if wanted.len() > NAMED {
            return Err(too_many("device_keys"));
        }
        let Some(user_id) = known(&federation, user_id).await? else { continue };
        let devices = federation.devices.devices(&user_id).await?;
        let is_wanted = |device: &Device| wanted.is_empty() || wanted.iter().any(|id| *id == device.device_id);
        let devices = devices.into_iter().filter(is_wanted);
        let devices: Map<_, _> =
            devices.map(|Device { device_id, object }| (device_id, Value::Object(object))).collect();
        if !devices.is_empty() {
            found.insert(user_id.to_string(), Value::Object(devices));
        }
    }
    Ok(json!({ "device_keys": found }))
}

/// Takes keys that serve once. Whoever does not exist or has no such key is left out.
pub(super) async fn claim(federation: Federation, given: Given) -> Answer {
    let mut claims = Vec::new();
    for (user_id, devices) in users(&given.body, "one_time_keys")? {
        let devices =
            devices.as_object().ok_or_else(|| Refusal::malformed("one_time_keys", "holds what is no object"))?;
        for (device_id, algorithm) in devices {
            let algorithm = algorithm.as_str();
            let algorithm =
                algorithm.ok_or_else(|| Refusal::malformed("one_time_keys", "an algorithm is no string"))?;
            claims.push((user_id, device_id, algorithm));
        }
    }
    if claims.len() > NAMED {
        return Err(too_many("one_time_keys"));
    }
    let mut found = Map::new();
    for (user_id, device_id, algorithm) in claims {
        let Some(user_id) = known(&federation, user_id).await? else { continue };
        let Some((name, key)) = federation.devices.claim(&user_id, device_id, algorithm).await? else { continue };
        let of_user = found.entry(user_id.to_string()).or_insert_with(|| json!({}));
        if let Some(of_user) = of_user.as_object_mut() {
            of_user.insert(device_id.clone(), json!({ name: key }));
        }
    }
    Ok(json!({ "one_time_keys": found }))
}

/// The entries of a map from users.
fn users<'a>(body: &'a Object, name: &str) -> Result<impl Iterator<Item = (&'a str, &'a Value)>, Refusal> {
    let users = body.get(name).and_then(Value::as_object);
    let users = users.ok_or_else(|| Refusal::malformed(name, "missing or no object"))?;
    if users.len() > NAMED {
        return Err(too_many(name));
    }
    Ok(users.iter().map(|(user_id, of_user)| (user_id.as_str(), of_user)))
}

fn too_many(name: &str) -> Refusal {
    Refusal::malformed(name, format!("more than {NAMED} entries"))
}

/// A user of the gateway who is known on the side where others see it.
async fn known(federation: &Federation, user_id: &str) -> Result<Option<OwnedUserId>, Refusal> {
    let Ok(user_id) = UserId::parse(user_id) else { return Ok(None) };
    match exists(federation, &user_id).await {
        Ok(()) => Ok(Some(user_id)),
        Err(Refusal::NotFound(_)) => Ok(None),
        Err(refusal) => Err(refusal),
    }
}

async fn exists(federation: &Federation, user_id: &UserId) -> Result<(), Refusal> {
    if user_id.server_name() != federation.context.server_name {
        return Err(Refusal::NotFound(format!("user {user_id}")));
    }
    federation.between.profile(side_of_user(user_id), user_id).await.map(drop)
}
