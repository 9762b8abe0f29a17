//! Alias names: `lm_NAME_SERVER` stands for the LM alias `#NAME:SERVER`, `lm_!OPAQUE_SERVER` for the LM room
//! `!OPAQUE:SERVER`. Pure.

use ruma::{OwnedRoomId, OwnedServerName, RoomId, ServerName};

/// What a localpart of the form `lm_…` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Named {
    /// An LM alias, in full.
    Alias {
        /// `#NAME:SERVER`
        alias: String,
        /// The server that knows it.
        server: OwnedServerName,
    },
    /// An LM room.
    Room {
        /// `!OPAQUE:SERVER`
        room_id: OwnedRoomId,
        /// The server in its ID.
        server: OwnedServerName,
    },
}

const PREFIX: &str = "lm_";
/// The longest alias, with `#`, `:` and the server's name.
const LIMIT: usize = 255;

/// What `localpart` names; none when it is not of that form.
pub(super) fn parse(localpart: &str) -> Option<Named> {
    let rest = localpart.strip_prefix(PREFIX)?;
    let (name, server) = rest.rsplit_once('_')?;
    let server: OwnedServerName = decode(server)?.try_into().ok()?;
    if name.is_empty() {
        return None;
    }
    if name.starts_with('!') {
        let room_id = RoomId::parse(format!("{name}:{server}")).ok()?;
        return Some(Named::Room { room_id, server });
    }
    let alias = format!("#{}:{server}", decode(name)?);
    (alias.len() <= LIMIT).then_some(Named::Alias { alias, server })
}

/// The localpart that names an LM room by its ID; none for IDs without a server.
pub(super) fn of_room(room_id: &RoomId) -> Option<String> {
    let (opaque, server) = room_id.as_str().split_once(':')?;
    Some(format!("{PREFIX}{opaque}_{}", encode_server(server)))
}

/// The localpart that names an LM alias `#NAME:SERVER`.
pub fn of_alias(name: &str, server: &ServerName) -> String {
    let escaped = name.replace('=', "=3d");
    let escaped = match escaped.strip_prefix('!') {
        Some(rest) => format!("=21{rest}"),
        None => escaped,
    };
    format!("{PREFIX}{escaped}_{}", encode_server(server.as_str()))
}

/// The LM alias `#NAME:SERVER` that a localpart names, and its server.
pub fn lm_alias(localpart: &str) -> Option<(String, OwnedServerName)> {
    match parse(localpart)? {
        Named::Alias { alias, server } => Some((alias, server)),
        Named::Room { .. } => None,
    }
}

/// The localpart of `alias` if it is one of `server`.
pub(super) fn localpart_at<'a>(alias: &'a str, server: &ServerName) -> Option<&'a str> {
    let (localpart, at) = alias.strip_prefix('#')?.split_once(':')?;
    (at == server.as_str() && !localpart.is_empty()).then_some(localpart)
}

fn encode_server(server: &str) -> String {
    let mut encoded = String::with_capacity(server.len());
    for byte in server.bytes() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("={byte:02x}")),
        }
    }
    encoded
}

/// Undoes `=hh`; none when a `=` is not followed by two lower-case hexadecimal digits or the result is no UTF-8.
fn decode(encoded: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(encoded.len());
    let mut bytes = encoded.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'=' {
            decoded.push(byte);
            continue;
        }
        let (high, low) = (hex(bytes.next()?)?, hex(bytes.next()?)?);
        decoded.push(high << 4 | low);
    }
    String::from_utf8(decoded).ok()
}

fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit.wrapping_sub(b'0')),
        b'a'..=b'f' => Some(digit.wrapping_sub(b'a').wrapping_add(10)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ruma::{room_id, server_name};

    use super::*;

    fn alias(alias: &str, server: &str) -> Option<Named> {
        Some(Named::Alias { alias: alias.to_owned(), server: server.try_into().unwrap() })
    }

    #[test]
    fn names() {
        assert_eq!(parse("lm_tea_hub.example"), alias("#tea:hub.example", "hub.example"));
        assert_eq!(parse("lm_tea_room_127.0.0.1=3a8448"), alias("#tea_room:127.0.0.1:8448", "127.0.0.1:8448"));
        assert_eq!(parse("lm_=21x_h"), alias("#!x:h", "h"));
        assert_eq!(
            parse("lm_!abc_localhost=3a1"),
            Some(Named::Room {
                room_id: room_id!("!abc:localhost:1").to_owned(),
                server: server_name!("localhost:1").to_owned()
            })
        );
        for bad in ["tea", "lm_", "lm_tea", "lm__hub", "lm_tea_", "lm_tea_h=3", "lm_tea_h=zz", "lm_t=3_h", "lm_t_a b"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn of_one_server_only() {
        let server = server_name!("g.example:1");
        assert_eq!(localpart_at("#lm_a_b:g.example:1", server), Some("lm_a_b"));
        assert_eq!(localpart_at("#lm_a_b:g.example", server), None);
        assert_eq!(localpart_at("lm_a_b:g.example:1", server), None);
    }

    proptest! {
        #[test]
        fn every_alias_and_room_id_comes_back(
            name in "[a-zA-Z0-9!=_#é./ ]{1,20}",
            opaque in "[a-zA-Z0-9.~_-]{1,20}",
            server in "[a-zA-Z0-9.-]{1,10}[a-z](:[1-9][0-9]{0,3})?",
        ) {
            if let Ok(server) = OwnedServerName::try_from(server) {
                prop_assert_eq!(
                    parse(&of_alias(&name, &server)),
                    Some(Named::Alias { alias: format!("#{name}:{server}"), server: server.clone() })
                );
                let room_id = RoomId::parse(format!("!{opaque}:{server}")).unwrap();
                prop_assert_eq!(parse(&of_room(&room_id).unwrap()), Some(Named::Room { room_id, server }));
            }
        }
    }
}
