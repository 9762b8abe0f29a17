-- Events of a server, or of many, that wait and for which there was no space (src/lm/waits.rs): one row of lm_holes stands for
-- all of them. Its event_id is '~' and that server, empty when the room had no space at all.
-- The newest of them, before which the others are found.
ALTER TABLE lm_holes ADD COLUMN newest TEXT;
-- Where our log ended when the first of them came; `place` is where it ended when the newest did.
ALTER TABLE lm_holes ADD COLUMN since BIGINT;
