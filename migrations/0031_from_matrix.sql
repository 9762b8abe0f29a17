-- Until when it is waited for somebody to come back into the Matrix room of a portal that lives elsewhere, when nobody of Matrix is in it
-- any more (src/bridge/ends.rs). NULL when somebody is.
ALTER TABLE bridge_portals ADD COLUMN empty_until_ts BIGINT;
