//! Portals that are one room: LM servers and graph servers share it, and nothing is translated. What is left to do is what an
//! operator asks for.

use ruma::UserId;

use super::admin::{Members, Uncorrected};
use super::core::Core;
use super::portal::Portal;
use super::side::MEMBER;
use crate::dag::GraphEvent;
use crate::event::Object;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::Outgoing;

/// Who is in it, by what their servers do: who came by an LPDU is at home on LM.
pub(super) async fn members(core: &Core, portal: &Portal) -> Result<Members, Refusal> {
    let state = core.sides()?.lm.state(&portal.lm_room_id).await?;
    let (mut matrix, mut lm) = (Vec::new(), Vec::new());
    for (user, event) in state.of_kind(MEMBER) {
        let joined = event.content().get("membership").and_then(|membership| membership.as_str()) == Some("join");
        if let Ok(user) = UserId::parse(user)
            && joined
            && user.server_name() != core.context.server_name
        {
            if event.hub_server.is_some() { lm.push(user) } else { matrix.push(user) }
        }
    }
    Ok(Members { matrix, lm, kept_out: Vec::new() })
}

/// For how many types and state keys the log does not have what the graph has: of members the membership, since nobody says what
/// a user calls themselves but the user.
pub(super) async fn out_of_step(core: &Core, portal: &Portal) -> Result<usize, Refusal> {
    let sides = core.sides()?;
    let log = sides.lm.state(&portal.lm_room_id).await?;
    let graph = sides.dag.state(&portal.matrix_room_id).await?;
    let differs = |kind: &str, key: &str, here: Option<&GraphEvent>| {
        let there = log.get(kind, key);
        if here.map(|event| &event.event_id) == there.map(|event| &event.event_id) {
            return false;
        }
        let here = membership(here.map(|event| &event.content));
        kind != MEMBER || here != membership(there.map(|event| event.content()))
    };
    let others = graph.iter().filter(|((kind, key), event)| differs(kind, key, Some(&***event))).count();
    let alone = log.iter().filter(|(kind, key, _)| !graph.contains_key(&((*kind).to_owned(), (*key).to_owned())));
    Ok(others.saturating_add(alone.filter(|(kind, key, _)| differs(kind, key, None)).count()))
}

fn membership(content: Option<&Object>) -> &str {
    content.and_then(|content| content.get("membership")?.as_str()).unwrap_or("leave")
}

/// What of the log's state could not be made the graph's, and why.
pub(super) async fn uncorrected(core: &Core, portal: &Portal) -> Result<Vec<Uncorrected>, Refusal> {
    let left = core.sides()?.dag.uncorrected(&portal.matrix_room_id).await?;
    let left = left.into_iter().map(|((kind, state_key), reason)| Uncorrected { kind, state_key, reason });
    Ok(left.collect())
}

/// Invites a user of any server.
pub(super) async fn invite(core: &Core, portal: &Portal, user: &UserId) -> Result<(), Refusal> {
    let rooms = core.sides()?.rooms(Side::Lm);
    let state = rooms.state(&portal.lm_room_id).await?;
    if matches!(state.membership(user), "invite" | "join") {
        return Ok(());
    }
    let draft = core.member(core.users.bot(), user, "invite");
    rooms.invite(&portal.lm_room_id, Outgoing { draft, effect: None }).await.map(drop)
}
