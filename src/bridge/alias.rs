//! Alias names: `lm_NAME_SERVER` stands for the LM alias `#NAME:SERVER`, `lm_!OPAQUE_SERVER` for the LM room
//! `!OPAQUE:SERVER`, and for LM servers `mx_NAME_SERVER` for the Matrix alias `#NAME:SERVER`. Pure.

use ruma::{OwnedRoomId, OwnedServerName, RoomAliasId, RoomId, ServerName};
use serde_json::Value;

use crate::event::Object;
use crate::identity::Side;

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
/// The same for what names a Matrix alias.
const MATRIX_PREFIX: &str = "mx_";
/// The form of the names of hubs' spaces.
const HUB_PREFIX: &str = "hub_";
/// How many alternative aliases cross.
const ALTERNATIVES: usize = 20;
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
    named(PREFIX, name, server)
}

fn named(prefix: &str, name: &str, server: &ServerName) -> String {
    let escaped = name.replace('=', "=3d");
    let escaped = match escaped.strip_prefix('!') {
        Some(rest) => format!("=21{rest}"),
        None => escaped,
    };
    format!("{prefix}{escaped}_{}", encode_server(server.as_str()))
}

/// The Matrix alias `#NAME:SERVER` that a localpart names, and its server.
pub(super) fn matrix_alias(localpart: &str) -> Option<(String, OwnedServerName)> {
    let (name, server) = localpart.strip_prefix(MATRIX_PREFIX)?.rsplit_once('_')?;
    let server: OwnedServerName = decode(server)?.try_into().ok()?;
    let alias = format!("#{}:{server}", decode(name)?);
    (!name.is_empty() && alias.len() <= LIMIT).then_some((alias, server))
}

/// How aliases are called across, so that they lead to the room there: by the gateway, which asks whose they are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Aliases<'a> {
    /// The gateway's name.
    pub(super) own: &'a ServerName,
    /// The homeserver at which LM aliases have names as well.
    pub(super) homeserver: Option<&'a ServerName>,
    /// The address in Matrix of a room that was made for an LM room, which may have none of its own.
    pub(super) address: Option<&'a str>,
}

impl Aliases<'_> {
    /// How an alias is called on `to`; none when it names nothing there.
    fn across(&self, alias: &str, to: Side) -> Option<String> {
        let parsed = <&RoomAliasId>::try_from(alias).ok()?;
        let (name, server) = (parsed.alias(), parsed.server_name());
        let is_own = server == self.own;
        let image = match to {
            Side::Matrix if is_own => matrix_alias(name).map_or_else(|| alias.to_owned(), |(alias, _)| alias),
            Side::Matrix => format!("#{}:{}", of_alias(name, server), self.own),
            Side::Lm if is_own || self.homeserver == Some(server) => match parse(name) {
                Some(Named::Alias { alias, .. }) => alias,
                // A log is found by its ID without one.
                Some(Named::Room { .. }) => return None,
                None if is_own => alias.to_owned(),
                None => format!("#{}:{}", named(MATRIX_PREFIX, name, server), self.own),
            },
            Side::Lm => format!("#{}:{}", named(MATRIX_PREFIX, name, server), self.own),
        };
        (image.len() <= LIMIT).then_some(image)
    }

    /// The content of the image of `m.room.canonical_alias`; none when the room across should have none.
    pub(super) fn image(&self, content: Option<&Object>, to: Side) -> Option<Object> {
        let address = self.address.filter(|_| to == Side::Matrix);
        let Some(content) = content else { return address.map(|alias| said(Some(alias.to_owned()), Vec::new())) };
        let (alias, others) = named_in(content);
        let alias = alias.and_then(|alias| self.across(alias, to));
        let mut others: Vec<String> = others.filter_map(|alias| self.across(alias, to)).collect();
        let by_id = |address: &str| matches!(localpart_at(address, self.own).and_then(parse), Some(Named::Room { .. }));
        others.extend(address.filter(|address| alias.is_some() && !by_id(address)).map(str::to_owned));
        Some(said(alias.or_else(|| address.map(str::to_owned)), others))
    }
}

/// What a content says of aliases, in the form of an image.
pub(super) fn as_image(content: &Object) -> Object {
    let (alias, others) = named_in(content);
    said(alias.map(str::to_owned), others.map(str::to_owned).collect())
}

fn named_in(content: &Object) -> (Option<&str>, impl Iterator<Item = &str>) {
    let alias = content.get("alias").and_then(Value::as_str).filter(|alias| !alias.is_empty());
    let others = content.get("alt_aliases").and_then(Value::as_array).into_iter().flatten();
    (alias, others.filter_map(Value::as_str))
}

fn said(alias: Option<String>, mut others: Vec<String>) -> Object {
    let mut seen: std::collections::BTreeSet<String> = alias.iter().cloned().collect();
    others.retain(|other| other.len() <= LIMIT && seen.insert(other.clone()));
    others.truncate(ALTERNATIVES);
    let mut content = Object::new();
    content.extend(alias.map(|alias| ("alias".to_owned(), alias.into())));
    if !others.is_empty() {
        content.insert("alt_aliases".to_owned(), others.into());
    }
    content
}

/// The LM alias `#NAME:SERVER` that a localpart names, and its server.
pub fn lm_alias(localpart: &str) -> Option<(String, OwnedServerName)> {
    match parse(localpart)? {
        Named::Alias { alias, server } => Some((alias, server)),
        Named::Room { .. } => None,
    }
}

/// The localpart that names the space of an LM hub.
pub(super) fn of_hub(hub: &ServerName) -> String {
    format!("{HUB_PREFIX}{}", encode_server(hub.as_str()))
}

/// The LM hub whose space a localpart names.
pub(super) fn hub(localpart: &str) -> Option<OwnedServerName> {
    decode(localpart.strip_prefix(HUB_PREFIX)?)?.try_into().ok()
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
    use serde_json::json;

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
    fn an_alias_leads_to_the_room_across_by_the_gateway() {
        let (own, homeserver) = (server_name!("g"), server_name!("hs"));
        let aliases = Aliases { own, homeserver: Some(homeserver), address: None };
        for (at_lm, in_matrix) in [
            ("#tea:hub:8448", "#lm_tea_hub=3a8448:g"),
            ("#mx_tea_other:g", "#tea:other"),
            ("#mx_a=3db_hs:g", "#a=b:hs"),
            ("#given:g", "#given:g"),
        ] {
            assert_eq!(aliases.across(at_lm, Side::Matrix).as_deref(), Some(in_matrix));
            assert_eq!(aliases.across(in_matrix, Side::Lm).as_deref(), Some(at_lm));
        }
        assert_eq!(aliases.across("#lm_tea_hub:hs", Side::Lm).as_deref(), Some("#tea:hub"));
        assert_eq!(aliases.across("#lm_!abc_hub:g", Side::Lm), None);
        for bad in ["tea", "#tea", "", "!r:h"] {
            assert_eq!((aliases.across(bad, Side::Lm), aliases.across(bad, Side::Matrix)), (None, None), "{bad}");
        }
        assert_eq!(aliases.across(&format!("#{}:hub", "x".repeat(249)), Side::Matrix), None, "too long there");
    }

    #[test]
    fn the_address_of_a_room_that_was_made_for_a_log_stays() {
        let image = |address, content: Option<Value>| {
            let aliases = Aliases { own: server_name!("g"), homeserver: None, address };
            aliases.image(content.as_ref().and_then(Value::as_object), Side::Matrix).map(Value::Object)
        };
        let (by_id, given) = (Some("#lm_!abc_hub:g"), Some("#given:g"));
        assert_eq!(image(None, None), None);
        assert_eq!(image(by_id, None), Some(json!({ "alias": "#lm_!abc_hub:g" })));
        let tea = || Some(json!({ "alias": "#tea:hub", "alt_aliases": ["#coffee:hub", 7, "#tea:hub", "bad"], "x": 1 }));
        let expected = json!({ "alias": "#lm_tea_hub:g", "alt_aliases": ["#lm_coffee_hub:g"] });
        assert_eq!(image(by_id, tea()), Some(expected.clone()));
        assert_eq!(as_image(expected.as_object().unwrap()), *expected.as_object().unwrap());
        let expected = json!({ "alias": "#lm_tea_hub:g", "alt_aliases": ["#lm_coffee_hub:g", "#given:g"] });
        assert_eq!(image(given, tea()), Some(expected));
        assert_eq!(image(given, Some(json!({ "alias": 7 }))), Some(json!({ "alias": "#given:g" })));
        let many: Vec<String> = (0..50).map(|number| format!("#a{number}:hub")).collect();
        let many = image(None, Some(json!({ "alt_aliases": many }))).unwrap();
        assert_eq!(many["alt_aliases"].as_array().unwrap().len(), ALTERNATIVES);
    }

    #[test]
    fn a_hub_is_named_by_the_address_of_its_space() {
        assert_eq!(of_hub(server_name!("hub.example:8448")), "hub_hub.example=3a8448");
        assert_eq!(hub("hub_hub.example=3a8448").unwrap(), "hub.example:8448");
        assert_eq!((hub("hub_"), hub("lm_tea_hub"), hub("hub_=3")), (None, None, None));
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
