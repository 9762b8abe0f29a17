-- What was redacted in a log, by redactions that were accepted (src/store/lm/redactions.rs). Of an event that is not in the log
-- here it is not known whose it is: then `by_user` is who may redact only what is their own, and empty who may redact everything.
CREATE TABLE lm_redactions (
    room_id TEXT NOT NULL,
    target TEXT NOT NULL,
    by_user TEXT NOT NULL,
    redaction TEXT NOT NULL,
    PRIMARY KEY (room_id, target, by_user)
);
