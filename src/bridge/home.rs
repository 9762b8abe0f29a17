//! On which side a user is at home, where an operator names one. User IDs do not say it; what is not certain is refused, and
//! the operator says it.

use ruma::UserId;

use super::core::Core;
use super::portal::Portal;
use super::side::State;
use super::users::Who;
use crate::identity::{Ghost, GhostNames, Side};
use crate::refusal::Refusal;
use crate::store::overview;

/// The side where a user is at home, and its room's state. `said` is what the operator says.
pub(super) async fn home(
    core: &Core,
    portal: &Portal,
    user: &UserId,
    said: Option<Side>,
) -> Result<(Side, State), Refusal> {
    let sides = core.sides()?;
    let server = user.server_name();
    if *server == core.context.server_name {
        return Err(Refusal::Forbidden(format!("{user} is of this gateway's own name")));
    }
    let matrix = sides.rooms(Side::Matrix).state(&portal.matrix_room_id).await?;
    let lm = sides.rooms(Side::Lm).state(&portal.lm_room_id).await?;
    let side = match said {
        Some(side) => side,
        None if core.users.who(&core.context.store, Side::Matrix, user).await? == Who::Appservice => Side::Matrix,
        None => match by_room(user, &matrix, &lm).or_else(|| by_name(user)) {
            Some(side) => side,
            None => by_server(core, portal, user, [is_there(&matrix, user), is_there(&lm, user)] == [true; 2]).await?,
        },
    };
    Ok((side, if side == Side::Matrix { matrix } else { lm }))
}

/// Who is in one of the rooms alone, or was in one of them alone, is at home there.
fn by_room(user: &UserId, matrix: &State, lm: &State) -> Option<Side> {
    let active = |state: &State| matches!(state.membership(user), "join" | "invite" | "knock");
    let one = |matrix: bool, lm: bool| match (matrix, lm) {
        (true, false) => Some(Side::Matrix),
        (false, true) => Some(Side::Lm),
        _ => None,
    };
    if active(matrix) && active(lm) {
        return None;
    }
    one(active(matrix), active(lm)).or_else(|| one(is_there(matrix, user), is_there(lm, user)))
}

fn is_there(state: &State, user: &UserId) -> bool {
    state.member(user).is_some()
}

/// A ghost of another gateway says by its name on which side it lives.
fn by_name(user: &UserId) -> Option<Side> {
    let names = GhostNames::new(user.server_name().to_owned());
    [Side::Lm, Side::Matrix].into_iter().find(|side| !matches!(names.parse(*side, user), Ghost::No))
}

/// What the user's server is, if that is certain.
async fn by_server(core: &Core, portal: &Portal, user: &UserId, in_both: bool) -> Result<Side, Refusal> {
    let server = user.server_name();
    let unsure =
        |why: String| Refusal::Forbidden(format!("on which side {user} is at home is not certain ({why}): say it"));
    if in_both {
        return Err(unsure("that user is in both rooms".to_owned()));
    }
    let homeserver = core.context.config.appservice.as_ref().map(|appservice| &appservice.homeserver_name);
    if homeserver.is_some_and(|homeserver| homeserver == server) {
        return Ok(Side::Matrix);
    }
    let shared = overview::peer(&core.context.store, server).await?;
    let does_lm = shared.lm_rooms > 0 || shared.hub_of > 0 || portal.lm_hub == *server;
    match core.context.keyring.server_keys(server).await {
        Ok(keys) if keys.linearized => Ok(Side::Lm),
        _ if does_lm && shared.matrix_rooms > 0 => Err(unsure(format!("{server} does both"))),
        _ if does_lm => Ok(Side::Lm),
        _ if shared.matrix_rooms > 0 => Ok(Side::Matrix),
        // A server that does LM alone says so; of any other, Matrix is the side that it is sure to do.
        Ok(_) => Ok(Side::Matrix),
        Err(error) => Err(unsure(format!("the keys of {server} cannot be had: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use ruma::user_id;
    use serde_json::{Value, json};

    use super::*;
    use crate::bridge::power::tests::state;
    use crate::bridge::side::MEMBER;

    fn room(membership: Option<&str>) -> State {
        let content = membership.map(|membership| json!({ "membership": membership }));
        let member: Vec<(&str, &str, &str, Value)> =
            content.into_iter().map(|content| (MEMBER, "@a:b", "@a:b", content)).collect();
        state(&member)
    }

    #[test]
    fn who_is_in_one_room_alone_is_at_home_there() {
        let user = user_id!("@a:b");
        for (matrix, lm, expected) in [
            (Some("join"), None, Some(Side::Matrix)),
            (None, Some("leave"), Some(Side::Lm)),
            (Some("leave"), Some("join"), Some(Side::Lm)),
            (Some("invite"), Some("ban"), Some(Side::Matrix)),
            (Some("join"), Some("join"), None),
            (Some("leave"), Some("leave"), None),
            (None, None, None),
        ] {
            assert_eq!(by_room(user, &room(matrix), &room(lm)), expected, "{matrix:?} {lm:?}");
        }
        assert_eq!(by_name(user_id!("@lm_bob_l.example:other")), Some(Side::Matrix));
        assert_eq!(by_name(user_id!("@mx_bob_l.example:other")), Some(Side::Lm));
        assert_eq!(by_name(user_id!("@bob:other")), None);
    }
}
