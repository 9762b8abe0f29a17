//! Redaction: the draft's table, and the one of room version 11 that graph servers use in shared rooms.
//! Source: draft-ralston-mimi-linearized-matrix-04, section "Event Redactions" (`int-redactions`).

use std::borrow::Cow;

use serde_json::Value;

use super::Object;

/// Which table of kept fields is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redaction {
    /// The table of the LM draft, with `allow` of join rules, which both existing peers keep.
    Draft,
    /// The table of Matrix room version 11, with `hub_server` kept and `depth` dropped.
    GraphServer,
}

/// The top-level fields that are kept, in canonical order.
const TOP_LEVEL: [&str; 11] = [
    "auth_events",
    "content",
    "hashes",
    "hub_server",
    "origin_server_ts",
    "prev_events",
    "room_id",
    "sender",
    "signatures",
    "state_key",
    "type",
];

/// The event with only the fields that redaction keeps.
pub fn redact(event: &Object, redaction: Redaction) -> Object {
    redacted_view(event, redaction).into_iter().map(|(key, value)| (key.to_owned(), value.into_owned())).collect()
}

/// The same without a copy of what stays as it is.
pub(super) fn redacted_view(event: &Object, redaction: Redaction) -> Vec<(&'static str, Cow<'_, Value>)> {
    let kind = event.get("type").and_then(Value::as_str).unwrap_or_default();
    TOP_LEVEL
        .into_iter()
        .filter_map(|key| {
            let value = event.get(key)?;
            let kept = if key == "content" { redact_content(kind, value, redaction) } else { Cow::Borrowed(value) };
            Some((key, kept))
        })
        .collect()
}

fn redact_content<'a>(kind: &str, content: &'a Value, redaction: Redaction) -> Cow<'a, Value> {
    if kind == "m.room.create" {
        return Cow::Borrowed(content);
    }
    let Some(fields) = content.as_object() else { return Cow::Owned(Value::Object(Object::new())) };
    let mut kept: Object = kept_fields(kind, redaction)
        .iter()
        .filter_map(|field| fields.get(*field).map(|value| ((*field).to_owned(), value.clone())))
        .collect();
    if kind == "m.room.member"
        && redaction == Redaction::GraphServer
        && let Some(signed) = fields.get("third_party_invite").and_then(|invite| invite.get("signed"))
    {
        kept.insert("third_party_invite".to_owned(), serde_json::json!({ "signed": signed }));
    }
    Cow::Owned(Value::Object(kept))
}

fn kept_fields(kind: &str, redaction: Redaction) -> &'static [&'static str] {
    match (kind, redaction) {
        ("m.room.member", Redaction::Draft) => &["membership"],
        ("m.room.member", Redaction::GraphServer) => &["membership", "join_authorised_via_users_server"],
        ("m.room.join_rules", _) => &["join_rule", "allow"],
        ("m.room.power_levels", _) => {
            &["ban", "events", "events_default", "invite", "kick", "redact", "state_default", "users", "users_default"]
        }
        ("m.room.history_visibility", _) => &["history_visibility"],
        ("m.room.redaction", Redaction::GraphServer) => &["redacts"],
        _ => &[],
    }
}
