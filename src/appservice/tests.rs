//! The appservice between a bridge and a homeserver that are both made for the test.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use http::{Method, Request, StatusCode};
use ruma::{EventId, OwnedRoomId, RoomId, UserId, owned_room_id, user_id};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::*;
use crate::bridge::{Explanation, Health, Listed, Members, Portal, PortalKind, PortalState, Waiting};
use crate::clock::ManualClock;
use crate::refusal::Refusal;
use crate::seam::AliasTarget;

/// A homeserver as far as the appservice knows it.
#[derive(Default)]
struct FakeHomeserver {
    known_rooms: BTreeSet<String>,
    aliases: BTreeMap<String, String>,
    said: Vec<(String, String, String)>,
    joined: Vec<String>,
    left: Vec<String>,
    invited: Vec<String>,
    /// Rooms in the lists of the directory.
    listed: BTreeSet<(String, String)>,
    fails: Option<StatusCode>,
    /// What it answers who gives an alias.
    aliases_fail: Option<StatusCode>,
}

type Shared = Arc<Mutex<FakeHomeserver>>;
type Reply = (StatusCode, Json<Value>);

fn reply(status: u16, body: Value) -> Reply {
    (StatusCode::from_u16(status).unwrap(), Json(body))
}

async fn put_alias(State(fake): State<Shared>, Path(alias): Path<String>, Json(body): Json<Value>) -> Reply {
    let mut fake = fake.lock().unwrap();
    let room_id = body["room_id"].as_str().unwrap().to_owned();
    assert_eq!(body["servers"], json!(["g.example"]));
    if let Some(status) = fake.aliases_fail {
        return (status, Json(json!({ "errcode": "M_UNKNOWN" })));
    }
    if !fake.known_rooms.contains(&room_id) {
        return reply(400, json!({ "errcode": "M_UNKNOWN", "error": "Room does not exist" }));
    }
    if fake.aliases.contains_key(&alias) {
        return reply(409, json!({ "errcode": "M_UNKNOWN", "error": "Room alias already exists" }));
    }
    fake.aliases.insert(alias, room_id);
    reply(200, json!({}))
}

async fn get_alias(State(fake): State<Shared>, Path(alias): Path<String>) -> Reply {
    reply(200, json!({ "room_id": fake.lock().unwrap().aliases[&alias], "servers": ["g.example"] }))
}

async fn delete_alias(State(fake): State<Shared>, Path(alias): Path<String>) -> Reply {
    fake.lock().unwrap().aliases.remove(&alias);
    reply(200, json!({}))
}

async fn list(
    State(fake): State<Shared>,
    Path((list, room_id)): Path<(String, String)>,
    Json(body): Json<Value>,
) -> Reply {
    let mut fake = fake.lock().unwrap();
    match body["visibility"].as_str() {
        Some("public") => fake.listed.insert((list, room_id)),
        Some("private") => fake.listed.remove(&(list, room_id)),
        _ => panic!("{body}"),
    };
    reply(200, json!({}))
}

async fn join(State(fake): State<Shared>, Path(room_id): Path<String>) -> Reply {
    fake.lock().unwrap().joined.push(room_id);
    reply(200, json!({}))
}

async fn leave(State(fake): State<Shared>, Path(room_id): Path<String>) -> Reply {
    fake.lock().unwrap().left.push(room_id);
    reply(200, json!({}))
}

async fn invite(State(fake): State<Shared>, Path(room_id): Path<String>, Json(body): Json<Value>) -> Reply {
    fake.lock().unwrap().invited.push(format!("{} {room_id}", body["user_id"].as_str().unwrap()));
    reply(200, json!({}))
}

async fn say(
    State(fake): State<Shared>,
    Path((room_id, txn_id)): Path<(String, String)>,
    Json(body): Json<Value>,
) -> Reply {
    let mut fake = fake.lock().unwrap();
    if let Some(status) = fake.fails {
        return (status, Json(json!({ "errcode": "M_FORBIDDEN" })));
    }
    fake.said.push((room_id, txn_id, body["body"].as_str().unwrap().to_owned()));
    reply(200, json!({ "event_id": "$x" }))
}

/// A bridge as far as the appservice knows it.
struct FakePortals {
    homeserver: Shared,
    room_id: Mutex<OwnedRoomId>,
    /// Where aliases lead without anything being made.
    known: Mutex<Option<OwnedRoomId>>,
    resolved: AtomicUsize,
    invited: Mutex<Vec<String>>,
    withdrawn: Mutex<Vec<String>>,
    bridged: Mutex<Vec<String>>,
    guests: Mutex<Vec<String>>,
    is_public: AtomicBool,
    ended: Mutex<Vec<String>>,
    gate: tokio::sync::Semaphore,
}

#[async_trait]
impl Portals for FakePortals {
    async fn resolve_alias(&self, localpart: &str) -> Result<AliasTarget, Refusal> {
        self.resolved.fetch_add(1, Ordering::SeqCst);
        self.gate.acquire().await.unwrap().forget();
        self.gate.add_permits(1);
        if localpart.starts_with("lm_no_") {
            return Err(Refusal::Policy("hub.example is not in access.hubs".to_owned()));
        }
        let room_id = self.room_id.lock().unwrap().clone();
        Ok(AliasTarget { room_id, servers: vec!["g.example".try_into().unwrap()] })
    }

    fn known_alias(&self, _localpart: &str) -> Option<AliasTarget> {
        let room_id = self.known.lock().unwrap().clone()?;
        Some(AliasTarget { room_id, servers: vec!["g.example".try_into().unwrap()] })
    }

    async fn why_not(&self, localpart: &str) -> Option<Refusal> {
        localpart.starts_with("lm_no_").then(|| Refusal::Policy("hub.example is not in access.hubs".to_owned()))
    }

    async fn invite(&self, room_id: &RoomId, user_id: &UserId) -> Result<(), Refusal> {
        assert_eq!(user_id, "@_isthmus:hs.example");
        self.homeserver.lock().unwrap().known_rooms.insert(room_id.to_string());
        self.invited.lock().unwrap().push(room_id.to_string());
        Ok(())
    }

    async fn withdraw_invite(&self, room_id: &RoomId, _user_id: &UserId) -> Result<(), Refusal> {
        self.withdrawn.lock().unwrap().push(room_id.to_string());
        Ok(())
    }

    async fn invite_if_public(&self, room_id: &RoomId, user_id: &UserId) -> Result<bool, Refusal> {
        self.guests.lock().unwrap().push(format!("{user_id} {room_id}"));
        Ok(self.is_public.load(Ordering::SeqCst))
    }

    async fn expose(&self, room_id: &RoomId, via: &ruma::ServerName) -> Result<Arc<Portal>, Refusal> {
        assert_eq!(via, "hs.example");
        if room_id == "!secret:hs.example" {
            return Err(Refusal::Encryption("megolm".to_owned()));
        }
        self.bridged.lock().unwrap().push(room_id.to_string());
        Ok(self.first(1).await?.remove(0))
    }

    async fn invite_into(&self, portal_id: &str, _user_id: &UserId) -> Result<(), Refusal> {
        match portal_id {
            "p1" => Ok(()),
            _ => Err(Refusal::NotFound(format!("portal {portal_id}"))),
        }
    }

    async fn listed(&self, _limit: usize) -> Result<Vec<Listed>, Refusal> {
        let room = |alias: Option<&str>, members, join_rule: &str| Listed {
            room_id: "!r:g.example".to_owned(),
            alias: alias.map(str::to_owned),
            name: Some("Tea".to_owned()),
            members,
            join_rule: Some(join_rule.to_owned()),
        };
        Ok(vec![room(Some("#tea:g.example"), 1, "public"), room(None, 7, "knock")])
    }

    async fn show(&self, portal_id: &str) -> Result<(Arc<Portal>, Health), Refusal> {
        let portal = self.first(1).await?.pop().filter(|portal| portal.portal_id == portal_id);
        let portal = portal.ok_or_else(|| Refusal::NotFound(format!("the portal {portal_id}")))?;
        let waiting = |side, count| Waiting { side, count, since: None };
        let health = Health {
            waiting: [waiting("matrix", 3), waiting("lm", 0)],
            members: Members { matrix: vec![user_id!("@a:hs.example").to_owned()], ..Members::default() },
            ..Health::default()
        };
        Ok((portal, health))
    }

    async fn of_room(&self, room_id: &RoomId) -> Result<String, Refusal> {
        Err(Refusal::UnknownRoom(room_id.to_string()))
    }

    async fn end(&self, portal_id: &str, by: &UserId) -> Result<(), Refusal> {
        self.ended.lock().unwrap().push(format!("{portal_id} by {by}"));
        Ok(())
    }

    async fn explain(&self, event_id: &EventId) -> Result<Option<Explanation>, Refusal> {
        Ok((event_id == "$known").then(|| Explanation {
            event_id: event_id.to_owned(),
            side: "matrix",
            room_id: owned_room_id!("!r:g.example"),
            sender: user_id!("@carol:hs.example").to_owned(),
            kind: "m.room.message".to_owned(),
            portal_id: Some("p1".to_owned()),
            status: "crossed",
            across: Some("$there".try_into().unwrap()),
            note: None,
            refusal: None,
            waiting_since: None,
        }))
    }

    async fn ghost_of(&self, user: &UserId) -> Result<Option<OwnedUserId>, Refusal> {
        Ok((user == "@bob:hub.example").then(|| user_id!("@lm_bob_hub.example:g.example").to_owned()))
    }

    async fn user_behind(&self, ghost: &UserId) -> Result<Option<OwnedUserId>, Refusal> {
        Ok((ghost == "@lm_bob_hub.example:g.example").then(|| user_id!("@bob:hub.example").to_owned()))
    }

    async fn first(&self, limit: usize) -> Result<Vec<Arc<Portal>>, Refusal> {
        let portal = Portal {
            portal_id: "p1".to_owned(),
            kind: PortalKind::FromLm,
            state: PortalState::Active,
            matrix_room_id: owned_room_id!("!r:g.example"),
            lm_room_id: owned_room_id!("!l:hub.example"),
            lm_hub: "hub.example".try_into().unwrap(),
            alias: None,
            reason: None,
            ghosts_alone: false,
        };
        let portal = Arc::new(portal);
        Ok(vec![portal; limit.min(2)])
    }
}

/// A gateway that is doing well.
struct Fine;

#[async_trait]
impl Summary for Fine {
    async fn summary(&self) -> String {
        "everything works".to_owned()
    }
}

struct House {
    homeserver: Shared,
    portals: Arc<FakePortals>,
    clock: Arc<ManualClock>,
    store: Store,
    config: config::Config,
    appservice: Appservice,
    _folder: tempfile::TempDir,
}

impl House {
    async fn build() -> Self {
        let homeserver = Shared::default();
        let directory = "/_matrix/client/v3/directory/room/{alias}";
        let router = Router::new()
            .route(directory, put(put_alias).get(get_alias).delete(delete_alias))
            .route("/_matrix/client/v3/directory/list/appservice/{list}/{room_id}", put(list))
            .route("/_matrix/client/v3/rooms/{room_id}/join", post(join))
            .route("/_matrix/client/v3/rooms/{room_id}/invite", post(invite))
            .route("/_matrix/client/v3/rooms/{room_id}/leave", post(leave))
            .route("/_matrix/client/v3/rooms/{room_id}/send/m.room.message/{txn_id}", put(say))
            .route("/_matrix/client/versions", get(|| async { reply(200, json!({ "versions": [] })) }))
            .with_state(homeserver.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("isthmus.toml");
        let text = format!(
            "server_name = \"g.example\"\n[access]\nadmins = [\"@admin:hs.example\"]\n[appservice]\n\
             homeserver_url = \"http://{address}\"\nhomeserver_name = \"hs.example\"\nregistration = \"r.yaml\"\n"
        );
        std::fs::write(&path, text).unwrap();
        let config = config::Config::load_with(&path, std::iter::empty()).unwrap();
        register(&config, None).unwrap();
        let store = Store::open(&config.database.url).await.unwrap();
        let portals = Arc::new(FakePortals {
            homeserver: homeserver.clone(),
            room_id: Mutex::new(owned_room_id!("!room:g.example")),
            known: Mutex::default(),
            resolved: AtomicUsize::default(),
            invited: Mutex::default(),
            withdrawn: Mutex::default(),
            bridged: Mutex::default(),
            guests: Mutex::default(),
            is_public: AtomicBool::new(true),
            ended: Mutex::default(),
            gate: tokio::sync::Semaphore::new(1),
        });
        let clock = ManualClock::new(1_000_000);
        let appservice = Self::over(&config, &store, &clock, &portals).await;
        Self { homeserver, portals, clock, store, config, appservice, _folder: folder }
    }

    async fn over(
        config: &config::Config,
        store: &Store,
        clock: &Arc<ManualClock>,
        portals: &Arc<FakePortals>,
    ) -> Appservice {
        let base = Base { store: store.clone(), clock: clock.clone() };
        Appservice::over(base, portals.clone(), config.appservice.as_ref().unwrap(), config).await.unwrap()
    }

    /// As after a restart: what was in memory is gone.
    async fn restart(&mut self) {
        self.appservice = Self::over(&self.config, &self.store, &self.clock, &self.portals).await;
    }

    async fn call_with(&self, method: Method, path: &str, body: &str, token: Option<&str>) -> (u16, Value) {
        let mut request = Request::builder().method(method).uri(format!("/_matrix/app/v1{path}"));
        if let Some(token) = token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let request = request.body(Body::from(body.to_owned())).unwrap();
        let response = self.appservice.routes().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }

    async fn call(&self, method: Method, path: &str, body: Value) -> (u16, Value) {
        let token = self.appservice.inner.registration.hs_token.clone();
        self.call_with(method, path, &body.to_string(), Some(token.expose())).await
    }

    async fn transaction(&self, id: u32, events: &[Value]) {
        let path = format!("/transactions/{id}");
        assert_eq!(self.call(Method::PUT, &path, json!({ "events": events })).await, (200, json!({})));
    }

    async fn waiting(&self) -> i64 {
        rows::waiting(&self.store).await.unwrap().0
    }

    async fn work(&self) -> Duration {
        self.appservice.worker(Arc::new(Fine)).round().await.unwrap()
    }

    async fn query(&self, alias: &str) -> (u16, Value) {
        let alias = alias.replace('#', "%23").replace(':', "%3A");
        self.call(Method::GET, &format!("/rooms/{alias}"), Value::Null).await
    }
}

impl House {
    /// Everything that the bot said.
    fn answers(&self) -> Vec<String> {
        self.homeserver.lock().unwrap().said.iter().map(|(_, _, body)| body.clone()).collect()
    }

    /// Has `user` invite the bot into a direct chat.
    async fn chat_with(&self, user: &str) {
        let mut invite = member("$invite", "!direct:hs.example", user, BOT, "invite");
        invite["content"]["is_direct"] = json!(true);
        self.transaction(1, &[invite]).await;
        self.work().await;
    }

    /// What the bot answers in that chat.
    async fn ask(&self, user: &str, body: &str) -> String {
        let mut event = said(&format!("${body}"), body);
        event["room_id"] = json!("!direct:hs.example");
        event["sender"] = json!(user);
        let before = self.answers().len();
        self.transaction(u32::try_from(before).unwrap() + 100, &[event]).await;
        self.work().await;
        let answers = self.answers();
        assert_eq!(answers.len(), before + 1, "{body}: one answer");
        answers[before].clone()
    }
}

fn member(id: &str, room: &str, sender: &str, target: &str, membership: &str) -> Value {
    json!({ "type": "m.room.member", "event_id": id, "room_id": room, "sender": sender, "state_key": target,
            "content": { "membership": membership } })
}

fn said(id: &str, body: &str) -> Value {
    json!({ "type": "m.room.message", "event_id": id, "room_id": "!chat:hs.example", "sender": "@alice:hs.example",
            "content": { "msgtype": "m.text", "body": body } })
}

const BOT: &str = "@_isthmus:hs.example";
const ALIAS: &str = "#lm_tea_hub.example:hs.example";

const ENDPOINTS: [(Method, &str); 9] = [
    (Method::PUT, "/transactions/1"),
    (Method::GET, "/users/@x:y"),
    (Method::GET, "/rooms/%23x:y"),
    (Method::POST, "/ping"),
    (Method::GET, "/thirdparty/protocol/linearized"),
    (Method::GET, "/thirdparty/location/linearized"),
    (Method::GET, "/thirdparty/location"),
    (Method::GET, "/thirdparty/user/linearized"),
    (Method::GET, "/thirdparty/user"),
];

#[tokio::test]
async fn hc_12_every_endpoint_asks_for_the_token() {
    let house = House::build().await;
    for (method, path) in ENDPOINTS {
        let (status, body) = house.call_with(method.clone(), path, "{}", None).await;
        assert_eq!((status, body["errcode"].as_str()), (401, Some("M_UNAUTHORIZED")), "{path}");
        let (status, body) = house.call_with(method.clone(), path, "{}", Some("wrong")).await;
        assert_eq!((status, body["errcode"].as_str()), (403, Some("M_FORBIDDEN")), "{path}");
        // Where it ends up in logs it does not count.
        let in_query = format!("{path}?access_token={}", house.appservice.inner.registration.hs_token.expose());
        let (status, body) = house.call_with(method, &in_query, "{}", None).await;
        assert_eq!((status, body["errcode"].as_str()), (401, Some("M_UNAUTHORIZED")), "{path}");
    }
    assert_eq!(house.waiting().await, 0);
    assert_eq!(house.portals.resolved.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn hc_62_a_transaction_is_kept_before_it_is_acknowledged_and_once_across_restarts() {
    let mut house = House::build().await;
    let events = [member("$1", "!r:g.example", "@a:hs.example", "@a:hs.example", "join")];
    house.transaction(1, &events).await;
    assert_eq!(house.waiting().await, 1);
    house.restart().await;
    house.transaction(1, &events).await;
    assert_eq!(house.waiting().await, 1);
    house.transaction(2, &events).await;
    assert_eq!(house.waiting().await, 2);
}

#[tokio::test]
async fn a_bad_event_stops_no_other() {
    let house = House::build().await;
    let good = member("$2", "!r:g.example", "@a:hs.example", "@a:hs.example", "join");
    let bad = [
        json!(null),
        json!([]),
        json!({ "type": "m.room.member" }),
        member("$1", "no room", "@a:hs.example", "@a:hs.example", "join"),
        member("$1", "!r:g.example", "nobody", "@a:hs.example", "join"),
        json!({ "type": "m.room.member", "event_id": "$1", "room_id": "!r:g", "sender": "@a:hs.example", "state_key": 7 }),
        json!({ "type": "m.room.member", "event_id": "$1", "room_id": "!r:g", "sender": "@a:b", "state_key": "@a:b",
                "content": "x" }),
    ];
    for bad in bad {
        house.transaction(1, &[bad, good.clone()]).await;
    }
    assert_eq!(house.waiting().await, 7);
}

#[tokio::test]
async fn a_request_out_of_shape_is_refused_by_its_name() {
    let house = House::build().await;
    let token = house.appservice.inner.registration.hs_token.clone();
    let large = format!("{{\"events\":[]{}}}", " ".repeat(32 << 20));
    for (body, status, errcode) in [
        ("", 400, "M_NOT_JSON"),
        ("no JSON", 400, "M_NOT_JSON"),
        ("{\"events\":[}", 400, "M_NOT_JSON"),
        ("1", 400, "M_BAD_JSON"),
        ("{\"events\":{}}", 400, "M_BAD_JSON"),
        (&large, 413, "M_TOO_LARGE"),
    ] {
        let (answered, error) = house.call_with(Method::PUT, "/transactions/3", body, Some(token.expose())).await;
        let shown: String = body.chars().take(20).collect();
        assert_eq!((answered, error["errcode"].as_str()), (status, Some(errcode)), "{shown:?}: {error}");
    }
    for (method, path) in ENDPOINTS {
        for other in [Method::GET, Method::PUT, Method::POST, Method::DELETE] {
            if other != method {
                let (status, error) = house.call(other.clone(), path, Value::Null).await;
                assert_eq!((status, error["errcode"].as_str()), (405, Some("M_UNRECOGNIZED")), "{other} {path}");
            }
        }
    }
    assert_eq!(house.waiting().await, 0);
}

#[tokio::test]
async fn hc_13_no_user_but_the_bot_is_known_to_the_appservice() {
    let house = House::build().await;
    // Ghosts are users of the gateway's own name; what the homeserver asks about is its own, or another's.
    for user in ["@other:hs.example", "@lm_bob_hub.example:hs.example", "@_isthmus:elsewhere.example", "@x", "%00"] {
        let (status, error) = house.call(Method::GET, &format!("/users/{user}"), Value::Null).await;
        assert_eq!((status, error["errcode"].as_str()), (404, Some("M_NOT_FOUND")), "{user}");
    }
    assert_eq!(house.call(Method::GET, &format!("/users/{BOT}"), Value::Null).await, (200, json!({})));
}

#[tokio::test]
async fn an_alias_of_an_unknown_room_is_published_after_an_invite_which_the_first_local_join_ends() {
    let house = House::build().await;
    assert_eq!(house.query(ALIAS).await, (200, json!({})));
    assert_eq!(house.homeserver.lock().unwrap().aliases[ALIAS], "!room:g.example");
    assert_eq!(*house.portals.invited.lock().unwrap(), ["!room:g.example"]);

    let join = |id, user| member(id, "!room:g.example", user, user, "join");
    house.transaction(1, &[member("$0", "!room:g.example", "@isthmus:g.example", BOT, "invite")]).await;
    house.transaction(2, &[join("$1", "@x:elsewhere.example")]).await;
    house.work().await;
    assert!(house.portals.withdrawn.lock().unwrap().is_empty());
    assert!(house.homeserver.lock().unwrap().joined.is_empty(), "the bot stays out of portals");
    house.transaction(3, &[join("$2", "@a:hs.example"), join("$3", "@b:hs.example")]).await;
    house.work().await;
    assert_eq!(*house.portals.withdrawn.lock().unwrap(), ["!room:g.example"], "once");

    // The same again: the alias is there and leads to the room.
    assert_eq!(house.query(ALIAS).await, (200, json!({})));
    assert_eq!(house.portals.invited.lock().unwrap().len(), 1);
    // The portal has ended and was made again.
    *house.portals.room_id.lock().unwrap() = owned_room_id!("!new:g.example");
    house.homeserver.lock().unwrap().known_rooms.insert("!new:g.example".to_owned());
    assert_eq!(house.query(ALIAS).await, (200, json!({})));
    assert_eq!(house.homeserver.lock().unwrap().aliases[ALIAS], "!new:g.example");
}

#[tokio::test]
async fn an_alias_goes_with_its_portal() {
    let house = House::build().await;
    assert_eq!(house.query(ALIAS).await, (200, json!({})));
    house.work().await;
    assert_eq!(house.homeserver.lock().unwrap().aliases.len(), 1);
    let end =
        house.store.write(|tx| Box::pin(async move { rows::end_room(tx, &owned_room_id!("!room:g.example")).await }));
    end.await.unwrap();
    house.work().await;
    assert!(house.homeserver.lock().unwrap().aliases.is_empty());
    assert_eq!(rows::ended_aliases(&house.store).await.unwrap(), []);
    // Whoever asks again gets it again.
    assert_eq!(house.query(ALIAS).await, (200, json!({})));
    house.work().await;
    assert_eq!(house.homeserver.lock().unwrap().aliases.len(), 1);
}

#[tokio::test]
async fn an_alias_follows_its_room_when_that_is_replaced() {
    let house = House::build().await;
    assert_eq!(house.query(ALIAS).await, (200, json!({})));
    let listed = |room: &str| BTreeSet::from([("hub.example".to_owned(), room.to_owned())]);
    assert_eq!(house.homeserver.lock().unwrap().listed, listed("!room:g.example"));
    *house.portals.known.lock().unwrap() = Some(owned_room_id!("!next:g.example"));
    let end =
        house.store.write(|tx| Box::pin(async move { rows::end_room(tx, &owned_room_id!("!room:g.example")).await }));
    end.await.unwrap();
    // The homeserver is away at first.
    let is_away = Some(StatusCode::BAD_GATEWAY);
    house.homeserver.lock().unwrap().aliases_fail = is_away;
    house.work().await;
    assert_eq!(rows::ended_aliases(&house.store).await.unwrap().len(), 1, "it is tried again");
    house.homeserver.lock().unwrap().aliases_fail = None;
    house.work().await;
    assert_eq!(house.homeserver.lock().unwrap().aliases[ALIAS], "!next:g.example");
    assert_eq!(house.homeserver.lock().unwrap().listed, listed("!next:g.example"));
    assert_eq!(*house.portals.invited.lock().unwrap(), ["!room:g.example", "!next:g.example"]);
    assert_eq!(house.portals.resolved.load(Ordering::SeqCst), 1, "nobody asked for it");
    assert_eq!(rows::ended_aliases(&house.store).await.unwrap(), []);
    // That one ends as well, and no other has the name.
    *house.portals.known.lock().unwrap() = None;
    let end =
        house.store.write(|tx| Box::pin(async move { rows::end_room(tx, &owned_room_id!("!next:g.example")).await }));
    end.await.unwrap();
    house.work().await;
    assert!(house.homeserver.lock().unwrap().aliases.is_empty());
}

#[tokio::test]
async fn what_is_refused_or_not_ours_is_not_found() {
    let house = House::build().await;
    let (status, body) = house.query("#lm_no_hub.example:hs.example").await;
    assert_eq!((status, body["errcode"].as_str()), (404, Some("M_NOT_FOUND")));
    assert!(body["error"].as_str().unwrap().contains("is not in access.hubs"), "{body}");
    let asked = house.portals.resolved.load(Ordering::SeqCst);
    for alias in ["#lm_tea_hub.example:other.example", "#tea:hs.example", "lm_tea_hub.example:hs.example", "#lm_:x"] {
        assert_eq!(house.query(alias).await.0, 404, "{alias}");
    }
    assert_eq!(house.portals.resolved.load(Ordering::SeqCst), asked, "the bridge is not asked");
    // Synapse does not escape slashes.
    assert_eq!(house.query("#lm_a/b_hub.example:hs.example").await.0, 200);
}

#[tokio::test]
async fn those_who_ask_for_the_same_alias_share_one_query() {
    let house = House::build().await;
    let held = house.portals.gate.acquire().await.unwrap();
    let all = futures::future::join_all((0..5).map(|_| house.query(ALIAS)));
    let release = async {
        while house.portals.resolved.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        drop(held);
    };
    let (answers, ()) = tokio::join!(all, release);
    assert!(answers.iter().all(|(status, _)| *status == 200));
    assert_eq!(house.portals.resolved.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn the_bot_chats_with_local_users_alone() {
    let house = House::build().await;
    house.transaction(1, &[member("$1", "!evil:e", "@eve:elsewhere.example", BOT, "invite")]).await;
    house.transaction(2, &[member("$2", "!chat:hs.example", "@alice:hs.example", BOT, "invite")]).await;
    house.work().await;
    assert_eq!(house.homeserver.lock().unwrap().joined, ["!chat:hs.example"]);

    let events =
        [said("$3", "!join #tea:hub.example"), said("$4", "!show p1"), said("$5", "!invite p1 @b:hub.example")];
    house.transaction(3, &events).await;
    house.work().await;
    let answers = house.answers();
    assert!(answers[0].contains("join #NAME:SERVER") && !answers[0].contains("unbridge"), "{answers:?}");
    assert_eq!(answers[1], format!("You are invited into {ALIAS}."));
    assert_eq!(*house.portals.guests.lock().unwrap(), ["@alice:hs.example !room:g.example"]);
    assert_eq!(house.homeserver.lock().unwrap().aliases[ALIAS], "!room:g.example");
    assert_eq!(answers[2..], ["This is for the gateway's admins alone.", "This is for the gateway's admins alone."]);

    // The chat ends, and what is said there afterwards is not even kept.
    house.transaction(4, &[member("$6", "!chat:hs.example", "@alice:hs.example", "@alice:hs.example", "leave")]).await;
    house.work().await;
    house.transaction(5, &[said("$7", "!help")]).await;
    assert_eq!(house.waiting().await, 0);
}

#[tokio::test]
async fn what_users_ask_the_bot() {
    let house = House::build().await;
    house.chat_with("@alice:hs.example").await;
    house.portals.is_public.store(false, Ordering::SeqCst);
    for (said, expected) in [
        ("join #tea:hub.example", format!("The room is {ALIAS}. Only who is invited or let in there may join it.")),
        (
            "join #no:hub.example",
            "That did not work: the policy of this gateway does not allow it: hub.example is not in access.hubs."
                .to_owned(),
        ),
        ("join tea", "It is said so: join #NAME:SERVER".to_owned()),
        ("list", "#tea:g.example Tea (1 member)\n!r:g.example Tea (7 members, who wants in knocks)".to_owned()),
        // Not hers.
        ("explain $known", "I know nothing of $known.".to_owned()),
        ("explain $unknown", "I know nothing of $unknown.".to_owned()),
        ("status", "This is for the gateway's admins alone.".to_owned()),
        ("unbridge p1", "This is for the gateway's admins alone.".to_owned()),
    ] {
        assert_eq!(house.ask("@alice:hs.example", said).await, expected, "{said}");
    }
    assert!(house.ask("@alice:hs.example", "what is this?").await.contains("explain $EVENT"), "help");
    assert!(house.portals.ended.lock().unwrap().is_empty());
}

#[tokio::test]
async fn what_admins_ask_the_bot() {
    let house = House::build().await;
    house.chat_with("@admin:hs.example").await;
    let portal = "p1 active (from_lm): !r:g.example – !l:hub.example";
    for (said, expected) in [
        ("list", format!("{portal}\n{portal}")),
        (
            "show p1",
            format!("{portal}\nLM hub: hub.example\nmembers: 1 of Matrix, 0 of LM\nwaiting to cross from matrix: 3"),
        ),
        ("show p2", "That did not work: the portal p2 was not found.".to_owned()),
        ("invite p1 @bob:hub.example", "@bob:hub.example is invited.".to_owned()),
        ("explain $known", "It crossed: $there.".to_owned()),
        ("expose", "Invite me into the room, and say !expose there.".to_owned()),
        ("status", "everything works".to_owned()),
        ("unbridge", "This room is not bridged: name the portal, as `list` shows it.".to_owned()),
        ("unbridge p1", "p1 has ended.".to_owned()),
    ] {
        assert_eq!(house.ask("@admin:hs.example", said).await, expected, "{said}");
    }
    assert_eq!(*house.portals.ended.lock().unwrap(), ["p1 by @admin:hs.example"]);
    assert!(house.ask("@admin:hs.example", "help").await.contains("unbridge PORTAL"));
}

#[tokio::test]
async fn the_rooms_of_each_hub_are_a_list_in_the_directory() {
    let house = House::build().await;
    house.query(ALIAS).await;
    let listed = ("hub.example".to_owned(), "!room:g.example".to_owned());
    assert_eq!(house.homeserver.lock().unwrap().listed, BTreeSet::from([listed]));
    let end =
        house.store.write(|tx| Box::pin(async move { rows::end_room(tx, &owned_room_id!("!room:g.example")).await }));
    end.await.unwrap();
    house.work().await;
    assert_eq!(house.homeserver.lock().unwrap().listed, BTreeSet::new());
}

#[tokio::test]
async fn what_fails_is_tried_again_and_given_up_at_last() {
    let mut house = House::build().await;
    house.transaction(1, &[member("$1", "!chat:hs.example", "@alice:hs.example", BOT, "invite")]).await;
    house.work().await;
    house.restart().await;
    house.homeserver.lock().unwrap().fails = Some(StatusCode::BAD_GATEWAY);
    house.transaction(2, &[said("$2", "!help")]).await;
    assert!(house.work().await <= Duration::from_secs(1));
    assert_eq!(house.waiting().await, 1);
    house.homeserver.lock().unwrap().fails = None;
    house.clock.advance(1000);
    house.work().await;
    assert_eq!(house.waiting().await, 0);
    assert_eq!(house.homeserver.lock().unwrap().said.len(), 2);

    house.homeserver.lock().unwrap().fails = Some(StatusCode::FORBIDDEN);
    house.transaction(3, &[said("$3", "!help")]).await;
    house.work().await;
    assert_eq!(house.waiting().await, 0, "an answer that will not change is not waited for");
}

#[tokio::test]
async fn lookups() {
    let house = House::build().await;
    assert_eq!(house.call(Method::GET, "/users/@_isthmus:hs.example", Value::Null).await, (200, json!({})));
    assert_eq!(house.call(Method::GET, "/users/@other:hs.example", Value::Null).await.0, 404);
    let (status, body) = house.call(Method::GET, "/thirdparty/protocol/linearized", Value::Null).await;
    assert_eq!((status, &body["location_fields"]), (200, &json!(["alias"])));
    let hub = json!({ "desc": "hub.example (Linearized Matrix)", "fields": {}, "network_id": "hub.example" });
    assert_eq!(body["instances"], json!([hub]), "each hub once");
    assert_eq!(house.call(Method::GET, "/thirdparty/protocol/irc", Value::Null).await.0, 404);
    let place = json!([{ "alias": ALIAS, "protocol": "linearized", "fields": { "alias": "#tea:hub.example" } }]);
    let ghost = "@lm_bob_hub.example:g.example";
    let person = json!([{ "userid": ghost, "protocol": "linearized", "fields": { "user_id": "@bob:hub.example" } }]);
    let nobody = json!([]);
    for (path, expected) in [
        ("/thirdparty/location/linearized?alias=%23tea%3Ahub.example", &place),
        ("/thirdparty/location/irc?alias=%23tea%3Ahub.example", &nobody),
        ("/thirdparty/location?alias=%23lm_tea_hub.example%3Ahs.example", &place),
        ("/thirdparty/location?alias=%23lm_tea_hub.example%3Aother.example", &nobody),
        ("/thirdparty/location?alias=%23tea%3Ahs.example", &nobody),
        ("/thirdparty/user/linearized?user_id=%40bob%3Ahub.example", &person),
        ("/thirdparty/user/linearized?user_id=bob", &nobody),
        ("/thirdparty/user?userid=%40lm_bob_hub.example%3Ag.example", &person),
        ("/thirdparty/user?userid=%40bob%3Ahub.example", &nobody),
        ("/thirdparty/user", &nobody),
    ] {
        assert_eq!(house.call(Method::GET, path, Value::Null).await, (200, expected.clone()), "{path}");
    }
    let (status, _) = house.call(Method::POST, "/ping", json!({ "transaction_id": "t1" })).await;
    assert_eq!((status, house.appservice.status().received.as_deref()), (200, Some("t1")));
}

#[tokio::test]
async fn an_admin_exposes_the_room_into_which_they_invited_the_bot() {
    let house = House::build().await;
    for (number, room) in ["!room:hs.example", "!secret:hs.example"].into_iter().enumerate() {
        let number = u32::try_from(number).unwrap() * 2;
        house.transaction(number, &[member("$1", room, "@admin:hs.example", BOT, "invite")]).await;
        house.work().await;
        let mut expose = said(&format!("${number}"), "!expose");
        expose["room_id"] = json!(room);
        expose["sender"] = json!("@admin:hs.example");
        house.transaction(number + 1, &[expose]).await;
        house.work().await;
    }
    assert_eq!(*house.portals.bridged.lock().unwrap(), ["!room:hs.example"]);
    let homeserver = house.homeserver.lock().unwrap();
    assert_eq!(homeserver.invited, ["@isthmus:g.example !room:hs.example", "@isthmus:g.example !secret:hs.example"]);
    assert_eq!(homeserver.left, ["!room:hs.example"], "where it can still help it stays");
    let told: Vec<_> = homeserver.said.iter().map(|(room, _, body)| (room.as_str(), body.as_str())).collect();
    assert_eq!(told[1], ("!room:hs.example", "This room is connected with the LM room !l:hub.example (p1)."));
    assert_eq!(told[3].0, "!secret:hs.example");
    assert!(told[3].1.starts_with("That did not work: "), "{told:?}");
}
