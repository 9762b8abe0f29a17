//! isthmus as a hub, in a process of its own: the linear side with its real routes, queues and store, and no bridge.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use isthmus::clock::{Clock as _, SystemClock};
use isthmus::config::Config;
use isthmus::dag::Dag;
use isthmus::event::{Object, RoomVersion};
use isthmus::gateway::{Federation, context, federation_routes};
use isthmus::lm::{Lm, NewRoom};
use isthmus::seam::{Alone, Draft, SharedBetween};
use ruma::{OwnedServerName, UserId};
use serde_json::{Value, json};

/// The hub, as the participants see it.
pub struct Hub {
    process: Child,
    /// Its server name, which is its address.
    pub name: OwnedServerName,
    /// Where it listens.
    pub url: String,
    /// Its rooms.
    pub rooms: Vec<String>,
}

impl Hub {
    /// Starts this program again as the hub, with so many rooms that anybody may join.
    pub async fn start(directory: &Path, rooms: usize) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--serve-hub", directory.to_str().unwrap(), "--rooms", &rooms.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = process.stdout.take().unwrap();
        let line = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line).unwrap();
            line
        });
        let hello: Value = serde_json::from_str(&line.await.unwrap()).unwrap();
        let rooms = hello["rooms"].as_array().unwrap().iter().map(|room| room.as_str().unwrap().to_owned()).collect();
        let name = hello["name"].as_str().unwrap();
        Self { process, name: name.try_into().unwrap(), url: format!("http://{name}"), rooms }
    }

    /// The CPU time that it has used, in seconds.
    pub fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        // User and system time, in ticks of 10 ms.
        (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
    }

    /// The most memory that it had, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The hub's process.
pub async fn serve(directory: &Path) {
    let arguments: Vec<String> = std::env::args().collect();
    let rooms: usize = arguments.iter().skip_while(|a| *a != "--rooms").nth(1).unwrap().parse().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = listener.local_addr().unwrap().to_string();
    // The participants' names are their addresses.
    let resolve: String = (0..super::participant::MOST)
        .map(super::participant::address)
        .map(|address| format!("\"{address}\" = \"http://{address}\"\n"))
        .collect();
    let path = directory.join("isthmus.toml");
    let text = format!(
        "server_name = \"{name}\"\n[database]\nurl = \"sqlite://{}\"\n[federation]\nallow_private_networks = true\n\
         [federation.resolve]\n{resolve}",
        directory.join("hub.db").display()
    );
    std::fs::write(&path, text).unwrap();
    let context = context(Config::load(&path).unwrap(), Arc::new(SystemClock)).await.unwrap();
    let between: SharedBetween = Arc::new(Alone);
    let lm = Lm::new(context.clone(), between.clone());
    let dag = Dag::new(context.clone(), between.clone());
    let mut made = Vec::new();
    for _ in 0..rooms {
        made.push(create(&lm, &name).await);
    }
    context.outbound.start().await.unwrap();
    let routes = federation_routes(Federation::new(context, lm, dag, between));
    println!("{}", json!({ "name": name, "rooms": made }));
    std::io::stdout().flush().unwrap();
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
