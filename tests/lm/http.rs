//! What a stranger can do at the listener of other servers: nothing without a signature, and nothing out of bounds with one. Every test
//! goes through all endpoints, by the table that the router is made from.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;
use std::time::Duration;

use http::Method;
use isthmus::dag::NewRoom;
use isthmus::event::{RoomVersion, canonical_json, canonical_text};
use isthmus::federation::RemoteError;
use isthmus::gateway::{Endpoint, Takes, federation_endpoints};
use isthmus::identity::SigningKey;
use ruma::RoomId;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::world::{Node, World};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The endpoints that answer other servers only.
fn guarded() -> impl Iterator<Item = Endpoint> {
    let open = [Takes::Nothing, Takes::OpenBody];
    federation_endpoints().into_iter().filter(move |endpoint| !open.contains(&endpoint.takes))
}

/// Those of them that take a body, with the size that it may have.
fn with_bodies() -> impl Iterator<Item = (Endpoint, usize)> {
    federation_endpoints().into_iter().filter_map(|endpoint| match endpoint.takes {
        Takes::Nothing | Takes::Signature => None,
        Takes::Body | Takes::OpenBody => Some((endpoint, 1 << 20)),
        Takes::Transaction => Some((endpoint, 10 << 20)),
    })
}

/// A path, and what in the query the endpoints ask for, about a room.
fn uri(path: &str, room: &str) -> String {
    let names = [
        ("{room_id}", room),
        ("{user_id}", "@u:a.example"),
        ("{event_id}", "$e"),
        ("{txn_id}", "1"),
        ("{server_name}", "c.example"),
        ("{device_id}", "DEVICE"),
        ("{media_id}", "x"),
    ];
    let path = names.into_iter().fold(path.to_owned(), |filled, (name, value)| filled.replace(name, value));
    format!("{path}?ver=10&v=$e&event_id=$e&limit=10&user_id=@u:b.example&room_alias=%23a:b.example")
}

/// What a server answered: the status and the body.
pub type Answered = (u16, Value);

/// Without a pool, since each test has a runtime of its own.
pub fn http() -> &'static reqwest::Client {
    static CLIENT: LazyLock<reqwest::Client> = LazyLock::new(|| {
        reqwest::Client::builder().no_proxy().timeout(PATIENCE).pool_max_idle_per_host(0).build().unwrap()
    });
    &CLIENT
}

/// Asks with the body as it is.
pub async fn ask(
    node: &Node,
    method: &Method,
    uri: &str,
    authorization: Option<&str>,
    body: Option<&[u8]>,
) -> Answered {
    let mut request = http().request(method.clone(), node.url(uri));
    if let Some(authorization) = authorization {
        request = request.header("authorization", authorization);
    }
    if let Some(body) = body {
        request = request.header("content-type", "application/json").body(body.to_vec());
    }
    let response = request.send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap_or_default())
}

/// The signature of a request from `a` to `b`, over any JSON.
pub fn signature(a: &Node, b: &Node, key: &SigningKey, method: &Method, uri: &str, content: Option<&Value>) -> String {
    let (origin, destination) = (&a.name, &b.name);
    let mut message = json!({ "origin": origin, "destination": destination, "method": method.as_str(), "uri": uri });
    if let Some(content) = content {
        message["content"] = content.clone();
    }
    let sig = key.sign(&canonical_json(message.as_object().unwrap()));
    format!(r#"X-Matrix origin="{origin}",destination="{destination}",key="{}",sig="{sig}""#, key.id())
}

/// The signature of a request from `a` to `b`, over a body that may be no JSON: then over none.
pub fn signature_over(a: &Node, b: &Node, method: &Method, uri: &str, body: &[u8]) -> String {
    let rest = json!({ "destination": b.name, "method": method.as_str(), "origin": a.name, "uri": uri });
    let rest = canonical_json(rest.as_object().unwrap());
    let message = match canonical_text(body) {
        Ok(content) => [b"{\"content\":", &content[..], b",", &rest[1..]].concat(),
        Err(_) => rest,
    };
    let key = &a.context.signing_key;
    format!(r#"X-Matrix origin="{}",destination="{}",key="{}",sig="{}""#, a.name, b.name, key.id(), key.sign(&message))
}

/// Asks with a right signature.
pub async fn ask_signed(a: &Node, b: &Node, method: &Method, uri: &str, content: Option<&Value>) -> Answered {
    let authorization = signature(a, b, &a.context.signing_key, method, uri, content);
    let body = content.map(|content| serde_json::to_vec(content).unwrap());
    ask(b, method, uri, Some(&authorization), body.as_deref()).await
}

fn assert_refused((status, error): &Answered, expected: (u16, &str), how: &str) {
    let errcode = error["errcode"].as_str().unwrap_or_default();
    assert_eq!((*status, errcode), expected, "{how}: {error}");
    assert!(error["error"].is_string(), "{how}: {error}");
}

const UNAUTHORIZED: (u16, &str) = (401, "M_FORBIDDEN");

#[tokio::test]
async fn the_names_of_servers_rooms_and_users_differ_by_the_case_of_their_letters() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    let room = b.create_room("public").await;
    let make_join = |room: &str, user: &str| {
        format!("/_matrix/federation/v1/make_join/{room}/{user}?ver={}", RoomVersion::Lm02.as_str())
    };
    let asked = async |origin: &str, destination: &str, uri: &str| {
        let message = json!({ "origin": origin, "destination": destination, "method": "GET", "uri": uri });
        let key = &a.context.signing_key;
        let sig = key.sign(&canonical_json(message.as_object().unwrap()));
        let header =
            format!(r#"X-Matrix origin="{origin}",destination="{destination}",key="{}",sig="{sig}""#, key.id());
        ask(&b, &Method::GET, uri, Some(&header), None).await
    };
    let right = make_join(room.as_str(), "@alice:a.example");
    assert_eq!(asked("a.example", "b.example", &right).await.0, 200);
    assert_refused(&asked("a.example", "B.example", &right).await, UNAUTHORIZED, "destination");
    assert_eq!(asked("A.example", "b.example", &right).await.0, 401, "origin");
    assert_eq!(asked("a.example", "b.example", &make_join(room.as_str(), "@alice:A.example")).await.0, 403, "user");
    let other = room.as_str().to_uppercase().replace("B.EXAMPLE", "b.example");
    assert_ne!(other, room.as_str());
    assert_eq!(asked("a.example", "b.example", &make_join(&other, "@alice:a.example")).await.0, 404, "room");
}

#[tokio::test]
async fn hc_01_hc_04_no_endpoint_answers_without_a_signature_that_is_right() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    let stranger = SigningKey::generate();
    for Endpoint { method, path, takes, .. } in guarded() {
        let uri = uri(&path, "!r:b.example");
        let content = (takes != Takes::Signature).then(|| json!({}));
        let body = content.as_ref().map(|_| &b"{}"[..]);
        let sign = |key: &SigningKey, method: &Method, uri: &str, destination: &Node| {
            signature(&a, destination, key, method, uri, content.as_ref())
        };
        let own = &a.context.signing_key;
        for (authorization, how) in [
            (None, "without a signature"),
            (Some("Bearer token".to_owned()), "with a token"),
            (Some(sign(&stranger, &method, &uri, &b)), "with a key that is not a.example's"),
            (Some(sign(own, &method, "/_matrix/other", &b)), "signed for another path"),
            (Some(sign(own, &Method::DELETE, &uri, &b)), "signed for another method"),
            (Some(sign(own, &method, &uri, &a)), "signed for another server"),
        ] {
            let answered = ask(&b, &method, &uri, authorization.as_deref(), body).await;
            assert_refused(&answered, UNAUTHORIZED, &format!("{method} {path} {how}"));
        }
        let (status, answer) = ask_signed(&a, &b, &method, &uri, content.as_ref()).await;
        assert!(status != 401 && status < 500, "{method} {path} signed: {status} {answer}");
    }
}

#[tokio::test]
async fn nothing_of_a_request_is_judged_before_its_signature() {
    let (_world, [_a, b]) = World::new(["a.example", "b.example"]).await;
    for Endpoint { method, path, takes, .. } in guarded() {
        let named = path.split('/').map(|part| if part.starts_with('{') { "%ff" } else { part });
        let unreadable = named.collect::<Vec<_>>().join("/");
        let not_an_id = uri(&path, "no-room").replace("@u", "no-user").replace("$e", "no-event");
        let twice = format!("{}&limit=x&limit=y&user_id=%ff&room_alias=&room_alias=", uri(&path, "!r:b.example"));
        for uri in [unreadable, not_an_id, twice] {
            let body = (takes != Takes::Signature).then_some(&b"no JSON"[..]);
            assert_refused(&ask(&b, &method, &uri, None, body).await, UNAUTHORIZED, &format!("{method} {uri}"));
        }
        // A body that never comes, of whatever size: the answer does not wait for it.
        let answered = declare(&b, &method, &uri(&path, "!r:b.example"), None, usize::MAX / 2).await;
        assert_refused(&answered, UNAUTHORIZED, &format!("{method} {path} with an endless body"));
    }
}

/// Sends a request whose body has so many bytes, as it says; none of them ever comes.
async fn declare(node: &Node, method: &Method, uri: &str, authorization: Option<&str>, size: usize) -> Answered {
    let mut stream = TcpStream::connect(node.address()).await.unwrap();
    let authorization = authorization.map(|value| format!("Authorization: {value}\r\n")).unwrap_or_default();
    let head = format!(
        "{method} {uri} HTTP/1.1\r\nHost: {}\r\n{authorization}Content-Length: {size}\r\nConnection: close\r\n\r\n",
        node.name
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    tokio::time::timeout(PATIENCE, read).await.expect("an answer").unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap_or_default())
}

#[tokio::test]
async fn a_wrong_method_is_unrecognized_on_every_path() {
    let (_world, [_a, b]) = World::new(["a.example", "b.example"]).await;
    let mut taken: BTreeMap<String, Vec<Method>> = BTreeMap::new();
    for Endpoint { method, path, .. } in federation_endpoints() {
        taken.entry(path).or_default().push(method);
    }
    for (path, methods) in taken {
        let others = [Method::GET, Method::PUT, Method::POST, Method::DELETE, Method::PATCH, Method::OPTIONS];
        for method in others.iter().filter(|method| !methods.contains(method)) {
            let answered = ask(&b, method, &uri(&path, "!r:b.example"), None, Some(b"{}")).await;
            assert_refused(&answered, (405, "M_UNRECOGNIZED"), &format!("{method} {path}"));
        }
    }
}

#[tokio::test]
async fn everybody_is_told_what_program_this_is() {
    let (_world, [node]) = World::new(["hub.example"]).await;
    let (status, answer) = ask(&node, &Method::GET, "/_matrix/federation/v1/version", None, None).await;
    assert_eq!(status, 200);
    assert_eq!(answer, json!({ "server": { "name": "isthmus", "version": env!("CARGO_PKG_VERSION") } }));
}

#[tokio::test]
async fn an_unknown_path_is_unrecognized() {
    let (_world, [_a, b]) = World::new(["a.example", "b.example"]).await;
    let mut paths: Vec<String> =
        ["/", "/_matrix", "/_matrix/federation/v1/nothing", "/_matrix/client/versions"].map(str::to_owned).to_vec();
    for Endpoint { path, .. } in federation_endpoints() {
        paths.extend([format!("{path}/"), format!("{path}/more/of/it"), path.replace("/_matrix/", "/_matrix//")]);
        paths.extend([path.replace("/v", "/v9"), path.replace("/_matrix/", "/_other/")]);
    }
    let known: BTreeSet<String> = federation_endpoints().into_iter().map(|endpoint| endpoint.path).collect();
    for path in paths.iter().filter(|path| !known.contains(*path)) {
        for method in [Method::GET, Method::PUT, Method::POST] {
            let answered = ask(&b, &method, &uri(path, "!r:b.example"), None, None).await;
            assert_refused(&answered, (404, "M_UNRECOGNIZED"), &format!("{method} {path}"));
        }
    }
}

#[tokio::test]
async fn hc_21_a_body_that_is_no_json_is_refused_whatever_it_is_called() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    let multipart = b"--x\r\nContent-Disposition: form-data; name=\"pdus\"; filename=\"a\"\r\n\r\n[]\r\n--x--\r\n";
    for (Endpoint { method, path, .. }, _) in with_bodies() {
        let uri = uri(&path, "!r:b.example");
        let authorization = signature(&a, &b, &a.context.signing_key, &method, &uri, Some(&json!({})));
        for body in [&b""[..], b"no JSON", b"{", b"{}{}", b"{\"x\":\xff}", b"pdus=%5B%5D", multipart] {
            let answered = ask(&b, &method, &uri, Some(&authorization), Some(body)).await;
            assert_refused(&answered, (400, "M_NOT_JSON"), &format!("{method} {path} {}", body.escape_ascii()));
        }
        // Matrix does not ask for a content type, and a wrong one changes nothing.
        let mut answers = Vec::new();
        for kind in ["application/json", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "x"] {
            let request = http().request(method.clone(), b.url(&uri)).header("authorization", &authorization);
            let response = request.header("content-type", kind).header("content-encoding", "gzip").body("{}").send();
            answers.push(response.await.unwrap().text().await.unwrap());
        }
        assert!(answers.iter().all(|answer| *answer == answers[0]), "{method} {path}: {answers:?}");
    }
}

#[tokio::test]
async fn hc_03_a_signature_is_over_what_the_body_says_and_not_over_how_it_is_written() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    for Endpoint { method, path, .. } in guarded().filter(|endpoint| endpoint.takes != Takes::Signature) {
        let uri = uri(&path, "!r:b.example");
        let content = json!({ "b": "\u{e9}", "a": [1, { "y": 2, "x": 3 }] });
        let authorization = signature(&a, &b, &a.context.signing_key, &method, &uri, Some(&content));
        let ask = async |body: &str| ask(&b, &method, &uri, Some(&authorization), Some(body.as_bytes())).await;
        for same in [
            r#"{"a":[1,{"x":3,"y":2}],"b":"\u00e9"}"#,
            " {\n\t\"b\" : \"\u{e9}\" , \"a\" : [ 1 , { \"y\" : 2 , \"x\" : 3 } ] }\r\n",
        ] {
            let (status, answer) = ask(same).await;
            assert!(status != 401 && status < 500, "{method} {path} {same}: {status} {answer}");
        }
        for other in [
            r#"{"a":[1,{"x":3,"y":2}],"b":"e"}"#,
            r#"{"a":[{"x":3,"y":2},1],"b":"\u00e9"}"#,
            r#"{"a":[1,{"x":3,"y":2}],"b":"\u00e9","c":null}"#,
            r#"{"a":[1,{"x":3,"y":2}]}"#,
        ] {
            assert_refused(&ask(other).await, UNAUTHORIZED, &format!("{method} {path} {other}"));
        }
    }
}

#[tokio::test]
async fn a_body_of_the_wrong_shape_is_bad_json() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    let log = b.create_room("public").await;
    let bot = b.user("bot");
    let room = NewRoom { creator: bot, version: RoomVersion::V12, initial_state: Vec::new() };
    let graph = b.dag.create_room(room).await.unwrap();
    let mut shapes: Vec<Value> = vec![json!([]), json!(["a.example", [], []]), json!(1), json!("{}"), json!(null)];
    // Every field that an endpoint reads, each of a kind that it is not.
    shapes.push(json!({
        "pdus": {}, "edus": 1, "event": [], "room_version": 1, "limit": "1", "since": 1, "device_keys": [],
        "one_time_keys": [], "server_keys": [], "earliest_events": 1, "latest_events": {}, "min_depth": "0", "type": 1, "content": [],
    }));
    for (Endpoint { method, path, takes, .. }, _) in with_bodies() {
        let rooms: &[&RoomId] = match path.contains("{room_id}") {
            // Asked of logs by nobody: the draft has no such thing.
            true if path.contains("get_missing_events") => &[&graph],
            true => &[&log, &graph],
            false => &[&log],
        };
        for room in rooms {
            let uri = uri(&path, room.as_str());
            for shape in &shapes {
                let answered = ask_signed(&a, &b, &method, &uri, Some(shape)).await;
                assert_refused(&answered, (400, "M_BAD_JSON"), &format!("{method} {uri} {shape}"));
            }
            // A key twice: parsers differ in which they take. Inside a transaction that is for each event.
            if takes != Takes::Transaction {
                let authorization = signature(&a, &b, &a.context.signing_key, &method, &uri, Some(&json!({ "a": 1 })));
                let answered = ask(&b, &method, &uri, Some(&authorization), Some(br#"{"a":1,"a":1}"#)).await;
                assert_refused(&answered, (400, "M_BAD_JSON"), &format!("{method} {uri} with a key twice"));
            }
        }
    }
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    for (Endpoint { method, path, .. }, limit) in with_bodies() {
        let uri = uri(&path, "!r:b.example");
        let authorization = signature(&a, &b, &a.context.signing_key, &method, &uri, Some(&json!({})));
        // By what its head says already.
        let answered = declare(&b, &method, &uri, Some(&authorization), limit + 1).await;
        assert_refused(&answered, (413, "M_TOO_LARGE"), &format!("{method} {path}"));
        // And when it does not say how much comes: the last piece is the one too many.
        let pieces = (0..=limit >> 16).map(|_| Ok::<_, std::io::Error>(vec![b' '; 1 << 16]));
        let endless = reqwest::Body::wrap_stream(futures::stream::iter(pieces));
        let request = http().request(method.clone(), b.url(&uri)).header("authorization", &authorization);
        let response = request.body(endless).send().await.unwrap();
        let answered = (response.status().as_u16(), response.json().await.unwrap());
        assert_refused(&answered, (413, "M_TOO_LARGE"), &format!("{method} {path} in pieces"));
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
async fn what_names_no_room_is_refused_by_its_id() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    for (version, field) in [("v1", "pdus"), ("v2", "failed_pdus")] {
        for event in [json!({ "type": "m.x", "content": {} }), json!({ "type": "m.x", "content": {}, "room_id": "r" })]
        {
            let uri = format!("/_matrix/federation/{version}/send/{}", event.as_object().unwrap().len());
            let body = json!({ "pdus": [event] });
            let call = isthmus::federation::Call::put(uri, body.as_object().unwrap().clone());
            let answer = a.context.client.call(&b.name, call, true).await.unwrap();
            let redaction = isthmus::event::Redaction::Draft;
            let id = format!("${}", isthmus::event::reference_hash(event.as_object().unwrap(), redaction));
            let problem = answer[field][&id]["error"].as_str().unwrap_or_default().to_owned();
            assert!(problem.starts_with("room_id"), "{answer:?}");
        }
    }
}
