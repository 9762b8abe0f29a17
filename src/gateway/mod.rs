//! The composition root: builds the rooms of the house, gives each what it needs, and puts the listeners in front of them.

mod connections;
pub(crate) mod descriptors;
mod devices;
mod edus;
mod greeting;
mod handshakes;
mod housekeeping;
mod listen;
mod lookups;
mod media;
mod notary;
mod reads;
mod routes;
mod signed;
mod transaction;
mod unproved;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::middleware::from_fn_with_state;
use rand::RngCore as _;
use rand::rngs::OsRng;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

pub use self::listen::ListenError;
pub(crate) use self::listen::Listener;
pub use self::routes::{Endpoint, Federation, Takes, federation_endpoints, federation_routes};
pub use self::transaction::parse as transaction_parts;
use crate::admin::{Admin, metrics};
use crate::appservice::{Appservice, AppserviceError};
use crate::bridge::Bridge;
use crate::clock::{SharedClock, SystemClock};
use crate::config::Config;
use crate::dag::Dag;
use crate::event::VerifyKey;
use crate::federation::{Asked, Client, ClientOptions, Context, Large, OutboundQueues};
use crate::identity::{Keyring, MediaNames, SigningKey, SigningKeyError, Trust};
use crate::lm::Lm;
use crate::refusal::Refusal;
use crate::store::{self, Store, StoreError};

/// How long requests under way may take when the gateway stops.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// How long `/health` still says that another process has taken the database.
const TOLD: Duration = Duration::from_secs(30);

/// Why the gateway could not start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The signing key.
    #[error(transparent)]
    SigningKey(#[from] SigningKeyError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The HTTP client, for instance a certificate authority that cannot be read.
    #[error("the client for other servers: {0}")]
    Client(String),
    /// The appservice, for instance its registration file.
    #[error(transparent)]
    Appservice(#[from] AppserviceError),
    /// The portals could not be taken up again.
    #[error("the bridge: {0}")]
    Bridge(Refusal),
    /// The gateway's own key must not be used any more.
    #[error(
        "`federation.leaked_keys` holds the gateway's own key, which is in {}: move that file away, and a new key is made",
        .0.display()
    )]
    OwnKeyLeaked(std::path::PathBuf),
    /// A listener.
    #[error(transparent)]
    Listen(#[from] ListenError),
}

impl GatewayError {
    /// What to do about it, where the error does not say so itself.
    pub fn advice(&self) -> Option<&'static str> {
        match self {
            Self::SigningKey(error) => Some(error.advice()),
            Self::Listen(error) => Some(error.advice()),
            Self::Client(_) => Some("correct `federation.custom_ca`, or install the system's certificate authorities"),
            Self::Store(StoreError::Migration(_)) => {
                Some("start the isthmus that wrote the database, or a newer one, or name another in `database.url`")
            }
            Self::Store(_) | Self::Appservice(_) | Self::Bridge(_) | Self::OwnKeyLeaked(_) => None,
        }
    }
}

/// Builds what every part of the gateway holds. Nothing is sent yet, and nobody else is kept from the database.
pub async fn context(config: Config, clock: SharedClock) -> Result<Context, GatewayError> {
    let store = Store::open(&config.database.url).await?;
    context_on(store, config, clock).await
}

async fn context_on(store: Store, config: Config, clock: SharedClock) -> Result<Context, GatewayError> {
    let signing_key = Arc::new(SigningKey::load_or_generate(&config.signing_key)?);
    housekeeping::bring_back(&store, &*clock).await?;
    let server_name = config.server_name.clone();
    let options = ClientOptions {
        custom_ca: config.federation.custom_ca.clone(),
        allow_private_networks: config.federation.allow_private_networks,
        resolve: config.federation.resolve.clone(),
    };
    let client = Client::new(server_name.clone(), signing_key.clone(), options)
        .map_err(|error| GatewayError::Client(error.to_string()))?;
    let leaked =
        config.federation.leaked_keys.iter().filter_map(|key| Some(VerifyKey::from_base64(key).ok()?.to_base64()));
    let leaked: BTreeSet<String> = leaked.collect();
    if leaked.contains(&signing_key.public_base64()) {
        return Err(GatewayError::OwnKeyLeaked(config.signing_key));
    }
    let (own, fetcher) = (signing_key.clone(), Arc::new(client.clone()));
    let trust = Trust { denied: leaked, notaries: config.federation.notaries.clone() };
    let keyring = Keyring::with_trust(server_name.clone(), own, fetcher, store.clone(), clock.clone(), trust);
    keyring.remember_own().await?;
    let outbound =
        OutboundQueues::new(store.clone(), clock.clone(), server_name.clone(), client.clone(), keyring.clone());
    let mut fresh = [0; 32];
    OsRng.fill_bytes(&mut fresh);
    let media = MediaNames::new(server_name.clone(), &store::media::secret(&store, fresh).await?);
    Ok(Context {
        server_name,
        signing_key,
        keyring,
        store,
        clock,
        client,
        outbound,
        asked: Asked::default(),
        large: Large::default(),
        media,
        config: Arc::new(config),
    })
}

/// A gateway that runs.
pub struct Gateway {
    context: Context,
    bridge: Bridge,
    appservice: Option<Appservice>,
    public: Listener,
    admin: Listener,
    /// Cancelled when what is done now and then is to end.
    chores: CancellationToken,
}

impl Gateway {
    /// Starts everything: takes up what was left at the last stop, listens, and only then sends.
    pub async fn start(config: Config, clock: SharedClock) -> Result<Self, GatewayError> {
        let store = Store::open_alone(&config.database.url).await?;
        let context = context_on(store, config, clock).await?;
        let config = context.config.clone();
        let bridge = Bridge::new(context.clone());
        let between = bridge.between();
        let lm = Lm::new(context.clone(), between.clone());
        let dag = Dag::new(context.clone(), between.clone());
        let appservice = match &config.appservice {
            Some(settings) => Some(Appservice::new(&context, &bridge, settings).await?),
            None => None,
        };
        let federation = Federation::new(context.clone(), lm.clone(), dag.clone(), between);
        let media = federation.media.clone();
        let public = match &appservice {
            Some(appservice) => federation_routes(federation).merge(appservice.routes()),
            None => federation_routes(federation),
        };
        let public = public.layer(from_fn_with_state("federation", metrics::track));
        let admin = Admin {
            context: context.clone(),
            lm: lm.clone(),
            dag: dag.clone(),
            bridge: bridge.clone(),
            appservice: appservice.clone(),
            media: media.clone(),
        };
        media.load().await;
        // Before anything new comes: who is asked to keep it must know the portals, and what waits was there first.
        let loaded = bridge.load(lm.clone(), dag.clone()).await.map_err(GatewayError::Bridge)?;
        lm.resume().await.map_err(GatewayError::Bridge)?;
        dag.resume().await.map_err(GatewayError::Bridge)?;
        let public = Listener::open("federation", &config.listen, public).await?;
        let summary = Arc::new(admin.clone());
        let admin = Listener::open_plain("admin", config.admin.address, admin.routes()).await?;
        bridge.resume(loaded).await.map_err(GatewayError::Bridge)?;
        context.outbound.start().await?;
        if let Some(appservice) = &appservice {
            appservice.start(summary).await?;
        }
        tracing::info!(
            server_name = %context.server_name,
            key = context.signing_key.id(),
            listen = %config.listen.address,
            admin = %config.admin.address,
            "the gateway runs"
        );
        let chores = CancellationToken::new();
        tokio::spawn(chores.clone().run_until_cancelled_owned(housekeeping::run(context.clone())));
        tokio::spawn(chores.clone().run_until_cancelled_owned(housekeeping::watch_clock(context.clone())));
        tokio::spawn(chores.clone().run_until_cancelled_owned(greeting::run(context.clone())));
        Ok(Self { context, bridge, appservice, public, admin, chores })
    }

    /// What the parts share.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// The bridge.
    pub fn bridge(&self) -> &Bridge {
        &self.bridge
    }

    /// Where other servers reach it.
    pub fn address(&self) -> SocketAddr {
        self.public.address()
    }

    /// Runs until `stop` is cancelled, then stops in order: no new requests, no new work, then the store. Stops by itself when
    /// another process has taken the database: `/health` tells of it for half a minute.
    pub async fn run(self, stop: CancellationToken) -> Result<(), GatewayError> {
        let lost = tokio::select! {
            () = stop.cancelled() => None,
            lost = self.context.store.lose_claim() => Some(lost),
        };
        tracing::info!("stopping");
        self.public.stop(STOP_GRACE);
        if lost.is_none() {
            self.admin.stop(STOP_GRACE);
        }
        self.public.ended().await;
        if let Some(appservice) = &self.appservice {
            appservice.stop();
        }
        self.chores.cancel();
        self.bridge.stop().await;
        self.context.outbound.stop().await;
        if let Some(lost) = &lost {
            tracing::error!(error = %lost, "nothing is served any more");
            let _ = tokio::time::timeout(TOLD, stop.cancelled()).await;
        }
        self.admin.stop(STOP_GRACE);
        self.admin.ended().await;
        self.context.store.close().await;
        tracing::info!("stopped");
        lost.map_or(Ok(()), |lost| Err(lost.into()))
    }
}

/// Runs the gateway until the process is told to stop (SIGINT or SIGTERM), which may be while it starts.
pub async fn serve(config: Config) -> Result<(), GatewayError> {
    let told = told_to_stop();
    let stop = CancellationToken::new();
    let asked = stop.clone();
    tokio::spawn(async move {
        told.await;
        asked.cancel();
    });
    descriptors::raise();
    let gateway = tokio::select! {
        started = Gateway::start(config, Arc::new(SystemClock)) => started?,
        () = stop.cancelled() => return Ok(()),
    };
    gateway.run(stop).await
}

/// Listens from the call on: the first process of a container is not ended by a signal to which it does not listen.
fn told_to_stop() -> impl Future<Output = ()> {
    let signals = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
    async move {
        match signals {
            (Ok(mut interrupt), Ok(mut terminate)) => tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            },
            // They end the process, then.
            _ => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::store::testing::{both_databases, take_claim_away};

    #[tokio::test]
    async fn inv_6_a_gateway_whose_database_another_process_has_taken_serves_no_more_and_says_so() {
        both_databases(|url| async move {
            if url.starts_with("sqlite:") {
                return;
            }
            let directory = tempfile::tempdir().unwrap();
            let config = serde_json::from_value(json!({
                "server_name": "g.example",
                "signing_key": directory.path().join("key"),
                "database": { "url": url },
                "media": { "cache_dir": directory.path().join("media") },
                "listen": { "address": "127.0.0.1:0" },
                "admin": { "address": "127.0.0.1:0", "token": "0123456789abcdef0123456789abcdef" },
            }));
            let gateway = Gateway::start(config.unwrap(), Arc::new(SystemClock)).await.unwrap();
            let (public, admin) = (gateway.public.address(), gateway.admin.address());
            let stop = CancellationToken::new();
            let running = tokio::spawn(gateway.run(stop.clone()));
            tokio::net::TcpStream::connect(public).await.unwrap();
            let _other = take_claim_away(&url).await;
            while tokio::net::TcpStream::connect(public).await.is_ok() {
                assert!(!running.is_finished());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let health = reqwest::get(format!("http://{admin}/health")).await.unwrap();
            assert_eq!(health.status(), 503);
            let health = health.text().await.unwrap();
            assert!(health.contains("nothing is served: another isthmus serves from this database"), "{health}");
            stop.cancel();
            let ended = running.await.unwrap();
            assert!(matches!(ended, Err(GatewayError::Store(StoreError::InUse))), "{ended:?}");
        })
        .await;
    }
}
