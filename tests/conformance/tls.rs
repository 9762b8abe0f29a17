//! What the suite sees of TLS.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum_server::tls_rustls::RustlsConfig;
use isthmus::clock::SystemClock;
use isthmus::conformance::{Options, Role, run_on};
use isthmus::federation::crypto_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::{TLS12, TLS13};
use rustls::{ServerConfig, SupportedProtocolVersion};

use super::world::SUITE;
use crate::support::testbed::certificates::Authority;

/// What fails for a server that speaks these, and whose authority is trusted or not.
async fn failed(versions: &[&'static SupportedProtocolVersion], alpn: &[&str], is_trusted: bool) -> Vec<&'static str> {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let files = authority.issue(directory.path()).unwrap();
    let certificates = CertificateDer::pem_file_iter(&files.certificate).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
    let config = ServerConfig::builder_with_provider(crypto_provider()).with_protocol_versions(versions).unwrap();
    let mut config = config.with_no_client_auth().with_single_cert(certificates, key).unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    socket.set_nonblocking(true).unwrap();
    let server = axum_server::from_tcp_rustls(socket, RustlsConfig::from_config(Arc::new(config))).unwrap();
    let serving = tokio::spawn(async move { server.serve(Router::new().into_make_service()).await });
    let trusted: Vec<PathBuf> = is_trusted.then(|| authority.file.clone()).into_iter().collect();
    let target = format!("localhost:{port}");
    let options = Options {
        role: Role::Participant { room: format!("!room:{target}").try_into().unwrap() },
        target: target.try_into().unwrap(),
        url: None,
        name: SUITE.try_into().unwrap(),
        second: None,
        user: "conformance".to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        signing_key: None,
        custom_ca: trusted,
        allow_private_networks: true,
        patience: Duration::from_secs(1),
        limit: Duration::from_secs(5),
        only: vec!["LM-T-00".to_owned()],
    };
    let suite = TcpListener::bind("127.0.0.1:0").unwrap();
    let report = run_on(suite, options, Arc::new(SystemClock), |_| ()).await.unwrap();
    serving.abort();
    report.failed().into_iter().filter(|id| ["LM-T-001", "LM-T-002", "LM-T-003"].contains(id)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_version_what_is_spoken_and_the_certificate_are_seen() {
    let both = ["h2", "http/1.1"];
    assert_eq!(failed(&[&TLS13, &TLS12], &both, true).await, Vec::<&str>::new());
    assert_eq!(failed(&[&TLS12], &both, true).await, ["LM-T-001"]);
    assert_eq!(failed(&[&TLS13], &["http/1.1"], true).await, ["LM-T-002"]);
    // Nothing is agreed on with a server that is not trusted.
    assert_eq!(failed(&[&TLS13], &both, false).await, ["LM-T-001", "LM-T-002", "LM-T-003"]);
}
