-- The room of what was refused: an invite may be refused into a room that never had a portal.
ALTER TABLE bridge_refusals ADD COLUMN room_id TEXT;
-- The Matrix room that holds the rooms of an LM hub.
CREATE TABLE bridge_spaces (
    hub TEXT NOT NULL PRIMARY KEY,
    room_id TEXT NOT NULL
);
