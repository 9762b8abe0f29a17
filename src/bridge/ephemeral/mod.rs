//! Typing, read receipts and presence: carried over as EDUs of the ghosts, straight to the servers with users in the room
//! across. Nothing of it is stored: the newest of each user and room counts, and what is lost comes again.
//!
//! A hub hands nobody's EDUs round. The draft has servers send them directly to whom they are for, and whoever gets one from
//! another server than its user's could not believe it. So in a room that LM servers and other homeservers share nothing is done here:
//! each tells all others.

mod carry;
mod waiting;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use moka::sync::Cache;
use ruma::{OwnedServerName, OwnedUserId, RoomId, ServerName};
use tokio::sync::Notify;

use self::carry::{Done, carry, look};
use self::waiting::{From, Waiting, What, server};
use super::core::Core;
use crate::admin::metrics;
use crate::event::{Edu, EduKey, Ignored};
use crate::identity::Side;

/// Of how many users it is remembered what crossed last.
const REMEMBERED: u64 = 10_000;
/// For how long a server is known of whose users something crossed.
const KNOWN: Duration = Duration::from_secs(24 * 3600);
/// How often it is looked whether something is due, at least: clocks can be set.
const LOOK: Duration = Duration::from_secs(1);

/// What waits to be carried over, and what was.
pub(super) struct Ephemeral {
    waiting: Mutex<Waiting>,
    news: Notify,
    /// Up to where receipts went: the order of the event on its own side.
    read: Cache<(Side, EduKey), i64>,
    /// When presence crossed last.
    shown: Cache<OwnedUserId, i64>,
    /// The servers of whose users something crossed of late.
    known: Cache<OwnedServerName, ()>,
    /// The portals that users are in.
    portals: Cache<(Side, OwnedUserId), Arc<[i64]>>,
}

impl Default for Ephemeral {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            news: Notify::default(),
            read: Cache::new(REMEMBERED),
            shown: Cache::new(REMEMBERED),
            known: Cache::builder().max_capacity(REMEMBERED).time_to_live(KNOWN).build(),
            portals: Cache::builder().max_capacity(REMEMBERED).time_to_live(carry::PRESENCE_KNOWN).build(),
        }
    }
}

impl Ephemeral {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An EDU of another server came.
    pub(super) fn take(&self, core: &Core, side: Side, edu: Edu) {
        let Some(key) = edu.key() else { return };
        let settings = core.context.config.bridge;
        let is_on = match edu {
            Edu::Typing(_) => settings.typing,
            Edu::Receipt(_) => settings.receipts,
            _ => settings.presence,
        };
        let kind = edu.kind();
        // Some servers send all that they have to say by one protocol's endpoint.
        let side = edu.room().map_or(Some(side), |room_id| {
            [side, side.other()].into_iter().find(|side| core.registry.watches(*side, room_id))
        });
        if !is_on {
            metrics::edu_received(kind, Ignored::Off.code());
            return;
        }
        let Some(side) = side else {
            metrics::edu_received(kind, Ignored::NoPortal.code());
            return;
        };
        let key = (side, key);
        let from = if self.known.contains_key(server(&key)) { From::Known } else { From::Stranger };
        if self.waiting().put(key, core.now_ms(), What::Carry(edu, 0), from) {
            self.news.notify_one();
        } else {
            metrics::edu_received(kind, Ignored::Budget.code());
        }
    }

    /// A user of a server is in a portal.
    fn knows(&self, server: &ServerName) {
        self.known.insert(server.to_owned(), ());
    }

    /// Something was accepted in a room: who types there may have left.
    pub(super) fn look_at(&self, core: &Core, side: Side, room_id: &RoomId) {
        let mut waiting = self.waiting();
        if waiting.typing.is_empty() {
            return;
        }
        let typers = waiting.typing.get(&(side, room_id.to_owned()));
        let users: Vec<OwnedUserId> = typers.into_iter().flat_map(HashMap::keys).cloned().collect();
        for user in users {
            let key = (side, EduKey::Typing(room_id.to_owned(), user));
            if waiting.jobs.get(&key).is_none_or(|job| job.what == What::Look) {
                waiting.put(key, core.now_ms(), What::Look, From::Known);
            }
        }
        self.news.notify_one();
    }
}

/// Carries over what is due, for ever.
pub(super) async fn run(core: Arc<Core>) {
    loop {
        let next = core.ephemeral.waiting().take(core.now_ms());
        match next {
            Ok((key, what)) => {
                if AssertUnwindSafe(work(&core, key, what)).catch_unwind().await.is_err() {
                    tracing::error!("this gateway failed on an EDU");
                }
            }
            Err(None) => core.ephemeral.news.notified().await,
            Err(Some(left)) => {
                let left = Duration::from_millis(u64::try_from(left).unwrap_or(0)).min(LOOK);
                let _ = tokio::time::timeout(left, core.ephemeral.news.notified()).await;
            }
        }
    }
}

async fn work(core: &Core, key: (Side, EduKey), what: What) {
    let side = key.0;
    let (kind, done) = match what {
        What::Look => return look(core, key).await,
        What::Carry(edu, tries) => (edu.kind(), carry(core, side, edu, tries).await),
    };
    match done {
        Ok(Done::Carried) => metrics::edu_received(kind, "ok"),
        Ok(Done::Later) => {}
        Ok(Done::Ignored(reason)) => metrics::edu_received(kind, reason.code()),
        Err(refusal) => {
            tracing::debug!(%refusal, kind, "an EDU did not cross");
            let reason = if refusal.is_transient() { Ignored::Failed } else { Ignored::Refused };
            metrics::edu_received(kind, reason.code());
        }
    }
}
