//! `/join #lm_NAME_SERVER:SYNAPSE`: the homeserver asks for an alias that it does not know, and the gateway finds or makes the
//! portal and publishes the alias there, before it answers.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use http::StatusCode;
use ruma::{OwnedServerName, OwnedUserId, RoomId};
use tokio::sync::Semaphore;

use super::portals::Portals;
use super::{Homeserver, HomeserverError};
use crate::admin::metrics::METRICS;
use crate::bridge::lm_alias;
use crate::clock::SharedClock;
use crate::refusal::Refusal;
use crate::seam::AliasTarget;
use crate::store::{Store, appservice as rows};

/// How long the homeserver is kept waiting; it gives up after 60 s. The work goes on behind it.
const PATIENCE: Duration = Duration::from_secs(50);
/// How many aliases are looked into at once.
const AT_ONCE: usize = 32;
/// The form of the aliases in the appservice's namespace.
const PREFIX: &str = "lm_";

/// Why an alias leads nowhere.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum AliasError {
    /// It is no alias of this appservice.
    #[error("{0} is not an alias of this appservice")]
    NotOurs(String),
    /// There is no portal and none was made.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The homeserver did not take the alias.
    #[error("the homeserver did not take the alias: {0}")]
    Homeserver(#[from] HomeserverError),
    /// It takes longer than the homeserver waits; asking again later joins in.
    #[error("it is still being looked into after {} s", PATIENCE.as_secs())]
    Slow,
    /// Too many others are being looked into.
    #[error("too many aliases of this hub, or of all hubs, are being looked into")]
    Busy,
}

impl AliasError {
    /// Whether it may go well later.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::NotOurs(_) => false,
            Self::Refused(refusal) => refusal.is_transient(),
            Self::Homeserver(error) => error.is_transient(),
            Self::Slow | Self::Busy => true,
        }
    }

    /// The label in metrics.
    fn label(&self) -> &'static str {
        match self {
            Self::NotOurs(_) => "not_ours",
            Self::Refused(refusal) => refusal.code(),
            Self::Homeserver(_) => "homeserver",
            Self::Slow => "slow",
            Self::Busy => "busy",
        }
    }
}

/// How many of those may be of one owner's hubs, whose answers can be slow.
const AT_ONCE_OF_ONE: usize = 8;

/// What registries of countries put between the country and the names that they give: `co.uk`, `com.au`, `or.jp`. Nearly nobody
/// can own such a name, so who asks under one is told by the label before it.
const SECOND_LEVEL: [&str; 13] = ["ac", "co", "com", "edu", "go", "gob", "gov", "ne", "net", "nom", "or", "org", "sch"];

/// Whose hub an alias names: the last two labels of its host name, since everybody can give names below an own one; under the
/// suffixes of countries that have two labels the last three.
fn owner(localpart: &str) -> String {
    let server = localpart.rsplit('_').next().unwrap_or_default();
    // Colons are written so in aliases.
    let host = server.split("=3a").next().unwrap_or_default();
    if host.parse::<IpAddr>().is_ok() || host.starts_with("=5b") {
        return host.to_owned();
    }
    let mut last = host.rsplit('.');
    let of_country = last.next().is_some_and(|label| label.len() == 2)
        && last.next().is_some_and(|label| SECOND_LEVEL.contains(&label));
    let mut labels: Vec<&str> = host.rsplit('.').take(if of_country { 3 } else { 2 }).collect();
    labels.reverse();
    labels.join(".")
}

type Query = Shared<BoxFuture<'static, Result<(), AliasError>>>;

/// The queries for aliases, each alias one at a time.
pub(super) struct Aliases {
    pub(super) publisher: Arc<Publisher>,
    homeserver_name: OwnedServerName,
    running: Arc<Mutex<HashMap<String, Query>>>,
    permits: Arc<Semaphore>,
}

impl Aliases {
    pub(super) fn new(publisher: Publisher, homeserver_name: OwnedServerName) -> Self {
        let permits = Arc::new(Semaphore::new(AT_ONCE));
        Self { publisher: Arc::new(publisher), homeserver_name, running: Arc::default(), permits }
    }

    /// Makes `alias` lead to its portal. Returns when it does.
    pub(super) async fn query(&self, alias: &str) -> Result<(), AliasError> {
        let answer = match self.start(alias) {
            Ok(query) => tokio::time::timeout(PATIENCE, query).await.unwrap_or(Err(AliasError::Slow)),
            Err(error) => Err(error),
        };
        let label = answer.as_ref().map_or_else(AliasError::label, |()| "ok");
        METRICS.appservice_alias_queries.with_label_values(&[label]).inc();
        match &answer {
            Ok(()) => tracing::info!(alias, "an alias was published at the homeserver"),
            Err(reason) => tracing::warn!(alias, %reason, "an alias that the homeserver asked for leads nowhere"),
        }
        answer
    }

    fn localpart<'a>(&self, alias: &'a str) -> Option<&'a str> {
        alias.strip_prefix('#')?.strip_suffix(self.homeserver_name.as_str())?.strip_suffix(':')
    }

    fn start(&self, alias: &str) -> Result<Query, AliasError> {
        let not_ours = || AliasError::NotOurs(alias.to_owned());
        let localpart = self
            .localpart(alias)
            .filter(|localpart| localpart.starts_with(PREFIX) && alias.len() <= 255)
            .ok_or_else(not_ours)?;
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(query) = running.get(alias) {
            return Ok(query.clone());
        }
        let whose = owner(localpart);
        if running.keys().filter(|other| owner(self.localpart(other).unwrap_or_default()) == whose).count()
            >= AT_ONCE_OF_ONE
        {
            return Err(AliasError::Busy);
        }
        let permit = self.permits.clone().try_acquire_owned().map_err(|_| AliasError::Busy)?;
        let (publisher, alias, localpart) = (self.publisher.clone(), alias.to_owned(), localpart.to_owned());
        let all = self.running.clone();
        let key = alias.clone();
        // Spawned, so that it goes on when the homeserver has stopped waiting.
        let task = tokio::spawn(async move {
            let answer = publisher.publish(&alias, &localpart).await;
            all.lock().unwrap_or_else(PoisonError::into_inner).remove(&alias);
            drop(permit);
            answer
        });
        let lost = |_| Err(Refusal::Internal("the query was given up".to_owned()).into());
        let query = task.map(move |answer| answer.unwrap_or_else(lost)).boxed().shared();
        running.insert(key, query.clone());
        Ok(query)
    }
}

/// Finds or makes the portal and tells the homeserver.
pub(super) struct Publisher {
    pub(super) portals: Arc<dyn Portals>,
    pub(super) homeserver: Homeserver,
    pub(super) bot: OwnedUserId,
    pub(super) store: Store,
    pub(super) clock: SharedClock,
}

impl Publisher {
    async fn publish(&self, alias: &str, localpart: &str) -> Result<(), AliasError> {
        let target = self.portals.resolve_alias(localpart).await?;
        let (stored, room) = (alias.to_owned(), target.room_id.clone());
        // First, so that it is taken away again with the portal, whatever happens.
        let write = self.store.write(move |tx| Box::pin(async move { rows::add_alias(tx, &stored, &room).await }));
        write.await.map_err(Refusal::from)?;
        self.lead(alias, localpart, &target).await
    }

    /// Has an alias whose portal is over lead to the portal that has the name now, and be listed there, as when a room was replaced. False
    /// when no portal has it.
    pub(super) async fn lead_on(&self, alias: &str, localpart: &str) -> Result<bool, AliasError> {
        let Some(target) = self.portals.known_alias(localpart) else { return Ok(false) };
        let (stored, room) = (alias.to_owned(), target.room_id.clone());
        let begin = self.store.write(move |tx| Box::pin(async move { rows::lead_on(tx, &stored, &room).await }));
        begin.await.map_err(Refusal::from)?;
        self.lead(alias, localpart, &target).await?;
        let (stored, room) = (alias.to_owned(), target.room_id);
        let done = self.store.write(move |tx| Box::pin(async move { rows::led_on(tx, &stored, &room).await }));
        done.await.map_err(Refusal::from)?;
        Ok(true)
    }

    async fn lead(&self, alias: &str, localpart: &str, target: &AliasTarget) -> Result<(), AliasError> {
        match self.put(alias, target).await {
            // The homeserver has never heard of the room. An invite for one of its users makes it known.
            Err(error) if error.status() == Some(StatusCode::BAD_REQUEST) => {
                self.invite_bot(&target.room_id).await?;
                self.put(alias, target).await?;
            }
            other => other?,
        }
        self.list(localpart, &target.room_id).await;
        Ok(())
    }

    /// In the homeserver's directory the rooms of each LM server are a list. An alias that is in none leads to its room all the same.
    async fn list(&self, localpart: &str, room_id: &RoomId) {
        let Some((_, hub)) = lm_alias(localpart) else { return };
        if let Err(error) = self.homeserver.list_room(hub.as_str(), room_id, true).await {
            tracing::info!(room = %room_id, %hub, %error, "a room could not be put into the homeserver's directory");
        }
    }

    async fn put(&self, alias: &str, target: &AliasTarget) -> Result<(), HomeserverError> {
        let put = || self.homeserver.put_alias(alias, &target.room_id, &target.servers);
        match put().await {
            Err(error) if error.status() == Some(StatusCode::CONFLICT) => {
                if self.homeserver.alias(alias).await? == target.room_id {
                    return Ok(());
                }
                // It leads to a portal that has ended.
                self.homeserver.delete_alias(alias).await?;
                put().await
            }
            other => other,
        }
    }

    async fn invite_bot(&self, room_id: &RoomId) -> Result<(), Refusal> {
        let (room, now) = (room_id.to_owned(), self.clock.now_ms());
        // First, so that the invite is withdrawn even when the gateway stops right after it.
        self.store.write(move |tx| Box::pin(async move { rows::add_invite(tx, &room, now).await })).await?;
        self.portals.invite(room_id, &self.bot).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hubs_below_one_name_are_of_one_owner() {
        for (localpart, expected) in [
            ("lm_tea_hub.example", "hub.example"),
            ("lm_a_tea_x.hub.example=3a8448", "hub.example"),
            ("lm_tea_y.x.hub.example", "hub.example"),
            ("lm_tea_x.hub.co.uk=3a8448", "hub.co.uk"),
            ("lm_tea_other.com.au", "other.com.au"),
            ("lm_tea_co.uk", "co.uk"),
            ("lm_tea_x.hub.de", "hub.de"),
            ("lm_tea_x.co.example", "co.example"),
            ("lm_tea_localhost=3a27448", "localhost"),
            ("lm_tea_192.0.2.1=3a8448", "192.0.2.1"),
            ("", ""),
        ] {
            assert_eq!(owner(localpart), expected, "{localpart}");
        }
    }
}
