-- Accepted events of bridged rooms that the bridge has yet to carry over (src/store/inbox.rs).
CREATE TABLE bridge_inbox (
    seq BIGINT NOT NULL PRIMARY KEY,
    side TEXT NOT NULL,
    room_id TEXT NOT NULL,
    event_id TEXT NOT NULL,
    received_ts BIGINT NOT NULL
);
CREATE INDEX bridge_inbox_room ON bridge_inbox (side, room_id, seq);
