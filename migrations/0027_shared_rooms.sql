-- Whether an LM room is a graph too (src/seam/both.rs), from which its log follows.
ALTER TABLE lm_rooms ADD COLUMN shared BIGINT NOT NULL DEFAULT 0;
