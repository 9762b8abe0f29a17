-- Other servers' answers about their keys as they came, signed by them, to be given to whoever asks this server as a notary
-- (src/store/server_keys.rs). One for each set of keys that a server had in use.
CREATE TABLE server_key_answers (
    server_name TEXT NOT NULL,
    key_set TEXT NOT NULL,
    answer BYTEA NOT NULL,
    fetched_ts BIGINT NOT NULL,
    valid_until_ts BIGINT NOT NULL,
    PRIMARY KEY (server_name, key_set)
);
