//! HTTP/2, where a server has it: spoken, asked by the right name, and no way for one connection to hold up a server's others.

use std::sync::atomic::AtomicBool;

use futures::StreamExt as _;

use super::*;
use crate::federation::download::Opened;

#[tokio::test]
async fn a_server_is_asked_by_what_it_speaks() {
    let authority = Authority::new();
    let client = authority.client();
    for (protocols, version) in [
        (&["h2"] as &[&str], http::Version::HTTP_2),
        (&["http/1.1"], http::Version::HTTP_11),
        (&[], http::Version::HTTP_11),
        (&["http/1.1", "h2"], http::Version::HTTP_11),
    ] {
        let server = Server::speaking(protocols, &authority, &["localhost", "127.0.0.1"], hello);
        let literal: OwnedServerName = server.address.to_string().try_into().unwrap();
        for name in [named(server.address), literal] {
            let body = object(json!({ "a": "x".repeat(200 << 10) }));
            client.call(&name, Call::put("/_matrix/federation/v1/send/1?a=b", body.clone()), true).await.unwrap();
            let seen = server.last();
            assert_eq!((seen.version, seen.authority.as_str()), (version, name.as_str()), "{protocols:?}");
            assert_eq!(seen.uri, "/_matrix/federation/v1/send/1?a=b");
            assert_eq!(serde_json::from_slice::<Object>(&seen.body).unwrap(), body);
            assert!(is_signed_request(&key(), &name, &Method::PUT, &seen.uri, &seen.headers, Some(&seen.body)));
        }
    }
}

#[tokio::test]
async fn hc_58_a_server_is_asked_by_its_name_wherever_it_is_dialled() {
    let authority = Authority::new();
    for protocol in ["h2", "http/1.1"] {
        let server = Server::speaking(&[protocol], &authority, &["fed.example", "localhost"], hello);
        let tls = tls_config(&[authority.file()]).unwrap();
        // Delegated, or behind SRV: the name's own port is not the one that is dialled.
        let http = Http::new(tls, Reach::Everything, Loopback(server.address.port()), answers());
        ask(&http, "fed.example").await.unwrap();
        assert_eq!(server.last().authority, "fed.example");
        // Named by an admin: the certificate is for the place, the request for the name.
        let base = format!("https://localhost:{}/base", server.address.port());
        let client = client(ClientOptions {
            custom_ca: vec![authority.file()],
            resolve: [(peer().to_owned(), base.parse().unwrap())].into(),
            ..ClientOptions::default()
        });
        client.call(peer(), Call::get("/_matrix/x"), false).await.unwrap();
        assert_eq!((server.last().authority.as_str(), server.last().uri.as_str()), ("peer.example", "/base/_matrix/x"));
    }
}

#[tokio::test]
async fn hc_22_answers_by_http2_are_bounded_too() {
    let authority = Authority::new();
    let server = Server::speaking(&["h2"], &authority, &["localhost"], |seen| match seen.uri.as_str() {
        "/_matrix/endless" => endless().into_response(),
        "/_matrix/silent" => Body::from_stream(futures::stream::pending::<Result<Bytes, Infallible>>()).into_response(),
        "/_matrix/headers" => ([("x-long", "x".repeat(40 << 10))], "{}").into_response(),
        _ => hello(seen),
    });
    let (client, name) = (authority.client(), named(server.address));
    let call = async |path: &str| {
        let uri = format!("/_matrix/{path}");
        let timeout = Duration::from_millis(if path == "silent" { 700 } else { 20_000 });
        let call = Call { timeout, limit: 1 << 20, ..Call::get(uri) };
        client.call(&name, call, false).await
    };
    assert!(matches!(call("endless").await, Err(RemoteError::BadAnswer(_))));
    for path in ["silent", "headers"] {
        assert!(matches!(call(path).await, Err(RemoteError::Unreachable(_))), "{path}");
    }
    // The connection goes on.
    call("hello").await.unwrap();
}

/// A TLS listener that hands each connection on to `to`, and can fall silent: what it holds then goes nowhere.
struct Cable {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
}

impl Cable {
    fn to(to: SocketAddr) -> Self {
        let (listener, address) = Server::listen();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let (cut, connections) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (first_is_cut, count) = (cut.clone(), connections.clone());
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let is_first = count.fetch_add(1, Ordering::SeqCst) == 0;
                let cut = first_is_cut.clone();
                tokio::spawn(async move {
                    let far = tokio::net::TcpStream::connect(to).await.unwrap();
                    let ((mut from_near, mut to_near), (mut from_far, mut to_far)) =
                        (near.into_split(), far.into_split());
                    tokio::spawn(async move { tokio::io::copy(&mut from_far, &mut to_near).await });
                    let mut buffer = [0; 4096];
                    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
                    while let Ok(read @ 1..) = from_near.read(&mut buffer).await {
                        if is_first && cut.load(Ordering::SeqCst) {
                            continue;
                        }
                        if to_far.write_all(&buffer[..read]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { address, cut, connections }
    }
}

#[tokio::test]
async fn a_dead_http2_connection_is_given_up() {
    let authority = Authority::new();
    let server = Server::speaking(&["h2"], &authority, &["fed.example"], hello);
    let cable = Cable::to(server.address);
    let tls = tls_config(&[authority.file()]).unwrap();
    let targets = Loopback(cable.address.port());
    let http = Http::pinging(tls, Reach::Everything, targets, answers(), Duration::from_millis(1_500));
    for _ in 0..5 {
        ask(&http, "fed.example").await.unwrap();
    }
    assert_eq!(cable.connections.load(Ordering::SeqCst), 1, "one connection is enough");
    cable.cut.store(true, Ordering::SeqCst);
    let begun = Instant::now();
    let asked = futures::future::join_all((0..20).map(|_| ask(&http, "fed.example"))).await;
    assert!(asked.iter().all(|answer| matches!(answer, Err(RemoteError::Unreachable(_)))));
    assert!(begun.elapsed() < Duration::from_secs(15), "they wait for the connection and not each for its time");
    ask(&http, "fed.example").await.unwrap();
    assert_eq!(cable.connections.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_request_that_a_server_has_not_begun_with_goes_out_again() {
    let authority = Authority::new();
    let tls = Arc::new(authority.issue(&["fed.example"], &["h2"]));
    let (listener, address) = Server::listen();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let stream = tokio_rustls::TlsAcceptor::from(tls.clone()).accept(stream).await.unwrap();
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                if count.fetch_add(1, Ordering::SeqCst) == 0 {
                    respond.send_reset(h2::Reason::REFUSED_STREAM);
                } else {
                    let response = http::Response::new(());
                    respond.send_response(response, true).unwrap();
                }
            }
        }
    });
    let http =
        Http::new(tls_config(&[authority.file()]).unwrap(), Reach::Everything, Loopback(address.port()), answers());
    assert_eq!(ask(&http, "fed.example").await.unwrap().status, StatusCode::OK);
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

/// Media that a client reads slowly, say: what is there of it fills the windows.
#[tokio::test]
async fn long_answers_that_nobody_reads_hold_up_no_transaction() {
    let authority = Authority::new();
    let server = Server::speaking(&["h2"], &authority, &["localhost"], |seen| match seen.uri.as_str() {
        "/_matrix/long" => endless().into_response(),
        _ => hello(seen),
    });
    let (client, name) = (authority.client(), named(server.address));
    let mut unread = Vec::new();
    for _ in 0..4 {
        let opened = client.open(&name, "/_matrix/long", None, Duration::from_secs(10)).await.unwrap();
        let Opened::Body { mut body, .. } = opened else { panic!("elsewhere") };
        body.next().await.unwrap().unwrap();
        unread.push(body);
    }
    for _ in 0..3 {
        client.call(&name, Call::put("/_matrix/federation/v1/send/1", Object::new()), true).await.unwrap();
        // Others of that length go on as well.
        client.call(&name, Call::get("/_matrix/hello"), false).await.unwrap();
    }
}
