-- Answers to transactions of other servers, kept for a day (src/store/transactions.rs).
CREATE TABLE federation_transactions (
    origin TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    txn_id TEXT NOT NULL,
    answer BYTEA NOT NULL,
    answered_ts BIGINT NOT NULL,
    PRIMARY KEY (origin, endpoint, txn_id)
);
CREATE INDEX federation_transactions_age ON federation_transactions (answered_ts);

-- Outbound queues (src/store/outbound.rs): the last position of each feed, and up to where each destination has it.
CREATE TABLE outbound_feeds (
    kind TEXT NOT NULL,
    room_id TEXT NOT NULL,
    head BIGINT NOT NULL,
    PRIMARY KEY (kind, room_id)
);
CREATE TABLE outbound_cursors (
    destination TEXT NOT NULL,
    kind TEXT NOT NULL,
    room_id TEXT NOT NULL,
    sent BIGINT NOT NULL,
    ends_at BIGINT,
    PRIMARY KEY (destination, kind, room_id)
);
-- The transaction that may be on its way to a destination, so that after a crash the same one is sent again.
CREATE TABLE outbound_inflight (
    destination TEXT NOT NULL PRIMARY KEY,
    txn_id TEXT NOT NULL,
    parts BYTEA NOT NULL,
    composed_ts BIGINT NOT NULL
);
-- Destinations that fail.
CREATE TABLE outbound_destinations (
    destination TEXT NOT NULL PRIMARY KEY,
    failures BIGINT NOT NULL,
    retry_at BIGINT NOT NULL,
    last_error TEXT NOT NULL
);
