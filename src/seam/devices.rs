//! What other servers ask about the devices of the gateway's users. Whatever keeps devices answers through [`Devices`]; as long as
//! nothing does, nobody has any.

use std::sync::Arc;

use async_trait::async_trait;
use ruma::UserId;
use serde_json::Value;

use crate::event::Object;
use crate::refusal::Refusal;

/// A device, as its user signed it.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// Its ID.
    pub device_id: String,
    /// The device object: algorithms, keys, signatures.
    pub object: Object,
}

/// The devices of the gateway's users. Whether a user exists is not asked here.
#[async_trait]
pub trait Devices: Send + Sync + 'static {
    /// One device.
    async fn device(&self, user: &UserId, device_id: &str) -> Result<Option<Device>, Refusal>;

    /// All devices of a user.
    async fn devices(&self, user: &UserId) -> Result<Vec<Device>, Refusal>;

    /// Takes a key that serves once: what it is called (in LM by its algorithm, in Matrix with its ID after that) and the key. It is
    /// given to nobody else.
    async fn claim(&self, user: &UserId, device_id: &str, algorithm: &str) -> Result<Option<(String, Value)>, Refusal>;
}

/// The devices as the routes hold them.
pub type SharedDevices = Arc<dyn Devices>;

/// Nobody has a device.
#[derive(Debug, Default)]
pub struct NoDevices;

#[async_trait]
impl Devices for NoDevices {
    async fn device(&self, _user: &UserId, _device_id: &str) -> Result<Option<Device>, Refusal> {
        Ok(None)
    }

    async fn devices(&self, _user: &UserId) -> Result<Vec<Device>, Refusal> {
        Ok(Vec::new())
    }

    async fn claim(
        &self,
        _user: &UserId,
        _device_id: &str,
        _algorithm: &str,
    ) -> Result<Option<(String, Value)>, Refusal> {
        Ok(None)
    }
}
