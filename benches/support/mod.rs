//! What the benchmarks share.

// Each benchmark uses a part of it.
#![allow(dead_code)]

pub mod ear;
pub mod gateway;
pub mod homeserver;
pub mod hub;
pub mod participant;
pub mod portal;

use isthmus::event::Object;
use serde_json::json;

/// A message of the size that messages have: about 1,100 bytes as an LPDU.
pub fn message(room_id: &str, sender: &str, number: u64) -> Object {
    let json = json!({
        "type": "m.room.message",
        "room_id": room_id,
        "sender": sender,
        "origin_server_ts": 1_700_000_000_000_u64,
        "content": { "msgtype": "m.text", "body": "x".repeat(540), "n": number },
    });
    json.as_object().cloned().unwrap()
}

/// The value below which this part of the sorted values lies.
pub fn percentile(sorted: &[f64], part: f64) -> f64 {
    let index = (sorted.len() as f64 * part) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}
