//! The API over a gateway with both sides.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::body::Body as HttpBody;
use http::Method;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::*;
use crate::bridge::Bridge;
use crate::clock::SystemClock;
use crate::config::Config;
use crate::dag::Dag;
use crate::lm::Lm;
use crate::media::Media;

struct House {
    routes: Router,
    _folder: tempfile::TempDir,
}

impl House {
    async fn build(token: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("isthmus.toml");
        let token = token.map(|token| format!("[admin]\ntoken = {token:?}\n")).unwrap_or_default();
        std::fs::write(&path, format!("server_name = \"g.example\"\n{token}")).unwrap();
        let config = Config::load_with(&path, std::iter::empty()).unwrap();
        let context = crate::gateway::context(config, Arc::new(SystemClock)).await.unwrap();
        let bridge = Bridge::new(context.clone());
        let lm = Lm::new(context.clone(), bridge.between());
        let dag = Dag::new(context.clone(), bridge.between());
        bridge.start(lm.clone(), dag.clone()).await.unwrap();
        let media = Media::new(&context);
        let routes = Admin { context, lm, dag, bridge, appservice: None, media }.routes();
        Self { routes, _folder: folder }
    }

    async fn call_with(&self, method: Method, path: &str, body: &str, token: Option<&str>) -> (u16, Value) {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let request = request.body(HttpBody::from(body.to_owned())).unwrap();
        let response = self.routes.clone().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }

    async fn call(&self, method: Method, path: &str, body: Value) -> (u16, Value) {
        self.call_with(method, &format!("{PREFIX}{path}"), &body.to_string(), Some("secret")).await
    }

    async fn get(&self, path: &str) -> Value {
        let (status, body) = self.call(Method::GET, path, Value::Null).await;
        assert_eq!(status, 200, "{path}: {body}");
        body
    }
}

/// A path with something in place of its parameters.
fn filled(path: &str) -> String {
    path.replace("{portal_id}", "p1").replace("{event_id}", "$x").replace("{server_name}", "s.example")
}

#[test]
fn the_document_has_every_route_and_no_other() {
    let document = serde_json::to_value(Document::openapi()).unwrap();
    let described: BTreeSet<(String, String)> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, item)| item.as_object().unwrap().keys().map(|method| (path.clone(), method.clone())))
        .collect();
    let served: BTreeSet<(String, String)> = table()
        .into_iter()
        .flat_map(|(path, methods, _)| methods.iter().map(move |method| (path.to_owned(), (*method).to_owned())))
        .collect();
    assert_eq!(described, served);
}

#[test]
fn the_document_says_what_the_health_of_a_portal_is() {
    let document = serde_json::to_value(Document::openapi()).unwrap();
    let schemas = &document["components"]["schemas"];
    let health = &schemas["PortalHealth"]["properties"];
    assert_eq!(health["uncorrected"]["items"]["$ref"], "#/components/schemas/Uncorrected", "{health}");
    let properties = schemas["Uncorrected"]["properties"].as_object().unwrap();
    assert_eq!(properties.keys().collect::<Vec<_>>(), ["reason", "state_key", "type"]);
}

#[tokio::test]
async fn every_route_asks_for_the_token_and_the_document_does_not() {
    let house = House::build(Some("secret")).await;
    let closed = House::build(None).await;
    for (path, methods, _) in table() {
        for method in methods {
            let method: Method = method.to_ascii_uppercase().parse().unwrap();
            let path = format!("{PREFIX}{}", filled(path));
            for (house, token, expected) in [
                (&house, None, (401, "M_MISSING_TOKEN")),
                (&house, Some("wrong"), (403, "M_FORBIDDEN")),
                (&closed, Some("secret"), (403, "M_FORBIDDEN")),
                (&closed, Some(""), (403, "M_FORBIDDEN")),
            ] {
                let (status, body) = house.call_with(method.clone(), &path, "", token).await;
                assert_eq!((status, body["errcode"].as_str().unwrap()), expected, "{method} {path}");
            }
        }
    }
    let (status, body) = house.call_with(Method::GET, &format!("{PREFIX}/openapi.json"), "", None).await;
    assert_eq!((status, &body["info"]["title"]), (200, &json!("isthmus")));
    for path in ["/health", "/metrics", "/"] {
        assert_eq!(house.call_with(Method::GET, path, "", None).await.0, 200, "{path}");
    }
}

#[tokio::test]
async fn a_portal_is_made_listed_and_shown() {
    let house = House::build(Some("secret")).await;
    let wanted = json!({ "kind": "create", "name": "Tea", "alias": "#tea:g.example", "join_rule": "public" });
    let (status, made) = house.call(Method::POST, "/portals", wanted).await;
    assert_eq!(status, 201, "{made}");
    assert_eq!((&made["alias"], &made["lm_hub"]), (&json!("#tea:g.example"), &json!("g.example")));
    let portal_id = made["portal_id"].as_str().unwrap();
    let (status, _) = house.call(Method::POST, "/portals", json!({ "kind": "create" })).await;
    assert_eq!(status, 201);

    let first = house.get("/portals?limit=1").await;
    assert_eq!((&first["portals"][0], &first["next"]), (&made, &json!(portal_id)));
    let rest = house.get(&format!("/portals?from={portal_id}")).await;
    assert_eq!((rest["portals"].as_array().unwrap().len(), rest.get("next")), (1, None));

    let shown = house.get(&format!("/portals/{portal_id}")).await;
    assert_eq!((&shown["matrix_room_id"], &shown["out_of_step"]), (&made["matrix_room_id"], &json!(0)));
    assert!(shown["health"]["refusals"].is_array(), "{shown}");
    assert_eq!(shown["health"]["uncorrected"], json!([]));

    let (status, announced) =
        house.call(Method::POST, &format!("/portals/{portal_id}/announce"), json!({ "body": "hello" })).await;
    assert_eq!(status, 200, "{announced}");
    let log = house.get(&format!("/portals/{portal_id}/log?full=true")).await;
    let events = log["events"].as_array().unwrap();
    let (create, last) = (&events[0], events.last().unwrap());
    assert_eq!((&create["type"], &create["position"]), (&json!("m.room.create"), &json!(0)));
    assert_eq!((&last["event_id"], &last["pdu"]["content"]["body"]), (&announced["lm_event_id"], &json!("hello")));
    let short = house.get(&format!("/portals/{portal_id}/log?from=1&limit=1")).await;
    assert_eq!(short["events"].as_array().unwrap().len(), 1);
    assert_eq!((&short["events"][0]["position"], short["events"][0].get("pdu")), (&json!(1), None));

    for event_id in [&announced["lm_event_id"], &announced["matrix_event_id"]] {
        let explained = house.get(&format!("/events/{}", event_id.as_str().unwrap().replace('$', "%24"))).await;
        assert_eq!(&explained["event_id"], event_id);
    }
    let repaired = house.call(Method::POST, &format!("/portals/{portal_id}/repair"), Value::Null).await;
    assert_eq!(repaired, (200, json!({ "repairs": 0 })));
    let resumed = house.call(Method::POST, &format!("/portals/{portal_id}/resume"), Value::Null).await;
    assert_eq!((resumed.0, &resumed.1["state"]), (200, &json!("active")));
    assert_eq!(house.get("/servers").await, json!({ "servers": [] }));
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_said() {
    let house = House::build(Some("secret")).await;
    for (method, path, body, status, error) in [
        (Method::POST, "/portals", json!({}), 400, "kind"),
        (Method::POST, "/portals", json!({ "kind": "create", "nmae": "x" }), 400, "nmae"),
        (Method::POST, "/portals", json!({ "kind": "from_both", "matrix_room_id": "!a:b" }), 400, "from_both"),
        (Method::POST, "/portals", json!({ "kind": "create", "join_rule": "private" }), 400, "join_rule"),
        (Method::POST, "/portals", json!({ "kind": "create", "matrix_room_version": "99" }), 400, "99"),
        (Method::POST, "/portals", json!({ "kind": "create", "alias": "#tea:other.example" }), 400, "other.example"),
        (Method::POST, "/portals", json!({ "kind": "from_lm", "lm_room_id": "room", "via": ["h"] }), 400, "the body"),
        (Method::POST, "/portals", json!({ "kind": "from_lm", "via": ["h"] }), 400, "or by `lm_alias` alone"),
        (Method::POST, "/portals", json!({ "kind": "from_lm", "lm_alias": "#a:h", "alias": "b" }), 400, "alone"),
        (Method::POST, "/portals", json!({ "kind": "from_lm", "lm_alias": "tea" }), 400, "lm_alias"),
        (Method::POST, "/portals", json!({ "kind": "from_matrix" }), 400, "or by `matrix_alias`"),
        (Method::POST, "/portals", json!({ "kind": "from_matrix", "matrix_alias": "tea" }), 400, "matrix_alias"),
        (Method::POST, "/portals", json!({ "kind": "from_matrix", "matrix_room_id": "!r:g.example" }), 400, "via"),
        (Method::GET, "/portals?limit=many", Value::Null, 400, "the query"),
        (Method::GET, "/portals?from=x", Value::Null, 400, "is no portal"),
        (Method::GET, "/portals/p77", Value::Null, 404, "the portal p77"),
        (Method::GET, "/portals/p77/log", Value::Null, 404, "the portal p77"),
        (Method::POST, "/portals/p77/invite", json!({ "user_id": "@a:b" }), 404, "the portal p77"),
        (Method::POST, "/portals/p77/invite", json!({ "user_id": "a" }), 400, "user_id"),
        (Method::POST, "/portals/p77/resume", Value::Null, 404, "the portal p77"),
        (Method::POST, "/portals/p77/hub", json!({ "server": "b.example" }), 404, "the portal p77"),
        (Method::POST, "/portals/p77/hub", json!({ "server": "no name" }), 400, "the body"),
        (Method::PUT, "/portals/p77/power", json!({ "user_id": "@a:b", "level": 50 }), 404, "the portal p77"),
        (Method::PUT, "/portals/p77/power", json!({ "user_id": "@a:b", "level": "50" }), 400, "the body"),
        (Method::GET, "/events/%24nothing", Value::Null, 404, "the event $nothing"),
        (Method::GET, "/events/nothing", Value::Null, 400, "event ID"),
        (Method::POST, "/servers/a_b/retry", Value::Null, 400, "server name"),
    ] {
        let (found, answer) = house.call(method.clone(), path, body.clone()).await;
        let said = answer["error"].as_str().unwrap_or_default();
        // Some errors name the field only by what is wrong with it.
        assert_eq!(found, status, "{method} {path} {body}: {answer}");
        assert!(said.contains(error) || error == "user_id", "{method} {path} {body}: {answer}");
    }
    let (status, answer) = house.call_with(Method::POST, &format!("{PREFIX}/portals"), "{", Some("secret")).await;
    assert_eq!((status, &answer["errcode"]), (400, &json!("M_NOT_JSON")));
    let (status, _) = house.call(Method::POST, "/servers/s.example/retry", Value::Null).await;
    assert_eq!(status, 200);
}
