-- A gap of a foreign hub's log that is too long to be filled at once (src/lm/staged.rs): its events are fetched backwards, from
-- the newest on, and kept here until the first is there; then they go into the log from the first on.
CREATE TABLE lm_gaps (
    room_id TEXT NOT NULL PRIMARY KEY,
    -- The events that are asked for next, as a JSON array of their IDs.
    edges TEXT NOT NULL,
    -- The newest event that came meanwhile.
    newest TEXT,
    -- The lowest seq in lm_staged.
    lowest BIGINT NOT NULL,
    events BIGINT NOT NULL,
    bytes BIGINT NOT NULL,
    -- How many of them are in the log.
    taken BIGINT NOT NULL,
    -- The end of our log when all was fetched that can be; NULL before that.
    place BIGINT,
    -- Why what is before the first cannot be had; NULL when nothing is missing there.
    problem TEXT,
    noticed_ts BIGINT NOT NULL,
    tries BIGINT NOT NULL,
    retry_at BIGINT NOT NULL,
    last_error TEXT NOT NULL
);
CREATE TABLE lm_staged (
    room_id TEXT NOT NULL,
    -- Their order in the log.
    seq BIGINT NOT NULL,
    event_id TEXT NOT NULL,
    -- 1 when signatures and hashes were found right.
    proved BIGINT NOT NULL,
    json BYTEA NOT NULL,
    PRIMARY KEY (room_id, seq)
);
CREATE UNIQUE INDEX lm_staged_id ON lm_staged (room_id, event_id);
-- Whether an admin wants a portal: it never gives way to another (src/bridge/space.rs). Of those made before this, the ones that
-- may go unused for a time are nobody's, and who made the others is not known.
ALTER TABLE bridge_portals ADD COLUMN by_admin BIGINT NOT NULL DEFAULT 1;
UPDATE bridge_portals SET by_admin = 0 WHERE unused_until_ts IS NOT NULL;
