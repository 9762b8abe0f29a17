//! `m.room.server_acl`: which servers may take part in a room.
//! <https://spec.matrix.org/v1.16/client-server-api/#server-access-control-lists-acls-for-rooms>

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ruma::ServerName;
use serde_json::Value;

use super::Shared;
use super::room::Room;
use crate::event::Object;
use crate::refusal::Refusal;

/// A parsed list.
#[derive(Debug)]
pub struct Acl {
    allow: Vec<String>,
    deny: Vec<String>,
    allow_ip_literals: bool,
}

impl Acl {
    /// The list of an event's content; what is malformed in it counts as absent.
    pub fn parse(content: &Object) -> Self {
        let list = |key: &str| -> Vec<String> {
            let entries = content.get(key).and_then(Value::as_array).into_iter().flatten();
            entries.filter_map(Value::as_str).map(str::to_ascii_lowercase).collect()
        };
        let allow_ip_literals = content.get("allow_ip_literals").and_then(Value::as_bool).unwrap_or(true);
        Self { allow: list("allow"), deny: list("deny"), allow_ip_literals }
    }

    /// Whether it lets a server take part. Ports do not count.
    pub fn allows(&self, server: &ServerName) -> bool {
        let host = server.host().to_ascii_lowercase();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let is_ip = bare.parse::<Ipv4Addr>().is_ok() || bare.parse::<Ipv6Addr>().is_ok();
        let listed = |list: &[String]| list.iter().any(|glob| matches(glob.as_bytes(), host.as_bytes()));
        (self.allow_ip_literals || !is_ip) && !listed(&self.deny) && listed(&self.allow)
    }
}

/// Whether `text` matches `glob`, where `*` stands for any text and `?` for one character. Takes at most the product of both
/// lengths, whatever the glob.
fn matches(glob: &[u8], text: &[u8]) -> bool {
    let (mut g, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while let Some(&byte) = text.get(t) {
        match glob.get(g) {
            Some(b'*') => {
                star = Some((g, t));
                g += 1;
            }
            Some(&expected) if expected == b'?' || expected == byte => {
                g += 1;
                t += 1;
            }
            _ => {
                let Some((at, from)) = star else { return false };
                star = Some((at, from + 1));
                g = at + 1;
                t = from + 1;
            }
        }
    }
    glob.iter().skip(g).all(|byte| *byte == b'*')
}

impl Shared {
    /// Refuses a server that the room's current list denies.
    pub(super) async fn check_acl(&self, room: &Room, server: &ServerName) -> Result<(), Refusal> {
        let core = room.core();
        let Some(id) = core.current.get("m.room.server_acl", "").cloned() else { return Ok(()) };
        let acl = match self.acls_meter.count(self.acls.get(&id).await) {
            Some(acl) => acl,
            None => {
                let Some(event) = self.events.get(&id).await? else { return Ok(()) };
                let acl = Arc::new(Acl::parse(&event.content()));
                self.acls.insert(id, acl.clone()).await;
                acl
            }
        };
        if acl.allows(server) { Ok(()) } else { Err(Refusal::ServerAcl(server.to_string())) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn acl(content: Value) -> Acl {
        Acl::parse(content.as_object().unwrap())
    }

    fn server(name: &str) -> &ServerName {
        name.try_into().unwrap()
    }

    #[test]
    fn denied_servers_and_those_not_allowed_are_kept_out() {
        let list =
            acl(json!({ "allow": ["*"], "deny": ["*.evil.example", "bad?.example"], "allow_ip_literals": false }));
        for (name, allowed) in [
            ("good.example", true),
            ("a.EVIL.example:8448", false),
            ("bad1.example", false),
            ("bad.example", true),
            ("1.2.3.4", false),
            ("[::1]:8448", false),
        ] {
            assert_eq!(list.allows(server(name)), allowed, "{name}");
        }
        assert!(!acl(json!({})).allows(server("good.example")));
    }

    #[test]
    fn hc_26_a_glob_of_many_stars_takes_no_time() {
        let glob = "*a".repeat(5_000);
        let list = acl(json!({ "allow": [glob], "deny": vec!["*x*y*z*"; 5_000] }));
        let host = format!("{}.example", "a".repeat(60));
        let start = std::time::Instant::now();
        assert!(!list.allows(server(&host)));
        assert!(start.elapsed().as_secs() < 2);
    }
}
