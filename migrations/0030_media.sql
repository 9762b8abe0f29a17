-- The secret by which the gateway knows the names that it gave to media (src/identity/media_names.rs): one row.
CREATE TABLE media_secret (
    id BIGINT NOT NULL PRIMARY KEY,
    secret BYTEA NOT NULL
);
