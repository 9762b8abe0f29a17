//! Ed25519 signatures over canonical JSON, one by one and in batches.

use std::collections::BTreeMap;

use ruma::OwnedServerName;

use super::Object;
use crate::identity::SigningKey;
use crate::refusal::Refusal;

/// A server's public key, decompressed once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyKey(ed25519_dalek::VerifyingKey);

impl VerifyKey {
    /// Decodes unpadded or padded base64 (either alphabet), refusing wrong lengths and weak (small-order) keys.
    pub fn from_base64(_encoded: &str) -> Result<Self, Refusal> {
        unimplemented!()
    }

    /// The key as unpadded base64.
    pub fn to_base64(&self) -> String {
        unimplemented!()
    }
}

/// Public keys by server and key ID (`ed25519:…`), as they are valid for the thing that is being checked.
pub type VerifyKeys = BTreeMap<OwnedServerName, BTreeMap<String, VerifyKey>>;

/// One signature that is to be checked: `signature` of `server` over `message`.
pub struct SignatureCheck<'a> {
    /// Who signed, for the error.
    pub server: &'a str,
    /// The key.
    pub key: &'a VerifyKey,
    /// The canonical bytes.
    pub message: Vec<u8>,
    /// The signature as it stands in the JSON.
    pub signature: &'a str,
}

/// Signs `object` (its `signatures` and nothing else left out) and adds the signature under `entity`.
pub fn sign_object(_object: &mut Object, _entity: &str, _key: &SigningKey) {
    unimplemented!()
}

/// Checks that `object` is signed by `entity` with at least one key of `keys`, and with no key of `keys` wrongly (strict
/// verification). Not for events: they are redacted first.
pub fn verify_object(_object: &Object, _entity: &str, _keys: &BTreeMap<String, VerifyKey>) -> Result<(), Refusal> {
    unimplemented!()
}

/// Checks many signatures at once, faster than one by one; the answers are in the order of `checks`, and a bad one fails
/// alone.
pub fn verify_signatures(_checks: &[SignatureCheck<'_>]) -> Vec<Result<(), Refusal>> {
    unimplemented!()
}
