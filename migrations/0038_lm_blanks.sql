-- Events of a foreign hub's log that came as redaction leaves them, though they were said while the gateway was in the room: when all of the
-- log is here, a redaction of each must be (src/lm/look/blanks.rs).
CREATE TABLE lm_blanks (
    room_id TEXT NOT NULL,
    event_id TEXT NOT NULL,
    sender TEXT NOT NULL,
    noticed_ts BIGINT NOT NULL,
    PRIMARY KEY (room_id, event_id)
);
