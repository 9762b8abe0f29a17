//! Does what the homeserver's events ask for, from the store: each thing on its own, so that one that fails stops no other, and the
//! rooms side by side, so that nobody waits for somebody else's hub.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures::{FutureExt as _, StreamExt as _, stream};
use ruma::{OwnedRoomId, OwnedUserId, RoomId, UserId};
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;

use super::aliases::Publisher;
use super::answers::Answers;
use super::commands::{self, Command, ENCRYPTED};
use super::event::{Chat, Work};
use super::portals::Portals;
use super::{Homeserver, HomeserverError};
use crate::admin::metrics::METRICS;
use crate::bridge::lm_alias;
use crate::clock::SharedClock;
use crate::refusal::Refusal;
use crate::store::appservice::{self as rows, WorkRow};
use crate::store::{Store, StoreError};

/// How often a thing is tried.
const ATTEMPTS: i64 = 12;
/// The first pause between two tries, in milliseconds, and how often it is doubled.
const FIRST_PAUSE_MS: i64 = 1_000;
const DOUBLINGS: i64 = 9;
/// The longest pause between two tries, in milliseconds.
pub const LONGEST_PAUSE_MS: i64 = FIRST_PAUSE_MS << DOUBLINGS;
/// How many things are taken from the store at once.
const BATCH: i64 = 50;
/// How long the worker sleeps at most.
const NAP: Duration = Duration::from_secs(30);
/// In how many rooms something is done at once.
const SIDE_BY_SIDE: usize = 8;

/// Why a thing could not be done.
#[derive(Debug, thiserror::Error)]
enum WorkError {
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("the homeserver: {0}")]
    Homeserver(#[from] HomeserverError),
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{0}")]
    Bad(String),
}

impl WorkError {
    fn is_transient(&self) -> bool {
        match self {
            Self::Refused(refusal) => refusal.is_transient(),
            Self::Homeserver(error) => error.is_transient(),
            Self::Store(_) => true,
            Self::Bad(_) => false,
        }
    }
}

/// The bot's chats.
pub(super) type Chats = Arc<ArcSwap<BTreeMap<OwnedRoomId, Chat>>>;

/// The worker.
pub(super) struct Worker {
    pub(super) store: Store,
    pub(super) clock: SharedClock,
    pub(super) portals: Arc<dyn Portals>,
    pub(super) homeserver: Homeserver,
    pub(super) homeserver_name: ruma::OwnedServerName,
    pub(super) bot: OwnedUserId,
    pub(super) publisher: Arc<Publisher>,
    pub(super) answers: Answers,
    pub(super) chats: Chats,
    pub(super) news: Arc<Notify>,
}

impl Worker {
    /// Works for ever.
    pub(super) async fn run(self) {
        loop {
            let nap = match self.round().await {
                Ok(nap) => nap,
                Err(error) => {
                    tracing::error!(%error, "what the homeserver's events ask for cannot be read from the store");
                    NAP
                }
            };
            // A wake-up during the round is kept by the notifier.
            let _ = tokio::time::timeout(nap, self.news.notified()).await;
        }
    }

    /// Does what is due and says how long there is nothing to do.
    pub(super) async fn round(&self) -> Result<Duration, StoreError> {
        loop {
            let due = rows::due(&self.store, self.clock.now_ms(), BATCH).await?;
            let mut rooms: BTreeMap<OwnedRoomId, Vec<(WorkRow, Work)>> = BTreeMap::new();
            let nothing = due.is_empty();
            for row in due {
                match serde_json::from_slice::<Work>(&row.work) {
                    Ok(work) => rooms.entry(work.room_id().to_owned()).or_default().push((row, work)),
                    Err(error) => self.settle(&row, Err(WorkError::Bad(error.to_string()))).await?,
                }
            }
            let rooms: Vec<_> = rooms.into_values().map(|rows| self.of_a_room(rows).boxed()).collect();
            let done: Vec<_> = stream::iter(rooms).buffer_unordered(SIDE_BY_SIDE).collect().await;
            done.into_iter().collect::<Result<(), _>>()?;
            if nothing {
                break;
            }
        }
        self.take_aliases_away().await?;
        let (waiting, next) = rows::waiting(&self.store).await?;
        METRICS.appservice_waiting.set(waiting);
        let until = next.map_or(i64::MAX, |next| next.saturating_sub(self.clock.now_ms()).max(0));
        Ok(Duration::from_millis(u64::try_from(until).unwrap_or_default()).min(NAP))
    }

    /// Of portals that are over, but for those that other portals have taken over: these lead there. What the homeserver does not take now
    /// is tried again in the next round.
    async fn take_aliases_away(&self) -> Result<(), StoreError> {
        for (alias, room_id) in rows::ended_aliases(&self.store).await? {
            let localpart =
                alias.strip_prefix('#').and_then(|alias| alias.split_once(':')).map(|(localpart, _)| localpart);
            if let Some((_, hub)) = localpart.and_then(lm_alias)
                && let Err(error) = self.homeserver.list_room(hub.as_str(), &room_id, false).await
            {
                tracing::info!(alias, room = %room_id, %error, "a room could not be taken out of the homeserver's directory");
            }
            if let Some(localpart) = localpart {
                match self.publisher.lead_on(&alias, localpart).await {
                    Ok(true) => {
                        tracing::info!(alias, room = %room_id, "an alias leads to the room that took the place of this one");
                        continue;
                    }
                    Ok(false) => {}
                    Err(error) if error.is_transient() => {
                        tracing::info!(alias, room = %room_id, %error, "an alias could not be led to another room yet");
                        return Ok(());
                    }
                    Err(error) => {
                        tracing::info!(alias, room = %room_id, %error, "an alias could not be led to another room");
                    }
                }
            }
            match self.homeserver.delete_alias(&alias).await {
                Err(error) if error.is_transient() => {
                    tracing::info!(alias, room = %room_id, %error, "an alias could not be taken away yet");
                    return Ok(());
                }
                Err(error) => tracing::info!(alias, room = %room_id, %error, "an alias was not there to be taken away"),
                Ok(()) => tracing::info!(alias, room = %room_id, "an alias was taken away: its portal has ended"),
            }
            self.store.write(move |tx| Box::pin(async move { rows::remove_alias(tx, &alias).await })).await?;
        }
        Ok(())
    }

    async fn of_a_room(&self, rows: Vec<(WorkRow, Work)>) -> Result<(), StoreError> {
        for (row, work) in rows {
            // A thing that panics is poison, and the rest is not to suffer from it.
            let result = AssertUnwindSafe(self.work(work))
                .catch_unwind()
                .await
                .unwrap_or_else(|_| Err(WorkError::Bad("it panicked".to_owned())));
            self.settle(&row, result).await?;
        }
        Ok(())
    }

    async fn settle(&self, row: &WorkRow, result: Result<(), WorkError>) -> Result<(), StoreError> {
        let (seq, now) = (row.seq, self.clock.now_ms());
        let label = match result {
            Ok(()) => {
                self.store.write(move |tx| Box::pin(async move { rows::done(tx, seq).await })).await?;
                "done"
            }
            Err(error) if error.is_transient() && row.attempts < ATTEMPTS => {
                let due = now.saturating_add(FIRST_PAUSE_MS << row.attempts.clamp(0, DOUBLINGS));
                tracing::info!(seq, %error, "what a homeserver's event asks for is tried again later");
                self.store.write(move |tx| Box::pin(async move { rows::put_off(tx, seq, due).await })).await?;
                "put_off"
            }
            Err(error) => {
                tracing::warn!(seq, %error, "what a homeserver's event asks for was given up");
                let reason = error.to_string();
                self.store.write(move |tx| Box::pin(async move { rows::give_up(tx, seq, &reason).await })).await?;
                "given_up"
            }
        };
        METRICS.appservice_events.with_label_values(&[label]).inc();
        Ok(())
    }

    async fn work(&self, work: Work) -> Result<(), WorkError> {
        match work {
            Work::LocalJoin { room_id } => self.withdraw(&room_id).await,
            Work::Invited { room_id, sender, is_direct } => self.begin_chat(&room_id, &sender, is_direct).await,
            Work::ChatOver { room_id, leave } => self.end_chat(&room_id, leave).await,
            Work::Said { room_id, sender, event_id, body } => {
                let chat = self.chats.load().get(&room_id).cloned();
                // It was over before this came.
                let Some(chat) = chat.filter(|chat| chat.with == sender) else { return Ok(()) };
                let answer = match body {
                    Some(body) => self.answers.to(&room_id, &chat, Command::parse(&body)).await,
                    None => ENCRYPTED.to_owned().into(),
                };
                // The same event again gets the same answer again, and the homeserver shows it once.
                let transaction_id = data_encoding::HEXLOWER.encode(&Sha256::digest(event_id.as_bytes()));
                self.homeserver.notice(&room_id, &transaction_id, &answer.text).await?;
                if answer.leaves {
                    self.end_chat(&room_id, true).await?;
                }
                Ok(())
            }
        }
    }

    async fn withdraw(&self, room_id: &RoomId) -> Result<(), WorkError> {
        if !rows::is_invited(&self.store, room_id).await? {
            return Ok(());
        }
        match self.portals.withdraw_invite(room_id, &self.bot).await {
            Err(refusal) if refusal.is_transient() => return Err(refusal.into()),
            Err(refusal) => tracing::info!(room = %room_id, %refusal, "the bot's invite could not be withdrawn"),
            Ok(()) => tracing::debug!(room = %room_id, "the bot's invite was withdrawn"),
        }
        let room_id = room_id.to_owned();
        Ok(self.store.write(move |tx| Box::pin(async move { rows::remove_invite(tx, &room_id).await })).await?)
    }

    async fn begin_chat(&self, room_id: &RoomId, sender: &UserId, is_direct: bool) -> Result<(), WorkError> {
        if sender.server_name() != self.homeserver_name {
            return Ok(());
        }
        // Known before the join, so that no message after it is missed.
        let (room, user) = (room_id.to_owned(), sender.to_owned());
        self.store.write(move |tx| Box::pin(async move { rows::add_chat(tx, &room, &user, is_direct).await })).await?;
        let chat = Chat { with: sender.to_owned(), is_direct };
        self.change_chats(|chats| drop(chats.insert(room_id.to_owned(), chat.clone())));
        match self.homeserver.join(room_id).await {
            Ok(()) => {
                let help = commands::help(self.answers.is_admin(sender));
                Ok(self.homeserver.notice(room_id, "hello", &help).await?)
            }
            Err(error) => {
                if !error.is_transient() {
                    self.forget_chat(room_id).await?;
                }
                Err(error.into())
            }
        }
    }

    async fn end_chat(&self, room_id: &RoomId, leave: bool) -> Result<(), WorkError> {
        if leave {
            match self.homeserver.leave(room_id).await {
                Err(error) if error.is_transient() => return Err(error.into()),
                _ => {}
            }
        }
        self.forget_chat(room_id).await
    }

    async fn forget_chat(&self, room_id: &RoomId) -> Result<(), WorkError> {
        let room = room_id.to_owned();
        self.store.write(move |tx| Box::pin(async move { rows::remove_chat(tx, &room).await })).await?;
        self.change_chats(|chats| drop(chats.remove(room_id)));
        Ok(())
    }

    fn change_chats(&self, change: impl Fn(&mut BTreeMap<OwnedRoomId, Chat>)) {
        self.chats.rcu(|chats| {
            let mut chats = BTreeMap::clone(chats);
            change(&mut chats);
            chats
        });
    }
}
