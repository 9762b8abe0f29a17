-- EDUs for other servers that must not be lost (src/store/outbound_edus.rs).
CREATE TABLE outbound_edus (
    kind TEXT NOT NULL,
    destination TEXT NOT NULL,
    position BIGINT NOT NULL,
    edu BYTEA NOT NULL,
    PRIMARY KEY (kind, destination, position)
);
