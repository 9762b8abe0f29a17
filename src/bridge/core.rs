//! What the parts of the bridge share: the context, both sides, the portals, and the tasks that work for them.

use std::sync::{Arc, Mutex, OnceLock};

use ruma::{OwnedEventId, RoomId, UserId};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::acl::{self, Acls};
use super::alias::Aliases;
use super::budget::Budgets;
use super::create::Creations;
use super::ends;
use super::ephemeral::Ephemeral;
use super::gate::Joining;
use super::notice::Notices;
use super::pause::Pauses;
use super::pending::Pending;
use super::portal::{Portal, PortalState};
use super::registry::{Entry, Registry};
use super::repair::Repairs;
use super::resolve::{self, Negative};
use super::side::{MEMBER, Sides};
use super::spaces::Spaces;
use super::translate::MediaTo;
use super::upgrade::Moves;
use super::users::Users;
use super::worker;
use crate::event::Object;
use crate::federation::Context;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Draft, Outgoing};
use crate::store::{StoreError, dag, inbox, portals};

/// What every part of the bridge holds.
pub(super) struct Core {
    pub(super) context: Context,
    pub(super) users: Users,
    pub(super) registry: Registry,
    pub(super) creations: Creations,
    pub(super) notices: Notices,
    pub(super) repairs: Repairs,
    /// Ghosts whose join a handshake waits for: repair leaves them alone.
    pub(super) joining: Mutex<Joining>,
    pub(super) negative: Negative,
    /// What hubs said of their aliases.
    pub(super) leads: resolve::Leads,
    pub(super) acls: Acls,
    pub(super) budgets: Budgets,
    pub(super) pauses: Pauses,
    pub(super) ephemeral: Ephemeral,
    pub(super) pending: Pending,
    pub(super) moves: Moves,
    pub(super) spaces: Spaces,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
    sides: OnceLock<Sides>,
}

impl Core {
    pub(super) fn new(context: Context) -> Self {
        let homeserver = context.config.appservice.as_ref().map(|appservice| appservice.homeserver_name.as_ref());
        Self {
            users: Users::new(&context.server_name, homeserver),
            registry: Registry::default(),
            creations: Creations::default(),
            notices: Notices::default(),
            repairs: Repairs::default(),
            joining: Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            sides: OnceLock::new(),
            negative: resolve::negative(),
            leads: resolve::leads(),
            budgets: Budgets::default(),
            pauses: Pauses::default(),
            ephemeral: Ephemeral::default(),
            pending: Pending::default(),
            moves: Moves::default(),
            spaces: Spaces::default(),
            acls: acl::acls(context.config.caches.rooms),
            context,
        }
    }

    /// How files are called on a side.
    pub(super) fn media(&self, to: Side) -> MediaTo<'_> {
        MediaTo { names: &self.context.media, to }
    }

    /// How aliases are called across, where the Matrix room's own address is this.
    pub(super) fn aliases<'a>(&'a self, address: Option<&'a str>) -> Aliases<'a> {
        let appservice = self.context.config.appservice.as_ref();
        let homeserver = appservice.map(|appservice| appservice.homeserver_name.as_ref());
        Aliases { own: &self.context.server_name, homeserver, address }
    }

    /// Gives the bridge its sides; once.
    pub(super) fn set_sides(&self, sides: Sides) {
        let _ = self.sides.set(sides);
    }

    /// Both sides; not before the start.
    pub(super) fn sides(&self) -> Result<&Sides, Refusal> {
        self.sides.get().ok_or_else(|| Refusal::Internal("the bridge has not started yet".to_owned()))
    }

    pub(super) fn now_ms(&self) -> i64 {
        self.context.clock.now_ms()
    }

    /// An event of now.
    pub(super) fn draft(&self, sender: &UserId, kind: &str, state_key: Option<&str>, content: Object) -> Draft {
        Draft {
            sender: sender.to_owned(),
            kind: kind.to_owned(),
            state_key: state_key.map(str::to_owned),
            content,
            origin_server_ts: self.now_ms(),
        }
    }

    /// A member event of now that says nothing but the membership.
    pub(super) fn member(&self, sender: &UserId, target: &UserId, membership: &str) -> Draft {
        let mut content = Object::new();
        content.insert("membership".to_owned(), membership.into());
        self.draft(sender, MEMBER, Some(target.as_str()), content)
    }

    /// Sends one event of now, with nothing written beside it.
    pub(super) async fn send(&self, portal: &Portal, side: Side, draft: Draft) -> Result<OwnedEventId, Refusal> {
        let sent =
            self.sides()?.rooms(side).send(portal.room(side), vec![Outgoing { draft, effect: None }]).await.pop();
        Ok(sent.unwrap_or_else(|| Err(Refusal::Internal("nothing came of an event".to_owned())))?.event_id)
    }

    /// Runs a task that ends with the bridge.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Runs a task that ends with the bridge, and whose answer somebody may wait for.
    pub(super) async fn in_task<T: Send + 'static>(
        &self,
        task: impl Future<Output = Result<T, Refusal>> + Send + 'static,
    ) -> Result<T, Refusal> {
        let stop = self.stop.clone();
        let stopping = || Refusal::Internal("the gateway is stopping".to_owned());
        let task = self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => Err(stopping()),
                done = task => done,
            }
        });
        task.await.unwrap_or_else(|error| Err(Refusal::Internal(error.to_string())))
    }

    /// There is news for the direction of a room: its task works, or is started.
    pub(super) fn call(self: &Arc<Self>, side: Side, room_id: &RoomId) {
        if let Some(entry) = self.registry.of_room(side, room_id) {
            self.call_entry(&entry, side);
        }
    }

    /// The same for a portal that is at hand.
    pub(super) fn call_entry(self: &Arc<Self>, entry: &Arc<Entry>, source: Side) {
        if self.sides.get().is_some() && entry.direction(source).call() {
            self.spawn(worker::run(self.clone(), entry.clone(), source));
        }
    }

    /// Changes how a portal is, and says why.
    pub(super) async fn set_state(
        &self,
        entry: &Entry,
        state: PortalState,
        reason: Option<String>,
    ) -> Result<(), StoreError> {
        let portal = entry.portal();
        // Who ends a portal has the last word.
        let ending = matches!(portal.state, PortalState::Ending | PortalState::Ended);
        if ending || (portal.state == state && portal.reason == reason) {
            return Ok(());
        }
        tracing::warn!(portal = portal.portal_id, state = state.as_str(), reason, "portal changes");
        let changed = Portal { state, reason, ..portal.as_ref().clone() };
        let (number, stored) = (entry.number, changed.clone());
        let leave = (state == PortalState::Suspended).then(|| self.now_ms().saturating_add(ends::GHOSTS_STAY_MS));
        self.context
            .store
            .write(move |tx| {
                Box::pin(async move {
                    if state == PortalState::Suspended {
                        // What waits will not cross any more.
                        inbox::clear(tx, Side::Matrix, &stored.matrix_room_id).await?;
                        inbox::clear(tx, Side::Lm, &stored.lm_room_id).await?;
                    }
                    let listed = state.carries() && stored.may_be_listed();
                    dag::set_listed(tx, &stored.matrix_room_id, listed).await?;
                    portals::set_state(tx, number, stored.state.as_str(), stored.reason.as_deref(), leave).await
                })
            })
            .await?;
        if !matches!(entry.portal().state, PortalState::Ending | PortalState::Ended) {
            self.registry.put(entry.number, changed);
        }
        Ok(())
    }
}
