//! The journal: a file of JSON lines from which rooms, and what is still to be sent, come back after a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use isthmus::event::{Lpdu, Object, Pdu, Redaction};
use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, RoomId, ServerName};
use serde::{Deserialize, Serialize};

use super::lock;
use super::room::Room;

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
enum Line {
    Room { room_id: OwnedRoomId, version: String, hub: OwnedServerName },
    Alias { alias: String, room_id: OwnedRoomId },
    State { room_id: OwnedRoomId, event: Object },
    Event { room_id: OwnedRoomId, event: Object, to: BTreeSet<OwnedServerName> },
    Cursor { room_id: OwnedRoomId, server: OwnedServerName, place: usize },
    Pending { room_id: OwnedRoomId, lpdu: Object },
    Answered { room_id: OwnedRoomId, lpdu_id: OwnedEventId },
}

/// What a journal held.
#[derive(Default)]
pub struct Kept {
    pub rooms: BTreeMap<OwnedRoomId, Room>,
    pub aliases: BTreeMap<String, OwnedRoomId>,
}

/// The open journal, or none.
pub struct Journal(Option<Mutex<File>>);

impl Journal {
    /// Reads the journal and opens it for more.
    pub fn open(path: Option<&Path>) -> Result<(Self, Kept)> {
        let mut kept = Kept::default();
        let Some(path) = path else { return Ok((Self(None), kept)) };
        let file = OpenOptions::new().create(true).read(true).append(true).open(path);
        let file = file.with_context(|| format!("opening {}", path.display()))?;
        for line in BufReader::new(File::open(path)?).lines() {
            // A last line that a crash cut off says nothing.
            let Ok(line) = serde_json::from_str(&line?) else { continue };
            kept.apply(line)?;
        }
        Ok((Self(Some(Mutex::new(file))), kept))
    }

    fn write(&self, line: &Line) {
        let Some(file) = &self.0 else { return };
        let Ok(mut text) = serde_json::to_string(line) else { return };
        text.push('\n');
        if let Err(error) = lock(file).write_all(text.as_bytes()) {
            eprintln!("the journal could not be written: {error}");
        }
    }

    pub fn room(&self, room_id: &RoomId, version: &str, hub: &ServerName) {
        self.write(&Line::Room { room_id: room_id.to_owned(), version: version.to_owned(), hub: hub.to_owned() });
    }

    pub fn alias(&self, alias: &str, room_id: &RoomId) {
        self.write(&Line::Alias { alias: alias.to_owned(), room_id: room_id.to_owned() });
    }

    pub fn state(&self, room_id: &RoomId, event: &Object) {
        self.write(&Line::State { room_id: room_id.to_owned(), event: event.clone() });
    }

    pub fn event(&self, room_id: &RoomId, event: &Object, to: &BTreeSet<OwnedServerName>) {
        self.write(&Line::Event { room_id: room_id.to_owned(), event: event.clone(), to: to.clone() });
    }

    pub fn cursor(&self, room_id: &RoomId, server: &ServerName, place: usize) {
        self.write(&Line::Cursor { room_id: room_id.to_owned(), server: server.to_owned(), place });
    }

    pub fn pending(&self, room_id: &RoomId, lpdu: &Object) {
        self.write(&Line::Pending { room_id: room_id.to_owned(), lpdu: lpdu.clone() });
    }

    pub fn answered(&self, room_id: &RoomId, lpdu_id: &EventId) {
        self.write(&Line::Answered { room_id: room_id.to_owned(), lpdu_id: lpdu_id.to_owned() });
    }
}

impl Kept {
    fn apply(&mut self, line: Line) -> Result<()> {
        match line {
            Line::Room { room_id, version, hub } => {
                let room = Room::new(room_id.clone(), &version, hub);
                self.rooms.insert(room_id, room);
            }
            Line::Alias { alias, room_id } => {
                self.aliases.insert(alias, room_id);
            }
            Line::State { room_id, event } => self.room(&room_id)?.set_state(parse(event)?),
            Line::Event { room_id, event, to } => {
                let (room, event) = (self.room(&room_id)?, parse(event)?);
                room.set_state(event.clone());
                room.place_at_end(event, to);
            }
            Line::Cursor { room_id, server, place } => {
                self.room(&room_id)?.cursors.insert(server, place);
            }
            Line::Pending { room_id, lpdu } => self.room(&room_id)?.pending.push_back(Lpdu::parse(lpdu)?),
            Line::Answered { room_id, lpdu_id } => {
                self.room(&room_id)?.pending.retain(|lpdu| lpdu.lpdu_id != lpdu_id);
            }
        }
        Ok(())
    }

    fn room(&mut self, room_id: &RoomId) -> Result<&mut Room> {
        self.rooms.get_mut(room_id).with_context(|| format!("the journal has no room {room_id}"))
    }
}

fn parse(event: Object) -> Result<Arc<Pdu>> {
    Ok(Arc::new(Pdu::parse(event, Redaction::Draft)?))
}
