//! The checks, by what they look at. Their numbers are for good: one that is dropped is not given again.

mod authentication;
mod events;
mod hub;
mod keys;
mod levels;
mod lpdus;
mod membership;
mod reads;
mod rules;
mod second;
mod send;
mod transport;

use futures::FutureExt as _;

use super::Check;
use super::session::Session;

/// Declares checks: number, section of the draft, what must hold, and what finds out.
macro_rules! checks {
    ($($id:literal, $section:literal, $title:literal, $run:expr;)*) => {
        vec![$($crate::conformance::Check { id: $id, section: $section, title: $title, run: |session, id| Box::pin($run(session, id)) }),*]
    };
}
use checks;

/// The checks for which the suite is a participant of the target's room, in the order in which they are run.
pub(super) fn as_participant() -> Vec<Check> {
    let mut all = transport::checks();
    all.extend(keys::checks());
    all.extend(authentication::checks());
    all.extend(membership::before());
    all.extend(send::checks());
    all.extend(lpdus::checks());
    all.extend(rules::checks());
    all.extend(levels::checks());
    all.extend(reads::checks());
    all.extend(second::checks());
    all.extend(events::checks());
    all.extend(transport::overall());
    all.extend(membership::after());
    all
}

/// The checks for which the suite is the hub.
pub(super) fn as_hub() -> Vec<Check> {
    let mut all = transport::of_participant();
    all.extend(hub::checks());
    all
}

/// Whether a check says something of a target that cannot have the suite's keys: it asks for nothing that is signed. Of those that
/// do, one is to fail.
pub(super) fn stands_alone(id: &str) -> bool {
    let unsigned =
        ["LM-T-001", "LM-T-002", "LM-T-003", "LM-T-006", "LM-T-008", "LM-T-009", "LM-K-009", "LM-K-012", "LM-K-013"];
    // LM-K-007 and those after it ask for the suite's own keys.
    ["LM-A-015", "LM-H-074"].contains(&id) || unsigned.contains(&id) || (id.starts_with("LM-K-") && id < "LM-K-007")
}

/// Takes the suite's users out of the room, if they are still in it.
pub(super) async fn leave(session: &Session) {
    if session.invitee.is_some() {
        hub::end(session).boxed().await;
    } else {
        membership::leave_all(session).boxed().await;
    }
}
