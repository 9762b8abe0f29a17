//! Listeners that are filled by connections on which nothing is asked.

use axum::routing::get;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A connection and the server's end of it, as a listener with these bounds takes it.
async fn accept(
    listener: &TcpListener,
    connections: &Connections,
    peer: Peer,
) -> io::Result<(TcpStream, Watched, Serving<()>)> {
    let (there, here) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (watched, serving) = connections.open(here.unwrap().0, peer, ())?;
    Ok((there.unwrap(), watched, serving))
}

#[tokio::test]
async fn hc_22_a_connection_that_is_idle_makes_room_for_a_new_one() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connections = Connections::new(Bounds { all: 3, of_one: Some(2), patience: Patience::default() });
    let (one, other) = (Peer(Some([1, 1, 1, 1].into())), Peer(Some([2, 2, 2, 2].into())));
    let mut buffer = [0];
    let mut first = accept(&listener, &connections, one).await.unwrap();
    let mut second = accept(&listener, &connections, one).await.unwrap();
    let mut others = accept(&listener, &connections, other).await.unwrap();
    // A third of the same address: its own first ends, and nobody else's.
    let third = accept(&listener, &connections, one).await.unwrap();
    assert!(first.1.read(&mut buffer).await.is_err());
    for open in [&mut second, &mut others] {
        open.0.write_all(b"x").await.unwrap();
        assert_eq!(open.1.read(&mut buffer).await.unwrap(), 1);
    }
    // Of those without an address, one more than there is place for: whoever has been idle for longest.
    let nobody = accept(&listener, &connections, Peer(None)).await.unwrap();
    assert!(second.1.read(&mut buffer).await.is_err());
    // The place of one that is over is free.
    drop(third);
    let another = accept(&listener, &connections, Peer(None)).await.unwrap();
    others.0.write_all(b"x").await.unwrap();
    assert_eq!(others.1.read(&mut buffer).await.unwrap(), 1);
    drop((nobody, another));
}

#[tokio::test]
async fn hc_22_who_asks_for_nothing_is_cut_off_in_every_protocol_and_who_waits_for_an_answer_is_not() {
    let asked = get(|| async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        "here"
    });
    let patience = Patience { first: Duration::from_secs(1), idle: Duration::from_secs(1) };
    let routes = Router::new().route("/slow", asked).route("/", get(|| async { "quick" }));
    let listener = Listener::open_bounded("test", ([127, 0, 0, 1], 0).into(), 0, patience, routes).await;
    let listener = listener.unwrap_or_else(|error| panic!("{error}"));
    let connect = async |says: &[u8]| {
        let mut stream = TcpStream::connect(listener.address()).await.unwrap();
        stream.write_all(says).await.unwrap();
        stream
    };
    let mut slow = connect(b"GET /slow HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n").await;
    let kept = b"GET / HTTP/1.1\r\nHost: g\r\n\r\n";
    let mut silent = vec![connect(b"").await, connect(PREFACE).await, connect(&PREFACE[..9]).await];
    silent.extend([connect(b"GET / HT").await, connect(kept).await]);
    for mut stream in silent {
        let mut all = Vec::new();
        let read = stream.read_to_end(&mut all);
        let ended = tokio::time::timeout(Duration::from_secs(20), read).await;
        // How it ends is no matter.
        assert!(ended.is_ok(), "a connection is kept that asked for nothing");
    }
    let mut answer = String::new();
    slow.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("here"), "{answer}");
    listener.stop(Duration::ZERO);
}

#[tokio::test]
async fn a_listener_with_a_certificate_speaks_http2() {
    let directory = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    let file = |name: &str, text: String| {
        std::fs::write(directory.path().join(name), text).unwrap();
        directory.path().join(name)
    };
    let settings = Listen {
        tls_certificate: Some(file("certificate.pem", certificate.pem())),
        tls_private_key: Some(file("key.pem", key.serialize_pem())),
        address: ([127, 0, 0, 1], 0).into(),
        ..Listen::default()
    };
    let listener = Listener::open("test", &settings, Router::new()).await.unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let mut tls = rustls::ClientConfig::builder_with_provider(crypto_provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    for (offered, expected) in [(&["h2", "http/1.1"] as &[&str], "h2"), (&["http/1.1"], "http/1.1")] {
        tls.alpn_protocols = offered.iter().map(|name| name.as_bytes().to_vec()).collect();
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(tls.clone()));
        let stream = TcpStream::connect(listener.address()).await.unwrap();
        let stream = connector.connect("localhost".try_into().unwrap(), stream).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(expected.as_bytes()));
    }
    listener.stop(Duration::ZERO);
}
