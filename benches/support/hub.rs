//! isthmus as a hub: the linear side with its real routes, queues and store, and no bridge.

use std::path::Path;
use std::sync::Arc;

use isthmus::clock::{Clock as _, SystemClock};
use isthmus::dag::Dag;
use isthmus::event::{Object, RoomVersion};
use isthmus::gateway::{Federation, context, federation_routes};
use isthmus::lm::{Lm, NewRoom};
use isthmus::seam::{Alone, Draft, SharedBetween};
use ruma::UserId;
use serde_json::{Value, json};

use super::gateway::{Gateway, config, say_hello};

/// Starts this program again as the hub, with so many rooms that anybody may join.
pub async fn start(directory: &Path, rooms: usize) -> Gateway {
    Gateway::start(&["--serve-hub", directory.to_str().unwrap(), "--rooms", &rooms.to_string()]).await
}

/// The hub's process.
pub async fn serve(directory: &Path) {
    let arguments: Vec<String> = std::env::args().collect();
    let rooms: usize = arguments.iter().skip_while(|a| *a != "--rooms").nth(1).unwrap().parse().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = format!("localhost:{}", listener.local_addr().unwrap().port());
    let context = context(config(directory, &name), Arc::new(SystemClock)).await.unwrap();
    let between: SharedBetween = Arc::new(Alone);
    let lm = Lm::new(context.clone(), between.clone());
    let dag = Dag::new(context.clone(), between.clone());
    let mut made = Vec::new();
    for _ in 0..rooms {
        made.push(create(&lm, &name).await);
    }
    context.outbound.start().await.unwrap();
    let routes = federation_routes(Federation::new(context, lm, dag, between));
    say_hello(&json!({ "name": name, "rooms": made }));
    axum::serve(listener, routes).await.unwrap();
}

async fn create(lm: &Lm, name: &str) -> String {
    let creator = UserId::parse(format!("@hub:{name}")).unwrap();
    let draft = |kind: &str, content: Value| Draft {
        sender: creator.clone(),
        kind: kind.to_owned(),
        state_key: Some(String::new()),
        content: content.as_object().cloned().unwrap_or_else(Object::new),
        origin_server_ts: SystemClock.now_ms(),
    };
    let initial_state = vec![
        draft("m.room.power_levels", json!({ "users": { creator.as_str(): 100 } })),
        draft("m.room.join_rules", json!({ "join_rule": "public" })),
    ];
    let room = NewRoom { creator: creator.clone(), version: RoomVersion::Lm02, initial_state };
    lm.create_room(room).await.unwrap().to_string()
}
