//! Doing what was decided: images are sent together with what is written with them, in batches where nothing must come
//! first.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt as _;
use ruma::OwnedEventId;

use super::{Done, ECHO_PATIENCE_MS, Worker};
use crate::bridge::carry::{Before, Crossing, Outcome};
use crate::bridge::inbox::Item;
use crate::bridge::portal::{Portal, PortalState};
use crate::bridge::side::Made;
use crate::bridge::{effect, spaces};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Draft, Outgoing};
use crate::store::images;

impl Worker {
    /// Sends a batch of images; false when one of them failed.
    pub(super) async fn flush(&mut self, portal: &Arc<Portal>, batch: Vec<(i64, Crossing)>) -> Result<bool, Refusal> {
        let results = self.send_together(portal, &batch).await?;
        let (mut all, mut failed) = (true, false);
        for ((seq, crossing), result) in batch.iter().zip(results) {
            let result = match result {
                // What comes after a failure that may pass is tried again after it.
                Err(refusal) if refusal.is_transient() && failed => continue,
                // One of them may have failed all of them. Which one it was it must show alone, or an innocent one would
                // be put off for it, and it would never be given up.
                Err(refusal) if refusal.is_transient() && batch.len() > 1 => {
                    let alone = [(*seq, crossing.clone())];
                    self.send_together(portal, &alone).await?.pop().unwrap_or(Err(refusal))
                }
                result => result,
            };
            let done = match result {
                Ok(()) => Done::Crossed,
                Err(refusal) => {
                    all = false;
                    failed |= refusal.is_transient();
                    if refusal.is_transient() { Done::Later(refusal) } else { Done::Refused(refusal) }
                }
            };
            self.finish(portal, *seq, done).await?;
        }
        Ok(all)
    }

    /// Sends images in one call; what became of each.
    async fn send_together(
        &self,
        portal: &Arc<Portal>,
        batch: &[(i64, Crossing)],
    ) -> Result<Vec<Result<(), Refusal>>, Refusal> {
        let items: Option<Vec<_>> =
            batch.iter().map(|(seq, crossing)| Some((self.inbox.get(*seq)?, crossing.note.clone()))).collect();
        let items = items.ok_or_else(|| Refusal::Internal("an event is sent that does not wait".to_owned()))?;
        if items.is_empty() {
            return Ok(Vec::new());
        }
        let effects = effect::crossed_all(&self.core, portal, self.source, items);
        let outgoing = batch.iter().zip(effects).map(|((_, crossing), effect)| {
            let draft = crossing.image.clone();
            Outgoing { draft, effect: Some(effect) }
        });
        let far = self.source.other();
        let results = self.core.sides()?.rooms(far).send(portal.room(far), outgoing.collect()).await;
        Ok(results.into_iter().map(|result| result.map(drop)).collect())
    }

    /// Does with one event what is to be done with it.
    pub(super) async fn single(&mut self, portal: &Arc<Portal>, seq: i64, outcome: Outcome) -> Result<Done, Refusal> {
        let Some(item) = self.inbox.get(seq) else { return Ok(Done::Gone) };
        Ok(match outcome {
            Outcome::Cross(crossing) => self.cross(portal, item, *crossing).await?,
            Outcome::Refuse(refusal) => Done::Refused(refusal),
            Outcome::Nothing(_) => {
                effect::drop_row(&self.core, seq).await?;
                Done::Gone
            }
            Outcome::Adopt(image) => {
                effect::adopt(&self.core, portal, self.source, item, image).await?;
                Done::Gone
            }
            Outcome::Suspend(reason) => {
                self.core.set_state(&self.entry, PortalState::Suspended, Some(reason)).await?;
                spaces::soon(&self.core, &portal.lm_hub);
                effect::drop_row(&self.core, seq).await?;
                Done::Gone
            }
        })
    }

    async fn cross(&self, portal: &Arc<Portal>, item: &Item, crossing: Crossing) -> Result<Done, Refusal> {
        let Crossing { before, image, instead, asks_server, note } = crossing;
        let far = self.source.other();
        let rooms = self.core.sides()?.rooms(far);
        let room = portal.room(far);
        if self.on_its_way(&before).await? {
            return Ok(Done::Waits);
        }
        for Before { draft, source } in before {
            let effect = match source {
                Some(source) => effect::joined(&self.core, portal, self.source, source).await?,
                None => effect::prepared(&self.core, self.source, &item.event),
            };
            let result = rooms.send(room, vec![Outgoing { draft, effect }]).await.pop();
            if let Some(Err(refusal)) = result {
                return Ok(if refusal.is_transient() { Done::Later(refusal) } else { Done::Refused(refusal) });
            }
        }
        if asks_server {
            self.ask(portal, item, image, note);
            return Ok(Done::Asked);
        }
        let send = async |draft: Draft| -> Result<Made, Refusal> {
            let effect = effect::crossed(&self.core, portal, self.source, item, note.clone());
            let outgoing = Outgoing { draft, effect };
            let nothing = || Refusal::Internal("nothing came of an event".to_owned());
            rooms.send(room, vec![outgoing]).await.pop().unwrap_or_else(|| Err(nothing()))
        };
        Ok(match (send(image).await, instead) {
            (Ok(_), _) => Done::Crossed,
            (Err(refusal), _) if refusal.is_transient() => Done::Later(refusal),
            (Err(_), Some(instead)) => match send(instead).await {
                Ok(_) => Done::Crossed,
                Err(refusal) if refusal.is_transient() => Done::Later(refusal),
                Err(refusal) => Done::Refused(refusal),
            },
            (Err(refusal), None) => Done::Refused(refusal),
        })
    }

    /// Invites a user of another server, which may be slow or dead: on a task of its own.
    fn ask(&self, portal: &Arc<Portal>, item: &Item, invite: Draft, note: Option<String>) {
        let effect = effect::crossed(&self.core, portal, self.source, item, note);
        let (core, entry, portal, source) = (self.core.clone(), self.entry.clone(), portal.clone(), self.source);
        let (seq, asked) = (item.row.seq, self.asked.clone());
        self.core.spawn(async move {
            let outgoing = Outgoing { draft: invite, effect };
            let inviting =
                async { core.sides()?.rooms(source.other()).invite(portal.room(source.other()), outgoing).await };
            // Whatever happens, the item must hear of it.
            let invited = AssertUnwindSafe(inviting).catch_unwind().await;
            let invited = invited.unwrap_or_else(|_| Err(Refusal::Internal("inviting panicked".to_owned())));
            let done = match invited {
                Ok(_) => Done::Crossed,
                Err(refusal) if refusal.is_transient() => Done::Later(refusal),
                Err(refusal) => Done::Refused(refusal),
            };
            // The task that asked stays as long as the item does.
            let _ = asked.send((seq, done));
            entry.direction(source).wake.notify_one();
        });
    }

    /// Whether a join that would be sent first is already on its way to the hub.
    async fn on_its_way(&self, before: &[Before]) -> Result<bool, Refusal> {
        let sources: Vec<OwnedEventId> = before.iter().filter_map(|before| before.source.clone()).collect();
        if sources.is_empty() || self.source == Side::Lm {
            return Ok(false);
        }
        let now = self.core.now_ms();
        let images = images::of_sources(&self.core.context.store, self.source, &sources).await?;
        Ok(images.values().any(|row| row.pending && now.saturating_sub(row.made_ts) < ECHO_PATIENCE_MS))
    }
}
