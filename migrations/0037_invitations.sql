-- Invites of ghosts into rooms that have no portal yet (src/bridge/pending/). The portal of such a room is `pending`: whom a ghost
-- stands for is invited into its other room, and the ghost joins when they do. `side` and `room_id` say where the ghost is invited,
-- `user_id` for whom it stands. `stage` is what is to be done next: `asked` (invite the user), `open` (wait for the user), `entering` (the
-- user is coming in), `refused` (decline, for `code` and `reason`), `retracted` (take the user's invite back, for `reason`).
CREATE TABLE bridge_invitations (
    side TEXT NOT NULL,
    room_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    inviter TEXT NOT NULL,
    -- The server that brought the invite.
    via TEXT NOT NULL,
    event_id TEXT NOT NULL,
    -- The invite's content, and what came with it of the room and the inviter, as JSON.
    content BYTEA NOT NULL,
    shown BYTEA NOT NULL,
    stage TEXT NOT NULL,
    code TEXT,
    reason TEXT,
    -- The invite of the user.
    image TEXT,
    made_ts BIGINT NOT NULL,
    expires_ts BIGINT NOT NULL,
    -- Since when it is tried to do what is next, how often that failed, and when it is tried again.
    stage_ts BIGINT NOT NULL,
    tries BIGINT NOT NULL,
    retry_ts BIGINT NOT NULL,
    PRIMARY KEY (side, room_id, user_id)
);
-- For `explain`.
CREATE INDEX bridge_invitations_event ON bridge_invitations (event_id);
-- How many of one inviter are open.
CREATE INDEX bridge_invitations_inviter ON bridge_invitations (inviter);
