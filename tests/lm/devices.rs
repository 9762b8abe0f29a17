//! Devices and their keys, as long as nobody has any and with something that keeps them.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use http::Method;
use isthmus::event::Object;
use isthmus::gateway::{Federation, federation_routes};
use isthmus::refusal::Refusal;
use isthmus::seam::{Device, Devices};
use ruma::UserId;
use serde_json::{Value, json};

use super::http::{ask_signed, signature};
use super::world::{Node, World};

const ALGORITHM: &str = "m.mls.v1.key_package.dhkemx25519-aes128gcm-sha256-ed25519";
const V1: &str = "/_matrix/federation/v1";
const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";

#[tokio::test]
async fn without_a_store_nobody_has_devices() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    for at in [V1, UNSTABLE] {
        for user in ["@u:b.example", "@u:a.example", "@u:elsewhere.example"] {
            let uri = format!("{at}/user/{user}/device/ABCDEF");
            let (status, answer) = ask_signed(&a, &b, &Method::GET, &uri, None).await;
            assert_eq!((status, answer["errcode"].as_str().unwrap()), (404, "M_NOT_FOUND"), "{uri}");
        }
    }
    let claim = json!({ "one_time_keys": { "@u:b.example": { "ABCDEF": ALGORITHM } } });
    let (status, answer) = ask_signed(&a, &b, &Method::POST, &format!("{V1}/user/keys/claim"), Some(&claim)).await;
    assert_eq!((status, answer), (200, json!({ "one_time_keys": {} })));
}

/// `@u:b.example` has the device `ABCDEF` with one key.
struct Shelf {
    keys: Mutex<Vec<&'static str>>,
}

fn device() -> Object {
    json!({ "device_id": "ABCDEF", "user_id": "@u:b.example", "algorithms": [], "keys": {}, "signatures": {} })
        .as_object()
        .unwrap()
        .clone()
}

#[async_trait]
impl Devices for Shelf {
    async fn device(&self, user: &UserId, device_id: &str) -> Result<Option<Device>, Refusal> {
        Ok(self.devices(user).await?.into_iter().find(|device| device.device_id == device_id))
    }

    async fn devices(&self, user: &UserId) -> Result<Vec<Device>, Refusal> {
        assert_eq!(user.server_name(), "b.example", "nobody is asked about others' users");
        let has = user == "@u:b.example";
        Ok(has.then(|| Device { device_id: "ABCDEF".to_owned(), object: device() }).into_iter().collect())
    }

    async fn claim(&self, user: &UserId, device_id: &str, algorithm: &str) -> Result<Option<(String, Value)>, Refusal> {
        if self.device(user, device_id).await?.is_none() || algorithm != ALGORITHM {
            return Ok(None);
        }
        Ok(self.keys.lock().unwrap().pop().map(|key| (algorithm.to_owned(), json!(key))))
    }
}

/// Asks the server that has devices.
async fn ask(a: &Node, b: &Node, at: &str, method: Method, uri: &str, body: Option<Value>) -> (u16, Value) {
    let authorization = signature(a, b, &a.context.signing_key, &method, uri, body.as_ref());
    let mut request = super::http::http().request(method, format!("{at}{uri}")).header("authorization", authorization);
    if let Some(body) = body {
        request = request.json(&body);
    }
    let response = request.send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

#[tokio::test]
async fn what_keeps_devices_answers_for_the_gateways_own_users_alone() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    let shelf = Arc::new(Shelf { keys: Mutex::new(vec!["last", "first"]) });
    let federation = Federation::new(b.context.clone(), b.lm.clone(), b.dag.clone(), b.watcher.clone());
    let routes = federation_routes(Federation { devices: shelf, ..federation });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = format!("http://{}", listener.local_addr().unwrap());
    let serving = tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
    let ask = async |method, uri: &str, body| ask(&a, &b, &at, method, uri, body).await;

    for prefix in [V1, UNSTABLE] {
        let answered = ask(Method::GET, &format!("{prefix}/user/@u:b.example/device/ABCDEF"), None).await;
        assert_eq!(answered, (200, Value::Object(device())));
    }
    for (user, id) in [("@u:b.example", "OTHER"), ("@v:b.example", "ABCDEF"), ("@u:a.example", "ABCDEF")] {
        assert_eq!(ask(Method::GET, &format!("{V1}/user/{user}/device/{id}"), None).await.0, 404);
    }
    let (_, all) = ask(Method::GET, &format!("{V1}/user/devices/@u:b.example"), None).await;
    assert_eq!(all["devices"][0]["keys"], Value::Object(device()));
    let query = json!({ "device_keys": { "@u:b.example": [], "@v:b.example": [], "@u:a.example": [], "x": [] } });
    let (_, found) = ask(Method::POST, &format!("{V1}/user/keys/query"), Some(query)).await;
    assert_eq!(found, json!({ "device_keys": { "@u:b.example": { "ABCDEF": device() } } }));

    // A key is given once; whoever and whatever is not there is left out.
    let uri = format!("{V1}/user/keys/claim");
    let claim = json!({ "one_time_keys": {
        "@u:b.example": { "ABCDEF": ALGORITHM, "OTHER": ALGORITHM },
        "@v:b.example": { "ABCDEF": ALGORITHM },
        "@u:a.example": { "ABCDEF": ALGORITHM },
        "nobody": { "ABCDEF": ALGORITHM },
    } });
    for key in ["first", "last"] {
        let (_, answer) = ask(Method::POST, &uri, Some(claim.clone())).await;
        assert_eq!(answer, json!({ "one_time_keys": { "@u:b.example": { "ABCDEF": { ALGORITHM: key } } } }));
    }
    let (_, answer) = ask(Method::POST, &uri, Some(claim)).await;
    assert_eq!(answer, json!({ "one_time_keys": {} }));
    for bad in [
        json!({}),
        json!({ "one_time_keys": [] }),
        json!({ "one_time_keys": { "@u:b.example": [] } }),
        json!({ "one_time_keys": { "@u:b.example": { "ABCDEF": 7 } } }),
    ] {
        let (status, answer) = ask(Method::POST, &uri, Some(bad.clone())).await;
        assert_eq!((status, answer["errcode"].as_str().unwrap()), (400, "M_BAD_JSON"), "{bad}");
    }
    serving.abort();
}
