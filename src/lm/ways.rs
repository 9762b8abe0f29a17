//! The servers through which a room is asked for from outside (to join, to knock, to decline): one after the other, and those that
//! the hub of before names as the hub of now.

use std::collections::{BTreeSet, VecDeque};

use ruma::{OwnedServerName, RoomId, ServerName};
use serde_json::Value;

use super::Lm;
use super::participant::into_refusal;
use crate::event::{Family, Object, RoomVersion};
use crate::federation::RemoteError;
use crate::refusal::Refusal;

/// How many servers are asked because another has named them as the hub.
const NAMED: usize = 3;

/// The servers that are still to be asked, and what those say that were.
pub(super) struct Ways<'a> {
    own: &'a ServerName,
    left: VecDeque<OwnedServerName>,
    asked: BTreeSet<OwnedServerName>,
    named: usize,
    told: Option<Refusal>,
}

impl Lm {
    /// `via`, then the hub of a room that was known before, then the server that the room's ID names; each once and not
    /// ourselves.
    pub(super) async fn ways(&self, room_id: &RoomId, via: &[OwnedServerName]) -> Ways<'_> {
        let known = self.find(room_id).await.ok().map(|(_, room)| room.facts.hub.clone());
        let all = via.iter().map(|server| &**server).chain(known.as_deref()).chain(room_id.server_name());
        let left = all.map(ServerName::to_owned).collect();
        Ways { own: &self.context().server_name, left, asked: BTreeSet::new(), named: 0, told: None }
    }
}

impl Ways<'_> {
    /// Whom to ask next.
    pub fn next(&mut self) -> Option<OwnedServerName> {
        while let Some(server) = self.left.pop_front() {
            if server != self.own && self.asked.insert(server.clone()) {
                return Some(server);
            }
        }
        None
    }

    /// What a server said. One that was the hub says who is now: that one must prove it as every hub does.
    pub fn refused(&mut self, server: &ServerName, refusal: Refusal) {
        let refusal = match refusal {
            Refusal::WrongHub { hub, .. } if self.named < NAMED && ServerName::parse(&hub).is_ok() => {
                self.named = self.named.saturating_add(1);
                self.left.extend(ServerName::parse(&hub).ok());
                Refusal::Remote { server: server.to_string(), problem: format!("{hub} keeps the log") }
            }
            refusal => refusal,
        };
        // The first that decides it is worth more than one that only could not be asked.
        if self.told.as_ref().is_none_or(|told| told.is_transient() && !refusal.is_transient()) {
            self.told = Some(refusal);
        }
    }

    /// Why there was no way; `what` is what nobody could be asked for.
    pub fn end(self, what: &str) -> Refusal {
        self.told.unwrap_or_else(|| Refusal::NotFound(format!("a server through which {what}")))
    }
}

/// What a server that is asked as the hub answers.
pub(super) fn as_hub(error: RemoteError, server: &ServerName) -> Refusal {
    match error {
        RemoteError::Status { errcode, hub_server: Some(hub), .. } if errcode == "M_WRONG_SERVER" => {
            Refusal::WrongHub { hub: hub.to_string(), found: server.to_string() }
        }
        error => into_refusal(error, server),
    }
}

/// Refuses what a server answers to `make_…` for a room of a version that is not known here, or is none of LM's: nothing is signed for it.
/// A template need not say the version; that of the room's first event holds, whatever it says.
/// Source: draft-ralston-mimi-linearized-matrix-04, section "`GET /_matrix/federation/v1/make_leave/:roomId/:userId`" (`int-api-make-leave`).
pub(super) fn is_of_a_known_version(made: &Object) -> Result<(), Refusal> {
    let Some(version) = made.get("room_version").and_then(Value::as_str) else { return Ok(()) };
    match RoomVersion::parse(version).map(RoomVersion::family) {
        Some(Family::Log) => Ok(()),
        Some(Family::Graph) | None => Err(Refusal::IncompatibleRoomVersion(version.chars().take(100).collect())),
    }
}

#[cfg(test)]
mod tests {
    use ruma::server_name;
    use serde_json::json;

    use super::*;

    fn ways(left: &[&str]) -> Ways<'static> {
        let left = left.iter().map(|name| ServerName::parse(name).unwrap()).collect();
        Ways { own: server_name!("g.example"), left, asked: BTreeSet::new(), named: 0, told: None }
    }

    fn wrong(hub: &str) -> Refusal {
        Refusal::WrongHub { hub: hub.to_owned(), found: "a.example".to_owned() }
    }

    #[test]
    fn each_is_asked_once_and_a_named_hub_too_but_not_for_ever() {
        let mut ways = ways(&["a.example", "g.example", "a.example", "b.example"]);
        let mut asked = Vec::new();
        while let Some(server) = ways.next() {
            ways.refused(&server, wrong(&format!("hub{}.example", asked.len())));
            asked.push(server.to_string());
        }
        assert_eq!(asked, ["a.example", "b.example", "hub0.example", "hub1.example", "hub2.example"]);
        assert!(ways.next().is_none());
    }

    #[test]
    fn who_names_us_or_themselves_leads_nowhere() {
        let mut ways = ways(&["a.example"]);
        let server = ways.next().unwrap();
        ways.refused(&server, wrong("g.example"));
        assert!(ways.next().is_none());
        assert!(ways.end("it can be left").to_string().contains("g.example keeps the log"));
    }

    #[test]
    fn a_verdict_counts_more_than_a_server_that_is_away() {
        let mut ways = ways(&["a.example", "b.example", "c.example"]);
        let away = Refusal::Remote { server: "a.example".to_owned(), problem: "away".to_owned() };
        for refusal in [away, Refusal::Forbidden("no".to_owned()), Refusal::Forbidden("never".to_owned())] {
            let server = ways.next().unwrap();
            ways.refused(&server, refusal);
        }
        assert_eq!(ways.end("it can be left").to_string(), Refusal::Forbidden("no".to_owned()).to_string());
        assert!(self::ways(&[]).end("it can be left").to_string().contains("it can be left"));
    }

    #[test]
    fn a_template_may_say_a_version_that_is_known_or_none() {
        let made = |version: Value| {
            let made = json!({ "event": {}, "room_version": version });
            is_of_a_known_version(made.as_object().unwrap())
        };
        for version in RoomVersion::of(Family::Log) {
            assert_eq!(made(json!(version.as_str())), Ok(()));
        }
        assert_eq!(made(Value::Null), Ok(()));
        assert_eq!(is_of_a_known_version(&Object::new()), Ok(()));
        for version in ["I.2", "11", ""] {
            assert_eq!(made(json!(version)), Err(Refusal::IncompatibleRoomVersion(version.to_owned())));
        }
    }
}
