//! The appservice: the control plane between the gateway and its Synapse. Bridged events never come from here; what does is
//! the aliases in the Synapse's own namespace, third-party look-ups, and the bot's direct chats.

mod aliases;
mod answers;
mod commands;
mod endpoints;
mod event;
mod homeserver;
mod ping;
mod portals;
mod registration;
#[cfg(test)]
mod tests;
mod thirdparty;
mod token;
mod worker;

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use axum::Router;
use ruma::{OwnedServerName, OwnedUserId};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use self::aliases::{Aliases, Publisher};
use self::answers::Answers;
pub use self::answers::Summary;
use self::event::Chat;
pub use self::homeserver::{Homeserver, HomeserverError};
pub use self::ping::HomeserverStatus;
use self::ping::{Pinger, Status};
use self::portals::{OfBridge, Portals};
pub use self::registration::{Registered, Registration, RegistrationError, misses_tls, own_url, register};
pub use self::token::{Bearer, Token};
pub use self::worker::LONGEST_PAUSE_MS;
use self::worker::{Chats, Worker};
use crate::bridge::Bridge;
use crate::clock::SharedClock;
use crate::config;
use crate::federation::Context;
use crate::store::{Store, StoreError, appservice as rows};

/// For how long transactions are known, in milliseconds.
const REMEMBERED: i64 = 30 * 24 * 3600 * 1000;

/// Why the appservice could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum AppserviceError {
    /// The registration cannot be used.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// The registration's user cannot be.
    #[error("sender_localpart of the registration makes no user ID: {0}")]
    Sender(#[from] ruma::IdParseError),
    /// The client of the homeserver could not be made.
    #[error("the homeserver: {0}")]
    Homeserver(#[from] HomeserverError),
    /// The store could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The appservice; clones share it.
#[derive(Clone)]
pub struct Appservice {
    inner: Arc<Inner>,
}

/// What it stands on.
struct Base {
    store: Store,
    clock: SharedClock,
}

struct Inner {
    base: Base,
    admins: Vec<OwnedUserId>,
    registration: Registration,
    homeserver: Homeserver,
    homeserver_name: OwnedServerName,
    bot: OwnedUserId,
    gateway_bot: OwnedUserId,
    portals: Arc<dyn Portals>,
    aliases: Arc<Aliases>,
    chats: Chats,
    status: Status,
    news: Arc<Notify>,
    tasks: Mutex<JoinSet<()>>,
}

impl Appservice {
    /// The appservice that `[appservice]` describes, with the registration that it names. Nothing runs before
    /// [`Appservice::start`].
    pub async fn new(
        context: &Context,
        bridge: &Bridge,
        settings: &config::Appservice,
    ) -> Result<Self, AppserviceError> {
        let portals = Arc::new(OfBridge { bridge: bridge.clone(), store: context.store.clone() });
        Self::over(
            Base { store: context.store.clone(), clock: context.clock.clone() },
            portals,
            settings,
            &context.config,
        )
        .await
    }

    async fn over(
        base: Base,
        portals: Arc<dyn Portals>,
        settings: &config::Appservice,
        config: &config::Config,
    ) -> Result<Self, AppserviceError> {
        let registration = Registration::load(&settings.registration)?;
        let homeserver_name = settings.homeserver_name.clone();
        let bot = registration.sender(&homeserver_name)?;
        let homeserver = Homeserver::new(
            settings.homeserver_url.clone(),
            registration.as_token.clone(),
            &config.federation.custom_ca,
        )?;
        let chats = rows::chats(&base.store).await?.into_iter();
        let chats = chats.map(|(room_id, with, is_direct)| (room_id, Chat { with, is_direct })).collect();
        let publisher = Publisher {
            portals: portals.clone(),
            homeserver: homeserver.clone(),
            bot: bot.clone(),
            store: base.store.clone(),
            clock: base.clock.clone(),
        };
        let inner = Inner {
            base,
            admins: config.access.admins.clone(),
            registration,
            homeserver,
            aliases: Arc::new(Aliases::new(publisher, homeserver_name.clone())),
            homeserver_name,
            bot,
            gateway_bot: crate::bridge::bot_of(&config.server_name),
            portals,
            chats: Arc::new(ArcSwap::from_pointee(chats)),
            status: Status::default(),
            news: Arc::default(),
            tasks: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What the Synapse calls, for both listeners.
    pub fn routes(&self) -> Router {
        endpoints::routes(self.clone())
    }

    /// Starts to ping and to work, once the listeners are there. `summary` tells admins how the gateway is doing.
    pub async fn start(&self, summary: Arc<dyn Summary>) -> Result<(), StoreError> {
        let before = self.inner.base.clock.now_ms().saturating_sub(REMEMBERED);
        self.inner
            .base
            .store
            .write(move |tx| Box::pin(async move { rows::forget_transactions(tx, before).await }))
            .await?;
        let mut tasks = self.inner.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.spawn(self.pinger().run());
        tasks.spawn(self.worker(summary).run());
        Ok(())
    }

    /// Stops both. What was not done is in the store.
    pub fn stop(&self) {
        self.inner.tasks.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }

    /// There is something for the worker: a portal has ended.
    pub fn wake(&self) {
        self.inner.news.notify_one();
    }

    /// How the homeserver was found at the last ping.
    pub fn status(&self) -> HomeserverStatus {
        self.inner.status.read()
    }

    fn pinger(&self) -> Pinger {
        let inner = &self.inner;
        Pinger {
            homeserver: inner.homeserver.clone(),
            id: inner.registration.id.clone(),
            bot: inner.bot.clone(),
            clock: inner.base.clock.clone(),
            status: inner.status.clone(),
        }
    }

    /// Not kept in what is shared: what sums up has the appservice, too.
    fn worker(&self, summary: Arc<dyn Summary>) -> Worker {
        let inner = &self.inner;
        let answers = Answers {
            portals: inner.portals.clone(),
            aliases: inner.aliases.clone(),
            homeserver: inner.homeserver.clone(),
            homeserver_name: inner.homeserver_name.clone(),
            gateway_bot: inner.gateway_bot.clone(),
            admins: inner.admins.clone(),
            summary,
        };
        Worker {
            store: inner.base.store.clone(),
            clock: inner.base.clock.clone(),
            portals: inner.portals.clone(),
            homeserver: inner.homeserver.clone(),
            homeserver_name: inner.homeserver_name.clone(),
            bot: inner.bot.clone(),
            publisher: inner.aliases.publisher.clone(),
            answers,
            chats: inner.chats.clone(),
            news: inner.news.clone(),
        }
    }
}
