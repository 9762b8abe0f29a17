-- Rooms of foreign hubs that users of the gateway are to leave again (src/lm/owed.rs): a hub may have taken a join whose answer could
-- not be used here.
CREATE TABLE lm_owed_leaves (
    -- The server that was sent the join.
    server TEXT NOT NULL,
    room_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    made_ts BIGINT NOT NULL,
    -- How often the leave failed, and when it is tried next.
    tries BIGINT NOT NULL DEFAULT 0,
    next_ts BIGINT NOT NULL,
    PRIMARY KEY (server, room_id, user_id)
);
CREATE INDEX lm_owed_leaves_next ON lm_owed_leaves (next_ts);
