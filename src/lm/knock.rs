//! The participant's part of knocking: asking to be invited into a room that is hubbed elsewhere. Who has knocked takes it back by
//! leaving, and joins when invited.
//! Source: draft-ralston-mimi-linearized-matrix-04, section "Knocks" (`int-transport-knocks`).

use ruma::{OwnedServerName, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use super::actor::What;
use super::batch::Origin;
use super::handshake::stripped_state;
use super::room::{Facts, Snapshot};
use super::ways::{as_hub, is_of_a_known_version};
use super::{Lm, Role};
use crate::event::{Object, RoomVersion};
use crate::federation::RemoteError;
use crate::refusal::Refusal;
use crate::seam::Draft;

/// How many events of stripped state are read.
const STRIPPED: usize = 100;

impl Lm {
    /// Knocks as `user`, by make_knock and send_knock through the servers `via`, or, when the gateway is in the room, like anything that
    /// is said there; as a participant by an LPDU, waiting for its echo. Returns what the room shows of itself when the hub has accepted it.
    pub async fn knock(
        &self,
        room_id: &RoomId,
        user: &UserId,
        via: &[OwnedServerName],
        mut content: Object,
    ) -> Result<Vec<Value>, Refusal> {
        self.is_own(user)?;
        content.insert("membership".to_owned(), json!("knock"));
        let draft = self.own_member(user, content);
        match self.find(room_id).await {
            Ok((cell, room)) if self.appends(&room) => {
                let outcome = self.append(&cell, vec![(What::Own(draft), Origin::default())]).await.pop();
                outcome.ok_or_else(|| Refusal::Internal("no outcome".to_owned()))?.into_result()?;
                Ok(stripped_state(&room))
            }
            Ok((cell, room)) if room.has_server(&self.context().server_name) => {
                self.send_and_wait(&cell, &room.facts, draft).await?;
                Ok(stripped_state(&room))
            }
            Ok(_) | Err(Refusal::UnknownRoom(_)) => self.knock_from_outside(room_id, &draft, via).await,
            Err(refusal) => Err(refusal),
        }
    }

    /// Whether what a user of the gateway says is put into the room here: as the hub, or as a server of a shared room's graph.
    fn appends(&self, room: &Snapshot) -> bool {
        match self.role(room) {
            Role::Hub => true,
            Role::GraphServer { .. } => room.has_server(&self.context().server_name),
            Role::Participant { .. } => false,
        }
    }

    async fn knock_from_outside(
        &self,
        room_id: &RoomId,
        draft: &Draft,
        via: &[OwnedServerName],
    ) -> Result<Vec<Value>, Refusal> {
        let mut ways = self.ways(room_id, via).await;
        while let Some(server) = ways.next() {
            match self.knock_through(&server, room_id, draft).await {
                Ok(stripped) => return Ok(stripped),
                Err(refusal) => ways.refused(&server, refusal),
            }
        }
        Err(ways.end(&format!("{room_id} can be asked")))
    }

    async fn knock_through(&self, server: &ServerName, room_id: &RoomId, draft: &Draft) -> Result<Vec<Value>, Refusal> {
        let failed = |error: RemoteError| match error.is_unrecognized() {
            true => Refusal::Forbidden(format!("{server} knows no knocks")),
            false => as_hub(error, server),
        };
        let (made, _) = self.peers().make(server, "knock", room_id, &draft.sender).await.map_err(failed)?;
        is_of_a_known_version(&made)?;
        // Of the template nothing else is needed: what the knock says is ours.
        let facts =
            Facts { room_id: room_id.to_owned(), version: RoomVersion::Lm02, hub: server.to_owned(), shared: false };
        let lpdu = self.sign(&facts, draft)?;
        let (mut answer, _held) =
            self.peers().send(server, "knock", &lpdu.lpdu_id, &lpdu.json).await.map_err(failed)?;
        // The draft's name, and Matrix's.
        let stripped = ["stripped_state", "knock_room_state"].into_iter().find_map(|name| answer.remove(name));
        tracing::info!(room = %room_id, hub = %server, user = %draft.sender, "knocked");
        Ok(match stripped {
            Some(Value::Array(stripped)) => stripped.into_iter().take(STRIPPED).collect(),
            _ => Vec::new(),
        })
    }
}
