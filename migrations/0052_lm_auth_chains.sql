-- Events of foreign hubs' logs that allow the state with which the gateway came into a room, and that its copy of the log does not have:
-- they are in no place of it. Who is given the log later answers joins with them (src/lm/chain.rs).
CREATE TABLE lm_auth_chains (
    event_id TEXT NOT NULL PRIMARY KEY,
    room_id TEXT NOT NULL,
    json BYTEA NOT NULL
);
CREATE INDEX lm_auth_chains_room ON lm_auth_chains (room_id);
