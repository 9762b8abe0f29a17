-- Leaves that are owed, on either side (src/seam/owed.rs): a server was sent a join of a user of the gateway, may have taken it, and what
-- it answered could not be used. Written down before the join is sent.
CREATE TABLE owed_leaves (
    -- The server that is sent the join.
    server TEXT NOT NULL,
    room_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    -- 'lm' or 'matrix': by whose handshakes.
    side TEXT NOT NULL,
    -- The version of the room by which the join was made; none where the leave needs none.
    version TEXT,
    -- When the join was sent.
    made_ts BIGINT NOT NULL,
    -- 1 while the join is under way: then nobody leaves.
    joining BIGINT NOT NULL DEFAULT 0,
    -- How often the leave failed, and when it is tried next; none where none is owed, so far or any more.
    tries BIGINT NOT NULL DEFAULT 0,
    next_ts BIGINT,
    -- When it was given up.
    given_up_ts BIGINT,
    PRIMARY KEY (server, room_id, user_id)
);
INSERT INTO owed_leaves (server, room_id, user_id, side, made_ts, tries, next_ts)
    SELECT server, room_id, user_id, 'lm', made_ts, tries, next_ts FROM lm_owed_leaves;
DROP TABLE lm_owed_leaves;
CREATE INDEX owed_leaves_next ON owed_leaves (side, next_ts);
