//! What is asked and what is made of the answers: bounded, whatever a server does.

use super::*;

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
    let answers = Answers::new(&kinds, Duration::from_secs(2));
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
        let timeout = Duration::from_millis(if ["silent", "drip"].contains(&path) { 700 } else { 20_000 });
        let call = Call { timeout, limit: 1 << 20, ..Call::get(format!("/_matrix/{path}")) };
        let client = client.clone();
        async move { client.call(peer(), call, false).await }
    };
    assert!(call("deep").await.is_ok(), "what is too deep in an answer is replaced");
    let call = async |path: &str| call(path).await.unwrap_err();
    for path in ["large", "endless", "gzip", "list", "twice"] {
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
