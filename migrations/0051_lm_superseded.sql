-- Something else about the membership that an LPDU is about came into the log while the hub had the LPDU: it is not sent again, but it
-- may stand behind that in the log, and come yet.
ALTER TABLE lm_lpdu_queue ADD COLUMN superseded BIGINT NOT NULL DEFAULT 0;
