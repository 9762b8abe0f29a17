-- What is known of how foreign hubs keep their logs (src/lm/look.rs).
CREATE TABLE lm_looks (
    room_id TEXT NOT NULL PRIMARY KEY,
    -- 1 when the log was seen to fork: it is looked over for what did not arrive.
    forks BIGINT NOT NULL,
    -- The log's newest event when it was looked over last; empty before that.
    looked_until TEXT NOT NULL,
    -- Since when the hub does not know the end of the log as it is here; 0 while it does.
    lost_ts BIGINT NOT NULL
);
-- What kind of fault of the hub a complaint is about; empty where it is none.
ALTER TABLE lm_complaints ADD COLUMN fault TEXT NOT NULL DEFAULT '';
-- When the hub said that it has an LPDU; 0 while it waits to be sent. It stays until it is in the log.
ALTER TABLE lm_lpdu_queue ADD COLUMN taken_ts BIGINT NOT NULL DEFAULT 0;
-- 1 when one that was queued later is in the log.
ALTER TABLE lm_lpdu_queue ADD COLUMN passed BIGINT NOT NULL DEFAULT 0;
-- How often it was queued again because it did not come into the log.
ALTER TABLE lm_lpdu_queue ADD COLUMN resent BIGINT NOT NULL DEFAULT 0;
CREATE INDEX lm_lpdu_queue_lpdu ON lm_lpdu_queue (lpdu_id);
