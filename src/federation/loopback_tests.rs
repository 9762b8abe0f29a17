//! The client against real servers on loopback, friendly and hostile. Here is what the tests share.

mod answers;
mod http2;
mod tls;
mod well_known;

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use axum_server::tls_rustls::RustlsConfig;
use futures::future::BoxFuture;
use http::{Method, StatusCode, header};
use http_body_util::Full;
use ruma::{OwnedServerName, ServerName, server_name};
use serde_json::json;
use tempfile::TempDir;
use url::Url;

use super::answers::Answers;
use super::connector::{Itself, TargetSource, Targets};
use super::dialler::{Answer, Http, Reach, tls_config};
use super::discovery::{Lookups as _, Network};
use super::srv::SrvTargets;
use super::well_known::{Outcome, fetch_from};
use super::x_matrix::tests::is_signed_request;
use super::{Call, Client, ClientOptions, RemoteError, crypto_provider};
use crate::event::Object;
use crate::identity::{KeyFetcher as _, SigningKey};

/// A request as a server saw it.
#[derive(Debug, Clone)]
struct Seen {
    version: http::Version,
    method: Method,
    /// Path and query.
    uri: String,
    /// As whom the server is asked: `:authority`, or `Host`.
    authority: String,
    headers: http::HeaderMap,
    body: Bytes,
}

/// A server on loopback; it ends with the test's runtime.
struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    fn router(answer: impl Fn(&Seen) -> Response + Clone + Send + Sync + 'static) -> (Router, Arc<Mutex<Vec<Seen>>>) {
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let log = seen.clone();
        let router = Router::new().fallback(async move |request: Request| {
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, 1 << 20).await.unwrap();
            let host = parts.headers.get(header::HOST).map(|host| host.to_str().unwrap().to_owned());
            let authority = parts.uri.authority().map(ToString::to_string);
            assert!(authority.is_none() || host.is_none() || authority == host, "{authority:?} {host:?}");
            let request = Seen {
                version: parts.version,
                method: parts.method,
                uri: parts.uri.path_and_query().unwrap().to_string(),
                authority: authority.or(host).unwrap(),
                headers: parts.headers,
                body,
            };
            log.lock().unwrap().push(request.clone());
            answer(&request)
        });
        (router, seen)
    }

    fn listen() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    fn plain(answer: impl Fn(&Seen) -> Response + Clone + Send + Sync + 'static) -> Self {
        let (router, seen) = Self::router(answer);
        let (listener, address) = Self::listen();
        tokio::spawn(axum_server::from_tcp(listener).unwrap().serve(router.into_make_service()));
        Self { address, seen }
    }

    fn tls(
        authority: &Authority,
        names: &[&str],
        answer: impl Fn(&Seen) -> Response + Clone + Send + Sync + 'static,
    ) -> Self {
        Self::speaking(&["http/1.1"], authority, names, answer)
    }

    /// A server that speaks only what is named, as ALPN has it.
    fn speaking(
        protocols: &[&str],
        authority: &Authority,
        names: &[&str],
        answer: impl Fn(&Seen) -> Response + Clone + Send + Sync + 'static,
    ) -> Self {
        let (router, seen) = Self::router(answer);
        let (listener, address) = Self::listen();
        let tls = RustlsConfig::from_config(Arc::new(authority.issue(names, protocols)));
        let server = axum_server::from_tcp_rustls(listener, tls).unwrap();
        tokio::spawn(server.serve(router.into_make_service()));
        Self { address, seen }
    }

    /// A client to which this is `peer.example`, wherever it is.
    fn client(&self) -> Client {
        let base = format!("http://{}", self.address);
        client(ClientOptions {
            resolve: [(peer().to_owned(), base.parse().unwrap())].into(),
            ..ClientOptions::default()
        })
    }

    fn last(&self) -> Seen {
        self.seen.lock().unwrap().last().unwrap().clone()
    }
}

/// A certificate authority for one test.
struct Authority {
    directory: TempDir,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let (directory, key) = (tempfile::tempdir().unwrap(), rcgen::KeyPair::generate().unwrap());
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        std::fs::write(directory.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { directory, issuer: rcgen::Issuer::new(params, key) }
    }

    fn file(&self) -> std::path::PathBuf {
        self.directory.path().join("ca.pem")
    }

    fn issue(&self, names: &[&str], protocols: &[&str]) -> rustls::ServerConfig {
        let key = rcgen::KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let mut config = rustls::ServerConfig::builder_with_provider(crypto_provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        config
    }

    /// A client that trusts this authority and may dial loopback.
    fn client(&self) -> Client {
        client(ClientOptions { custom_ca: vec![self.file()], allow_private_networks: true, ..ClientOptions::default() })
    }
}

fn peer() -> &'static ServerName {
    server_name!("peer.example")
}

const SEED: &str = "YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1";

fn key() -> Arc<SigningKey> {
    Arc::new(SigningKey::from_seed("1", SEED).unwrap())
}

fn client(options: ClientOptions) -> Client {
    Client::new(server_name!("g.example").to_owned(), key(), options).unwrap()
}

fn object(value: serde_json::Value) -> Object {
    value.as_object().unwrap().clone()
}

fn hello(_: &Seen) -> Response {
    axum::Json(json!({ "hello": "world" })).into_response()
}

fn named(address: SocketAddr) -> OwnedServerName {
    format!("localhost:{}", address.port()).try_into().unwrap()
}

/// Asks `https://HOST/_matrix/x` through `http`.
async fn ask(http: &Http, host: &str) -> Result<Answer, RemoteError> {
    let uri = format!("https://{host}/_matrix/x").parse().unwrap();
    let request = http.request(Method::GET, uri)?.body(Full::default()).unwrap();
    http.send(host, request, Duration::from_secs(10), 1000, 0).await
}

/// Every name is at this port of loopback.
struct Loopback(u16);

impl TargetSource for Loopback {
    fn targets(&self, _: String) -> BoxFuture<'static, Targets> {
        Box::pin(std::future::ready(vec![("localhost".to_owned(), self.0)]))
    }
}

fn answers() -> Answers {
    Answers::default()
}

fn endless() -> Body {
    Body::from_stream(futures::stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from(vec![b' '; 64 << 10]))))
}
