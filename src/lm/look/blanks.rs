//! Events that came as redaction leaves them: when all of the log is here, so is what redacts them, or the hub has rewritten them.

use std::sync::Arc;

use super::{Certainty, QUIET, millis_of};
use crate::lm::Lm;
use crate::lm::intake::Taking;
use crate::lm::rooms::RoomCell;
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, Asked, Fault};

/// How many of a room are asked about at once.
const AT_ONCE: i64 = 500;

impl Lm {
    /// Asks about those that came before a look began, by which it is known how much of the log is here.
    pub(super) async fn ask_about_blanks(
        &self,
        cell: &Arc<RoomCell>,
        certainty: Certainty,
        began: i64,
    ) -> Result<(), Refusal> {
        let is_whole = match certainty {
            Certainty::Whole => true,
            Certainty::SilentSince(heard) => began.saturating_sub(heard) >= millis_of(self.looks().pace(QUIET)),
            Certainty::Partial => false,
        };
        let (store, room_id) = (&self.context().store, &cell.room_id);
        let blanks = stored::blanks(store, room_id, began, AT_ONCE).await?;
        if blanks.is_empty() {
            return Ok(());
        }
        if !is_whole {
            self.saw_blanks(room_id);
            return Ok(());
        }
        let redacted = stored::redacted(store, room_id, &blanks).await?;
        let rewritten: Vec<&Asked> = blanks.iter().filter(|(event_id, _)| !redacted.contains(event_id)).collect();
        if !rewritten.is_empty() {
            let _turn = cell.intake.lock().await;
            let mut taking = Taking::begin(self, cell, cell.snapshot(store).await?).await?;
            for (event_id, sender) in rewritten {
                let problem = format!("came without what {sender} said in it, and nothing in the log redacts it");
                taking.fault(Fault::Rewritten, event_id, &problem);
            }
            taking.finish(Some(cell)).await?;
        }
        let room_id = room_id.clone();
        let forget = store.write(move |tx| Box::pin(async move { stored::forget_blanks(tx, &room_id, &blanks).await }));
        Ok(forget.await?)
    }
}
