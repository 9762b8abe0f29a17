//! A stock Synapse: its configuration with a TLS listener for federation and a plain one for clients, its start, its end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::certificates::Authority;
use super::client::{Client, http};
use super::packages::say;
use super::process::{Process, Program, free_port};
use super::venv;

/// A Synapse that is not started yet: its name and addresses are known, so that others can be told of them.
pub struct Plan {
    /// Its server name, `localhost:PORT`.
    pub server_name: String,
    /// Where clients reach it, without a slash at the end.
    pub client_url: String,
    directory: PathBuf,
    ports: [u16; 2],
}

/// A running Synapse; stopped when dropped.
pub struct Synapse {
    /// Its server name, `localhost:PORT`.
    pub server_name: String,
    /// Where clients reach it, without a slash at the end.
    pub client_url: String,
    plan: Plan,
    process: Process,
}

impl Plan {
    /// A Synapse with its files in `directory` and ports that are free now.
    pub fn new(directory: &Path) -> Result<Self> {
        Self::at(directory, [free_port()?, free_port()?])
    }

    /// A Synapse with a port for federation and a port for clients.
    pub fn at(directory: &Path, ports: [u16; 2]) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        Ok(Self {
            server_name: format!("localhost:{}", ports[0]),
            client_url: format!("http://127.0.0.1:{}", ports[1]),
            directory: directory.to_owned(),
            ports,
        })
    }

    /// Writes the configuration and starts it, with the appservice whose registration file is given, and waits until it
    /// answers.
    pub async fn start(self, authority: &Authority, registration: Option<&Path>) -> Result<Synapse> {
        let tls = authority.issue(&self.directory)?;
        let yaml = self.configuration(&tls.certificate, &tls.key, &authority.file, registration);
        std::fs::write(self.directory.join("homeserver.yaml"), yaml)?;
        std::fs::write(self.directory.join("log.yaml"), LOG)?;
        let seed = data_encoding::BASE64_NOPAD.encode(&rand::random::<[u8; 32]>());
        let key = self.directory.join("signing.key");
        // Others remember the key of a Synapse that was here before.
        if !key.exists() {
            std::fs::write(key, format!("ed25519 a_test {seed}\n"))?;
        }
        let process = self.spawn().await?;
        Ok(Synapse { server_name: self.server_name.clone(), client_url: self.client_url.clone(), plan: self, process })
    }

    async fn spawn(&self) -> Result<Process> {
        let python = tokio::task::spawn_blocking(|| venv::python(&mut say)).await??;
        let mut process = Program::new("Synapse", python, &self.directory.join("output.log"))
            .args(["-m", "synapse.app.homeserver", "-c", "homeserver.yaml"])
            .directory(&self.directory)
            .start()?;
        let health = format!("{}/health", self.client_url);
        let http = http(None)?;
        let ready = async {
            while !http.get(&health).send().await.is_ok_and(|answer| answer.status().is_success()) {
                process.check()?;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(Duration::from_secs(120), ready)
            .await
            .context("Synapse did not answer in two minutes")??;
        Ok(process)
    }

    fn configuration(&self, certificate: &Path, key: &Path, ca: &Path, registration: Option<&Path>) -> String {
        let [federation, client] = self.ports;
        let registrations = registration.map(|path| format!("\"{}\"", path.display())).unwrap_or_default();
        let unlimited = "{per_second: 100000, burst_count: 100000}";
        format!(
            r#"server_name: "{name}"
public_baseurl: "{url}/"
report_stats: false
listeners:
  - {{port: {federation}, type: http, tls: true, bind_addresses: ["127.0.0.1"], resources: [{{names: [federation, client], compress: false}}]}}
  - {{port: {client}, type: http, tls: false, bind_addresses: ["127.0.0.1"], resources: [{{names: [client], compress: false}}]}}
tls_certificate_path: "{certificate}"
tls_private_key_path: "{key}"
federation_custom_ca_list: ["{ca}"]
ip_range_blacklist: []
federation_ip_range_blacklist: []
trusted_key_servers: []
suppress_key_server_warning: true
database: {{name: sqlite3, args: {{database: homeserver.db}}}}
signing_key_path: signing.key
media_store_path: media
log_config: log.yaml
registration_shared_secret: test
macaroon_secret_key: test
form_secret: test
enable_registration: true
enable_registration_without_verification: true
allow_public_rooms_over_federation: true
allow_public_rooms_without_auth: true
bcrypt_rounds: 4
filter_timeline_limit: 5000
app_service_config_files: [{registrations}]
rc_message: {unlimited}
rc_registration: {unlimited}
rc_login: {{address: {unlimited}, account: {unlimited}, failed_attempts: {unlimited}}}
rc_joins: {{local: {unlimited}, remote: {unlimited}}}
rc_joins_per_room: {unlimited}
rc_invites: {{per_room: {unlimited}, per_user: {unlimited}, per_issuer: {unlimited}}}
rc_room_creation: {unlimited}
rc_admin_redaction: {unlimited}
rc_key_requests: {unlimited}
rc_federation: {{window_size: 1000, sleep_limit: 100000, sleep_delay: 1, reject_limit: 100000, concurrent: 100}}
federation:
  client_timeout: 30s
  max_short_retries: 1
  max_long_retries: 2
  max_short_retry_delay: 1s
  max_long_retry_delay: 2s
  destination_min_retry_interval: 1s
  destination_retry_multiplier: 1
  destination_max_retry_interval: 2s
"#,
            name = self.server_name,
            url = self.client_url,
            certificate = certificate.display(),
            key = key.display(),
            ca = ca.display(),
        )
    }
}

impl Synapse {
    /// Registers a user and returns a client that is logged in as that user.
    pub async fn register(&self, localpart: &str, password: &str) -> Result<Client> {
        Client::register(&self.client_url, localpart, password).await
    }

    /// Its process ID.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Stops it.
    pub fn stop(&mut self) {
        self.process.stop();
    }

    /// Starts it again, on the same database, after [`Synapse::stop`].
    pub async fn start(&mut self) -> Result<()> {
        self.process = self.plan.spawn().await?;
        Ok(())
    }

    /// Fails when it is not running any more.
    pub fn check(&mut self) -> Result<()> {
        self.process.check()
    }
}

/// A server name's port.
pub fn port_of(server_name: &str) -> Result<u16> {
    let port = server_name.rsplit_once(':').map(|(_, port)| port);
    let port = port.with_context(|| format!("{server_name} has no port"))?.parse()?;
    ensure!(port != 0, "{server_name} has no port");
    Ok(port)
}

const LOG: &str = "version: 1
formatters: {precise: {format: '%(asctime)s %(name)s %(levelname)s %(request)s %(message)s'}}
handlers: {file: {class: logging.FileHandler, formatter: precise, filename: homeserver.log}}
root: {level: INFO, handlers: [file]}
disable_existing_loggers: false
";
