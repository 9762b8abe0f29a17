//! Making rooms of version 10, 11 and 12.

use std::sync::Arc;

use rand::Rng as _;
use rand::rngs::OsRng;
use ruma::OwnedRoomId;
use serde_json::{Value, json};

use super::accept::Source;
use super::batch::Batch;
use super::build::sign;
use super::pdu::Verified;
use super::room::{Core, Room};
use super::version::{can_create, is_shared, rules_of};
use super::{Dag, NewRoom};
use crate::event::{Object, RoomVersion};
use crate::refusal::Refusal;
use crate::seam::{Draft, Outgoing};

/// The highest level that canonical JSON can say.
const HIGHEST: i64 = (1 << 53) - 1;

impl Dag {
    /// Creates a room with the gateway's bot as its creator.
    pub async fn create_room(&self, room: NewRoom) -> Result<OwnedRoomId, Refusal> {
        if !can_create(room.version) {
            return Err(Refusal::IncompatibleRoomVersion(room.version.to_string()));
        }
        self.make_room(room).await
    }

    /// The same for shared rooms too.
    pub(super) async fn make_room(&self, room: NewRoom) -> Result<OwnedRoomId, Refusal> {
        if let Some(draft) = room.initial_state.iter().find(|draft| draft.kind == "m.room.encryption") {
            return Err(Refusal::Encryption(format!("a new room with {}", draft.kind)));
        }
        let (create, active) = self.reserve(&room).await?;
        let room_id = active.room_id.clone();
        let drafts = rest_of(&room, self.shared.context.clock.now_ms());
        let made = self.shared.run(&active, move |batch| Box::pin(begin(batch, create, drafts))).await;
        if let Err(refusal) = made {
            self.shared.rooms.let_go(&active);
            return Err(refusal);
        }
        tracing::info!(room = %room_id, version = %room.version, "room created");
        Ok(room_id)
    }

    /// The create event, and the room with its ID. The ID of a version 12 room is its create event's hash: of several rooms
    /// that are made alike in the same millisecond, each but the first is dated a little earlier.
    async fn reserve(&self, room: &NewRoom) -> Result<(Verified, Arc<Room>), Refusal> {
        let now = self.shared.context.clock.now_ms();
        let mut taken = Refusal::Internal("no room ID is free".to_owned());
        for earlier in 0..1000 {
            let create = self.create_event(room, now.saturating_sub(earlier))?;
            let room_id = create.pdu().room_id.clone();
            if self.shared.find(&room_id).await?.is_some() {
                continue;
            }
            match self.shared.start_new(&room_id, room.version, Core::default()) {
                Ok(active) => return Ok((create, active)),
                Err(refusal) => taken = refusal,
            }
        }
        Err(taken)
    }

    fn create_event(&self, room: &NewRoom, origin_server_ts: i64) -> Result<Verified, Refusal> {
        let context = &self.shared.context;
        let rules = rules_of(room.version)?;
        let given = room.initial_state.iter().find(|draft| draft.kind == "m.room.create");
        let mut content = given.map(|draft| draft.content.clone()).unwrap_or_default();
        content.insert("room_version".to_owned(), json!(room.version.as_str()));
        if !rules.authorization.use_room_create_sender {
            content.insert("creator".to_owned(), json!(room.creator));
        }
        let mut event = Object::from_iter([
            ("type".to_owned(), json!("m.room.create")),
            ("sender".to_owned(), json!(room.creator)),
            ("state_key".to_owned(), json!("")),
            ("content".to_owned(), Value::Object(content)),
            ("origin_server_ts".to_owned(), json!(origin_server_ts)),
            ("prev_events".to_owned(), json!([])),
            ("auth_events".to_owned(), json!([])),
        ]);
        if !is_shared(room.version) {
            event.insert("depth".to_owned(), json!(1));
        }
        if rules.event_format.require_room_create_room_id {
            let room_id = format!("!{}:{}", random_localpart(), context.server_name);
            event.insert("room_id".to_owned(), json!(room_id));
        }
        sign(event, room.version, context.server_name.as_str(), &context.signing_key)
    }
}

async fn begin(batch: &mut Batch, create: Verified, drafts: Vec<Draft>) -> Result<(), Refusal> {
    batch.accept(create, &Source::Own, None).await?.accepted()?;
    for draft in drafts {
        batch.send(Outgoing { draft, effect: None }).await?;
    }
    Ok(())
}

/// The events after `m.room.create`: the creator's join, power levels and join rules before anything that needs them.
fn rest_of(room: &NewRoom, now: i64) -> Vec<Draft> {
    let state = |kind: &str, state_key: &str, content: Value| Draft {
        sender: room.creator.clone(),
        kind: kind.to_owned(),
        state_key: Some(state_key.to_owned()),
        content: content.as_object().cloned().unwrap_or_default(),
        origin_server_ts: now,
    };
    let is_creators_join =
        |draft: &Draft| draft.kind == "m.room.member" && draft.state_key.as_deref() == Some(room.creator.as_str());
    let has = |kind: &str| room.initial_state.iter().any(|draft| draft.kind == kind);
    let join = room.initial_state.iter().find(|draft| is_creators_join(draft)).cloned();
    let mut drafts =
        vec![join.unwrap_or_else(|| state("m.room.member", room.creator.as_str(), json!({ "membership": "join" })))];
    if !has("m.room.power_levels") {
        drafts.push(state("m.room.power_levels", "", default_power_levels(room)));
    }
    if !has("m.room.join_rules") {
        drafts.push(state("m.room.join_rules", "", json!({ "join_rule": "invite" })));
    }
    if !has("m.room.history_visibility") {
        drafts.push(state("m.room.history_visibility", "", json!({ "history_visibility": "shared" })));
    }
    let rest = room.initial_state.iter().filter(|draft| draft.kind != "m.room.create" && !is_creators_join(draft));
    drafts.extend(rest.cloned());
    drafts
}

fn default_power_levels(room: &NewRoom) -> Value {
    // Creators of version 12 stand above all levels and must not be named.
    let users = match room.version {
        RoomVersion::V12 => json!({}),
        // Who lines a shared room up must be able to say everything that its graph can come to, whatever others' levels are.
        version if is_shared(version) => json!({ room.creator.as_str(): HIGHEST }),
        _ => json!({ room.creator.as_str(): 100 }),
    };
    json!({
        "users": users, "users_default": 0, "events_default": 0, "state_default": 50,
        "ban": 50, "kick": 50, "redact": 50, "invite": 0,
        "events": { "m.room.power_levels": 100, "m.room.tombstone": 150, "m.room.server_acl": 100,
            "m.room.encryption": 100, "m.room.history_visibility": 100 },
    })
}

fn random_localpart() -> String {
    OsRng.sample_iter(&rand::distributions::Alphanumeric).take(18).map(char::from).collect()
}
