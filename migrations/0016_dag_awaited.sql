-- Accepted redactions of events that were not here when they came (src/dag/redact.rs).
CREATE TABLE dag_awaited (
    room_id TEXT NOT NULL,
    -- The event that is to be redacted.
    target TEXT NOT NULL,
    redaction TEXT NOT NULL,
    PRIMARY KEY (room_id, target, redaction)
);
