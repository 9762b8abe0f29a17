//! The gateway's own signing key and its file.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use aws_lc_rs::signature::Ed25519KeyPair;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use ed25519_dalek::Signer as _;
use rand::RngCore as _;
use rand::rngs::OsRng;
use zeroize::Zeroizing;

use crate::event::decode_base64;

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

impl SigningKeyError {
    /// What to do about it. A key is never to be thrown away lightly: other servers know the gateway by it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                "let the user that isthmus runs as own the file and its folder (`chown`)"
            }
            Self::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
                "make its folder, or name another file in `signing_key`"
            }
            Self::Io { .. } => "make the file readable, or name another one in `signing_key`",
            Self::Format { .. } => {
                "restore the file from a backup; if it never held a key, move it away and a new one is made"
            }
        }
    }
}

/// An ed25519 signing key with its ID. Debug shows the ID alone.
pub struct SigningKey {
    id: String,
    key: ed25519_dalek::SigningKey,
    /// The same key for a library that signs twice as fast; the signatures are the same.
    signer: Option<Ed25519KeyPair>,
}

impl SigningKey {
    /// Reads the file (`ed25519 VERSION BASE64SEED`, as Synapse writes it), or makes it with mode 600 and a fresh version
    /// when it is absent.
    pub fn load_or_generate(path: &Path) -> Result<Self, SigningKeyError> {
        match std::fs::read_to_string(path).map(Zeroizing::new) {
            Ok(text) => Self::parse(&text).map_err(|problem| SigningKeyError::Format { path: show(path), problem }),
            Err(error) if error.kind() == ErrorKind::NotFound => Self::generate_file(path),
            Err(source) => Err(SigningKeyError::Io { path: show(path), source }),
        }
    }

    /// A fresh key; for tests and new files. Its version is random, since a new key always gets a new key ID.
    pub fn generate() -> Self {
        let mut version = [0; 4];
        OsRng.fill_bytes(&mut version);
        let version = data_encoding::HEXLOWER.encode(&version);
        Self::new(format!("ed25519:i_{version}"), ed25519_dalek::SigningKey::generate(&mut OsRng))
    }

    /// The key of a seed in base64; for tests with known keys.
    pub fn from_seed(version: &str, seed_base64: &str) -> Result<Self, SigningKeyError> {
        Self::parse(&format!("ed25519 {version} {seed_base64}"))
            .map_err(|problem| SigningKeyError::Format { path: "(given)".to_owned(), problem })
    }

    /// The key ID, as `ed25519:i_01ab23cd`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The public key as unpadded base64.
    pub fn public_base64(&self) -> String {
        STANDARD_NO_PAD.encode(self.key.verifying_key().as_bytes())
    }

    /// The signature of `message` as unpadded base64.
    pub fn sign(&self, message: &[u8]) -> String {
        match self.signer.as_ref().map(|signer| signer.try_sign(message)) {
            Some(Ok(signature)) => STANDARD_NO_PAD.encode(signature),
            _ => STANDARD_NO_PAD.encode(self.key.sign(message).to_bytes()),
        }
    }

    fn new(id: String, key: ed25519_dalek::SigningKey) -> Self {
        let signer = Ed25519KeyPair::from_seed_unchecked(key.as_bytes()).ok();
        Self { id, key, signer }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let &[algorithm, version, seed] = words.as_slice() else {
            return Err(format!("{} words, `ed25519 VERSION SEED` is needed", words.len()));
        };
        if algorithm != "ed25519" {
            return Err(format!("the algorithm is {algorithm:?}, only ed25519 is possible"));
        }
        if version.is_empty() || !version.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return Err(format!("the version {version:?} may only hold letters, digits and _"));
        }
        let seed = Zeroizing::new(decode_base64(seed).ok_or("the seed is not base64")?);
        let seed: &[u8; 32] =
            seed.as_slice().try_into().map_err(|_| format!("the seed has {} bytes, 32 are needed", seed.len()))?;
        Ok(Self::new(format!("ed25519:{version}"), ed25519_dalek::SigningKey::from_bytes(seed)))
    }

    /// Writes beside the file and links it into place, so that a crash leaves a whole file or none, and that of two
    /// processes that start at once both use the key of the first.
    fn generate_file(path: &Path) -> Result<Self, SigningKeyError> {
        let io = |source| SigningKeyError::Io { path: show(path), source };
        let key = Self::generate();
        let version = key.id.trim_start_matches("ed25519:");
        let seed = Zeroizing::new(STANDARD_NO_PAD.encode(key.key.as_bytes()));
        let line = Zeroizing::new(format!("ed25519 {version} {}\n", *seed));
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{version}"));
        let beside = Path::new(&name);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(beside).map_err(io)?;
        let written = file.write_all(line.as_bytes()).and_then(|()| file.sync_all());
        let linked = written.and_then(|()| std::fs::hard_link(beside, path));
        std::fs::remove_file(beside).map_err(io)?;
        match linked {
            Ok(()) => {
                sync_directory(path).map_err(io)?;
                Ok(key)
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Self::load_or_generate(path),
            Err(source) => Err(io(source)),
        }
    }
}

/// Makes the name of a new file last.
fn sync_directory(path: &Path) -> std::io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("SigningKey").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_file_is_made_once_for_its_owner_alone_and_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("signing.key");
        let made = SigningKey::load_or_generate(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let read = SigningKey::load_or_generate(&path).unwrap();
        assert_eq!((made.id(), made.public_base64()), (read.id(), read.public_base64()));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_bad_file_is_named_with_what_is_wrong_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("signing.key");
        for (text, expected) in [
            ("", "0 words"),
            ("rsa a_b AAAA", "algorithm"),
            ("ed25519 a:b AAAA", "version"),
            ("ed25519 a_b AAAA", "3 bytes"),
            ("ed25519 a_b !", "not base64"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = SigningKey::load_or_generate(&path).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("signing.key"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn both_ways_of_signing_give_the_same() {
        let mut key = SigningKey::from_seed("1", "YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1").unwrap();
        assert_eq!(
            (key.id(), key.public_base64().as_str()),
            ("ed25519:1", "XGX0JRS2Af3be3knz2fBiRbApjm2Dh61gXDJA8kcJNI")
        );
        let fast = key.sign(b"{}");
        assert_eq!(fast, "K8280/U9SSy9IVtjBuVeLr+HpOB4BQFWbg+UZaADMtTdGYI7Geitb76LTrr5QV/7Xg4ahLwYGYZzuHGZKM5ZAQ");
        assert!(key.signer.take().is_some());
        assert_eq!(key.sign(b"{}"), fast);
    }

    #[test]
    fn debug_does_not_show_the_secret() {
        let key = SigningKey::generate();
        let seed = STANDARD_NO_PAD.encode(key.key.to_bytes());
        assert!(!format!("{key:?}").contains(&seed));
    }
}
