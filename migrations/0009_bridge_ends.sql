-- How portals end (src/bridge/ends.rs): when the ghosts leave a suspended portal, and until when a portal that an alias made
-- may go unused. Each is NULL when there is nothing to be done.
ALTER TABLE bridge_portals ADD COLUMN ghosts_leave_ts BIGINT;
ALTER TABLE bridge_portals ADD COLUMN unused_until_ts BIGINT;
CREATE INDEX bridge_portals_leave ON bridge_portals (ghosts_leave_ts) WHERE ghosts_leave_ts IS NOT NULL;
CREATE INDEX bridge_portals_unused ON bridge_portals (unused_until_ts) WHERE unused_until_ts IS NOT NULL;
-- Which images of a portal still wait for their echo; asked for often.
CREATE INDEX bridge_images_pending ON bridge_images (portal) WHERE pending = 1;
-- Aliases that were published at the homeserver, and the rooms they lead to. `ended` is 1 when the room's portal is over, and
-- the alias must be taken away.
CREATE TABLE appservice_aliases (
    alias TEXT NOT NULL PRIMARY KEY,
    room_id TEXT NOT NULL,
    ended BIGINT NOT NULL
);
CREATE INDEX appservice_aliases_room ON appservice_aliases (room_id);
