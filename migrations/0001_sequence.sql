-- Numbers that grow for ever (src/store/ids.rs).
CREATE TABLE sequence (
    name TEXT NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
);
INSERT INTO sequence (name, value) VALUES ('id', 1);
