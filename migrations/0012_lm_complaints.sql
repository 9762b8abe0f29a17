-- Whether a complaint is the end of its event (1) or only a remark on it (0): an event's ID does not cover its signatures, so
-- one with a bad signature may come again with a good one.
ALTER TABLE lm_complaints ADD COLUMN settled BIGINT NOT NULL DEFAULT 1;
