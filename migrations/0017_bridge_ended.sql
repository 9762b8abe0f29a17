-- About when a portal ended, by which its row goes in time (src/store/pruning.rs): when it was first seen to have ended. NULL
-- until then.
ALTER TABLE bridge_portals ADD COLUMN ended_ts BIGINT;
