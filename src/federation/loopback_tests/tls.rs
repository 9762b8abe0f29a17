//! Who is dialled, and by which certificate.

use super::*;

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
    let http = Http::new(tls.clone(), Reach::Everything, Srv(server.address), answers());
    assert_eq!(ask(&http, "fed.example").await.unwrap().status, StatusCode::OK);
    assert_eq!(server.last().authority, "fed.example");

    let guarded = Http::new(tls.clone(), Reach::Public, Srv(server.address), answers());
    assert!(ask(&guarded, "fed.example").await.is_err());

    let of_target = Server::tls(&authority, &["localhost"], hello);
    let http = Http::new(tls, Reach::Everything, Srv(of_target.address), answers());
    assert!(ask(&http, "fed.example").await.is_err());
}
