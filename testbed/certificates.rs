//! A certificate authority for one run, and certificates for the servers on loopback.

use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// The certificate authority.
pub struct Authority {
    /// Its certificate, PEM.
    pub file: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, both PEM.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The certificate.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

impl Authority {
    /// A new authority, whose certificate is written to `directory`.
    pub fn new(directory: &Path) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(rcgen::DnType::CommonName, "isthmus test authority");
        let file = directory.join("ca.pem");
        std::fs::write(&file, params.self_signed(&key)?.pem())?;
        Ok(Self { file, issuer: Issuer::new(params, key) })
    }

    /// A certificate for `localhost` and `127.0.0.1`, written to `directory`.
    pub fn issue(&self, directory: &Path) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])?;
        params.use_authority_key_identifier_extension = true;
        params.extended_key_usages.push(rcgen::ExtendedKeyUsagePurpose::ServerAuth);
        let identity = Identity { certificate: directory.join("tls.pem"), key: directory.join("tls.key") };
        std::fs::write(&identity.certificate, params.signed_by(&key, &self.issuer)?.pem())?;
        std::fs::write(&identity.key, key.serialize_pem())?;
        Ok(identity)
    }
}
