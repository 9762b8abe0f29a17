-- Servers outside a room that are to be told of an event about one of their users (src/lm/tell.rs): an invite that they were not
-- asked about, or its end.
CREATE TABLE lm_tells (
    -- In the order of the log.
    seq BIGINT NOT NULL PRIMARY KEY,
    server TEXT NOT NULL,
    -- The server whose user it is that said it.
    by_server TEXT NOT NULL,
    room_id TEXT NOT NULL,
    event_id TEXT NOT NULL,
    made_ts BIGINT NOT NULL,
    -- How often that failed, and when it is tried again.
    tries BIGINT NOT NULL DEFAULT 0,
    next_ts BIGINT NOT NULL DEFAULT 0
);
CREATE INDEX lm_tells_next ON lm_tells (next_ts);
CREATE INDEX lm_tells_server ON lm_tells (server, seq);
CREATE INDEX lm_tells_by ON lm_tells (by_server, seq);
