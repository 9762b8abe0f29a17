//! The EDUs of a transaction: each is read on its own, believed for users of its server alone, and counted against its server's
//! budget. None of them ever fails the transaction, but for a store that does not take what must not be lost.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use ruma::{OwnedServerName, OwnedUserId, ServerName};
use sha2::{Digest as _, Sha256};

use super::routes::Federation;
use crate::admin::metrics;
use crate::event::{Edu, Ignored, ToDevice};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::Raw;
use crate::store::images;
use crate::store::to_device::{self, Message};

/// A server that was quiet may say as much at once as it may say in this time, in milliseconds.
const BURST_MS: i64 = 60_000;
/// How many servers are remembered.
const REMEMBERED: usize = 10_000;

/// How much each server has said lately.
#[derive(Clone, Default)]
pub struct EduBudgets(Arc<Mutex<HashMap<OwnedServerName, Level>>>);

/// How much was said, in EDUs times milliseconds, and when that was written down.
#[derive(Debug, Clone, Copy, Default)]
struct Level {
    spent: i64,
    at: i64,
}

impl EduBudgets {
    /// Whether a server may say something more now; counts it. 0 a second is no limit.
    fn spend(&self, server: &ServerName, per_second: u32, now: i64) -> bool {
        if per_second == 0 {
            return true;
        }
        let rate = i64::from(per_second);
        let most = rate.saturating_mul(BURST_MS);
        let mut levels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if levels.len() >= REMEMBERED && !levels.contains_key(server) {
            levels.retain(|_, level| now.abs_diff(level.at) < BURST_MS.unsigned_abs());
            if levels.len() >= REMEMBERED {
                // Who has said most stays known.
                let mut spent: Vec<i64> = levels.values().map(|level| level.spent).collect();
                let middle = spent.len().checked_div(2).unwrap_or(0);
                let (_, middle, _) = spent.select_nth_unstable(middle);
                levels.retain(|_, level| level.spent > *middle);
            }
        }
        let level = levels.entry(server.to_owned()).or_default();
        let gone = now.saturating_sub(level.at).max(0).saturating_mul(rate);
        let spent = level.spent.saturating_sub(gone).max(0).saturating_add(1_000);
        level.at = now;
        let fits = spent <= most;
        level.spent = if fits { spent } else { spent.saturating_sub(1_000) };
        fits
    }
}

/// Takes the EDUs of a transaction of `origin`, which came by the `send` of `side`.
pub(super) async fn receive(
    state: &Federation,
    origin: &ServerName,
    side: Side,
    txn_id: &str,
    edus: Vec<Raw>,
) -> Result<(), Refusal> {
    let mut kept = Kept::default();
    let rate = state.context.config.budgets.edus_per_second;
    for (index, raw) in edus.iter().enumerate() {
        for (entry_index, entry) in Edu::read(raw.get(), origin).into_iter().enumerate() {
            let in_budget = state.edus.spend(origin, rate, state.context.clock.now_ms());
            let (kind, taken) = match entry {
                _ if !in_budget => ("any", Err(Ignored::Budget)),
                Err(reason) => ("any", Err(reason)),
                Ok(edu) => {
                    let kind = edu.kind();
                    // A server may use the ID of a transaction again.
                    let known = || {
                        let hash = STANDARD_NO_PAD.encode(Sha256::digest(raw.get()));
                        format!("{txn_id}/{index}/{entry_index}/{hash}")
                    };
                    (kind, take(state, side, edu, &mut kept, known).await)
                }
            };
            match taken {
                Err(reason) => metrics::edu_received(kind, reason.code()),
                Ok(Taken::Kept) => metrics::edu_received(kind, "ok"),
                // The bridge counts what becomes of it.
                Ok(Taken::HandedOver) => {}
            }
        }
    }
    kept.store(state, origin).await
}

/// What must not be lost.
#[derive(Default)]
struct Kept {
    messages: Vec<Message>,
    changed: BTreeSet<OwnedUserId>,
}

enum Taken {
    Kept,
    HandedOver,
}

async fn take(
    state: &Federation,
    side: Side,
    edu: Edu,
    kept: &mut Kept,
    known_by: impl Fn() -> String,
) -> Result<Taken, Ignored> {
    match edu {
        Edu::Typing(_) | Edu::Receipt(_) | Edu::Presence(_) => {
            state.between.edu(side, edu);
            Ok(Taken::HandedOver)
        }
        Edu::ToDevice(message) => {
            if !state.between.has_device(&message.target, &message.device) {
                return Err(Ignored::NoDevice);
            }
            // The draft's have no ID; a transaction that is repeated has them at the same places.
            let ToDevice { sender, message_id, kind, target, device, content } = *message;
            let message_id = message_id.unwrap_or_else(known_by);
            kept.messages.push(Message { position: 0, side, sender, message_id, kind, target, device, content });
            Ok(Taken::Kept)
        }
        Edu::DevicesChanged(user) => {
            // Of strangers nothing is remembered.
            for side in [side, side.other()] {
                let known = images::profile(&state.context.store, side, &user).await.map_err(|_| Ignored::Failed)?;
                if known.is_some() {
                    kept.changed.insert(user);
                    return Ok(Taken::Kept);
                }
            }
            Err(Ignored::NotJoined)
        }
    }
}

impl Kept {
    /// Stores it before the transaction is answered (INV-6).
    async fn store(self, state: &Federation, origin: &ServerName) -> Result<(), Refusal> {
        if self.messages.is_empty() && self.changed.is_empty() {
            return Ok(());
        }
        let store = &state.context.store;
        let (origin, mut messages, changed) = (origin.to_owned(), self.messages, self.changed);
        let numbers = store.clone();
        let write = store.write(move |tx| {
            Box::pin(async move {
                // In here one write follows the other: who has read up to a number has read all below it.
                for message in &mut messages {
                    message.position = numbers.next_id();
                }
                let changed: Vec<_> = changed.into_iter().map(|user| (user, numbers.next_id())).collect();
                to_device::put(tx, &origin, &messages).await?;
                to_device::mark_changed(tx, &changed).await
            })
        });
        Ok(write.await?)
    }
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;

    #[test]
    fn hc_53_a_server_that_floods_spends_its_own_budget_alone() {
        let budgets = EduBudgets::default();
        let (one, other) = (server_name!("one.example"), server_name!("other.example"));
        let burst = (0..1_000).filter(|_| budgets.spend(one, 2, 0)).count();
        assert_eq!(burst, 120, "those of a minute");
        assert!(!budgets.spend(one, 2, 499) && budgets.spend(one, 2, 500) && !budgets.spend(one, 2, 500));
        assert!(budgets.spend(other, 2, 0));
        assert!(!budgets.spend(one, 2, 0), "a clock that goes back gives nothing");
        assert!(budgets.spend(one, 0, 0), "no limit");
        for number in 0..REMEMBERED + 10 {
            budgets.spend(&ServerName::parse(format!("s{number}.example")).unwrap(), 2, 0);
        }
        assert!(budgets.0.lock().unwrap().len() <= REMEMBERED);
        assert!(!budgets.spend(one, 2, 0), "however many others there are");
    }
}
