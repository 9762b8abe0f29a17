-- Rooms of the linear side (src/store/lm). A room's log is lm_events, positions dense from 0.
CREATE TABLE lm_rooms (
    room_id TEXT NOT NULL PRIMARY KEY,
    version TEXT NOT NULL,
    -- The server that keeps the log; the gateway itself where it is the hub.
    hub TEXT NOT NULL,
    -- Which table of redaction the hub uses: draft or graph.
    redaction TEXT NOT NULL,
    head BIGINT NOT NULL
);
CREATE TABLE lm_events (
    room_id TEXT NOT NULL,
    position BIGINT NOT NULL,
    event_id TEXT NOT NULL,
    -- The reference hash of the LPDU that the event was made of.
    lpdu_id TEXT,
    -- Of state events only.
    kind TEXT,
    state_key TEXT,
    json BYTEA NOT NULL,
    PRIMARY KEY (room_id, position)
);
CREATE UNIQUE INDEX lm_events_id ON lm_events (event_id);
CREATE INDEX lm_events_lpdu ON lm_events (lpdu_id) WHERE lpdu_id IS NOT NULL;
CREATE INDEX lm_events_state ON lm_events (room_id, kind, state_key, position) WHERE state_key IS NOT NULL;
-- The current state: where in the log the last event of each (type, state key) is.
CREATE TABLE lm_state (
    room_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    state_key TEXT NOT NULL,
    position BIGINT NOT NULL,
    PRIMARY KEY (room_id, kind, state_key)
);
-- When other servers were in a room that the gateway hubs: they get the events after `since`, up to and with `until`.
CREATE TABLE lm_servers (
    room_id TEXT NOT NULL,
    server TEXT NOT NULL,
    since BIGINT NOT NULL,
    until BIGINT,
    PRIMARY KEY (room_id, server, since)
);
-- LPDUs that wait for the hub's answer.
CREATE TABLE lm_lpdu_queue (
    room_id TEXT NOT NULL,
    position BIGINT NOT NULL,
    lpdu_id TEXT NOT NULL,
    json BYTEA NOT NULL,
    PRIMARY KEY (room_id, position)
);
-- Where a hub misbehaved. The events named here are not in the log.
CREATE TABLE lm_complaints (
    room_id TEXT NOT NULL,
    event_id TEXT NOT NULL,
    problem TEXT NOT NULL,
    noticed_ts BIGINT NOT NULL,
    PRIMARY KEY (room_id, event_id)
);
