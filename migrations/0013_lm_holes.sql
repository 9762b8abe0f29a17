-- What of a foreign hub's log cannot be put into ours yet (src/lm/holes.rs): it could not be fetched, or not be checked.
CREATE TABLE lm_holes (
    room_id TEXT NOT NULL,
    -- The missing event; with `json` one that is there and waits.
    event_id TEXT NOT NULL,
    -- The order in which they were noticed.
    seq BIGINT NOT NULL,
    -- The end of our log when it was noticed, if what comes after it goes on without it; NULL while that waits for it.
    place BIGINT,
    -- The event as it came, when only its signer's keys are missing, or what it stands on.
    json BYTEA,
    -- 1 for state that the hub gave as it is: it is believed, not judged.
    given BIGINT NOT NULL,
    noticed_ts BIGINT NOT NULL,
    tries BIGINT NOT NULL,
    retry_at BIGINT NOT NULL,
    last_error TEXT NOT NULL,
    PRIMARY KEY (room_id, event_id)
);
