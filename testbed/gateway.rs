//! isthmus itself as a process: its configuration, its registration, its start, its sudden death, and its admin API.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use reqwest::Method;
use serde_json::Value;

use super::certificates::Authority;
use super::client::http;
use super::process::{Process, Program, free_port};

/// A gateway that is not started yet: its name and addresses are known, so that others can be told of them.
#[derive(Clone)]
pub struct Plan {
    /// Its server name, `localhost:PORT`.
    pub server_name: String,
    /// Where other servers reach it, without a slash at the end.
    pub url: String,
    /// Where its admin API is, without a slash at the end.
    pub admin_url: String,
    binary: PathBuf,
    directory: PathBuf,
    ports: [u16; 2],
    log: String,
    settings: BTreeMap<String, Vec<String>>,
}

/// A gateway that was started; stopped when dropped.
pub struct Gateway {
    /// Its server name, `localhost:PORT`.
    pub server_name: String,
    plan: Plan,
    process: Option<Process>,
    http: reqwest::Client,
}

impl Plan {
    /// A gateway with its files in `directory` and ports that are free now.
    pub fn new(directory: &Path, binary: &Path, authority: &Authority) -> Result<Self> {
        Self::at(directory, binary, authority, [free_port()?, free_port()?])
    }

    /// A gateway with a port for other servers and a port for its admin API.
    pub fn at(directory: &Path, binary: &Path, authority: &Authority, ports: [u16; 2]) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let tls = authority.issue(directory)?;
        let mut plan = Self {
            server_name: format!("localhost:{}", ports[0]),
            url: format!("https://localhost:{}", ports[0]),
            admin_url: format!("http://127.0.0.1:{}", ports[1]),
            binary: binary.to_owned(),
            directory: directory.to_owned(),
            ports,
            log: std::env::var("ISTHMUS_TEST_LOG").unwrap_or_else(|_| "warn,isthmus=debug".to_owned()),
            settings: BTreeMap::new(),
        };
        plan.set("listen", "address", format!("127.0.0.1:{}", ports[0]));
        plan.set("listen", "tls_certificate", tls.certificate.display());
        plan.set("listen", "tls_private_key", tls.key.display());
        plan.set("admin", "address", format!("127.0.0.1:{}", ports[1]));
        plan.set("admin", "token", "test-token");
        plan.set_raw("federation", "custom_ca", &format!("[\"{}\"]", authority.file.display()));
        plan.set_raw("federation", "allow_private_networks", "true");
        Ok(plan)
    }

    /// Has it log what `directives` say instead of what the tests want; empty is what an admin gets.
    pub fn log(&mut self, directives: &str) {
        directives.clone_into(&mut self.log);
    }

    /// Sets a text value of the configuration.
    pub fn set(&mut self, section: &str, key: &str, value: impl std::fmt::Display) {
        self.set_raw(section, key, &format!("{:?}", value.to_string()));
    }

    /// Sets a value of the configuration, written as TOML.
    pub fn set_raw(&mut self, section: &str, key: &str, value: &str) {
        self.settings.entry(section.to_owned()).or_default().push(format!("{key} = {value}"));
    }

    /// Says where a server is.
    pub fn resolve(&mut self, server_name: &str, url: &str) {
        self.set("federation.resolve", &format!("{server_name:?}"), url);
    }

    /// Makes it the appservice of a Synapse, and returns the registration file for that.
    pub fn register_with(&mut self, synapse: &super::synapse::Plan) -> Result<PathBuf> {
        let registration = self.directory.join("registration.yaml");
        self.set("appservice", "homeserver_url", &synapse.client_url);
        self.set("appservice", "homeserver_name", &synapse.server_name);
        self.set("appservice", "registration", registration.display());
        self.write()?;
        self.run(&["register", "--config", "isthmus.toml"])?;
        ensure!(registration.exists(), "`isthmus register` wrote no {}", registration.display());
        Ok(registration)
    }

    /// Runs a command of the binary in the gateway's directory and returns what it prints.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let output =
            Command::new(&self.binary).args(arguments).current_dir(&self.directory).stdin(Stdio::null()).output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if !output.status.success() {
            bail!("isthmus {arguments:?}: {}\n{}{}", output.status, text(&output.stdout), text(&output.stderr));
        }
        Ok(text(&output.stdout))
    }

    fn write(&self) -> Result<()> {
        let mut toml = format!("server_name = {:?}\n", self.server_name);
        if !self.settings.contains_key("database") {
            toml.push_str("[database]\nurl = \"sqlite://isthmus.db\"\n");
        }
        for (section, lines) in &self.settings {
            toml.push_str(&format!("[{section}]\n{}\n", lines.join("\n")));
        }
        std::fs::write(self.directory.join("isthmus.toml"), toml)?;
        Ok(())
    }

    /// Starts it and waits until it answers.
    pub async fn start(self) -> Result<Gateway> {
        self.write()?;
        let server_name = self.server_name.clone();
        let mut gateway = Gateway { server_name, plan: self, process: None, http: http(None)? };
        gateway.start().await?;
        Ok(gateway)
    }
}

impl Gateway {
    /// Starts it again after [`Gateway::kill`].
    pub async fn start(&mut self) -> Result<()> {
        let log = self.log_file();
        let mut process = Program::new("isthmus", &self.plan.binary, &log)
            .args(["serve", "--config", "isthmus.toml"])
            .env("RUST_LOG", &self.plan.log)
            .directory(&self.plan.directory)
            .start()?;
        let health = format!("{}/health", self.plan.admin_url);
        // It runs when it answers at all: a Synapse that is not up yet makes it unhealthy.
        let ready = async {
            while self.http.get(&health).send().await.is_err() {
                process.check()?;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            anyhow::Ok(())
        };
        let ready = tokio::time::timeout(Duration::from_secs(60), ready).await;
        match ready {
            Ok(result) => result?,
            Err(_) => bail!("isthmus did not answer in a minute:\n{}", process.log_tail()),
        }
        self.process = Some(process);
        Ok(())
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("isthmus is not running")?.kill()
    }

    /// Stops it in order, and starts it again.
    pub async fn restart(&mut self) -> Result<()> {
        drop(self.process.take());
        self.start().await
    }

    /// A request to the admin API; `path` follows `/_isthmus/admin/v1`.
    pub async fn admin(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value> {
        let url = format!("{}/_isthmus/admin/v1{path}", self.plan.admin_url);
        let mut request = self.http.request(method.clone(), url).bearer_auth("test-token");
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await?;
        let status = response.status();
        let text = response.text().await?;
        ensure!(status.is_success(), "{method} {path}: {status} {text}");
        Ok(if text.is_empty() { Value::Null } else { serde_json::from_str(&text)? })
    }

    /// What `/health` says.
    pub async fn health(&self) -> Result<Value> {
        Ok(self.http.get(format!("{}/health", self.plan.admin_url)).send().await?.json().await?)
    }

    /// What `/metrics` says.
    pub async fn metrics(&self) -> Result<String> {
        Ok(self.http.get(format!("{}/metrics", self.plan.admin_url)).send().await?.text().await?)
    }

    /// Its process ID, while it runs.
    pub fn pid(&self) -> Option<i32> {
        self.process.as_ref().map(Process::pid)
    }

    /// Where its log is.
    pub fn log_file(&self) -> PathBuf {
        self.plan.directory.join("isthmus.log")
    }

    /// Its configuration and its commands.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where other servers reach it.
    pub fn port(&self) -> u16 {
        self.plan.ports[0]
    }
}
