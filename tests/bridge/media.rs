//! Files: how they are called across, and how they are fetched, kept and served. The server that has them is a socket of the test's,
//! which answers as it likes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use isthmus::federation::{Client, ClientOptions, Opened};
use isthmus::identity::Side;
use ruma::ServerName;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Semaphore;

use super::world::{Gateway, OTHER, World, draft, ghost, so, until};
use crate::dag::OWN;

const DOWNLOAD: &str = "/_matrix/federation/v1/media/download";
const PATIENCE: Duration = Duration::from_secs(60);

/// What the source sends, piece by piece; the connection ends after the last.
#[derive(Clone)]
enum Piece {
    Bytes(Vec<u8>),
    /// It goes on when the test lets it.
    Pause(Arc<Semaphore>),
}

type Pieces = Vec<Piece>;

/// `other.example`, which has files.
struct Source {
    asked: Arc<Mutex<Vec<String>>>,
    /// What is answered, by the beginning of the path.
    answers: Arc<Mutex<HashMap<String, Pieces>>>,
}

impl Source {
    async fn start(world: &mut World) -> Self {
        let listener = tokio::net::TcpListener::bind(world.give_up_other()).await.unwrap();
        let source = Self { asked: Arc::default(), answers: Arc::default() };
        let (asked, answers) = (source.asked.clone(), source.answers.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (asked, answers) = (asked.clone(), answers.clone());
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        let Ok(byte) = stream.read_u8().await else { return };
                        head.push(byte);
                    }
                    let head = String::from_utf8(head).unwrap();
                    asked.lock().unwrap().push(head.clone());
                    let path = head.split(' ').nth(1).unwrap();
                    let path = path.split('?').next().unwrap();
                    let pieces = answers.lock().unwrap().get(path).cloned();
                    for piece in pieces.unwrap_or_else(|| error(404, "M_UNRECOGNIZED")) {
                        match piece {
                            Piece::Bytes(bytes) => {
                                if stream.write_all(&bytes).await.is_err() {
                                    return;
                                }
                            }
                            Piece::Pause(gate) => gate.acquire().await.unwrap().forget(),
                        }
                    }
                    let _ = stream.shutdown().await;
                });
            }
        });
        source
    }

    fn answer(&self, path: &str, pieces: Pieces) {
        self.answers.lock().unwrap().insert(path.to_owned(), pieces);
    }

    /// Has a file by authenticated federation.
    fn has(&self, id: &str, content_type: &str, file: &[u8]) {
        self.answer(&format!("{DOWNLOAD}/{id}"), in_parts(content_type, file));
    }

    /// How often this was asked for.
    fn times(&self, id: &str) -> usize {
        let path = format!("/{id}");
        let is_it = |head: &&String| head.split(['?', ' ']).nth(1).is_some_and(|asked| asked.ends_with(&path));
        self.asked.lock().unwrap().iter().filter(is_it).count()
    }
}

fn bytes(text: impl Into<Vec<u8>>) -> Piece {
    Piece::Bytes(text.into())
}

/// The head of an answer, without a length unless it is among the headers.
fn head(headers: &str) -> Piece {
    bytes(format!("HTTP/1.1 200 OK\r\nConnection: close\r\n{headers}\r\n"))
}

fn error(status: u16, errcode: &str) -> Pieces {
    let body = json!({ "errcode": errcode, "error": "no" }).to_string();
    vec![bytes(format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len()))]
}

const BEFORE: &str = "--b\r\nContent-Type: application/json\r\n\r\n{}\r\n--b\r\n";

fn in_parts(content_type: &str, file: &[u8]) -> Pieces {
    let before =
        format!("{BEFORE}Content-Type: {content_type}\r\nContent-Disposition: inline; filename=cat.png\r\n\r\n");
    let whole = [before.as_bytes(), file, b"\r\n--b--\r\n"].concat();
    let length = whole.len();
    vec![head(&format!("Content-Type: multipart/mixed; boundary=b\r\nContent-Length: {length}\r\n")), bytes(whole)]
}

/// What came of asking the gateway for a file.
#[derive(Debug, PartialEq, Eq)]
enum Got {
    File {
        content_type: String,
        disposition: String,
        bytes: Vec<u8>,
    },
    Refused(String),
    /// It began, and broke off.
    Broken,
}

impl Got {
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::File { bytes, .. } => bytes,
            other => panic!("{other:?}"),
        }
    }

    /// That it was cut off, or refused because of that, whichever came first.
    fn cut(self, with: &str) {
        if self != Self::Broken {
            self.is_refused(with);
        }
    }

    /// That it was refused, and with which status and code.
    fn is_refused(&self, with: &str) {
        assert!(matches!(&self, Self::Refused(error) if error.starts_with(with)), "{with}: {self:?}");
    }
}

async fn ask(client: &Client, path: &str) -> Got {
    let own = ServerName::parse(OWN).unwrap();
    match client.open(&own, path, Some(false), PATIENCE).await {
        Ok(Opened::Body { headers, length, mut body }) => {
            assert_eq!(headers["x-content-type-options"], "nosniff");
            let mut answer = Vec::new();
            while let Some(chunk) = body.next().await {
                let Ok(chunk) = chunk else { return Got::Broken };
                answer.extend_from_slice(&chunk);
            }
            assert!(length.is_none_or(|length| length == answer.len() as u64));
            let kind = headers["content-type"].to_str().unwrap();
            let boundary = kind.strip_prefix("multipart/mixed; boundary=").unwrap();
            let begin = format!("--{boundary}\r\nContent-Type: application/json\r\n\r\n{{}}\r\n--{boundary}\r\n");
            let rest = answer.strip_prefix(begin.as_bytes()).unwrap();
            let at = rest.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
            let named = String::from_utf8(rest[..at].to_vec()).unwrap();
            let header = |name: &str| named.lines().find_map(|line| line.strip_prefix(name)).unwrap().to_owned();
            let bytes = rest[at + 4..].strip_suffix(format!("\r\n--{boundary}--\r\n").as_bytes()).unwrap();
            Got::File {
                content_type: header("Content-Type: "),
                disposition: header("Content-Disposition: "),
                bytes: bytes.to_vec(),
            }
        }
        Ok(Opened::Elsewhere(_)) => panic!("the gateway leads nobody elsewhere"),
        Err(error) => Got::Refused(error.to_string()),
    }
}

struct House {
    world: World,
    gateway: Gateway,
    source: Source,
}

impl House {
    async fn new(settings: Value) -> Self {
        let (mut world, gateway) = World::new(settings).await;
        let source = Source::start(&mut world).await;
        Self { world, gateway, source }
    }

    /// The gateway's ID for a file of the source, as it is called on a side.
    fn id(&self, name: &str, to: Side) -> String {
        let uri = format!("mxc://{OTHER}/{name}");
        let named = self.gateway.node.context.media.across(&uri, to).into_owned();
        named.strip_prefix(&format!("mxc://{OWN}/")).unwrap().to_owned()
    }

    /// The LM server asks for a file of the source.
    async fn get(&self, name: &str) -> Got {
        self.get_id(&self.id(name, Side::Lm)).await
    }

    async fn get_id(&self, id: &str) -> Got {
        ask(&self.world.server.context.client, &format!("{DOWNLOAD}/{id}")).await
    }
}

#[tokio::test]
async fn files_are_called_so_that_the_other_side_reads_them_and_come_home_under_their_own_names() {
    let house = House::new(json!({})).await;
    let (portal, mut view) = house.world.portal_of_two(&house.gateway).await;
    let (alice, bob) = (house.world.matrix_user("alice"), house.world.lm_user("bob"));
    let own = format!("mxc://{OTHER}/cat");
    house.source.has("cat", "image/png", b"the cat");
    let picture = |uri: &str| json!({ "msgtype": "m.image", "body": uri, "url": uri });

    // From Matrix.
    house.world.matrix_send(&house.gateway, &mut view, &alice, "m.room.message", None, picture(&own)).await;
    let url_of = |events: Vec<Value>, body: &str| {
        let is_it = |event: &&Value| event["content"]["body"] == *body;
        Some(events.iter().rfind(is_it)?["content"]["url"].as_str()?.to_owned())
    };
    let in_log = async || {
        let log = house.world.server.log(&portal.lm_room_id).await;
        log.into_iter().map(|event| Value::Object(event.event.json.clone())).collect::<Vec<_>>()
    };
    let there = until("the picture", || async { url_of(in_log().await, &own) }).await;
    assert_eq!(there, format!("mxc://{OWN}/{}", house.id("cat", Side::Lm)));
    let got = house.get("cat").await;
    let expected = Got::File {
        content_type: "image/png".to_owned(),
        disposition: "attachment; filename=cat.png".to_owned(),
        bytes: b"the cat".to_vec(),
    };
    assert_eq!(got, expected);
    assert!(house.source.asked.lock().unwrap().iter().any(|head| head.contains("authorization: X-Matrix origin=")));

    // Bob shows it again, and one of his own.
    let dog = format!("mxc://{OTHER}/dog");
    house.source.has("dog", "image/png", b"the dog");
    for uri in [&there, &dog] {
        house.world.lm_send(&portal.lm_room_id, draft(&bob, "m.room.message", None, picture(uri))).await;
    }
    let in_graph = async || {
        let events = house.gateway.matrix_events(&portal.matrix_room_id).await;
        events.into_iter().map(|(_, event)| Value::Object(event)).collect::<Vec<_>>()
    };
    assert_eq!(until("her own picture", || async { url_of(in_graph().await, &there) }).await, own);
    let here = until("his picture", || async { url_of(in_graph().await, &dog) }).await;
    assert_eq!(here, format!("mxc://{OWN}/{}", house.id("dog", Side::Matrix)));
    let options = ClientOptions { allow_private_networks: true, resolve: house.world.resolve(), ..Default::default() };
    let homeserver = Client::new(house.world.peer.name.clone(), house.world.peer.key.clone(), options).unwrap();
    let path = |uri: &str| format!("{DOWNLOAD}/{}", uri.rsplit('/').next().unwrap());
    assert_eq!(ask(&homeserver, &path(&here)).await.bytes(), b"the dog");

    // Avatars: of a member, in its profile, and of the room, which stays in step.
    let me = json!({ "membership": "join", "avatar_url": dog });
    house.world.lm_send(&portal.lm_room_id, draft(&bob, "m.room.member", Some(bob.as_str()), me)).await;
    let image = ghost(Side::Lm, "bob");
    let faced = || async {
        let content = house.gateway.matrix_member(&portal.matrix_room_id, &image).await?;
        content.get("avatar_url")?.as_str().map(str::to_owned)
    };
    assert_eq!(until("bob's face", faced).await, here);
    let profile = house.gateway.bridge.between().profile(Side::Matrix, image.as_str().try_into().unwrap()).await;
    assert_eq!(profile.unwrap().avatar_url.as_deref(), Some(here.as_str()));
    let bot = house.gateway.bot();
    let avatar = draft(&bot, "m.room.avatar", Some(""), json!({ "url": own }));
    let outgoing = isthmus::seam::Outgoing { draft: avatar, effect: None };
    house.gateway.dag.send(&portal.matrix_room_id, vec![outgoing]).await.pop().unwrap().unwrap();
    house.gateway.bridge.repair(&portal.portal_id).await.unwrap();
    let shown = || async {
        let content = house.world.server.state(&portal.lm_room_id, "m.room.avatar", "").await?;
        content.get("url")?.as_str().map(str::to_owned)
    };
    assert_eq!(until("the room's face", shown).await, there);
    so("all is in step", || house.gateway.in_step(&portal)).await;
}

#[tokio::test]
async fn hc_59_nobody_has_fetched_what_did_not_cross() {
    let house = House::new(json!({})).await;
    house.source.has("cat", "image/png", b"the cat");
    let id = house.id("cat", Side::Lm);
    let forged = format!("{}{}", if id.starts_with('A') { "B" } else { "A" }, &id[1..]);
    for path in [forged.as_str(), "cat", "AAAA", "..%2F..%2Fetc%2Fpasswd", &"A".repeat(5_000)] {
        house.get_id(path).await.is_refused("404 Not Found M_NOT_FOUND");
    }
    // A stranger gets nothing, whatever he knows.
    let stranger = reqwest::get(format!("{}{}/{id}", house.world.url_of(OWN).as_str().trim_end_matches('/'), DOWNLOAD));
    assert_eq!(stranger.await.unwrap().status(), 401);
    for path in ["/_matrix/media/v3/download", "/_matrix/client/v1/media/download"] {
        let open = ask(&house.world.server.context.client, &format!("{path}/{OWN}/{id}")).await;
        open.is_refused("404 Not Found M_UNRECOGNIZED");
    }
    assert_eq!(house.source.times("cat"), 0);
    assert_eq!(house.get_id(&id).await.bytes(), b"the cat");
}

#[tokio::test]
async fn one_fetch_serves_all_who_ask_and_what_is_kept_survives_a_restart() {
    let mut house = House::new(json!({})).await;
    let file: Vec<u8> = (0..300_000_u32).map(|number| number.to_le_bytes()[0]).collect();
    let gate = Arc::new(Semaphore::new(0));
    let mut pieces = in_parts("image/png", &file);
    let Some(Piece::Bytes(whole)) = pieces.pop() else { panic!() };
    pieces.extend([bytes(&whole[..100_000]), Piece::Pause(gate.clone()), bytes(&whole[100_000..])]);
    house.source.answer(&format!("{DOWNLOAD}/cat"), pieces);
    let all = async { futures::future::join_all((0..20).map(|_| house.get("cat"))).await };
    let open = async {
        so("the fetch", || async { house.source.times("cat") > 0 }).await;
        gate.add_permits(1);
    };
    let (all, ()) = tokio::join!(all, open);
    assert!(all.into_iter().all(|got| got.bytes() == file));
    assert_eq!(house.get("cat").await.bytes(), file);
    assert_eq!(house.source.times("cat"), 1);

    house.source.answer(&format!("{DOWNLOAD}/cat"), error(500, "M_UNKNOWN"));
    house.gateway = house.world.kill(house.gateway).await;
    assert_eq!(house.get("cat").await.bytes(), file);
    assert_eq!(house.source.times("cat"), 1);
}

#[tokio::test]
async fn the_budget_holds_and_the_oldest_files_go_first() {
    let house = House::new(json!({ "media": { "max_bytes": 100_000, "cache_bytes": 250_000 } })).await;
    for name in ["a", "b", "c"] {
        house.source.has(name, "image/png", &[7; 90_000]);
    }
    let kept = |name: &str| house.source.times(name);
    for name in ["a", "b", "a", "c", "a", "b"] {
        assert_eq!(house.get(name).await.bytes().len(), 90_000, "{name}");
    }
    assert_eq!((kept("a"), kept("b"), kept("c")), (1, 2, 1));
}

#[tokio::test]
async fn hc_59_too_large_files_are_refused_or_cut() {
    let house = House::new(json!({ "media": { "max_bytes": 100_000, "cache_bytes": 1_000_000 } })).await;
    let source = &house.source;
    let path = |name: &str| format!("{DOWNLOAD}/{name}");
    source.has("most", "image/png", &[7; 100_000]);
    source.has("said", "image/png", &[7; 600_000]);
    // Of the length of the whole answer nothing is said.
    let mut unsaid = in_parts("image/png", &[7; 200_000]);
    unsaid[0] = head("Content-Type: multipart/mixed; boundary=b\r\n");
    source.answer(&path("unsaid"), unsaid.clone());
    // It says too little, and goes on.
    unsaid[0] = head("Content-Type: multipart/mixed; boundary=b\r\nContent-Length: 1000\r\n");
    source.answer(&path("lies"), unsaid);
    // It says more than it has.
    let mut short = in_parts("image/png", &[7; 1_000]);
    short[0] = head("Content-Type: multipart/mixed; boundary=b\r\nContent-Length: 90000\r\n");
    source.answer(&path("short"), short);
    assert_eq!(house.get("most").await.bytes().len(), 100_000);
    house.get("said").await.is_refused("502 Bad Gateway M_TOO_LARGE");
    house.get("unsaid").await.cut("502 Bad Gateway M_TOO_LARGE");
    house.get("unsaid").await.is_refused("502 Bad Gateway M_TOO_LARGE");
    assert_eq!(source.times("unsaid"), 1, "it is not fetched again at once");
    for name in ["lies", "short"] {
        let got = house.get(name).await;
        // What ends in order behind the closing boundary may be whole all the same.
        let whole = matches!(&got, Got::File { bytes, .. } if bytes.len() == 1_000 && name == "short");
        assert!(whole || matches!(got, Got::Broken | Got::Refused(_)), "{name}: {got:?}");
    }
    source.answer(&path("says"), error(413, "M_TOO_LARGE"));
    house.get("says").await.is_refused("502 Bad Gateway M_TOO_LARGE");
}

#[tokio::test]
async fn hc_59_hostile_answers_are_refused_or_break_off() {
    let house = House::new(json!({})).await;
    let path = |name: &str| format!("{DOWNLOAD}/{name}");
    let multipart = || head("Content-Type: multipart/mixed; boundary=b\r\n");
    let long = "x".repeat(200_000);
    for (name, pieces, expected) in [
        ("plain", vec![head("Content-Type: image/png\r\n"), bytes("file")], "502"),
        ("none", vec![multipart(), bytes("--b--")], "502"),
        ("empty", vec![multipart()], "502"),
        ("long", vec![multipart(), bytes(long.clone())], "502"),
        ("header", vec![multipart(), bytes(format!("{BEFORE}X: {long}"))], "502"),
        (
            "elsewhere",
            vec![multipart(), bytes(format!("{BEFORE}Location: https://127.0.0.1:1/x\r\n\r\n\r\n--b--"))],
            "502",
        ),
        (
            "plainly",
            vec![multipart(), bytes(format!("{BEFORE}Location: http://cdn.example/x\r\n\r\n\r\n--b--"))],
            "502",
        ),
        ("file", vec![multipart(), bytes(format!("{BEFORE}Location: file:///etc/passwd\r\n\r\n\r\n--b--"))], "502"),
        ("gone", error(404, "M_NOT_FOUND"), "404 Not Found M_NOT_FOUND"),
        ("later", error(504, "M_NOT_YET_UPLOADED"), "504 Gateway Timeout M_NOT_YET_UPLOADED"),
        ("busy", error(429, "M_LIMIT_EXCEEDED"), "429 Too Many Requests M_LIMIT_EXCEEDED"),
        ("forbidden", error(403, "M_FORBIDDEN"), "502"),
        ("broken", vec![bytes("HTTP/1.1 2")], "502"),
    ] {
        house.source.answer(&path(name), pieces);
        house.get(name).await.is_refused(expected);
        // Also who asks again is answered, without asking there again.
        house.get(name).await.is_refused(expected);
        assert_eq!(house.source.times(name), 1, "{name}");
    }
    house.source.answer(&path("half"), vec![multipart(), bytes(format!("{BEFORE}X: y\r\n\r\nhalf of it\r\n--"))]);
    house.get("half").await.cut("502");
    let odd = "text/html\r\nContent-Disposition: inline; filename=\"../../.ssh/keys\"\r\nX: y";
    house
        .source
        .answer(&path("odd"), vec![multipart(), bytes(format!("{BEFORE}Content-Type: {odd}\r\n\r\n<b>\r\n--b--"))]);
    let expected = Got::File {
        content_type: "text/html".to_owned(),
        disposition: "attachment; filename=keys".to_owned(),
        bytes: b"<b>".to_vec(),
    };
    assert_eq!(house.get("odd").await, expected);
}

#[tokio::test]
async fn older_servers_and_other_places_are_asked_too() {
    let house = House::new(json!({})).await;
    let open = |name: &str| format!("/_matrix/media/v3/download/{OTHER}/{name}");
    let file =
        |text: &str| vec![head(&format!("Content-Type: image/gif\r\nContent-Length: {}\r\n", text.len())), bytes(text)];
    house.source.answer(&open("old"), file("an old one"));
    house.source.answer("/cdn/file", file("elsewhere"));
    let cdn = format!("{}cdn/file", house.world.url_of(OTHER));
    let lead = |url: &str| {
        vec![bytes(format!("HTTP/1.1 307 X\r\nConnection: close\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n"))]
    };
    house.source.answer(&open("led"), lead(&cdn));
    let part = format!("{BEFORE}Location: {cdn}\r\n\r\n\r\n--b--\r\n");
    let part = vec![head("Content-Type: multipart/mixed; boundary=b\r\n"), bytes(part)];
    house.source.answer(&format!("{DOWNLOAD}/part"), part);
    let round = format!("{}round", house.world.url_of(OTHER));
    house.source.answer("/round", lead(&round));
    house.source.answer(&open("round"), lead(&round));
    for (name, expected) in [("old", "an old one"), ("led", "elsewhere"), ("part", "elsewhere")] {
        let Got::File { content_type, bytes, .. } = house.get(name).await else { panic!("{name}") };
        assert_eq!((content_type.as_str(), bytes.as_slice()), ("image/gif", expected.as_bytes()), "{name}");
    }
    house.get("round").await.is_refused("502");
    house.get("nowhere").await.is_refused("404 Not Found M_NOT_FOUND");
    let asked = house.source.asked.lock().unwrap().clone();
    let elsewhere: Vec<&String> = asked.iter().filter(|head| head.starts_with("GET /cdn/")).collect();
    assert!(!elsewhere.is_empty() && elsewhere.iter().all(|head| !head.to_lowercase().contains("authorization")));
}

#[tokio::test]
async fn a_picture_of_a_picture_is_the_picture() {
    let house = House::new(json!({})).await;
    house.source.has("cat", "image/png", b"the cat");
    house.source.has("text", "text/plain", b"the text");
    let client = &house.world.server.context.client;
    let path = |name| format!("/_matrix/federation/v1/media/thumbnail/{}?width=1&height=1", house.id(name, Side::Lm));
    assert_eq!(ask(client, &path("cat")).await.bytes(), b"the cat");
    ask(client, &path("text")).await.is_refused("404 Not Found M_NOT_FOUND");
}

#[tokio::test]
async fn one_server_has_no_more_than_its_share_of_readers() {
    let house = House::new(json!({})).await;
    let gate = Arc::new(Semaphore::new(0));
    let mut pieces = in_parts("image/png", b"the cat");
    pieces.insert(1, Piece::Pause(gate.clone()));
    house.source.answer(&format!("{DOWNLOAD}/cat"), pieces);
    let mut asking: FuturesUnordered<_> = (0..45).map(|_| house.get("cat")).collect();
    for _ in 0..5 {
        asking.next().await.unwrap().is_refused("429 Too Many Requests M_LIMIT_EXCEEDED");
    }
    gate.add_permits(1);
    while let Some(got) = asking.next().await {
        assert_eq!(got.bytes(), b"the cat");
    }
    assert_eq!(house.source.times("cat"), 1);
}
