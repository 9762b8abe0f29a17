-- Transactions of the homeserver that were taken (src/store/appservice.rs). The fingerprint is of the event IDs: a homeserver
-- whose database was made anew counts its transactions from 1 again.
CREATE TABLE appservice_transactions (
    txn_id TEXT NOT NULL PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    received_ts BIGINT NOT NULL
);
-- What is to be done because of their events, as JSON. `failed` says why something was given up.
CREATE TABLE appservice_work (
    seq BIGINT NOT NULL PRIMARY KEY,
    work BYTEA NOT NULL,
    attempts BIGINT NOT NULL,
    due_ts BIGINT NOT NULL,
    failed TEXT
);
CREATE INDEX appservice_work_due ON appservice_work (due_ts);
-- Portals into which the appservice's user was invited and not yet withdrawn.
CREATE TABLE appservice_invites (
    room_id TEXT NOT NULL PRIMARY KEY,
    invited_ts BIGINT NOT NULL
);
-- Direct chats with the appservice's user.
CREATE TABLE appservice_chats (
    room_id TEXT NOT NULL PRIMARY KEY,
    user_id TEXT NOT NULL
);
