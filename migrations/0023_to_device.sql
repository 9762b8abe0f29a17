-- What other servers' users send to devices of this gateway's users, until somebody takes it out, and whose devices have changed
-- (src/store/to_device.rs).
CREATE TABLE to_device_messages (
    position BIGINT NOT NULL PRIMARY KEY,
    side TEXT NOT NULL,
    origin TEXT NOT NULL,
    sender TEXT NOT NULL,
    message_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    target TEXT NOT NULL,
    device TEXT NOT NULL,
    content BYTEA NOT NULL
);
CREATE UNIQUE INDEX to_device_once ON to_device_messages (origin, message_id, target, device);
CREATE INDEX to_device_of ON to_device_messages (target, device, position);
-- What was taken out is known for a while: its server may send it again.
CREATE TABLE to_device_taken (
    origin TEXT NOT NULL,
    message_id TEXT NOT NULL,
    target TEXT NOT NULL,
    device TEXT NOT NULL,
    taken_ts BIGINT NOT NULL,
    PRIMARY KEY (origin, message_id, target, device)
);
CREATE INDEX to_device_taken_age ON to_device_taken (taken_ts);
CREATE TABLE devices_changed (
    user_id TEXT NOT NULL PRIMARY KEY,
    position BIGINT NOT NULL
);
