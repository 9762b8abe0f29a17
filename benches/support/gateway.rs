//! isthmus in a process of its own, so that its CPU time and its memory are its own: this program, started again.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use isthmus::config::Config;
use ruma::OwnedServerName;
use serde_json::Value;

use super::ear::address;

/// The gateway, as its peers see it.
pub struct Gateway {
    process: Child,
    /// Its server name.
    pub name: OwnedServerName,
    /// Where it listens.
    pub url: String,
    /// Its LM rooms.
    pub rooms: Vec<String>,
    /// All that it has told of itself.
    pub hello: Value,
}

impl Gateway {
    /// Starts this program again with these arguments, and waits for what it says of itself: at least `name` and `rooms`.
    pub async fn start(arguments: &[&str]) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(arguments)
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
        Self { process, name: name.try_into().unwrap(), url: format!("http://{}", address(name)), rooms, hello }
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

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// In the process of its own: what the other one waits for.
pub fn say_hello(hello: &Value) {
    println!("{hello}");
    std::io::stdout().flush().unwrap();
}

/// The configuration of a gateway with this name, with its files in `directory`, that knows where the peers are and keeps none
/// of them within a budget.
pub fn config(directory: &Path, name: &str) -> Config {
    let resolve: String = (0..super::ear::MOST)
        .map(super::ear::name)
        .map(|peer| format!("\"{peer}\" = \"http://{}\"\n", address(&peer)))
        .collect();
    let listen = address(name);
    let path = directory.join("isthmus.toml");
    let text = format!(
        "server_name = \"{name}\"\n[listen]\naddress = \"{listen}\"\n[database]\nurl = \"sqlite://{}\"\n\
         [admin]\naddress = \"127.0.0.1:0\"\n[budgets]\nevents_per_second = 0\n[federation]\nallow_private_networks = true\n[federation.resolve]\n{resolve}",
        directory.join("isthmus.db").display()
    );
    std::fs::write(&path, text).unwrap();
    Config::load(&path).unwrap()
}
