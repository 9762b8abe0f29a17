-- The graph side: rooms, events, their state, and what is to be sent to other homeservers (src/store/dag.rs).
CREATE TABLE dag_rooms (
    room_id TEXT NOT NULL PRIMARY KEY,
    version TEXT NOT NULL,
    listed BIGINT NOT NULL,
    -- The state group of the current, resolved state.
    current_group BIGINT NOT NULL,
    -- The forward extremities, oldest first: a JSON array of event IDs.
    tips BYTEA NOT NULL,
    outbox_head BIGINT NOT NULL
);
CREATE TABLE dag_events (
    event_id TEXT NOT NULL PRIMARY KEY,
    room_id TEXT NOT NULL,
    version TEXT NOT NULL,
    -- The order in which events were stored.
    seq BIGINT NOT NULL,
    -- 0 accepted, 1 soft-failed, 2 rejected.
    status BIGINT NOT NULL,
    -- The state groups before and after the event; NULL when they are not known (an auth event that came alone).
    before_group BIGINT,
    after_group BIGINT,
    -- Why it was not accepted.
    reason TEXT,
    json BYTEA NOT NULL
);
CREATE INDEX dag_events_room ON dag_events (room_id, seq);
CREATE TABLE dag_groups (
    id BIGINT NOT NULL PRIMARY KEY,
    room_id TEXT NOT NULL,
    -- The group that `delta` changes; NULL when `delta` is the whole state.
    prev_id BIGINT,
    -- How many changes must be applied to get from the last whole state to this group.
    weight BIGINT NOT NULL,
    -- JSON: [[type, state key, event ID or null], …].
    delta BYTEA NOT NULL
);
CREATE TABLE dag_joined (
    room_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    PRIMARY KEY (room_id, user_id)
);
CREATE TABLE dag_outbox (
    room_id TEXT NOT NULL,
    position BIGINT NOT NULL,
    event_id TEXT NOT NULL,
    -- The server that the event came from.
    not_to TEXT,
    PRIMARY KEY (room_id, position)
);
-- Which positions of a room's outbox a server gets: those after `opened`, up to `closed`.
CREATE TABLE dag_windows (
    room_id TEXT NOT NULL,
    server TEXT NOT NULL,
    opened BIGINT NOT NULL,
    closed BIGINT,
    PRIMARY KEY (room_id, server, opened)
);
-- Invites of users of this gateway into rooms that live elsewhere.
CREATE TABLE dag_invites (
    room_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    version TEXT NOT NULL,
    via TEXT NOT NULL,
    json BYTEA NOT NULL,
    PRIMARY KEY (room_id, user_id)
);
