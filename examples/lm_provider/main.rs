//! A small provider of Linearized Matrix whose users chat from the terminal.
//!
//! `cargo run --example lm_provider -- --server-name hub.example --room cafe --resolve lm.example.org=https://localhost:8448`

mod provider;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result, anyhow};
use clap::Parser;
use isthmus::event::Pdu;
use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, UserId};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use url::Url;

use self::provider::{NewRoom, News, Options, Provider};

/// A small provider of Linearized Matrix whose users chat from the terminal.
#[derive(Parser)]
struct Arguments {
    /// The provider's server name.
    #[arg(long, default_value = "hub.example")]
    server_name: OwnedServerName,
    /// Where it listens, without TLS.
    #[arg(long, default_value = "127.0.0.1:3000")]
    listen: SocketAddr,
    /// Where another server is, as NAME=URL.
    #[arg(long, value_name = "NAME=URL", value_parser = parse_resolve)]
    resolve: Vec<(OwnedServerName, Url)>,
    /// A certificate authority to trust, PEM.
    #[arg(long)]
    ca: Option<PathBuf>,
    /// A file in which the rooms survive a restart.
    #[arg(long)]
    journal: Option<PathBuf>,
    /// The localpart of the user who chats here.
    #[arg(long, default_value = "bob")]
    user: String,
    /// The user's display name.
    #[arg(long)]
    display_name: Option<String>,
    /// Makes a room with the alias #NAME:SERVER_NAME, unless there is one.
    #[arg(long, value_name = "NAME")]
    room: Option<String>,
    /// Has the manners of the LM server that others know: nothing is sent twice and nothing is known again.
    #[arg(long)]
    eigen: bool,
    /// Prints every event as a line of JSON.
    #[arg(long)]
    json: bool,
}

fn parse_resolve(text: &str) -> Result<(OwnedServerName, Url)> {
    let (name, url) = text.split_once('=').ok_or_else(|| anyhow!("{text:?} is not NAME=URL"))?;
    Ok((name.try_into()?, url.parse()?))
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let provider = Provider::start(Options {
        server_name: arguments.server_name,
        listen: arguments.listen,
        ca: arguments.ca,
        resolve: BTreeMap::from_iter(arguments.resolve),
        journal: arguments.journal,
        eigen: arguments.eigen,
    })
    .await?;
    let user = provider.user(&arguments.user)?;
    provider.set_display_name(&user, arguments.display_name.as_deref().unwrap_or(&arguments.user));
    let mut room = provider.rooms().into_iter().next();
    if let (Some(alias), None) = (arguments.room, &room) {
        let new = NewRoom { alias: Some(alias.clone()), name: Some(alias.clone()), ..NewRoom::default() };
        room = Some(provider.create_room(&user, new)?);
        eprintln!("made the room #{alias}:{}", provider.server_name());
    }
    eprintln!("{user} is at {}; /help says what can be typed", provider.url());

    let mut news = provider.news();
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        tokio::select! {
            happened = news.recv() => {
                if let Ok(happened) = happened { print(&provider, &happened, arguments.json) }
            }
            line = lines.next_line() => {
                let Some(line) = line? else { break };
                if line.trim() == "/quit" { break }
                if let Err(error) = command(&provider, &user, &mut room, line.trim()).await {
                    eprintln!("{error:#}");
                }
            }
        }
    }
    Ok(())
}

/// Does what a line says.
async fn command(provider: &Provider, user: &UserId, room: &mut Option<OwnedRoomId>, line: &str) -> Result<()> {
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    let rest = rest.trim();
    match word {
        "" => return Ok(()),
        "/help" => {
            eprintln!("any text · /join ALIAS or ROOM SERVER · /invite USER · /kick USER · /ban USER · /topic TEXT");
            eprintln!("/name TEXT · /typing · /typing off · /read · /members · /rooms · /room ROOM · /leave · /quit");
            return Ok(());
        }
        "/join" => {
            let (target, via) = rest.split_once(' ').unwrap_or((rest, ""));
            let via: Vec<OwnedServerName> = via.split_whitespace().map(TryInto::try_into).collect::<Result<_, _>>()?;
            *room = Some(provider.join(user, target, &via).await?);
            return Ok(());
        }
        "/rooms" => {
            provider.rooms().iter().for_each(|room| eprintln!("{room}"));
            return Ok(());
        }
        "/room" => {
            *room = Some(rest.try_into()?);
            return Ok(());
        }
        _ => {}
    }
    let room_id = room.clone().context("no room yet: /join one")?;
    let target = || OwnedUserId::try_from(rest).with_context(|| format!("{rest:?} is no user ID"));
    match word {
        "/invite" => provider.invite(user, &room_id, &target()?).await?,
        "/kick" => drop(provider.set_membership(user, &room_id, &target()?, "leave", None)?),
        "/ban" => drop(provider.set_membership(user, &room_id, &target()?, "ban", None)?),
        "/topic" => drop(provider.send(user, &room_id, "m.room.topic", Some(""), json!({ "topic": rest }))?),
        "/name" => drop(provider.send(user, &room_id, "m.room.name", Some(""), json!({ "name": rest }))?),
        "/typing" => provider.set_typing(user, &room_id, rest != "off").await,
        "/read" => {
            let last = provider.log(&room_id).last().map(|event| event.event_id.clone());
            provider.read(user, &room_id, &last.context("nothing to read")?, None).await;
        }
        "/members" => members(provider, &room_id),
        "/leave" => {
            provider.leave(user, &room_id).await?;
            *room = None;
        }
        _ if word.starts_with('/') => eprintln!("{word} is not known; /help says what is"),
        _ => drop(provider.send_text(user, &room_id, line)?),
    }
    Ok(())
}

fn members(provider: &Provider, room: &RoomId) {
    let mut seen = std::collections::BTreeSet::new();
    for event in provider.log(room) {
        let user = event.state_key.clone().filter(|_| event.kind == "m.room.member").unwrap_or_default();
        if provider.membership(room, &user) == "join" && seen.insert(user.clone()) {
            eprintln!("{} ({user})", provider.display_name(room, &user));
        }
    }
}

fn print(provider: &Provider, news: &News, as_json: bool) {
    match news {
        News::Event(_, event) if as_json => println!("{}", Value::Object(event.json.clone())),
        News::Event(room, event) => {
            if let Some(line) = describe(provider, room, event) {
                println!("{line}");
            }
        }
        News::Edu(_, edu) if as_json => println!("{edu}"),
        News::Edu(origin, edu) => {
            let kind = edu.get("edu_type").or_else(|| edu.get("type")).and_then(Value::as_str).unwrap_or_default();
            println!("* {origin}: {kind} {}", edu.get("content").unwrap_or(&Value::Null));
        }
        News::Refused(_, id, error) => eprintln!("the hub refused {id}: {error}"),
        News::Invited(room, sender, target) => eprintln!("{sender} invites {target}: /join {room}"),
    }
}

/// One line for people.
fn describe(provider: &Provider, room: &RoomId, event: &Pdu) -> Option<String> {
    let name = |user: &str| provider.display_name(room, user);
    let sender = name(event.sender.as_str());
    let text = |key: &str| event.content().get(key).and_then(Value::as_str);
    Some(match event.kind.as_str() {
        "m.room.message" => format!("<{sender}> {}", text("body")?),
        "m.room.topic" => format!("* {sender} sets the topic: {}", text("topic")?),
        "m.room.name" => format!("* {sender} names the room: {}", text("name")?),
        "m.room.member" => {
            let target = event.state_key.as_deref()?;
            let what = match text("membership")? {
                "join" => "joins",
                "invite" => "is invited",
                "ban" => "is banned",
                "knock" => "knocks",
                _ if target == event.sender => "leaves",
                _ => "is kicked",
            };
            format!("* {} ({target}) {what}", name(target))
        }
        _ => return None,
    })
}
