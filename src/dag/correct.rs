//! Corrective events of shared rooms. The log is append-only: what the resolution of states changed in the graph, where no
//! event says it, is said at the log's end by events of the room's bot that follow all that is there, so that the log's state is
//! the graph's again (INV-4). They have the content that the graph has; nobody's join is made up: who should be joined and is
//! not, here or there, is taken out, and may come again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use imbl::{OrdMap, Vector};
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, UserId};
use serde_json::json;

use super::batch::Batch;
use super::room::{Core, Room};
use super::snapshot::StateKey;
use super::stored::Stored;
use super::{Dag, Shared};
use crate::event::Object;
use crate::refusal::Refusal;
use crate::seam::{Draft, Membership, Outgoing};

/// How many corrections are made together.
const MAX_TOGETHER: usize = 100;
/// How many are made for one key in [`SOON`].
const MAX_SOON: usize = 3;
const SOON_MS: i64 = 60_000;
/// Of how many keys that could not be corrected it is tried again with the next event.
const MAX_AGAIN: usize = 200;
const MEMBER: &str = "m.room.member";
const POWER_LEVELS: &str = "m.room.power_levels";

/// What is known of how far the log's state is the graph's. Clones share structure.
#[derive(Debug, Clone, Default)]
pub struct Corrections {
    /// Whether both were compared as a whole.
    pub compared: bool,
    /// Where another server is the hub: the reading of the log of which the state was set to be the graph's.
    pub followed: Option<u64>,
    /// When each key was corrected lately.
    made: OrdMap<StateKey, Vector<i64>>,
    /// What could not be corrected.
    left: OrdMap<StateKey, Arc<Left>>,
}

/// A key under which the log has something else than the graph.
#[derive(Debug, Clone)]
struct Left {
    reason: String,
    /// What it was tried on; none when it is to be tried again with the next event.
    on: Option<Standing>,
}

/// What stands in the graph and in the log, and by whose levels that is judged.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Standing {
    here: Option<OwnedEventId>,
    there: Option<OwnedEventId>,
    levels_here: Option<OwnedEventId>,
    levels_there: Option<OwnedEventId>,
}

impl Dag {
    /// The state of a shared room in which its log differs from its graph and could not be corrected, and why; in whose profile
    /// alone a member differs is not among it.
    pub async fn uncorrected(&self, room_id: &RoomId) -> Result<Vec<(StateKey, String)>, Refusal> {
        let core = self.shared.room(room_id).await?.core();
        Ok(core.corrections.left.iter().map(|(key, left)| (key.clone(), left.reason.clone())).collect())
    }

    /// In how many shared rooms there is such state, as far as they were looked at since the start, and of how many types and state keys.
    pub fn rooms_uncorrected(&self) -> (usize, usize) {
        let rooms = self.shared.uncorrected.lock().unwrap_or_else(PoisonError::into_inner);
        (rooms.len(), rooms.values().fold(0, |sum, left| sum.saturating_add(*left)))
    }
}

/// Rooms of which the log's state could not be made the graph's, and for how many types and state keys. Who has left a room is not to
/// mend it.
pub(super) type Uncorrected = Mutex<HashMap<OwnedRoomId, usize>>;

impl Shared {
    /// Remembers whether there is something left to correct in a room.
    pub(super) fn note_uncorrected(&self, room_id: &RoomId, core: &Core) {
        let left = core.corrections.left.len();
        let mut rooms = self.uncorrected.lock().unwrap_or_else(PoisonError::into_inner);
        if left > 0 && core.has_server(&self.context.server_name) {
            rooms.insert(room_id.to_owned(), left);
        } else {
            rooms.remove(room_id);
        }
    }

    /// Compares a shared room that was loaded with its log, in the room's task.
    pub(super) fn compare_with_log(self: &Arc<Self>, room: &Arc<Room>) {
        if self.logs.get().is_none() {
            return;
        }
        let (shared, room) = (self.clone(), room.clone());
        tokio::spawn(async move {
            let comparing = shared.run(&room, |batch| {
                Box::pin(async move {
                    let hub = batch.hub_of(&batch.core.current).await?;
                    if batch.linear.log.is_none() { batch.open_log(hub).await } else { Ok(()) }
                })
            });
            if let Err(refusal) = comparing.await {
                tracing::warn!(room = %room.room_id, %refusal, "a room was not compared with its log");
            }
        });
    }
}

impl Batch {
    /// Compares all state with the log's, once after the room was loaded.
    pub(super) async fn compare(&mut self) -> Result<(), Refusal> {
        if !self.is_hub() || self.core.corrections.compared {
            return Ok(());
        }
        self.core.corrections.compared = true;
        self.linear.dirty = self.differing();
        self.correct().await
    }

    /// Corrects what an event has changed otherwise than it says.
    pub(super) async fn correct_after(&mut self, event: &Stored) -> Result<(), Refusal> {
        if !self.is_hub() || self.linear.correcting || !event.is_accepted() {
            return Ok(());
        }
        let left = &self.core.corrections.left;
        let again = left.iter().filter(|(_, left)| left.on.is_none()).take(MAX_AGAIN).map(|(key, _)| key);
        let again: Vec<_> = again.cloned().collect();
        self.linear.dirty.extend(again);
        self.correct().await
    }

    async fn correct(&mut self) -> Result<(), Refusal> {
        self.linear.correcting = true;
        let corrected = self.correct_dirty().await;
        self.linear.correcting = false;
        self.linear.dirty.clear();
        corrected
    }

    async fn correct_dirty(&mut self) -> Result<(), Refusal> {
        // By the levels the others are judged.
        let levels: StateKey = (POWER_LEVELS.to_owned(), String::new());
        while let Some(key) = self.linear.dirty.take(&levels).or_else(|| self.linear.dirty.pop_first()) {
            if key == levels {
                let left = self.core.corrections.left.keys().cloned();
                self.linear.dirty.extend(left.filter(|left| *left != levels));
            }
            self.correct_key(key).await?;
        }
        Ok(())
    }

    async fn correct_key(&mut self, key: StateKey) -> Result<(), Refusal> {
        let standing = self.standing(&key);
        let Some(difference) = self.difference(&key, &standing).await? else {
            self.core.corrections.left.remove(&key);
            return Ok(());
        };
        if self.core.corrections.left.get(&key).is_some_and(|left| left.on.as_ref() == Some(&standing)) {
            return Ok(());
        }
        let now = self.shared.context.clock.now_ms();
        let mut made = self.core.corrections.made.get(&key).cloned().unwrap_or_default();
        made.retain(|at| (0..SOON_MS).contains(&now.saturating_sub(*at)));
        let refusal = if made.len() >= MAX_SOON {
            (format!("corrected {MAX_SOON} times in a minute"), None)
        } else if self.linear.corrected >= MAX_TOGETHER {
            (format!("more than {MAX_TOGETHER} corrections at once"), None)
        } else {
            match self.send_correction(&key, difference, now).await {
                Ok(()) => {
                    made.push_back(now);
                    self.linear.corrected = self.linear.corrected.saturating_add(1);
                    self.core.corrections.made.insert(key.clone(), made);
                    self.core.corrections.left.remove(&key);
                    // As it came out.
                    self.linear.dirty.insert(key);
                    return Ok(());
                }
                Err(refusal) if refusal.is_failure() => return Err(refusal),
                Err(refusal) => (refusal.to_string(), Some(standing)),
            }
        };
        let (reason, on) = refusal;
        tracing::warn!(room = %self.room_id, kind = key.0, reason, "the log's state could not be made the graph's");
        self.core.corrections.left.insert(key, Arc::new(Left { reason, on }));
        Ok(())
    }

    async fn send_correction(&mut self, key: &StateKey, difference: Difference, now: i64) -> Result<(), Refusal> {
        let bot = self.creator().await?;
        let lost = difference.lost(key);
        let content = difference.content(key, &bot)?;
        let (kind, state_key) = (key.0.clone(), Some(key.1.clone()));
        let draft = Draft { sender: bot, kind, state_key, content, origin_server_ts: now };
        let dirty = self.linear.dirty.clone();
        let sent = Box::pin(self.send(Outgoing { draft, effect: None })).await;
        if sent.is_err() {
            // Nothing of it stayed.
            self.linear.dirty = dirty;
        }
        let sent = sent?;
        // To the graph nobody of that server is in the room, and to the log the server is one that has the graph.
        if let Some(server) = lost.filter(|server| !self.core.has_server(server)) {
            self.once.push((server, self.core.head));
        }
        tracing::info!(room = %self.room_id, event = %sent.pdu.event_id, kind = key.0, "the log's state was corrected");
        Ok(())
    }

    /// The room's bot, which must be in it.
    async fn creator(&self) -> Result<OwnedUserId, Refusal> {
        let create = self.core.current.get("m.room.create", "").cloned();
        let found = self.shared.events.with_staged(create.as_slice(), &self.staged).await?;
        let bot = found.into_values().next().map(|create| create.pdu.sender.clone());
        let bot = bot.ok_or_else(|| Refusal::NotFound("m.room.create".to_owned()))?;
        if self.core.joined.contains(&bot) {
            return Ok(bot);
        }
        Err(Refusal::Forbidden(format!("{bot} is not in the room")))
    }

    fn standing(&self, key: &StateKey) -> Standing {
        let here = |key: &StateKey| self.core.current.map.get(key).cloned();
        let there = |kind: &str, state_key: &str| self.linear.log.as_ref().and_then(|log| log.state(kind, state_key));
        Standing {
            here: here(key),
            there: there(&key.0, &key.1),
            levels_here: here(&(POWER_LEVELS.to_owned(), String::new())),
            levels_there: there(POWER_LEVELS, ""),
        }
    }

    /// What must be said so that the log has what the graph has; none when it has. Of members the membership counts.
    async fn difference(&self, key: &StateKey, standing: &Standing) -> Result<Option<Difference>, Refusal> {
        if standing.here == standing.there {
            return Ok(None);
        }
        let ids: Vec<_> = standing.here.iter().chain(&standing.there).cloned().collect();
        let events = self.shared.events.with_staged(&ids, &self.staged).await?;
        let event = |id: &Option<OwnedEventId>| id.as_ref().and_then(|id| events.get(id));
        let content = event(&standing.here).map(|event| event.content());
        if key.0 != MEMBER {
            return Ok(Some(Difference::State(content)));
        }
        let content = content.unwrap_or_default();
        let membership =
            |id: &Option<OwnedEventId>| event(id).and_then(|event| event.membership()).unwrap_or(Membership::Leave);
        let (here, there) = (membership(&standing.here), membership(&standing.there));
        let by_graph = event(&standing.there).is_some_and(|event| event.pdu.hub_server.is_none());
        Ok((here != there).then_some(Difference::Member { here, there, by_graph, content }))
    }
}

/// What says of a type of state that there is none. Without content an access control list denies everybody, and some types mean
/// something by being there.
fn nothing(kind: &str) -> Result<Object, Refusal> {
    let content = match kind {
        "m.room.server_acl" => json!({ "allow": ["*"], "allow_ip_literals": true }),
        "m.room.join_rules" => json!({ "join_rule": "invite" }),
        "m.room.tombstone" | "m.room.encryption" | "m.room.hub" => {
            return Err(Refusal::Forbidden(format!("nothing says that there is no {kind}")));
        }
        _ => json!({}),
    };
    Ok(content.as_object().cloned().unwrap_or_default())
}

/// What the log lacks.
enum Difference {
    /// State with this content in the graph, or none.
    State(Option<Object>),
    /// A membership; what the log has of it came by the graph, or not.
    Member { here: Membership, there: Membership, by_graph: bool, content: Object },
}

impl Difference {
    /// The graph server of whose user the log alone has the join, which ends with the correction.
    fn lost(&self, key: &StateKey) -> Option<OwnedServerName> {
        let Self::Member { there: Membership::Join, by_graph: true, .. } = self else { return None };
        let user = <&UserId>::try_from(key.1.as_str()).ok()?;
        Some(user.server_name().to_owned())
    }

    /// What is said so that both have the same.
    fn content(self, key: &StateKey, bot: &OwnedUserId) -> Result<Object, Refusal> {
        let (here, there, content) = match self {
            Self::State(Some(content)) => return Ok(content),
            Self::State(None) => return nothing(&key.0),
            Self::Member { here, there, content, .. } => (here, there, content),
        };
        if key.1 == bot.as_str() {
            return Err(Refusal::Forbidden(format!("{bot} corrects the room and is not kicked by itself")));
        }
        let outside = matches!(there, Membership::Leave | Membership::Knock);
        match here {
            // The content of these is not the user's own.
            Membership::Ban => return Ok(content),
            Membership::Invite if outside => return Ok(content),
            _ => {}
        }
        let reason = match here {
            Membership::Join => "two servers' views of the room have parted; come again",
            _ => "another server's event decided so",
        };
        Ok(Object::from_iter([
            ("membership".to_owned(), json!(Membership::Leave.as_str())),
            ("reason".to_owned(), json!(reason)),
            ("im.isthmus.repair".to_owned(), json!(true)),
        ]))
    }
}
