//! What a stranger can do at the listener of other servers: nothing without a signature, and nothing out of bounds with one.

use std::time::Duration;

use http::{Method, StatusCode};
use isthmus::event::Object;
use isthmus::federation::{RemoteError, authorization_header};
use isthmus::identity::SigningKey;
use reqwest::{Client, Response};
use serde_json::{Value, json};

use super::world::{Node, World};

const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";

/// Every endpoint that answers other servers only.
fn guarded() -> Vec<(Method, String)> {
    let (room, user, event) = ("!r:b.example", "@u:a.example", "$e");
    let v = |version: &str, rest: &str| format!("/_matrix/federation/{version}/{rest}");
    let get = [
        v("v1", "query/directory?room_alias=%23a:b.example"),
        v("v1", "query/profile?user_id=@u:b.example"),
        v("v1", &format!("make_join/{room}/{user}?ver=10")),
        v("v1", &format!("make_leave/{room}/{user}")),
        v("v1", &format!("make_knock/{room}/{user}?ver=10")),
        v("v1", &format!("event/{event}")),
        v("v2", &format!("event/{event}")),
        v("v1", &format!("event_auth/{room}/{event}")),
        v("v1", &format!("state/{room}?event_id={event}")),
        v("v1", &format!("state_ids/{room}?event_id={event}")),
        v("v1", &format!("backfill/{room}?v={event}&limit=10")),
        v("v2", &format!("backfill/{room}?v={event}&limit=10")),
        v("v1", "publicRooms"),
        v("v1", "user/devices/@u:b.example"),
        format!("{UNSTABLE}/event/{event}"),
        format!("{UNSTABLE}/backfill/{room}?v={event}&limit=10"),
    ];
    let put = [
        v("v1", "send/1"),
        v("v2", "send/1"),
        format!("{UNSTABLE}/send/1"),
        v("v2", &format!("send_join/{room}/{event}")),
        v("v2", &format!("send_leave/{room}/{event}")),
        v("v1", &format!("send_knock/{room}/{event}")),
        v("v2", &format!("invite/{room}/{event}")),
    ];
    let mut post = vec![
        v("v1", &format!("get_missing_events/{room}")),
        v("v1", "publicRooms"),
        v("v1", "user/keys/query"),
        v("v1", "user/keys/claim"),
    ];
    for name in ["send_join", "send_leave", "send_knock", "invite"] {
        post.extend([v("v3", &format!("{name}/1")), format!("{UNSTABLE}/{name}/1")]);
    }
    let with = |method: Method| move |uri: String| (method.clone(), uri);
    let get = get.into_iter().map(with(Method::GET));
    get.chain(put.into_iter().map(with(Method::PUT))).chain(post.into_iter().map(with(Method::POST))).collect()
}

fn request(node: &Node, method: &Method, uri: &str) -> reqwest::RequestBuilder {
    let client = Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().unwrap();
    client.request(method.clone(), node.url(uri))
}

async fn error_of(response: Response) -> (StatusCode, Value) {
    (response.status(), response.json().await.unwrap())
}

#[tokio::test]
async fn no_endpoint_answers_without_a_signature_that_is_right() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    let stranger = SigningKey::generate();
    for (method, uri) in guarded() {
        let body = (method != Method::GET).then(Object::new);
        let send = async |authorization: Option<String>| {
            let mut request = request(&b, &method, &uri);
            if let Some(body) = &body {
                request = request.json(body);
            }
            if let Some(authorization) = authorization {
                request = request.header("authorization", authorization);
            }
            error_of(request.send().await.unwrap()).await
        };
        let unauthorized = |(status, error): (StatusCode, Value), how: &str| {
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{method} {uri} {how}: {error}");
            assert_eq!(error["errcode"], "M_FORBIDDEN", "{method} {uri} {how}");
        };
        unauthorized(send(None).await, "without a signature");
        unauthorized(send(Some("Bearer token".to_owned())).await, "with a token");
        let sign = |key: &SigningKey, uri: &str, destination: &Node| {
            authorization_header(&a.name, &destination.name, key, &method, uri, body.as_ref())
        };
        unauthorized(send(Some(sign(&stranger, &uri, &b))).await, "with a key that is not a.example's");
        unauthorized(send(Some(sign(&a.context.signing_key, "/_matrix/other", &b))).await, "signed for another path");
        unauthorized(send(Some(sign(&a.context.signing_key, &uri, &a))).await, "signed for another server");
        let (status, error) = send(Some(sign(&a.context.signing_key, &uri, &b))).await;
        assert_ne!(status, StatusCode::UNAUTHORIZED, "{method} {uri} signed: {error}");
        assert!(!status.is_server_error(), "{method} {uri} signed: {error}");
    }
}

#[tokio::test]
async fn a_transaction_out_of_bounds_is_refused_and_says_why() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    let uri = "/_matrix/federation/v2/send/1";
    let send = async |body: Value| {
        let call = isthmus::federation::Call::put(uri, body.as_object().unwrap().clone());
        a.context.client.call(&b.name, call, true).await
    };
    for (body, status, word) in [
        (json!({ "pdus": vec![json!({}); 51] }), 400, "more than 50"),
        (json!({ "pdus": [], "edus": vec![json!({}); 101] }), 400, "more than 100"),
        (json!({ "pdus": {} }), 400, "a list of at most 50"),
        (json!({ "pdus": [], "origin": "c.example" }), 400, "c.example"),
        (json!({ "pdus": [], "large": "x".repeat(10 << 20) }), 413, "transaction"),
    ] {
        match send(body).await.unwrap_err() {
            RemoteError::Status { status: answered, error, .. } => {
                assert_eq!(answered.as_u16(), status, "{error}");
                assert!(error.contains(word), "{error}");
            }
            other => panic!("{other}"),
        }
    }
    // An event that is larger than any may be does not keep its transaction from being answered.
    assert!(send(json!({ "pdus": [{ "room_id": "!r:b.example", "x": "x".repeat(300 << 10) }] })).await.is_ok());
}

#[tokio::test]
async fn a_body_is_not_waited_for_from_a_stranger() {
    let (_world, [_a, b]) = World::new(["a.example", "b.example"]).await;
    // The body never comes: the answer must not wait for it.
    let endless = reqwest::Body::wrap_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>());
    let response = request(&b, &Method::PUT, "/_matrix/federation/v1/send/1").body(endless).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn an_unknown_path_and_a_wrong_method_are_unrecognized() {
    let (_world, [_a, b]) = World::new(["a.example", "b.example"]).await;
    for (method, uri, status) in [
        (Method::GET, "/_matrix/federation/v1/nothing", 404),
        (Method::GET, "/_matrix/federation/v1/publicRooms/", 404),
        (Method::DELETE, "/_matrix/federation/v1/publicRooms", 405),
        (Method::GET, "/_matrix/federation/v1/send/1", 405),
    ] {
        let (answered, error) = error_of(request(&b, &method, uri).send().await.unwrap()).await;
        assert_eq!((answered.as_u16(), &error["errcode"]), (status, &json!("M_UNRECOGNIZED")), "{method} {uri}");
    }
}
