-- What is missing in graphs (src/dag/gaps.rs): with `json` an event that waits for what is before it; without it one that was taken
-- with the state that another server says was before it.
CREATE TABLE dag_gaps (
    room_id TEXT NOT NULL,
    event_id TEXT NOT NULL,
    -- The order in which they were noticed.
    seq BIGINT NOT NULL,
    -- The server that sent the event.
    server TEXT NOT NULL,
    json BYTEA,
    -- How many of the events that it follows are not here.
    missing BIGINT NOT NULL,
    noticed_ts BIGINT NOT NULL,
    tries BIGINT NOT NULL,
    retry_at BIGINT NOT NULL,
    last_error TEXT NOT NULL,
    PRIMARY KEY (room_id, event_id)
);
CREATE INDEX dag_gaps_server ON dag_gaps (server);
-- The join with which the gateway came into a room that was elsewhere: what is before it is no gap.
CREATE TABLE dag_begins (
    room_id TEXT NOT NULL PRIMARY KEY,
    event_id TEXT NOT NULL
);
