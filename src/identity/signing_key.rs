//! The gateway's own signing key and its file.

use std::path::Path;

/// Why a signing key file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum SigningKeyError {
    /// The file could not be read or written.
    #[error("signing key file {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file does not hold a key.
    #[error("signing key file {path}: {problem}")]
    Format {
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// An ed25519 signing key with its ID. Debug shows the ID alone.
pub struct SigningKey {
    id: String,
    key: ed25519_dalek::SigningKey,
}

impl SigningKey {
    /// Reads the file (`ed25519 VERSION BASE64SEED`, as Synapse writes it), or makes it with mode 600 and a fresh version
    /// when it is absent.
    pub fn load_or_generate(_path: &Path) -> Result<Self, SigningKeyError> {
        unimplemented!()
    }

    /// A fresh key; for tests and new files.
    pub fn generate() -> Self {
        unimplemented!()
    }

    /// The key of a seed in base64; for tests with known keys.
    pub fn from_seed(_version: &str, _seed_base64: &str) -> Result<Self, SigningKeyError> {
        unimplemented!()
    }

    /// The key ID, as `ed25519:a_x1y2`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The public key as unpadded base64.
    pub fn public_base64(&self) -> String {
        unimplemented!()
    }

    /// The signature of `message` as unpadded base64.
    pub fn sign(&self, _message: &[u8]) -> String {
        let _ = &self.key;
        unimplemented!()
    }
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("SigningKey").field("id", &self.id).finish_non_exhaustive()
    }
}
