//! The ping: at the start it makes the Synapse send at once what it has held back, later it shows in health whether the two
//! still reach each other.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::Rng as _;
use rand::rngs::OsRng;
use ruma::OwnedUserId;
use serde::Serialize;

use super::Homeserver;
use crate::admin::metrics::METRICS;
use crate::clock::SharedClock;

/// How long after a good ping the next one comes.
const PERIOD: Duration = Duration::from_secs(60);
/// The first wait after a bad one; it doubles up to the period.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// What the appservice's user calls itself.
const DISPLAYNAME: &str = "isthmus";

/// How the homeserver was found at the last ping.
#[derive(Debug, Clone, Default, Serialize, serde::Deserialize)]
pub struct HomeserverStatus {
    /// Whether the last ping came back.
    pub reachable: bool,
    /// When it was tried last, in milliseconds since the epoch.
    pub last_ping: Option<i64>,
    /// When a ping came back last.
    pub last_success: Option<i64>,
    /// What went wrong at the last ping.
    pub error: Option<String>,
    /// The transaction ID of the last ping that the homeserver sent on to this gateway: how `doctor` sees that it was this one.
    pub received: Option<String>,
    /// How often the homeserver called this gateway with the right token since its start.
    pub calls: u64,
    /// How often somebody called the appservice with a wrong token or none.
    pub refused_calls: u64,
}

/// Where the status is kept; clones share it.
#[derive(Clone, Default)]
pub(super) struct Status(Arc<Mutex<HomeserverStatus>>);

impl Status {
    pub(super) fn read(&self) -> HomeserverStatus {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The homeserver called the gateway's ping endpoint.
    pub(super) fn received(&self, transaction_id: Option<&str>) {
        let transaction_id = transaction_id.map(|id| id.chars().take(100).collect());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).received = transaction_id;
    }

    /// The appservice was called, with the right token or not.
    pub(super) fn called(&self, right: bool) {
        let mut status = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = if right { &mut status.calls } else { &mut status.refused_calls };
        *count = count.saturating_add(1);
    }

    fn tried(&self, now_ms: i64, error: Option<String>) {
        let mut status = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        status.last_ping = Some(now_ms);
        status.reachable = error.is_none();
        if error.is_none() {
            status.last_success = Some(now_ms);
        }
        status.error = error;
    }
}

/// What pings.
pub(super) struct Pinger {
    pub(super) homeserver: Homeserver,
    pub(super) id: String,
    pub(super) bot: OwnedUserId,
    pub(super) clock: SharedClock,
    pub(super) status: Status,
}

impl Pinger {
    /// Pings for ever.
    pub(super) async fn run(self) {
        let mut retry = FIRST_RETRY;
        let mut bot_is_made = false;
        loop {
            let was_reachable = self.status.read().reachable;
            let result = self.homeserver.ping(&self.id, &transaction_id()).await;
            METRICS.homeserver_up.set(i64::from(result.is_ok()));
            self.status.tried(self.clock.now_ms(), result.as_ref().err().map(ToString::to_string));
            let wait = match result {
                Ok(took) => {
                    if !was_reachable {
                        tracing::info!(?took, "the homeserver reaches this gateway");
                    }
                    retry = FIRST_RETRY;
                    PERIOD
                }
                Err(error) => {
                    if was_reachable || retry == FIRST_RETRY {
                        tracing::warn!(%error, "the ping through the homeserver failed; `isthmus doctor` says why");
                    }
                    let wait = retry;
                    retry = retry.saturating_mul(2).min(PERIOD);
                    wait
                }
            };
            if self.status.read().reachable && !bot_is_made {
                bot_is_made = self.make_bot().await;
            }
            tokio::time::sleep(wait).await;
        }
    }

    async fn make_bot(&self) -> bool {
        if let Err(error) = self.homeserver.register(self.bot.localpart()).await {
            tracing::warn!(user = %self.bot, %error, "the appservice's user could not be made at the homeserver");
            return false;
        }
        if let Err(error) = self.homeserver.set_displayname(&self.bot, DISPLAYNAME).await {
            tracing::debug!(user = %self.bot, %error, "the appservice's user could not be named");
        }
        true
    }
}

/// A transaction ID that no other ping has.
pub(super) fn transaction_id() -> String {
    format!("isthmus-{:016x}", OsRng.r#gen::<u64>())
}
