//! Events that are right but for one thing, so that each check is the only one that finds it out.

use isthmus::event::{Object, Redaction, canonical_json, content_hash, lpdu_hash, redact, reference_hash};
use rand::Rng as _;
use ruma::{OwnedServerName, RoomId, UserId};
use serde_json::{Value, json};

use super::adversary::{Forger, Owned};
use super::{AIMED, RIGHT};

impl Forger {
    /// The event, and the server that sends it.
    pub fn nearly_right(&mut self, room: &RoomId, hub: &OwnedServerName) -> Option<(Object, OwnedServerName)> {
        match self.owned.iter().find(|owned| owned.name == *hub).cloned() {
            Some(hub) => Some((self.nearly_right_of_hub(room, &hub)?, hub.name)),
            None if self.is_shared && self.random.gen_bool(0.6) => self.nearly_right_of_graph(room, hub),
            None => self.nearly_right_lpdu(room, hub),
        }
    }

    fn nearly_right_lpdu(&mut self, room: &RoomId, hub: &OwnedServerName) -> Option<(Object, OwnedServerName)> {
        let users = [(self.owned[0].clone(), "eve"), (self.owned[1].clone(), "mallory")];
        let (by, name) = self.pick(&users);
        let mut event = self.lpdu(room, hub, &format!("@{name}:{}", by.name), AIMED);
        match self.random.gen_range(0..5) {
            // Signed, but not this.
            0 => {
                let other = self.lpdu(room, hub, &format!("@{name}:{}", by.name), "other");
                sign(&mut event, &by.name, by.key.id(), &signature(&other, &by));
            }
            // Changed after it was hashed.
            1 => {
                event["content"]["body"] = json!(format!("{AIMED} and changed"));
                let right = signature(&event, &by);
                sign(&mut event, &by.name, by.key.id(), &right);
            }
            // With what is the hub's to say.
            2 => {
                let right = signature(&event, &by);
                sign(&mut event, &by.name, by.key.id(), &right);
                event.insert("auth_events".to_owned(), json!([id(self.seen.first()?)]));
                if self.random.gen_bool(0.5) {
                    event.insert("prev_events".to_owned(), json!([id(self.seen.last()?)]));
                }
            }
            // Another server's, as that has signed it.
            3 if !self.found.is_empty() => {
                let found = self.found.clone();
                event = self.pick(&found);
            }
            // Of another server's user, under that server's name.
            _ => {
                let (sender, server, key_id) = self.member()?;
                event = self.lpdu(room, hub, &sender, AIMED);
                let wrong = signature(&event, &by);
                sign(&mut event, &server, &key_id, &wrong);
            }
        }
        Some((event, by.name))
    }

    /// As a server of a shared room's graph sends it.
    fn nearly_right_of_graph(&mut self, room: &RoomId, hub: &OwnedServerName) -> Option<(Object, OwnedServerName)> {
        let by = self.owned[2].clone();
        let mut event = match self.random.gen_range(0..6) {
            // Another's LPDU, as if this server were the hub, or had its signature.
            0 if !self.found.is_empty() => {
                let found = self.found.clone();
                let mut event = self.pick(&found);
                self.finish(&mut event)?;
                if self.random.gen_bool(0.5) {
                    let (key_id, wrong) = (self.honest.first()?.1.clone(), signature(&event, &by));
                    sign(&mut event, hub, &key_id, &wrong);
                }
                event
            }
            // What another has said, with something else in it.
            1 => {
                let said: Vec<Object> =
                    self.seen.iter().filter(|event| event["type"] == "m.room.message").cloned().collect();
                let mut event = if said.is_empty() { return None } else { self.pick(&said) };
                event.insert("content".to_owned(), json!({ "msgtype": "m.text", "body": AIMED }));
                if self.random.gen_bool(0.5) {
                    event["hashes"].as_object_mut()?.remove("sha256");
                    let hash = content_hash(&event);
                    event["hashes"].as_object_mut()?.insert("sha256".to_owned(), json!(hash));
                }
                event
            }
            // Right: its own.
            2 => {
                let mut event = self.whole(room, &format!("@grace:{}", by.name), RIGHT)?;
                let right = signature(&event, &by);
                sign(&mut event, &by.name, by.key.id(), &right);
                return Some((event, by.name));
            }
            // Of another server's user, under that server's name, with what that has signed, or with no signature of it.
            what => {
                let (sender, server, key_id) = self.member()?;
                let mut event = self.whole(room, &sender, AIMED)?;
                let known = self.seen.iter().rev().find_map(|seen| seen["signatures"].get(server.as_str()).cloned());
                match (what, known) {
                    (3, _) => {
                        let wrong = signature(&event, &by);
                        sign(&mut event, &server, &key_id, &wrong);
                    }
                    (4, Some(known)) => drop(event.insert("signatures".to_owned(), json!({ server.as_str(): known }))),
                    _ => {}
                }
                event
            }
        };
        let right = signature(&event, &by);
        sign(&mut event, &by.name, by.key.id(), &right);
        Some((event, by.name))
    }

    /// A message that follows what was seen last, as its sender's own server makes it.
    fn whole(&mut self, room: &RoomId, sender: &str, body: &str) -> Option<Object> {
        let hub = self.owned[0].name.clone();
        let mut event = self.lpdu(room, &hub, sender, body);
        event.remove("hub_server");
        event.remove("hashes");
        self.finish(&mut event)?;
        Some(event)
    }

    fn nearly_right_of_hub(&mut self, room: &RoomId, hub: &Owned) -> Option<Object> {
        let (sender, server, key_id) = self.member()?;
        let mut event = match self.random.gen_range(0..4) {
            // The LPDU is not its server's.
            0 => {
                let mut event = self.lpdu(room, &hub.name, &sender, AIMED);
                let wrong = signature(&event, hub);
                sign(&mut event, &server, &key_id, &wrong);
                event
            }
            // It was, with something else in it.
            1 => {
                let honest: Vec<_> = self.honest.iter().map(|(name, _)| format!(":{name}")).collect();
                let of_honest = |sender: &str| honest.iter().any(|name| sender.ends_with(name));
                let said = self.seen.iter().filter(|event| {
                    event.contains_key("hub_server")
                        && event["type"] == "m.room.message"
                        && of_honest(event["sender"].as_str().unwrap_or_default())
                });
                let said: Vec<Object> = said.cloned().collect();
                let mut event = if said.is_empty() { return None } else { self.pick(&said) };
                for hubs in ["auth_events", "prev_events"] {
                    event.remove(hubs);
                }
                event["hashes"].as_object_mut()?.remove("sha256");
                event["signatures"].as_object_mut()?.remove(hub.name.as_str());
                event.insert("content".to_owned(), json!({ "msgtype": "m.text", "body": AIMED }));
                event
            }
            // By no LPDU at all.
            2 => {
                let mut event = self.lpdu(room, &hub.name, &sender, AIMED);
                event.remove("hub_server");
                event.remove("hashes");
                event
            }
            // Right: its own.
            _ => {
                let by = self.owned[1].clone();
                let mut event = self.lpdu(room, &hub.name, &format!("@mallory:{}", by.name), RIGHT);
                let right = signature(&event, &by);
                sign(&mut event, &by.name, by.key.id(), &right);
                event
            }
        };
        self.finish(&mut event)?;
        if !event.contains_key("hub_server") {
            let wrong = signature(&event, hub);
            sign(&mut event, &server, &key_id, &wrong);
        }
        let right = signature(&event, hub);
        sign(&mut event, &hub.name, hub.key.id(), &right);
        Some(event)
    }

    /// A message with its hash, for a hub.
    fn lpdu(&mut self, room: &RoomId, hub: &OwnedServerName, sender: &str, body: &str) -> Object {
        let body = format!("{body} {}", self.random.gen_range(0..1_000_000));
        let event = json!({ "type": "m.room.message", "room_id": room, "sender": sender, "hub_server": hub,
            "content": { "msgtype": "m.text", "body": body },
            "origin_server_ts": 1_700_000_000_000_i64 + self.random.gen_range(0..1000) });
        let mut event = event.as_object().unwrap().clone();
        let hash = lpdu_hash(&event);
        event.insert("hashes".to_owned(), json!({ "lpdu": { "sha256": hash } }));
        event
    }

    /// What the hub adds, at the end of what it has seen.
    fn finish(&mut self, event: &mut Object) -> Option<()> {
        let sender = event["sender"].clone();
        let current = |kind: &str, key: &Value| {
            self.seen.iter().rev().find(|seen| seen["type"] == kind && seen.get("state_key") == Some(key)).map(id)
        };
        let auth: Option<Vec<String>> =
            [("m.room.create", &json!("")), ("m.room.power_levels", &json!("")), ("m.room.member", &sender)]
                .into_iter()
                .map(|(kind, key)| current(kind, key))
                .collect();
        event.insert("auth_events".to_owned(), json!(auth?));
        event.insert("prev_events".to_owned(), json!([id(self.seen.last()?)]));
        let hash = content_hash(event);
        event.entry("hashes").or_insert_with(|| json!({})).as_object_mut()?.insert("sha256".to_owned(), json!(hash));
        Some(())
    }

    /// A user of an honest server who is in the room, with that server and the ID of its key.
    fn member(&mut self) -> Option<(String, OwnedServerName, String)> {
        let joined = self.seen.iter().filter(|event| event["content"]["membership"] == "join");
        let of_honest = joined.filter_map(|event| {
            let user = event.get("state_key")?.as_str()?;
            let server = <&UserId>::try_from(user).ok()?.server_name();
            let (server, key_id) = self.honest.iter().find(|(honest, _)| honest == server)?;
            Some((user.to_owned(), server.clone(), key_id.clone()))
        });
        let members: Vec<_> = of_honest.collect();
        (!members.is_empty()).then(|| self.pick(&members))
    }
}

fn id(event: &Object) -> String {
    format!("${}", reference_hash(event, Redaction::Draft))
}

fn signature(event: &Object, by: &Owned) -> String {
    let mut signed = redact(event, Redaction::Draft);
    signed.remove("signatures");
    by.key.sign(&canonical_json(&signed))
}

fn sign(event: &mut Object, server: &OwnedServerName, key_id: &str, signature: &str) {
    let signatures = event.entry("signatures").or_insert_with(|| json!({}));
    signatures[server.as_str()] = json!({ key_id: signature });
}
