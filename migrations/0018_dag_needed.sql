-- Whether the room stands on an auth event that came alone: 1 when a kept event or a state names it, or one that such an event
-- needs does. The others can go (src/dag/outliers.rs).
ALTER TABLE dag_events ADD COLUMN needed BIGINT NOT NULL DEFAULT 0;
DROP INDEX dag_outliers;
CREATE INDEX dag_outliers ON dag_events (room_id, seq) WHERE before_group IS NULL;
