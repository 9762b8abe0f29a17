//! The logs of LM rooms as they are kept, on both databases.

use ruma::{OwnedUserId, room_id, server_name, user_id};

use super::*;
use crate::store::Store;
use crate::store::testing::both_stores;

const ROOM: &str = "!room:hub.example";

fn id(name: &str) -> OwnedEventId {
    OwnedEventId::try_from(format!("${name}")).unwrap()
}

fn event(position: i64, state: Option<(&str, &str)>) -> NewEvent {
    NewEvent {
        position,
        event_id: id(&format!("event{position}")),
        lpdu_id: (position % 2 == 1).then(|| id(&format!("lpdu{position}"))),
        state: state.map(|(kind, state_key)| (kind.to_owned(), state_key.to_owned())),
        json: format!("{{\"position\":{position}}}").into_bytes(),
    }
}

/// A room with `events`, in one transaction.
async fn write(store: &Store, events: Vec<NewEvent>) -> Result<(), crate::store::StoreError> {
    store
        .write(move |tx| {
            Box::pin(async move {
                let room_id = room_id!("!room:hub.example");
                append(tx, room_id, &events).await?;
                let state = events.iter().filter_map(|event| Some((event.state.as_ref()?, event.position)));
                let state: std::collections::BTreeMap<_, _> = state.collect();
                set_state(tx, room_id, &state.into_iter().collect::<Vec<_>>()).await?;
                advance_head(tx, room_id, events.last().map_or(0, |event| event.position)).await
            })
        })
        .await
}

async fn add_room(store: &Store) {
    let row = RoomRow {
        room_id: ROOM.try_into().unwrap(),
        version: RoomVersion::Lm02,
        hub: server_name!("hub.example").to_owned(),
        redaction: Redaction::Draft,
        shared: false,
        head: 0,
    };
    store.write(move |tx| Box::pin(async move { insert_room(tx, &row).await })).await.unwrap();
}

fn positions(rows: Vec<EventRow>) -> Vec<i64> {
    rows.into_iter().map(|row| row.position).collect()
}

#[tokio::test]
async fn a_log_and_its_states_come_back_as_they_were_written() {
    both_stores(|store| async move {
        add_room(&store).await;
        let odd = ("type\u{0}", "key\u{0}\u{1}");
        let mut events = vec![event(0, Some(("m.room.create", ""))), event(1, Some(odd)), event(2, None)];
        events.extend((3..150).map(|position| event(position, None)));
        events.extend([event(150, Some(odd)), event(151, Some(("m.room.name", "")))]);
        write(&store, events).await.unwrap();

        let room_id = room_id!("!room:hub.example");
        assert_eq!(room_ids(&store).await.unwrap(), [room_id]);
        let row = room(&store, room_id).await.unwrap().unwrap();
        assert_eq!((row.head, row.version, row.redaction), (151, RoomVersion::Lm02, Redaction::Draft));
        assert_eq!(room(&store, room_id!("!other:hub.example")).await.unwrap(), None);
        assert_eq!(positions(range(&store, room_id, 140, 145, 3).await.unwrap()), [140, 141, 142]);
        assert_eq!(positions(state_now(&store, room_id).await.unwrap()), [0, 150, 151]);
        assert_eq!(positions(state_before(&store, room_id, 151).await.unwrap()), [0, 150]);
        assert_eq!(positions(state_before(&store, room_id, 150).await.unwrap()), [0, 1]);
        assert_eq!(positions(state_before(&store, room_id, 0).await.unwrap()), Vec::<i64>::new());

        let found = super::event(&store, &id("event7")).await.unwrap().unwrap();
        assert_eq!((found.position, found.json), (7, b"{\"position\":7}".to_vec()));
        assert_eq!(event_of_lpdu(&store, &id("lpdu7")).await.unwrap().unwrap().position, 7);
        assert_eq!(event_of_lpdu(&store, &id("lpdu8")).await.unwrap(), None);
        let wanted: Vec<OwnedEventId> = (0..100).map(|position| id(&format!("lpdu{position}"))).collect();
        let wanted: Vec<&ruma::EventId> = wanted.iter().map(|id| &**id).collect();
        let found = positions_of_lpdus(&store, &wanted).await.unwrap();
        assert_eq!((found.len(), found.get(&id("lpdu99"))), (50, Some(&99)));
        let mut both = positions(events_by_id(&store, &[&id("event5"), &id("none"), &id("event9")]).await.unwrap());
        both.sort_unstable();
        assert_eq!(both, [5, 9]);
        let known = known_of(&store, room_id, &[&id("event5"), &id("none"), &id("event9")]).await.unwrap();
        assert_eq!(
            known.into_iter().collect::<Vec<_>>(),
            [(id("event5"), Known::Settled), (id("event9"), Known::Settled)]
        );
    })
    .await;
}

#[tokio::test]
async fn inv_1_a_position_is_written_once() {
    both_stores(|store| async move {
        add_room(&store).await;
        write(&store, vec![event(0, None), event(1, None)]).await.unwrap();
        let mut again = event(1, None);
        again.event_id = id("another");
        assert!(write(&store, vec![event(2, None), again]).await.is_err());
        let mut elsewhere = event(5, None);
        elsewhere.event_id = id("event1");
        assert!(write(&store, vec![elsewhere]).await.is_err());
        let log = range(&store, room_id!("!room:hub.example"), 0, 100, 100).await.unwrap();
        assert_eq!(log.iter().map(|row| row.event_id.as_str()).collect::<Vec<_>>(), ["$event0", "$event1"]);
        assert_eq!(room(&store, room_id!("!room:hub.example")).await.unwrap().unwrap().head, 1);
    })
    .await;
}

#[tokio::test]
async fn stays_lpdus_and_complaints_come_back() {
    both_stores(|store| async move {
        let room_id = room_id!("!room:hub.example");
        let server = server_name!("part.example");
        store
            .write(move |tx| {
                Box::pin(async move {
                    server_joined(tx, room_id, server, 3).await?;
                    server_left(tx, room_id, server, 5).await?;
                    server_joined(tx, room_id, server, 9).await?;
                    for position in [10, 20, 30] {
                        queue_lpdu(tx, room_id, position, &id(&format!("l{position}")), b"{}").await?;
                    }
                    forget_lpdus(tx, room_id, &[20]).await?;
                    for (number, (event, problem, settled)) in (1..).zip([
                        ("e", "first\u{0}", true),
                        ("e", "second", true),
                        ("f", "third", false),
                        ("g", "fourth", false),
                        ("g", "the end", true),
                        ("g", "after it", false),
                    ]) {
                        let complaint =
                            Complaint { event_id: id(event), problem: problem.to_owned(), settled, fault: None };
                        complain(tx, room_id, &complaint, number).await?;
                    }
                    Ok(())
                })
            })
            .await
            .unwrap();
        let found = stays(&store, room_id, server).await.unwrap();
        assert_eq!(found, [Stay { since: 3, until: Some(5) }, Stay { since: 9, until: None }]);
        assert_eq!(stays(&store, room_id, server_name!("other.example")).await.unwrap(), []);
        let queued = lpdus_after(&store, room_id, 10, 10).await.unwrap();
        assert_eq!(queued.iter().map(|lpdu| lpdu.position).collect::<Vec<_>>(), [30]);
        let some = queued_lpdus(&store, room_id, &[10, 20, 30]).await.unwrap();
        assert_eq!(some.len(), 2);
        assert_eq!(complaints(&store, room_id, 5).await.unwrap(), ["$g: the end", "$f: third", "$e: first\u{0}"]);
        let known = known_of(&store, room_id, &[&id("e"), &id("g"), &id("f"), &id("h")]).await.unwrap();
        let expected = [("e", Known::Settled), ("f", Known::Remarked), ("g", Known::Settled)];
        assert_eq!(known.into_iter().collect::<Vec<_>>(), expected.map(|(event, known)| (id(event), known)));
    })
    .await;
}

#[tokio::test]
async fn holes_are_kept_in_order_and_within_bounds_until_they_are_closed() {
    both_stores(|store| async move {
        let (room_id, other) = (room_id!("!room:hub.example"), room_id!("!other:hub.example"));
        assert_eq!(missing(&store, None).await.unwrap(), Missing::default());
        let hole = |name: &str, noticed_ts| Hole {
            event_id: id(name),
            json: None,
            place: None,
            given: false,
            tries: 0,
            retry_at: noticed_ts,
            noticed_ts,
            last_error: format!("{name}\u{0}"),
            overflow: None,
        };
        let here = |name: &str| Hole { json: Some(b"{}".to_vec()), place: Some(7), ..hole(name, 20) };
        let note = |room_id: &'static ruma::RoomId, holes: Vec<Hole>| {
            let bounds = Counts { absent: 2, waiting: 1, given: 1 };
            let kept = store.clone();
            store.write(move |tx| Box::pin(async move { note_holes(&kept, tx, room_id, &holes, bounds).await }))
        };
        let given = Hole { given: true, ..here("g") };
        assert_eq!(note(room_id, vec![hole("b", 10), here("w"), hole("a", 20), given]).await.unwrap(), 0);
        assert_eq!(note(room_id, vec![hole("c", 20), here("v"), here("u")]).await.unwrap(), 3);
        assert_eq!(note(other, vec![hole("d", 5), Hole { place: Some(3), ..hole("d", 6) }]).await.unwrap(), 0);
        let names = |holes: Vec<Hole>| holes.into_iter().map(|hole| hole.event_id).collect::<Vec<_>>();
        assert_eq!(names(holes(&store, room_id, false).await.unwrap()), [id("b"), id("w"), id("a")]);
        assert_eq!(names(holes(&store, room_id, true).await.unwrap()), [id("g")]);
        let counts = count_holes(&store, room_id).await.unwrap();
        assert_eq!(counts, Counts { absent: 2, waiting: 1, given: 1 });
        // What is noticed again is the same hole.
        let again = holes(&store, other, false).await.unwrap();
        assert_eq!(again, [Hole { place: Some(3), ..hole("d", 5) }]);
        let shown = missing(&store, None).await.unwrap();
        assert_eq!(
            shown,
            Missing { count: 5, since: Some(5), last_error: Some("d\u{0}".to_owned()), ..Missing::default() }
        );
        assert_eq!(missing(&store, Some(room_id)).await.unwrap().count, 4);
        assert_eq!(rooms_with_holes(&store).await.unwrap().len(), 2);

        // One stands for all of its server: it is the newest of them, and goes back to the first.
        let beyond = |name: &str, place, since| Hole {
            place: Some(place),
            overflow: Some(Overflow { of: "a.example".to_owned(), since }),
            ..hole(name, 20)
        };
        assert_eq!(note(room_id, vec![beyond("w", 5, 5), beyond("b", 9, 9), beyond("x", 7, 3)]).await.unwrap(), 0);
        let kept = holes(&store, room_id, false).await.unwrap();
        assert_eq!(names(kept.clone()), [id("b"), id("w"), id("a"), id("b")]);
        assert_eq!(kept.last(), Some(&beyond("b", 9, 3)));
        assert_eq!(count_holes(&store, room_id).await.unwrap(), counts);
        let hasten = store.write(move |tx| Box::pin(async move { hasten_overflows(tx, room_id, 1).await }));
        hasten.await.unwrap();
        assert_eq!(next_try(&store, room_id).await.unwrap(), Some(1));
        store.write(move |tx| Box::pin(async move { close_overflow(tx, room_id, "a.example").await })).await.unwrap();
        assert_eq!(holes(&store, room_id, false).await.unwrap().len(), 3, "what waits for itself stays");

        let put_off = store.write(move |tx| {
            Box::pin(async move {
                let problem = |of: &ruma::EventId| (*of == *id("b")).then(|| "still".to_owned());
                put_off_holes(tx, room_id, 15, |tries| tries * 100, problem).await
            })
        });
        put_off.await.unwrap();
        let first = holes(&store, room_id, false).await.unwrap().remove(0);
        assert_eq!((first.tries, first.retry_at, first.last_error.as_str()), (1, 115, "still"));
        assert_eq!(next_try(&store, room_id).await.unwrap(), Some(20));

        store
            .write(move |tx| Box::pin(async move { close_holes(tx, room_id, &[id("a"), id("w")]).await }))
            .await
            .unwrap();
        assert_eq!(names(holes(&store, room_id, false).await.unwrap()), [id("b")]);
        store.write(move |tx| Box::pin(async move { forget_holes(tx, room_id).await })).await.unwrap();
        assert_eq!(rooms_with_holes(&store).await.unwrap(), [other.to_owned()]);
        assert_eq!(next_try(&store, room_id).await.unwrap(), None);
    })
    .await;
}

/// What a join, and everybody who asks for the state, costs must not grow with how often a name was changed.
#[tokio::test]
async fn reading_the_state_costs_no_more_in_a_long_log() {
    const CHANGES: i64 = 30_000;
    both_stores(|store| async move {
        add_room(&store).await;
        let room_id = room_id!("!room:hub.example");
        let mut costs = Vec::new();
        for (first, last) in [(0, 100), (100, CHANGES)] {
            let member = |position| event(position, Some(("m.room.member", "@user:part.example")));
            write(&store, (first..last).map(member).collect()).await.unwrap();
            // As PostgreSQL does by itself now and then; a plan that was made for a hundred rows is good for no more.
            sqlx::query("ANALYZE").execute(store.reader()).await.unwrap();
            let mut best = std::time::Duration::MAX;
            for _ in 0..10 {
                let begin = std::time::Instant::now();
                assert_eq!(positions(state_before(&store, room_id, last).await.unwrap()), [last - 1]);
                assert_eq!(positions(state_before(&store, room_id, 70).await.unwrap()), [69]);
                let of_server = state_of_kind_before(&store, room_id, 70, "m.room.member", "%:part.example").await;
                assert_eq!(positions(of_server.unwrap()), [69]);
                best = best.min(begin.elapsed());
            }
            costs.push(best);
        }
        assert!(costs[1] < costs[0] * 25, "{costs:?}");
        let others = state_of_kind_before(&store, room_id, 70, "m.room.member", "%:other.example").await.unwrap();
        assert_eq!(others, []);
    })
    .await;
}

#[tokio::test]
async fn what_is_redacted_is_so_whoever_said_it_or_for_its_sender_alone() {
    both_stores(|store| async move {
        let (room, other) = (room_id!("!room:hub.example"), room_id!("!other:hub.example"));
        let [alice, bob] = ["@alice:h.example", "@bob:h.example"].map(|user| OwnedUserId::try_from(user).unwrap());
        let by_bob = bob.clone();
        let write = store.write(move |tx| {
            Box::pin(async move {
                redact(tx, room, &id("all"), By::Anybody, &id("r1")).await?;
                redact(tx, room, &id("all"), By::Anybody, &id("r2")).await?;
                redact(tx, room, &id("bobs"), By::Sender(&by_bob), &id("r3")).await?;
                redact(tx, other, &id("elsewhere"), By::Anybody, &id("r4")).await
            })
        });
        write.await.unwrap();
        let asked: Vec<Asked> = ["all", "bobs", "elsewhere", "none"]
            .into_iter()
            .flat_map(|name| [(id(name), alice.clone()), (id(name), bob.clone())])
            .collect();
        let of = |events: &[Asked]| events.to_vec();
        assert_eq!(redacted(&store, room, &asked).await.unwrap(), [id("all"), id("bobs")].into());
        assert_eq!(redacted(&store, room, &of(&asked[2..3])).await.unwrap(), [].into(), "it is not alice's");
        // Many at once are asked of in pieces, and of a room in which nothing is redacted nothing is asked.
        let mut many: Vec<Asked> = (0..333).map(|number| (id(&format!("e{number}")), alice.clone())).collect();
        many.push((id("all"), alice.clone()));
        assert_eq!(redacted(&store, room, &many).await.unwrap(), [id("all")].into());
        assert_eq!(redacted(&store, room_id!("!third:hub.example"), &many).await.unwrap(), [].into());
        let events = many.clone();
        let now = store.write(move |tx| Box::pin(async move { redacted_now(tx, room, &events).await }));
        assert_eq!(now.await.unwrap(), [id("all")].into());
    })
    .await;
}

/// What a hub has not taken yet it has not passed over either.
#[tokio::test]
async fn an_lpdu_is_passed_over_only_where_the_hub_has_it() {
    both_stores(|store| async move {
        let room_id = room_id!("!room:hub.example");
        let ids = [id("a"), id("b"), id("c")];
        let write = store.write(move |tx| {
            Box::pin(async move {
                for (position, id) in (1..).zip(&ids) {
                    queue_lpdu(tx, room_id, position, id, b"{}").await?;
                }
                take_lpdus(tx, room_id, &[1], 5).await?;
                lpdu_echoed(tx, room_id, &ids[2]).await?;
                take_lpdus(tx, room_id, &[2], 6).await
            })
        });
        write.await.unwrap();
        let taken = taken_lpdus(&store, room_id, 10).await.unwrap();
        let passed: Vec<(i64, bool)> = taken.iter().map(|row| (row.position, row.passed)).collect();
        assert_eq!(passed, [(1, true), (2, false)]);
    })
    .await;
}

/// What is queued behind the join itself is said after it.
#[tokio::test]
async fn who_comes_in_anew_says_nothing_more_of_what_was_said_of_the_own_membership_before() {
    both_stores(|store| async move {
        let (room_id, user) = (room_id!("!r:h.example"), user_id!("@a:g.example"));
        let ids: Vec<OwnedEventId> = ["leave", "join", "later"].iter().map(|name| id(name)).collect();
        let json = serde_json::json!({ "type": "m.room.member", "sender": user, "state_key": user }).to_string();
        for (came, expected) in [(1, &ids[..1]), (5, &ids[..])] {
            let (ids, json) = (ids.clone(), json.clone());
            let write = store.write(move |tx| {
                Box::pin(async move {
                    forget_lpdus(tx, room_id, &[0, 1, 2]).await?;
                    for (position, id) in (0..).zip(&ids) {
                        queue_lpdu(tx, room_id, position, id, json.as_bytes()).await?;
                    }
                    let handshake = id("handshake");
                    let lpdu_id = ids.get(came).unwrap_or(&handshake);
                    let by_hub = forget_memberships(tx, room_id, user, Came::In(Some(&handshake))).await?;
                    assert!(by_hub.is_empty(), "what waits may be later: {by_hub:?}");
                    forget_memberships(tx, room_id, user, Came::Anew(Some(lpdu_id))).await
                })
            });
            assert_eq!(write.await.unwrap(), expected);
        }
    })
    .await;
}

/// The hub may have appended what it has behind what it gives now.
#[tokio::test]
async fn what_the_hub_has_of_a_membership_that_others_change_is_marked_and_waits_for_the_log() {
    both_stores(|store| async move {
        let (room_id, user) = (room_id!("!r:h.example"), user_id!("@a:g.example"));
        let json = serde_json::json!({ "type": "m.room.member", "sender": user, "state_key": user }).to_string();
        let write = store.write(move |tx| {
            Box::pin(async move {
                for (position, name) in [(1, "taken"), (2, "waits")] {
                    queue_lpdu(tx, room_id, position, &id(name), json.as_bytes()).await?;
                }
                take_lpdus(tx, room_id, &[1], 7).await?;
                forget_memberships(tx, room_id, user, Came::In(None)).await
            })
        });
        assert_eq!(write.await.unwrap(), [] as [OwnedEventId; 0]);
        let taken = taken_lpdus(&store, room_id, 10).await.unwrap();
        let marked: Vec<(i64, bool)> = taken.iter().map(|row| (row.position, row.superseded)).collect();
        assert_eq!(marked, [(1, true)]);
        assert_eq!(newest_lpdus(&store, room_id, i64::MAX, 10).await.unwrap().len(), 1, "what waits may be later");
    })
    .await;
}

#[tokio::test]
async fn member_events_come_one_by_one_in_the_order_of_the_log() {
    both_stores(|store| async move {
        add_room(&store).await;
        let users = ["@a:one.example", "@b:two.example", "@c:one.example"];
        // More than are read at once, and other events between them.
        let events = (0..400_i64).map(|position| {
            let user = usize::try_from(position).ok().and_then(|place| users.get(place % 4));
            event(position, user.map(|user| ("m.room.member", *user)))
        });
        write(&store, events.collect()).await.unwrap();
        let room_id = room_id!("!room:hub.example");
        let mut of_one = Vec::new();
        let each = |position: i64, json: &[u8]| of_one.push((position, json.to_vec()));
        members_before(&store, room_id, "%:one.example", 398, each).await.unwrap();
        let expected = (0..398_i64).filter(|position| position % 4 == 0 || position % 4 == 2);
        let expected = expected.map(|position: i64| (position, format!("{{\"position\":{position}}}").into_bytes()));
        assert_eq!(of_one, expected.collect::<Vec<_>>());
        let job = store.write(|tx| {
            Box::pin(async move {
                let mut all = Vec::new();
                member_events(tx, room_id!("!room:hub.example"), |position, _| all.push(position)).await?;
                Ok(all)
            })
        });
        assert_eq!(job.await.unwrap(), (0..400_i64).filter(|position| position % 4 != 3).collect::<Vec<_>>());
    })
    .await;
}

#[tokio::test]
async fn what_allows_state_is_kept_outside_of_the_log_within_bounds() {
    both_stores(|store| async move {
        add_room(&store).await;
        write(&store, vec![event(0, Some(("m.room.create", "")))]).await.unwrap();
        let room_id = room_id!("!room:hub.example");
        let keep = async |names: &[&str], bounds: ChainBounds| -> bool {
            let events: Vec<_> = names.iter().map(|name| (id(name), name.as_bytes().to_vec())).collect();
            let job = store.write(move |tx| Box::pin(async move { keep_chain(tx, room_id, &events, bounds).await }));
            job.await.unwrap()
        };
        let kept = async || -> Vec<(i64, String)> {
            let mut rows = chain_of(&store, room_id).await.unwrap();
            rows.sort_by(|one, other| one.event_id.cmp(&other.event_id));
            rows.into_iter().map(|row| (row.position, row.event_id.to_string())).collect()
        };
        let wide = ChainBounds { events: 100, bytes: 100 };
        // What is in the log is not kept twice, nor what is kept already.
        assert!(keep(&["event0", "a", "b"], wide).await);
        assert!(keep(&["b"], wide).await);
        assert_eq!(kept().await, [(OUTSIDE, "$a".to_owned()), (OUTSIDE, "$b".to_owned())]);
        assert!(!keep(&["c"], ChainBounds { events: 2, ..wide }).await);
        assert!(!keep(&["c"], ChainBounds { bytes: 2, ..wide }).await);
        assert!(keep(&["c"], ChainBounds { events: 3, bytes: 3 }).await);
        assert_eq!(kept().await.len(), 3);
        assert_eq!(chain_event(&store, &id("c")).await.unwrap().unwrap().json, b"c");
        assert_eq!(chain_event(&store, &id("event0")).await.unwrap(), None);
        store.write(move |tx| Box::pin(async move { forget_chain(tx, room_id).await })).await.unwrap();
        assert!(kept().await.is_empty());
    })
    .await;
}
