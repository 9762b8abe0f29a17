//! Ed25519 signatures over canonical JSON, one by one and in batches. Verification is strict: keys with a part of small order
//! and points that are not encoded canonically are refused in both ways of checking.
//!
//! One thing is left that a batch may take and a single check never does: a signature whose own point has a part of small
//! order besides a good one. Only the owner of a key can make it. A hub must not take what stricter servers will refuse, or
//! their logs would part, so LPDUs are checked one by one; batches are for what a hub has already put into its log.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::LazyLock;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use curve25519_dalek::constants::EIGHT_TORSION;
use ed25519_dalek::{Signature, Verifier as _, VerifyingKey};
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
        // With a part of small order in the key, whether a signature verifies would hang on the way of checking.
        let point = key.to_edwards();
        if key.is_weak() || !point.is_torsion_free() || point.compress().to_bytes() != bytes {
            return Err(bad("a weak key: of small order, in whole or in part, or not encoded canonically".to_owned()));
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
        // With this it is the library's strict verification, which decompresses the point to look at its order.
        if is_small_or_not_canonical(*signature.r_bytes()) {
            return Err("does not verify");
        }
        self.0.verify(message, &signature).map_err(|_| "does not verify")
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
/// alone. For what is a fact elsewhere already; what this server is the first to take goes through [`verify_each`].
pub fn verify_signatures(checks: &[SignatureCheck<'_>]) -> Vec<Result<(), Refusal>> {
    if checks.len() >= BATCH && verify_batch(checks) {
        return checks.iter().map(|_| Ok(())).collect();
    }
    verify_each(checks)
}

/// Checks signatures one by one, which takes nothing that any other way of checking would refuse.
pub fn verify_each(checks: &[SignatureCheck<'_>]) -> Vec<Result<(), Refusal>> {
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
    if signatures.iter().any(|signature| is_small_or_not_canonical(*signature.r_bytes())) {
        return false;
    }
    let messages: Vec<&[u8]> = checks.iter().map(|check| check.message.as_slice()).collect();
    let keys: Vec<VerifyingKey> = checks.iter().map(|check| check.key.0).collect();
    ed25519_dalek::verify_batch(&messages, &signatures, &keys).is_ok()
}

/// Whether an encoded point is of small order, or has a y-coordinate that is not below the field's order.
fn is_small_or_not_canonical(mut point: [u8; 32]) -> bool {
    const SIGN: u8 = 0x80;
    // 2^255 − 19, little-endian.
    const ORDER: [u8; 32] = {
        let mut order = [0xff; 32];
        order[0] = 0xed;
        order[31] = 0x7f;
        order
    };
    if let Some(last) = point.last_mut() {
        *last &= !SIGN;
    }
    point.iter().rev().ge(ORDER.iter().rev()) || SMALL_ORDER.contains(&point)
}

/// The y-coordinates of the points of small order.
static SMALL_ORDER: LazyLock<Vec<[u8; 32]>> = LazyLock::new(|| {
    EIGHT_TORSION
        .iter()
        .map(|point| {
            let mut encoded = point.compress().to_bytes();
            encoded[31] &= 0x7f;
            encoded
        })
        .collect()
});

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
        let found: Vec<String> = signatures.keys().map(|id| id.chars().take(60).collect()).take(5).collect();
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
    use curve25519_dalek::constants::ED25519_BASEPOINT_POINT;
    use curve25519_dalek::scalar::Scalar;
    use sha2::Digest as _;

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
            keys.iter().enumerate().map(|(index, key)| key.sign(&[u8::try_from(index).unwrap(); 40])).collect();
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
        // The neutral point as the signature's own, in all its encodings, with the s that makes the equation hold.
        let odd = OddSigner::new();
        let mut sign_bit_of_zero = [0; 32];
        (sign_bit_of_zero[0], sign_bit_of_zero[31]) = (1, 0x80);
        let mut above_the_order = [0xff; 32];
        (above_the_order[0], above_the_order[31]) = (0xee, 0x7f);
        let mut both = above_the_order;
        both[31] = 0xff;
        let mut neutral = [0; 32];
        neutral[0] = 1;
        for point in [neutral, sign_bit_of_zero, above_the_order, both] {
            let forged = odd.sign_with(point, Scalar::ZERO, b"m");
            let check = || SignatureCheck { server: "a", key: &odd.public, message: b"m".to_vec(), signature: &forged };
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
    fn hc_11_a_signature_with_a_part_of_small_order_is_refused_one_by_one() {
        let odd = OddSigner::new();
        for n in 1..9_u64 {
            let r = Scalar::from(n + 1000);
            let torsion = EIGHT_TORSION[usize::try_from(n % 8).unwrap()];
            let point = (ED25519_BASEPOINT_POINT * r + torsion).compress().to_bytes();
            let signature = odd.sign_with(point, r, b"m");
            let check = SignatureCheck { server: "a", key: &odd.public, message: b"m".to_vec(), signature: &signature };
            assert_eq!(verify_each(&[check])[0].is_ok(), n % 8 == 0);
        }
    }

    #[test]
    fn hc_11_a_key_with_a_part_of_small_order_is_refused() {
        for (n, torsion) in EIGHT_TORSION.iter().enumerate() {
            let key = LENIENT.encode((ED25519_BASEPOINT_POINT * Scalar::from(7_u8) + torsion).compress().as_bytes());
            assert_eq!(VerifyKey::from_base64(&key).is_ok(), n == 0);
        }
    }

    /// Signs as nobody honest would: with a point of its own choice.
    struct OddSigner {
        secret: Scalar,
        public: VerifyKey,
    }

    impl OddSigner {
        fn new() -> Self {
            let key = ed25519_dalek::SigningKey::generate(&mut rand::rngs::OsRng);
            Self { secret: key.to_scalar(), public: VerifyKey(key.verifying_key()) }
        }

        fn sign_with(&self, point: [u8; 32], r: Scalar, message: &[u8]) -> String {
            let hash = sha2::Sha512::new().chain_update(point).chain_update(self.public.0.as_bytes());
            let s = r + Scalar::from_hash(hash.chain_update(message)) * self.secret;
            LENIENT.encode([point, s.to_bytes()].concat())
        }
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
