//! Redactions: what an accepted one takes away is taken out of the store too, so that nobody gets it from here.
//! <https://spec.matrix.org/v1.16/rooms/v11/#handling-redactions>

use std::sync::{Arc, OnceLock};

use ruma::state_res::Event as _;

use super::auth::AuthState;
use super::batch::Batch;
use super::stored::Stored;
use crate::refusal::Refusal;
use crate::store::redactions;

/// An access control list without its content denies everybody, the gateway too. Setting one needs more power than redacting, so
/// a redaction must not do what only a new list may.
const SERVER_ACL: &str = "m.room.server_acl";

impl Batch {
    /// Applies an accepted redaction, when its sender may redact its target and both are of this room.
    pub(super) async fn redact(&mut self, redaction: &Arc<Stored>) -> Result<(), Refusal> {
        let Some(target_id) = redaction.pdu.redacts.clone() else { return Ok(()) };
        if target_id == redaction.pdu.event_id {
            return Ok(());
        }
        let found = self.shared.events.with_staged(std::slice::from_ref(&target_id), &self.staged).await?;
        let Some(target) = found.get(&target_id) else {
            self.awaited.push((target_id, redaction.pdu.event_id.clone()));
            self.core.awaits_targets = true;
            return Ok(());
        };
        if target.pdu.room_id != self.room_id || target.pdu.kind.to_string() == SERVER_ACL {
            return Ok(());
        }
        if !self.may_redact(redaction, target).await? {
            return Ok(());
        }
        let redacted =
            Arc::new(Stored { pdu: target.pdu.redacted()?, shown: OnceLock::new(), ..Stored::clone(target) });
        if self.staged.contains_key(&target_id) {
            self.put_staged(redacted.clone());
        }
        self.redacted.push(redacted);
        self.linear.redact(&target_id, &redaction.pdu.event_id);
        if target.groups.is_none() {
            // It came alone, and may come again as part of the room.
            self.awaited.push((target_id, redaction.pdu.event_id.clone()));
            self.core.awaits_targets = true;
        }
        Ok(())
    }

    /// Applies the redactions that were accepted before this event came, late or by another way than they.
    pub(super) async fn redact_late(&mut self, event: &Stored) -> Result<(), Refusal> {
        if !self.core.awaits_targets {
            return Ok(());
        }
        let event_id = &event.pdu.event_id;
        let staged = self.awaited.iter().filter(|(target, _)| target == event_id);
        let mut ids: Vec<_> = staged.map(|(_, redaction)| redaction.clone()).collect();
        ids.extend(redactions::of(&self.shared.context.store, &self.room_id, event_id).await?);
        for redaction in self.events(&ids).await?.into_values().filter(|redaction| redaction.is_accepted()) {
            self.redact(&redaction).await?;
        }
        Ok(())
    }

    /// Same server as the target's sender, or the power to redact what others say.
    async fn may_redact(&self, redaction: &Stored, target: &Stored) -> Result<bool, Refusal> {
        if redaction.pdu.sender.server_name() == target.pdu.sender.server_name() {
            return Ok(true);
        }
        let state = self.auth_state(redaction, &self.core.current).await?;
        Ok(can_redact_others(redaction, &state, &self.rules.authorization).unwrap_or(false))
    }
}

fn can_redact_others(
    redaction: &Stored,
    state: &AuthState,
    rules: &ruma::room_version_rules::AuthorizationRules,
) -> Result<bool, String> {
    use ruma::state_res::events::{RoomCreateEvent, RoomPowerLevelsEvent, RoomPowerLevelsIntField};

    let get = |kind: &str| state.get(&(kind.to_owned(), String::new()));
    let create = get("m.room.create").ok_or("no m.room.create")?;
    let creators = RoomCreateEvent::new(create.clone()).creators(rules)?;
    let Some(levels) = get("m.room.power_levels") else { return Ok(creators.contains(redaction.sender())) };
    if rules.explicitly_privilege_room_creators && creators.contains(redaction.sender()) {
        return Ok(true);
    }
    let levels = RoomPowerLevelsEvent::new(levels.clone());
    let has = levels.user_power_level(redaction.sender(), rules)?;
    Ok(has >= levels.get_as_int_or_default(RoomPowerLevelsIntField::Redact, rules)?)
}
