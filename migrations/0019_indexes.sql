-- Indexes as they are used: events of a room are never read in their order, and what is to be done for the homeserver is asked
-- for often, what was given up is not.
DROP INDEX dag_events_room;
CREATE INDEX appservice_work_open ON appservice_work (seq, due_ts) WHERE failed IS NULL;
