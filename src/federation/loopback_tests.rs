//! The client against real servers on loopback, friendly and hostile.

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
use ruma::{OwnedServerName, ServerName, server_name};
use serde_json::json;
use tempfile::TempDir;
use url::Url;

use super::answers::Answers;
use super::dialler::{Http, Itself, Reach, TargetSource, Targets, tls_config};
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
    method: Method,
    uri: String,
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
            let request = Seen { method: parts.method, uri: parts.uri.to_string(), headers: parts.headers, body };
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
        let (router, seen) = Self::router(answer);
        let (listener, address) = Self::listen();
        let server = axum_server::from_tcp_rustls(listener, authority.issue(names)).unwrap();
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

    fn issue(&self, names: &[&str]) -> RustlsConfig {
        let key = rcgen::KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(crypto_provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        RustlsConfig::from_config(Arc::new(config))
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

#[tokio::test]
async fn hc_58_a_request_is_signed_as_it_goes_over_tls() {
    let authority = Authority::new();
    let server = Server::tls(&authority, &["localhost", "127.0.0.1"], hello);
    let (client, name) = (authority.client(), named(server.address));
    let uri = "/_matrix/federation/v1/make_join/!a%3Ab.example/%40u%3Ag.example?ver=1&ver=2";
    for linearized in [false, true] {
        let answer = client.call(&name, Call::get(uri), linearized).await.unwrap();
        assert_eq!(answer, object(json!({ "hello": "world" })));
        let seen = server.last();
        assert_eq!((&seen.method, seen.uri.as_str()), (&Method::GET, uri));
        assert_eq!(seen.headers[header::HOST], name.as_str());
        let content = linearized.then_some(b"{}".as_slice());
        assert!(is_signed_request(&key(), &name, &Method::GET, uri, &seen.headers, content));
    }
    let body = object(json!({ "b": 1, "a": ["é", { "z": null }] }));
    client.call(&name, Call::put("/_matrix/federation/v1/send/1", body.clone()), true).await.unwrap();
    let seen = server.last();
    assert_eq!(seen.headers[header::CONTENT_TYPE], "application/json");
    assert_eq!(serde_json::from_slice::<Object>(&seen.body).unwrap(), body);
    assert!(is_signed_request(&key(), &name, &Method::PUT, &seen.uri, &seen.headers, Some(&seen.body)));
    // IP literals are reached by the certificate for the address.
    let literal: OwnedServerName = server.address.to_string().try_into().unwrap();
    client.call(&literal, Call::get("/_matrix/x"), false).await.unwrap();
    assert_eq!(server.last().headers[header::HOST], literal.as_str());
    // What needs no signature has none.
    client.get_json(&name, Call::get("/_matrix/key/v2/server")).await.unwrap();
    assert!(server.last().headers.get(header::AUTHORIZATION).is_none());
}

#[tokio::test]
async fn hc_58_a_certificate_must_be_trusted_and_for_the_name() {
    let authority = Authority::new();
    let server = Server::tls(&authority, &["other.example"], hello);
    let problem = |result: Result<Object, RemoteError>| match result {
        Err(RemoteError::Unreachable(problem)) => problem.to_lowercase(),
        other => panic!("{other:?}"),
    };
    let wrong_name = authority.client().call(&named(server.address), Call::get("/_matrix/x"), false).await;
    assert!(problem(wrong_name).contains("certificate"));
    let server = Server::tls(&Authority::new(), &["localhost"], hello);
    let untrusted = authority.client().call(&named(server.address), Call::get("/_matrix/x"), false).await;
    assert!(problem(untrusted).contains("certificate"));
    assert!(server.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn hc_57_private_addresses_are_dialled_only_where_an_admin_says_so() {
    let authority = Authority::new();
    let server = Server::tls(&authority, &["localhost", "127.0.0.1"], hello);
    let guarded = client(ClientOptions { custom_ca: vec![authority.file()], ..ClientOptions::default() });
    for name in [named(server.address).to_string(), server.address.to_string(), "2130706433".to_owned()] {
        let name: OwnedServerName = name.try_into().unwrap();
        let error = guarded.call(&name, Call::get("/_matrix/x"), false).await.unwrap_err();
        assert!(error.to_string().contains("may not be dialled"), "{error}");
    }
    assert!(server.seen.lock().unwrap().is_empty());
    let base = format!("https://localhost:{}", server.address.port());
    let named_by_admin = client(ClientOptions {
        custom_ca: vec![authority.file()],
        resolve: [(peer().to_owned(), base.parse().unwrap())].into(),
        ..ClientOptions::default()
    });
    named_by_admin.call(peer(), Call::get("/_matrix/x"), false).await.unwrap();
    assert_eq!(server.last().headers[header::HOST], peer().as_str());
}

#[test]
fn overrides_are_https_or_on_this_machine() {
    let build = |base: &str| {
        let resolve = [(peer().to_owned(), base.parse::<Url>().unwrap())].into();
        Client::new(peer().to_owned(), key(), ClientOptions { resolve, ..ClientOptions::default() }).is_ok()
    };
    for good in ["http://127.0.0.1:3000", "http://localhost:3000/", "http://[::1]:1", "https://hub.example:1/base"] {
        assert!(build(good), "{good}");
    }
    for bad in [
        "http://10.0.0.1:3000",
        "http://hub.example",
        "ftp://127.0.0.1/",
        "https://hub.example/?a",
        "https://u@hub.example",
    ] {
        assert!(!build(bad), "{bad}");
    }
}

#[tokio::test]
async fn connections_are_kept() {
    let accepted = Arc::new(AtomicUsize::new(0));
    let (listener, address) = Server::listen();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let count = accepted.clone();
    tokio::spawn(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            count.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
                let mut buffer = [0; 4096];
                while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
                }
            });
        }
    });
    let client = Server { address, seen: Arc::default() }.client();
    for _ in 0..10 {
        client.call(peer(), Call::get("/_matrix/x"), false).await.unwrap();
    }
    assert_eq!(accepted.load(Ordering::SeqCst), 1);
}

fn answers() -> Answers {
    Answers::default()
}

#[tokio::test]
async fn hc_22_answers_that_are_worked_on_are_bounded_together_and_small_ones_always_have_room() {
    let server = Server::plain(|seen| match seen.uri.as_str() {
        "/_matrix/small" => hello(seen),
        _ => axum::Json(json!({ "state": "x".repeat(150 << 10) })).into_response(),
    });
    let base: Url = format!("http://{}", server.address).parse().unwrap();
    let servers = ["a.example", "b.example", "c.example"].map(|name| ServerName::parse(name).unwrap());
    let resolve = servers.iter().map(|name| (name.clone(), base.clone())).collect();
    let options = ClientOptions { resolve, ..ClientOptions::default() };
    let kinds = [(16 << 10, 16 << 10, 8 << 10), (usize::MAX, 400 << 10, 200 << 10)];
    let answers = Answers::new(&kinds, Duration::from_millis(300));
    let client = Client::within(server_name!("g.example").to_owned(), key(), options, answers).unwrap();
    let ask = |server: &OwnedServerName, uri: &'static str| {
        let (client, server) = (client.clone(), server.clone());
        async move { client.call_held(&server, Call::get(uri).with_state(), false).await }
    };
    let (large, small) = ("/_matrix/x", "/_matrix/small");
    let [a, b, c] = &servers;
    let (_, first) = ask(a, large).await.unwrap();
    let too_much = |error: RemoteError| error.to_string().contains("too much to work on at once");
    assert!(too_much(ask(a, large).await.err().unwrap()), "beyond its share");
    let (_, second) = ask(b, large).await.unwrap();
    assert!(too_much(ask(c, large).await.err().unwrap()), "beyond what there is");
    for server in &servers {
        ask(server, small).await.unwrap();
    }
    // Who waits gets what is given back meanwhile.
    let waiting = tokio::spawn(ask(c, large));
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(first);
    waiting.await.unwrap().unwrap();
    ask(a, large).await.unwrap();
    drop(second);
}

fn endless() -> Body {
    Body::from_stream(futures::stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from(vec![b' '; 64 << 10]))))
}

#[tokio::test]
async fn hc_22_answers_are_bounded_in_size_and_time() {
    let server = Server::plain(|seen| match seen.uri.as_str() {
        "/_matrix/large" => Body::from(vec![b' '; 3 << 20]).into_response(),
        "/_matrix/endless" => endless().into_response(),
        "/_matrix/endless-error" => (StatusCode::FORBIDDEN, endless()).into_response(),
        "/_matrix/silent" => Body::from_stream(futures::stream::pending::<Result<Bytes, Infallible>>()).into_response(),
        "/_matrix/drip" => {
            let drip = futures::stream::unfold((), async |()| {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Some((Ok::<_, Infallible>(Bytes::from_static(b" ")), ()))
            });
            Body::from_stream(drip).into_response()
        }
        "/_matrix/loop" => (StatusCode::FOUND, [(header::LOCATION, "/_matrix/loop")]).into_response(),
        // `{}`, compressed.
        "/_matrix/gzip" => (
            [(header::CONTENT_ENCODING, "gzip")],
            b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab\xae\x05\x00\x43\xbf\xa6\xa3\x02\x00\x00\x00".to_vec(),
        )
            .into_response(),
        "/_matrix/list" => "[]".into_response(),
        "/_matrix/twice" => r#"{"a":1,"a":2}"#.into_response(),
        "/_matrix/deep" => format!("{}1{}", "{\"a\":".repeat(100_000), "}".repeat(100_000)).into_response(),
        _ => hello(seen),
    });
    let client = server.client();
    let call = |path: &str| {
        let call =
            Call { timeout: Duration::from_millis(700), limit: 1 << 20, ..Call::get(format!("/_matrix/{path}")) };
        let client = client.clone();
        async move { client.call(peer(), call, false).await.unwrap_err() }
    };
    for path in ["large", "endless", "gzip", "list", "twice", "deep"] {
        let error = call(path).await;
        assert!(matches!(error, RemoteError::BadAnswer(_)), "{path}: {error:?}");
    }
    for path in ["silent", "drip"] {
        let (start, error) = (Instant::now(), call(path).await);
        assert!(matches!(error, RemoteError::Unreachable(_)), "{path}: {error:?}");
        assert!(start.elapsed() < Duration::from_secs(5));
    }
    let before = server.seen.lock().unwrap().len();
    for (path, expected) in [("loop", StatusCode::FOUND), ("endless-error", StatusCode::FORBIDDEN)] {
        let error = call(path).await;
        assert!(matches!(error, RemoteError::Status { status, .. } if status == expected), "{path}: {error:?}");
    }
    assert_eq!(server.seen.lock().unwrap().len(), before + 2, "no redirect is followed");
}

#[tokio::test]
async fn errors_are_told_as_the_server_tells_them() {
    let server = Server::plain(|seen| match seen.uri.as_str() {
        "/_matrix/matrix" => {
            let body = json!({ "errcode": "M_UNRECOGNIZED", "error": "é".repeat(10_00) });
            (StatusCode::NOT_FOUND, axum::Json(body)).into_response()
        }
        _ => (StatusCode::NOT_FOUND, "<html>").into_response(),
    });
    let client = server.client();
    let error = client.call(peer(), Call::get("/_matrix/matrix"), false).await.unwrap_err();
    assert!(error.is_unrecognized());
    let RemoteError::Status { errcode, error, .. } = error else { panic!("{error:?}") };
    assert_eq!((errcode.as_str(), error.chars().count()), ("M_UNRECOGNIZED", 500));
    assert!(client.call(peer(), Call::get("/_matrix/other"), false).await.unwrap_err().is_unrecognized());
}

#[tokio::test]
async fn only_paths_that_stay_as_they_are_are_asked_for() {
    let server = Server::plain(hello);
    let client = server.client();
    for bad in [
        "/_matrix/../x",
        "/_matrix/a/%2e%2e/b",
        "/other",
        "_matrix/a",
        "/_matrix/a b",
        "/_matrix/a#b",
        "/_matrix/\u{e9}",
        "@evil.example/_matrix/",
    ] {
        let error = client.call(peer(), Call::get(bad), false).await.unwrap_err();
        assert!(matches!(error, RemoteError::Unreachable(_)), "{bad}: {error:?}");
    }
    assert!(server.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn hc_07_keys_are_fetched_within_64_kib() {
    let large = Server::plain(|_| axum::Json(json!({ "x": "x".repeat(70 << 10) })).into_response());
    assert!(large.client().fetch_keys(peer()).await.is_err());
    let small = Server::plain(hello);
    assert_eq!(small.client().fetch_keys(peer()).await.unwrap()["hello"], "world");
    assert_eq!(small.last().uri, "/_matrix/key/v2/server");
}

#[tokio::test]
async fn a_server_is_asked_for_its_time_whatever_it_answers() {
    for status in [StatusCode::OK, StatusCode::NOT_FOUND] {
        let server =
            Server::plain(move |_| (status, [(header::DATE, "Thu, 01 Jan 2026 00:00:00 GMT")]).into_response());
        assert_eq!(server.client().date(peer()).await.as_deref(), Some("Thu, 01 Jan 2026 00:00:00 GMT"));
    }
}

/// SRV records that all lead to one place, the first of them to nowhere.
struct Srv(SocketAddr);

impl TargetSource for Srv {
    fn targets(&self, name: String) -> BoxFuture<'static, Targets> {
        assert_eq!(name, "fed.example");
        let nowhere = ("does-not-exist.invalid".to_owned(), 1);
        Box::pin(std::future::ready(vec![nowhere, ("localhost".to_owned(), self.0.port())]))
    }
}

#[tokio::test]
async fn hc_58_behind_srv_the_certificate_is_for_the_name_and_not_for_the_target() {
    let authority = Authority::new();
    let server = Server::tls(&authority, &["fed.example"], hello);
    let tls = tls_config(&[authority.file()]).unwrap();
    let url: Url = "https://fed.example/_matrix/x".parse().unwrap();
    let http = Http::new(tls.clone(), Reach::Everything, Srv(server.address), answers()).unwrap();
    let request = http.request(Method::GET, url.clone()).unwrap().header(header::HOST, "fed.example");
    let answer = http.send("fed.example", request, Duration::from_secs(10), 1000, 0).await.unwrap();
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(server.last().headers[header::HOST], "fed.example");

    let guarded = Http::new(tls.clone(), Reach::Public, Srv(server.address), answers()).unwrap();
    let request = guarded.request(Method::GET, url.clone()).unwrap();
    assert!(guarded.send("fed.example", request, Duration::from_secs(10), 1000, 0).await.is_err());

    let of_target = Server::tls(&authority, &["localhost"], hello);
    let http = Http::new(tls, Reach::Everything, Srv(of_target.address), answers()).unwrap();
    let request = http.request(Method::GET, url).unwrap();
    assert!(http.send("fed.example", request, Duration::from_secs(10), 1000, 0).await.is_err());
}

#[tokio::test]
async fn hc_56_well_known_within_bounds() {
    let authority = Authority::new();
    let to = |location: &str| (StatusCode::FOUND, [(header::LOCATION, location.to_owned())]).into_response();
    let server = Server::tls(&authority, &["localhost"], move |seen| match seen.uri.as_str() {
        "/good" => axum::Json(json!({ "m.server": "fed.example" })).into_response(),
        "/hops/5" => to("/good"),
        hops if hops.starts_with("/hops/") => {
            let hop: u32 = hops.trim_start_matches("/hops/").parse().unwrap();
            to(&format!("/hops/{}", hop + 1))
        }
        "/loop" => to("/loop"),
        "/http" => to("http://localhost/good"),
        "/metadata" => to("https://169.254.169.254/latest"),
        "/file" => to("file:///etc/passwd"),
        "/large" => axum::Json(json!({ "m.server": "fed.example", "x": "x".repeat(51 << 10) })).into_response(),
        "/endless" => endless().into_response(),
        "/broken" => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        _ => StatusCode::NOT_FOUND.into_response(),
    });
    let tls = tls_config(&[authority.file()]).unwrap();
    let http = Http::new(tls.clone(), Reach::Everything, Itself, answers()).unwrap();
    let url = |path: &str| -> Url { format!("https://localhost:{}{path}", server.address.port()).parse().unwrap() };
    let day = Duration::from_secs(24 * 3600);
    let good = Outcome::Delegates(server_name!("fed.example").to_owned(), day);
    for (path, expected) in [
        ("/good", good.clone()),
        ("/hops/1", good),
        ("/hops/0", Outcome::Absent),
        ("/loop", Outcome::Absent),
        ("/http", Outcome::Absent),
        ("/file", Outcome::Absent),
        ("/large", Outcome::Absent),
        ("/endless", Outcome::Absent),
        ("/none", Outcome::Absent),
        ("/broken", Outcome::Failed),
    ] {
        assert_eq!(fetch_from(&http, url(path)).await, expected, "{path}");
    }
    let seen = server.seen.lock().unwrap().len();
    let guarded = Http::new(tls, Reach::Public, Itself, answers()).unwrap();
    assert_eq!(fetch_from(&guarded, url("/metadata")).await, Outcome::Failed);
    assert_eq!(server.seen.lock().unwrap().len(), seen, "nothing private is dialled");
}

/// Every name is at this port of loopback.
struct Loopback(u16);

impl TargetSource for Loopback {
    fn targets(&self, _: String) -> BoxFuture<'static, Targets> {
        Box::pin(std::future::ready(vec![("localhost".to_owned(), self.0)]))
    }
}

#[tokio::test]
async fn hc_56_well_known_is_asked_for_once_until_it_is_outdated() {
    let authority = Authority::new();
    let server = Server::tls(&authority, &["one.example", "none.example"], |seen| {
        match seen.headers[header::HOST].to_str().unwrap() {
            "one.example" => axum::Json(json!({ "m.server": "fed.example:443" })).into_response(),
            _ => StatusCode::NOT_FOUND.into_response(),
        }
    });
    let tls = tls_config(&[authority.file()]).unwrap();
    let http = Arc::new(Http::new(tls, Reach::Everything, Loopback(server.address.port()), answers()).unwrap());
    let network = Network::new(http, SrvTargets::new());
    let asked = || std::mem::take(&mut *server.seen.lock().unwrap()).len();
    for (host, delegate) in [("one.example", Some(server_name!("fed.example:443").to_owned())), ("none.example", None)]
    {
        let hosts = [host.to_owned(), host.to_uppercase()];
        for _ in 0..2 {
            let answers = futures::future::join_all((0..10).map(|n| network.delegate(&hosts[n % 2]))).await;
            assert!(answers.iter().all(|answer| *answer == delegate), "{answers:?}");
        }
        assert_eq!(asked(), 1, "{host}");
        network.outdate(host).await;
        assert_eq!(network.delegate(host).await, delegate);
        assert_eq!(asked(), 1, "{host}");
    }
}
