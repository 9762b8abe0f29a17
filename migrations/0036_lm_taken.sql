-- When a hub said for the first time that it has an LPDU; 0 while it never did. It stays when the LPDU is sent again.
ALTER TABLE lm_lpdu_queue ADD COLUMN first_taken_ts BIGINT NOT NULL DEFAULT 0;
UPDATE lm_lpdu_queue SET first_taken_ts = taken_ts;
