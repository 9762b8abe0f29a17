//! Tables of events and their images.

use ruma::{event_id, room_id, server_name, user_id};

use super::*;
use crate::bridge::alias::Aliases;
use crate::bridge::pins::Pins;
use crate::identity::Side;

fn event(kind: &str, state_key: Option<&str>, content: Value) -> Event {
    Event {
        event_id: event_id!("$source").to_owned(),
        lpdu_id: None,
        room_id: room_id!("!near:h").to_owned(),
        sender: user_id!("@alice:h").to_owned(),
        kind: kind.to_owned(),
        state_key: state_key.map(str::to_owned),
        origin_server_ts: 1_000,
        content: content.as_object().unwrap().clone(),
        redacts: None,
        order: 1,
    }
}

fn known() -> Known {
    Known::from([
        (user_id!("@alice:h").to_owned(), Who::Native { ghost: user_id!("@mx_alice_h:g").to_owned() }),
        (user_id!("@lm_bob_l:g").to_owned(), Who::Ghost { user: user_id!("@bob:l").to_owned() }),
        (user_id!("@isthmus:g").to_owned(), Who::Bot),
        (user_id!("@_isthmus:h").to_owned(), Who::Appservice),
        (user_id!("@x:g").to_owned(), Who::Stranger),
    ])
}

fn names() -> MediaNames {
    MediaNames::new(server_name!("g").to_owned(), &[7; 32])
}

/// How a file is called on the LM side.
fn there(uri: &str) -> String {
    let there = names().across(uri, Side::Lm).into_owned();
    assert!(there.starts_with("mxc://g/"));
    there
}

fn image(kind: &str, content: Value) -> Result<Image, Refusal> {
    let names = names();
    let media = MediaTo { names: &names, to: Side::Lm };
    let users = known();
    let events = HashMap::from([(event_id!("$near").to_owned(), event_id!("$far").to_owned())]);
    let lookups = Lookups { users: &users, events: &events, rooms: (room_id!("!near:h"), room_id!("!far:g")), media };
    message(&event(kind, None, content), &lookups)
}

fn text(content: Value) -> (Value, Option<String>) {
    let mut image = image("m.room.message", content).unwrap();
    assert_eq!(
        image.content.remove(SOURCE),
        Some(json!({"room_id": "!near:h", "event_id": "$source", "sender": "@alice:h", "origin_server_ts": 1_000}))
    );
    (Value::Object(image.content), image.note)
}

#[test]
fn message_like_content_crosses_with_its_ids_mapped() {
    for (source, expected) in [
        (
            json!({"msgtype": "m.text", "body": "hi @lm_bob_l:g"}),
            json!({"msgtype": "m.text", "body": "hi @lm_bob_l:g"}),
        ),
        (
            json!({"body": "x", "m.mentions": {"user_ids": ["@lm_bob_l:g", "@alice:h", "@x:g", "@_isthmus:h", 7], "room": true}}),
            json!({"body": "x", "m.mentions": {"user_ids": ["@bob:l", "@mx_alice_h:g"], "room": true}}),
        ),
        (
            json!({"body": "x", "formatted_body": "<a href=\"https://matrix.to/#/@lm_bob_l:g\">b</a>"}),
            json!({"body": "x", "formatted_body": "<a href=\"https://matrix.to/#/@bob:l\">b</a>"}),
        ),
        (
            json!({"body": "x", "m.relates_to": {"m.in_reply_to": {"event_id": "$near"}}}),
            json!({"body": "x", "m.relates_to": {"m.in_reply_to": {"event_id": "$far"}}}),
        ),
        (
            json!({"body": "* x", "m.new_content": {"body": "x"}, "m.relates_to": {"rel_type": "m.replace", "event_id": "$near"}}),
            json!({"body": "* x", "m.new_content": {"body": "x"}, "m.relates_to": {"rel_type": "m.replace", "event_id": "$far"}}),
        ),
        // What is ours is stripped at any depth; what is a number stays one if it can.
        (
            json!({"body": "x", "im.isthmus.source": {"event_id": "$forged"}, "a": [{"im.isthmus.repair": 1, "b": 2, "c": 0.5}]}),
            json!({"body": "x", "a": [{"b": 2, "c": "0.5"}]}),
        ),
        (
            json!({"body": "x", "a": {"room_id": "!near:h", "event_id": "$near", "user_id": "@lm_bob_l:g"}, "room_id": "!other:h"}),
            json!({"body": "x", "a": {"room_id": "!far:g", "event_id": "$far", "user_id": "@bob:l"}, "room_id": "!other:h"}),
        ),
    ] {
        assert_eq!(text(source), (expected, None));
    }
}

#[test]
fn a_relation_to_what_never_crossed_is_dropped_and_noted() {
    let (content, note) = text(json!({"body": "x", "m.relates_to": {"m.in_reply_to": {"event_id": "$gone"}}}));
    assert_eq!(content, json!({"body": "(in reply to a message that is not in this room)\nx"}));
    assert!(note.unwrap().contains("reply to $gone"));

    let thread = json!({"rel_type": "m.thread", "event_id": "$near", "is_falling_back": true, "m.in_reply_to": {"event_id": "$gone"}});
    let (content, _) = text(json!({"body": "x", "m.relates_to": thread}));
    assert_eq!(content, json!({"body": "x", "m.relates_to": {"rel_type": "m.thread", "event_id": "$far"}}));

    let edit = json!({"body": "* x", "m.new_content": {"body": "x"}, "m.relates_to": {"rel_type": "m.replace", "event_id": "$gone"}});
    let (content, note) = text(edit);
    assert_eq!(content, json!({"body": "* x"}));
    assert!(note.unwrap().contains("m.replace of $gone"));

    let reaction = json!({"m.relates_to": {"rel_type": "m.annotation", "event_id": "$gone", "key": "+1"}});
    assert_eq!(image("m.reaction", reaction).unwrap_err().code(), "not_bridged");
    let reaction = json!({"m.relates_to": {"rel_type": "m.annotation", "event_id": "$near", "key": "+1"}});
    assert_eq!(image("m.reaction", reaction).unwrap().content["m.relates_to"]["event_id"], json!("$far"));
}

#[test]
fn what_is_named_is_found() {
    let content = json!({
        "body": "see https://matrix.to/#/!near:h/$linked", "m.mentions": {"user_ids": ["@lm_bob_l:g"]},
        "m.relates_to": {"rel_type": "m.thread", "event_id": "$root", "m.in_reply_to": {"event_id": "$last"}},
    });
    let found = references(&event("m.room.message", None, content));
    let ids = |ids: &[&str]| ids.iter().map(|id| (*id).try_into().unwrap()).collect::<BTreeSet<OwnedEventId>>();
    assert_eq!(found.events, ids(&["$last", "$linked", "$root"]));
    assert_eq!(found.needs.iter().cloned().collect::<BTreeSet<_>>(), ids(&["$last", "$root"]));
    assert!(found.users.contains(user_id!("@lm_bob_l:g")) && found.users.contains(user_id!("@alice:h")));

    let member = references(&event(MEMBER, Some("@lm_bob_l:g"), json!({"membership": "ban", "event_id": "$x"})));
    assert_eq!(member.users.len(), 2);
    assert!(member.events.is_empty());
}

#[test]
fn types_that_never_cross() {
    for (kind, state_key, crossing) in [
        ("m.room.message", None, true),
        ("org.example.custom", None, true),
        ("m.room.name", Some(""), true),
        ("m.room.member", Some("@a:h"), true),
        ("m.room.name", Some("x"), false),
        ("m.room.name", None, false),
        ("m.room.member", None, false),
        ("org.example.custom", Some(""), false),
        ("m.room.create", Some(""), false),
        ("m.room.encryption", Some(""), false),
        ("m.room.encrypted", None, false),
        ("m.room.hub", Some(""), false),
        ("m.mls.commit", None, false),
        ("m.room.third_party_invite", Some("t"), false),
        ("m.room.server_acl", Some(""), false),
        ("m.room.tombstone", Some(""), true),
        ("m.room.aliases", Some("h"), false),
        ("m.room.canonical_alias", Some(""), true),
        ("m.room.guest_access", Some(""), true),
        ("m.room.pinned_events", Some(""), true),
        ("m.space.child", Some("!x:h"), false),
        ("m.call.member", Some("@a:h"), false),
        ("im.isthmus.anything", None, false),
    ] {
        assert_eq!(crosses(&event(kind, state_key, json!({}))).is_ok(), crossing, "{kind} {state_key:?}");
    }
    let long = "x".repeat(256);
    assert_eq!(crosses(&event(&long, None, json!({}))).unwrap_err().code(), "too_large");
    // What was redacted before it could cross stays where it is.
    assert_eq!(image("m.room.message", json!({})).unwrap_err().code(), "not_bridged");
}

#[test]
fn every_type_with_a_rule_of_its_own_stands_in_the_documentation() {
    let table = include_str!("../../../docs/mapping.md");
    for kind in NEVER.into_iter().chain(MAPPED_STATE).chain([MEMBER, TOMBSTONE]) {
        assert!(table.contains(&format!("`{kind}`")), "{kind}");
    }
}

#[test]
fn state_is_rebuilt_from_a_whitelist() {
    let across = |user: &UserId| across(&known(), user).filter(|_| user != user_id!("@isthmus:g"));
    let names = names();
    let media = Some(MediaTo { names: &names, to: Side::Lm });
    let rules = StateRules {
        creator: None,
        across: &across,
        to: Side::Lm,
        bot: None,
        sovereigns: &[],
        limit: 1_000,
        asks: false,
        replaceable: true,
        media,
        pins: Pins::Unknown,
        aliases: Some(Aliases { own: server_name!("g"), homeserver: None, address: None }),
    };
    let image = |kind: &str, content: Value| state_content(kind, content.as_object(), &rules).map(Value::Object);
    for (kind, source, expected) in [
        ("m.room.name", json!({"name": "Tea", "x": 1, "im.isthmus.repair": true}), Some(json!({"name": "Tea"}))),
        ("m.room.name", json!({"name": {}}), Some(json!({"name": ""}))),
        ("m.room.topic", json!({"topic": "t", "m.topic": {}}), Some(json!({"topic": "t"}))),
        ("m.room.avatar", json!({"url": "mxc://h/x", "info": {"w": 1.5}}), Some(json!({"url": there("mxc://h/x")}))),
        ("m.room.avatar", json!({}), Some(json!({}))),
        ("m.room.join_rules", json!({"join_rule": "public"}), Some(json!({"join_rule": "public"}))),
        ("m.room.join_rules", json!({"join_rule": "restricted", "allow": []}), Some(json!({"join_rule": "invite"}))),
        ("m.room.join_rules", json!({"join_rule": "knock_restricted"}), Some(json!({"join_rule": "knock"}))),
        ("m.room.join_rules", json!({"join_rule": 7}), Some(json!({"join_rule": "invite"}))),
        (
            "m.room.history_visibility",
            json!({"history_visibility": "x"}),
            Some(json!({"history_visibility": "shared"})),
        ),
        (
            "m.room.power_levels",
            json!({"users": {"@lm_bob_l:g": 50, "@isthmus:g": 9}}),
            Some(json!({"users": {"@bob:l": 50}, "events": {"m.room.hub": 100}})),
        ),
        ("m.room.pinned_events", json!({"pinned": []}), None),
        ("m.room.guest_access", json!({"guest_access": "can_join", "x": 1}), Some(json!({"guest_access": "can_join"}))),
        ("m.room.guest_access", json!({"guest_access": ["can_join"]}), Some(json!({"guest_access": "forbidden"}))),
        (
            "m.room.canonical_alias",
            json!({"alias": "#tea:h", "alt_aliases": ["#lm_tea_l:g"], "x": 1}),
            Some(json!({"alias": "#mx_tea_h:g", "alt_aliases": ["#tea:l"]})),
        ),
    ] {
        assert_eq!(image(kind, source), expected, "{kind}");
    }
    // Where who joins is asked about, nobody needs an invite for meeting conditions.
    let rule = json!({ "join_rule": "restricted" });
    let asking = StateRules { asks: true, ..rules };
    assert_eq!(state_content("m.room.join_rules", rule.as_object(), &asking).unwrap()["join_rule"], "public");
    assert_eq!(state_content("m.room.name", None, &asking), None);

    let member = json!({
        "membership": "join", "displayname": "x".repeat(5_000), "avatar_url": 7, "reason": "r", "is_direct": true,
        "join_authorised_via_users_server": "@a:h", "third_party_invite": {},
    });
    let media = MediaTo { names: &names, to: Side::Lm };
    let content = member_content(member.as_object().unwrap(), "leave", media);
    assert_eq!(
        Value::Object(content),
        json!({"membership": "leave", "displayname": "x".repeat(2_000), "reason": "r", "is_direct": true})
    );
}

#[test]
fn times_are_neither_in_the_future_nor_before_the_epoch() {
    assert_eq!([time(5, 10), time(15, 10), time(-5, 10)], [5, 10, 0]);
}

#[test]
fn no_more_is_looked_up_than_a_person_would_name_and_what_it_is_about_always() {
    let users: Vec<String> = (0..10_000).map(|number| format!("@u{number}:h")).collect();
    let links: String = (0..10_000).map(|number| format!("https://matrix.to/#/!r:h/$e{number} ")).collect();
    let content = json!({
        "body": links, "formatted_body": links, "a": { "user_ids": users },
        "m.relates_to": {"rel_type": "m.thread", "event_id": "$root", "m.in_reply_to": {"event_id": "$last"}},
    });
    let found = references(&event("m.room.message", None, content));
    // Its sender is one more.
    assert_eq!(found.users.len() + found.events.len(), content::MOST_NAMED + 1);
    assert_eq!(found.needs, ["$root", "$last"]);
}

#[test]
fn files_are_called_so_that_the_other_side_can_read_them() {
    let (cat, small) = ("mxc://h/cat", "mxc://h/small");
    let (far_cat, far_small) = (there(cat), there(small));
    let picture = |cat: &str, small: &str| {
        json!({
            "msgtype": "m.image", "body": "cat.png", "url": cat,
            "info": {"mimetype": "image/png", "thumbnail_url": small, "thumbnail_info": {"w": 1}},
        })
    };
    let all = |cat: &str, small: &str| {
        [
            ("m.room.message", picture(cat, small)),
            ("m.sticker", picture(cat, small)),
            ("m.room.message", json!({"body": "x", "m.new_content": picture(cat, small)})),
            (
                "m.room.message",
                json!({
                    "body": "x", "file": {"url": cat, "hashes": {"sha256": "abc"}, "v": "v2"},
                    "info": {"thumbnail_file": {"url": small}},
                }),
            ),
            (
                "m.room.message",
                json!({
                    "body": ":cat: mxc://h/cat", "format": "org.matrix.custom.html",
                    "formatted_body": format!("<img data-mx-emoticon src=\"{cat}\" alt=\":cat:\"> mxc://other <a href='{small}'>x</a>"),
                }),
            ),
            (
                "org.matrix.msc1767.image",
                json!({
                    "org.matrix.msc1767.text": [
                        {"body": "mxc://h/cat"},
                        {"body": format!("<img src='{cat}'>"), "mimetype": "text/html"},
                    ],
                    "org.matrix.msc1767.file": {"url": cat, "mimetype": "image/png"},
                    "thumbnails": [cat, {"m.file": {"url": small}}],
                }),
            ),
            ("m.room.message", json!({"body": "x", "com.beeper.per_message_profile": {"id": "a", "avatar_url": cat}})),
        ]
    };
    for ((kind, here), (_, expected)) in all(cat, small).into_iter().zip(all(&far_cat, &far_small)) {
        let mut image = image(kind, here).unwrap();
        image.content.remove(SOURCE);
        assert_eq!(Value::Object(image.content), expected);
    }
    // What was already called so by the gateway, and is from across, is called there as it was.
    let names = names();
    let home = names.across("mxc://l/dog", Side::Matrix).into_owned();
    for (source, expected) in
        [(home.as_str(), "mxc://l/dog"), (&far_cat, &far_cat), ("mxc://g/forged", "mxc://g/forged")]
    {
        let (content, _) = text(json!({"body": "x", "url": source}));
        assert_eq!(content["url"], expected);
    }
}

#[test]
fn avatars_are_called_so_that_the_other_side_can_read_them() {
    let names = names();
    let content =
        json!({"membership": "join", "avatar_url": "mxc://h/me", "displayname": "mxc://h/me", "reason": "mxc://h/me"});
    let image = member_content(content.as_object().unwrap(), "join", MediaTo { names: &names, to: Side::Lm });
    assert_eq!(
        Value::Object(image),
        json!({"membership": "join", "avatar_url": there("mxc://h/me"), "displayname": "mxc://h/me", "reason": "mxc://h/me"})
    );
}
