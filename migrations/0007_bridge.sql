-- Portals: pairs of rooms kept in step (src/store/portals.rs). A `creating` row names what is still to be made of it, so that
-- a crash in the middle is taken up at the next start; an `ended` one stays for the record and frees its rooms.
CREATE TABLE bridge_portals (
    number BIGINT NOT NULL PRIMARY KEY,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    matrix_room_id TEXT,
    lm_room_id TEXT,
    lm_hub TEXT NOT NULL,
    alias TEXT,
    reason TEXT,
    request BYTEA NOT NULL,
    created_ts BIGINT NOT NULL
);
CREATE UNIQUE INDEX bridge_portals_matrix ON bridge_portals (matrix_room_id) WHERE state <> 'ended';
CREATE UNIQUE INDEX bridge_portals_lm ON bridge_portals (lm_room_id) WHERE state <> 'ended';
-- The localparts of aliases at the gateway.
CREATE TABLE bridge_aliases (
    localpart TEXT NOT NULL PRIMARY KEY,
    portal BIGINT NOT NULL
);
CREATE INDEX bridge_aliases_portal ON bridge_aliases (portal);
-- Which event is the image of which (src/store/images.rs). `side` is the source's. While `pending` is 1 the image is an LPDU
-- on its way to its hub, known by the LPDU's own hash. The keys are INV-5: one image a source, one source an image, and an
-- LPDU that a hub has appended twice crosses once.
CREATE TABLE bridge_images (
    side TEXT NOT NULL,
    source_event_id TEXT NOT NULL,
    source_lpdu_id TEXT,
    image_event_id TEXT NOT NULL,
    pending BIGINT NOT NULL,
    portal BIGINT NOT NULL,
    note TEXT,
    made_ts BIGINT NOT NULL,
    PRIMARY KEY (side, source_event_id)
);
CREATE UNIQUE INDEX bridge_images_image ON bridge_images (side, image_event_id);
CREATE UNIQUE INDEX bridge_images_lpdu ON bridge_images (source_lpdu_id);
-- Events that were not carried over, and why.
CREATE TABLE bridge_refusals (
    side TEXT NOT NULL,
    source_event_id TEXT NOT NULL,
    portal BIGINT NOT NULL,
    sender TEXT NOT NULL,
    kind TEXT NOT NULL,
    code TEXT NOT NULL,
    reason TEXT NOT NULL,
    refused_ts BIGINT NOT NULL,
    PRIMARY KEY (side, source_event_id)
);
CREATE INDEX bridge_refusals_portal ON bridge_refusals (portal, refused_ts);
-- What users call themselves, as last seen in a portal.
CREATE TABLE bridge_profiles (
    side TEXT NOT NULL,
    user_id TEXT NOT NULL,
    displayname TEXT,
    avatar_url TEXT,
    PRIMARY KEY (side, user_id)
);
-- For `explain`: whether an event waits.
CREATE INDEX bridge_inbox_event ON bridge_inbox (event_id);
-- Ghosts whose name had to be hashed, and for whom they stand (src/store/ghosts.rs).
CREATE TABLE bridge_ghosts (
    ghost TEXT NOT NULL PRIMARY KEY,
    home TEXT NOT NULL,
    user_id TEXT NOT NULL
);
