-- The checked signing keys of other servers (src/store/server_keys.rs).
CREATE TABLE server_keys (
    server_name TEXT NOT NULL PRIMARY KEY,
    keys BYTEA NOT NULL,
    fetched_ts BIGINT NOT NULL
);
