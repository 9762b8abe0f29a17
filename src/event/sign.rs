//! Ed25519 signatures over canonical JSON, one by one and in batches. Verification is strict: weak keys and signatures with
//! a small-order point are refused in both ways of checking, so that it never matters in which batch a signature came.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::LazyLock;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use curve25519_dalek::constants::EIGHT_TORSION;
use ed25519_dalek::{Signature, VerifyingKey};
use ruma::OwnedServerName;
use serde_json::Value;

use super::canonical::canonical_view;
use super::{Object, canonical_json};
use crate::identity::SigningKey;
use crate::refusal::Refusal;

/// Standard base64, padded or not, as peers write it.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// From how many signatures on a batch pays.
const BATCH: usize = 4;

/// A server's public key, decompressed once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyKey(VerifyingKey);

impl VerifyKey {
    /// Decodes unpadded or padded base64 (either alphabet), refusing wrong lengths and weak (small-order) keys.
    pub fn from_base64(encoded: &str) -> Result<Self, Refusal> {
        let bad = |problem: String| Refusal::malformed("public key", problem);
        let bytes = decode_base64(encoded).ok_or_else(|| bad("not base64".to_owned()))?;
        let bytes: [u8; 32] =
            bytes.try_into().map_err(|bytes: Vec<u8>| bad(format!("{} bytes, 32 are needed", bytes.len())))?;
        let key = VerifyingKey::from_bytes(&bytes).map_err(|error| bad(error.to_string()))?;
        if key.is_weak() {
            return Err(bad("a weak key of small order".to_owned()));
        }
        Ok(Self(key))
    }

    /// The key as unpadded base64.
    pub fn to_base64(&self) -> String {
        LENIENT.encode(self.0.as_bytes())
    }

    /// Checks one signature over `message`.
    pub fn verify(&self, message: &[u8], signature: &str) -> Result<(), &'static str> {
        let signature = decode_signature(signature)?;
        self.0.verify_strict(message, &signature).map_err(|_| "does not verify")
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
pub fn sign_object(object: &mut Object, entity: &str, key: &SigningKey) {
    let signatures = object.remove("signatures");
    let signature = key.sign(&canonical_json(object));
    if let Some(signatures) = signatures {
        object.insert("signatures".to_owned(), signatures);
    }
    add_signature(object, entity, key.id(), signature);
}

/// Checks that `object` is signed by `entity` with at least one key of `keys`, and with no key of `keys` wrongly (strict
/// verification). Not for events: they are redacted first.
pub fn verify_object(object: &Object, entity: &str, keys: &BTreeMap<String, VerifyKey>) -> Result<(), Refusal> {
    let entries = object.iter().filter(|(key, _)| *key != "signatures");
    let message = canonical_view(entries.map(|(key, value)| (key.as_str(), Cow::Borrowed(value))).collect());
    for (key, signature) in known_signatures(object, entity, keys)? {
        key.verify(&message, signature).map_err(|problem| bad_signature(entity, problem))?;
    }
    Ok(())
}

/// Checks many signatures at once, faster than one by one; the answers are in the order of `checks`, and a bad one fails
/// alone.
pub fn verify_signatures(checks: &[SignatureCheck<'_>]) -> Vec<Result<(), Refusal>> {
    if checks.len() >= BATCH && verify_batch(checks) {
        return checks.iter().map(|_| Ok(())).collect();
    }
    checks
        .iter()
        .map(|check| {
            check.key.verify(&check.message, check.signature).map_err(|problem| bad_signature(check.server, problem))
        })
        .collect()
}

fn verify_batch(checks: &[SignatureCheck<'_>]) -> bool {
    let Ok(signatures) = checks.iter().map(|check| decode_signature(check.signature)).collect::<Result<Vec<_>, _>>()
    else {
        return false;
    };
    // Strict verification refuses these; a batch alone would let them pass.
    if signatures.iter().any(|signature| SMALL_ORDER.contains(signature.r_bytes())) {
        return false;
    }
    let messages: Vec<&[u8]> = checks.iter().map(|check| check.message.as_slice()).collect();
    let keys: Vec<VerifyingKey> = checks.iter().map(|check| check.key.0).collect();
    ed25519_dalek::verify_batch(&messages, &signatures, &keys).is_ok()
}

/// The encodings of the points of small order.
static SMALL_ORDER: LazyLock<Vec<[u8; 32]>> =
    LazyLock::new(|| EIGHT_TORSION.iter().map(|point| point.compress().to_bytes()).collect());

/// The signatures of `entity` with a key that is known; at least one, or the reason why there is none.
pub(super) fn known_signatures<'a>(
    object: &'a Object,
    entity: &str,
    keys: &'a BTreeMap<String, VerifyKey>,
) -> Result<Vec<(&'a VerifyKey, &'a str)>, Refusal> {
    let signatures = object
        .get("signatures")
        .and_then(|signatures| signatures.get(entity))
        .and_then(Value::as_object)
        .ok_or_else(|| bad_signature(entity, "missing"))?;
    let known: Vec<_> = signatures
        .iter()
        .filter_map(|(key_id, signature)| Some((keys.get(key_id)?, signature.as_str().unwrap_or_default())))
        .collect();
    if known.is_empty() {
        let found: Vec<&str> = signatures.keys().map(String::as_str).take(5).collect();
        return Err(bad_signature(entity, &format!("made with {found:?}, none of which is a valid key of it")));
    }
    Ok(known)
}

pub(super) fn bad_signature(entity: &str, problem: &str) -> Refusal {
    Refusal::BadSignature { entity: entity.to_owned(), problem: problem.to_owned() }
}

pub(super) fn add_signature(object: &mut Object, entity: &str, key_id: &str, signature: String) {
    let signatures = object.entry("signatures").or_insert_with(|| Value::Object(Object::new()));
    if !signatures.is_object() {
        *signatures = Value::Object(Object::new());
    }
    if let Some(signatures) = signatures.as_object_mut() {
        let of_entity = signatures.entry(entity).or_insert_with(|| Value::Object(Object::new()));
        if let Some(of_entity) = of_entity.as_object_mut() {
            of_entity.insert(key_id.to_owned(), Value::String(signature));
        }
    }
}

fn decode_signature(encoded: &str) -> Result<Signature, &'static str> {
    let bytes = decode_base64(encoded).ok_or("not base64")?;
    Signature::from_slice(&bytes).map_err(|_| "not 64 bytes long")
}

/// Decodes base64 of either alphabet, padded or not.
pub(crate) fn decode_base64(encoded: &str) -> Option<Vec<u8>> {
    if encoded.contains(['-', '_']) {
        LENIENT.decode(encoded.replace('-', "+").replace('_', "/")).ok()
    } else {
        LENIENT.decode(encoded).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checks<'a>(
        keys: &'a [SigningKey],
        public: &'a [VerifyKey],
        signatures: &'a [String],
    ) -> Vec<SignatureCheck<'a>> {
        (0..keys.len())
            .map(|index| SignatureCheck {
                server: "a.example",
                key: &public[index],
                message: vec![u8::try_from(index).unwrap(); 40],
                signature: &signatures[index],
            })
            .collect()
    }

    #[test]
    fn a_bad_signature_in_a_batch_fails_alone() {
        let keys: Vec<SigningKey> = (0..10).map(|_| SigningKey::generate()).collect();
        let public: Vec<VerifyKey> =
            keys.iter().map(|key| VerifyKey::from_base64(&key.public_base64()).unwrap()).collect();
        let mut signatures: Vec<String> =
            keys.iter().enumerate().map(|(index, key)| key.sign(&vec![u8::try_from(index).unwrap(); 40])).collect();
        assert!(verify_signatures(&checks(&keys, &public, &signatures)).iter().all(Result::is_ok));
        signatures[3] = keys[3].sign(b"something else");
        signatures[7] = "not base64!".to_owned();
        let answers = verify_signatures(&checks(&keys, &public, &signatures));
        let bad: Vec<usize> = (0..10).filter(|index| answers[*index].is_err()).collect();
        assert_eq!(bad, [3, 7]);
    }

    #[test]
    fn hc_11_small_order_keys_and_signatures_are_refused_alone_and_in_a_batch() {
        for point in SMALL_ORDER.iter() {
            assert!(VerifyKey::from_base64(&LENIENT.encode(point)).is_err());
        }
        let key = SigningKey::generate();
        let public = VerifyKey::from_base64(&key.public_base64()).unwrap();
        for point in SMALL_ORDER.iter() {
            let forged = LENIENT.encode([&point[..], &[0; 32]].concat());
            let check = || SignatureCheck { server: "a", key: &public, message: b"m".to_vec(), signature: &forged };
            assert!(verify_signatures(&[check()])[0].is_err());
            let batch: Vec<_> = (0..8).map(|_| check()).collect();
            assert!(verify_signatures(&batch).iter().all(Result::is_err));
        }
        // s must be below the group's order: adding it gives another encoding of the same signature.
        let good = decode_base64(&key.sign(b"m")).unwrap();
        let mut malleable = good.clone();
        malleable[63] |= 0xf0;
        assert!(public.verify(b"m", &LENIENT.encode(&good)).is_ok());
        assert!(public.verify(b"m", &LENIENT.encode(&malleable)).is_err());
    }

    #[test]
    fn padded_and_url_safe_base64_is_accepted() {
        let key = SigningKey::generate();
        let public = VerifyKey::from_base64(&key.public_base64()).unwrap();
        let signature = key.sign(b"m");
        assert!(public.verify(b"m", &format!("{signature}==")).is_ok());
        assert!(public.verify(b"m", &signature.replace('+', "-").replace('/', "_")).is_ok());
    }

    #[test]
    fn objects_are_signed_and_checked() {
        let key = SigningKey::generate();
        let keys = BTreeMap::from([(key.id().to_owned(), VerifyKey::from_base64(&key.public_base64()).unwrap())]);
        let mut object: Object = serde_json::from_str(r#"{"b":1,"a":"x"}"#).unwrap();
        sign_object(&mut object, "a.example", &key);
        sign_object(&mut object, "b.example", &key);
        verify_object(&object, "a.example", &keys).unwrap();
        assert_eq!(verify_object(&object, "c.example", &keys).unwrap_err().code(), "bad_signature");
        object.insert("b".to_owned(), 2.into());
        assert_eq!(verify_object(&object, "a.example", &keys).unwrap_err().code(), "bad_signature");
    }
}
