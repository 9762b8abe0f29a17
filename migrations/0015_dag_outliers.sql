-- Auth events that came alone, of which a room keeps so many bytes (src/dag/outliers.rs).
CREATE INDEX dag_outliers ON dag_events (room_id) WHERE before_group IS NULL;
