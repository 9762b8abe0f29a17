-- Since when a destination has taken nothing, and whether what it did last was an answer: a server that is there and refuses is another trouble
-- than one that is away. 0 where that is not known.
ALTER TABLE outbound_destinations ADD COLUMN since_ts BIGINT NOT NULL DEFAULT 0;
ALTER TABLE outbound_destinations ADD COLUMN answers BIGINT NOT NULL DEFAULT 0;
