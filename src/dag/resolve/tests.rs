//! HC-44: what is left out of the input of a resolution never changes its result. Random rooms, with bans, kicks, changes of
//! power and of join rules on branches that know nothing of each other, are resolved with everything and with what is here
//! thought to be enough.

use proptest::prelude::*;
use ruma::events::TimelineEventType;
use serde_json::{Value, json};

use super::*;
use crate::dag::auth::{AuthState, check_against, keys_needed};
use crate::dag::pdu::{Pdu, Unverified};
use crate::dag::stored::{Groups, Stored};
use crate::dag::version::rules_of;
use crate::event::RoomVersion;
use crate::store::Store;

/// What somebody tries to do, on which of the events before.
#[derive(Debug, Clone)]
struct Step {
    on: Vec<prop::sample::Index>,
    who: usize,
    whom: usize,
    what: usize,
    level: i64,
    age: i64,
}

fn step() -> impl Strategy<Value = Step> {
    let on = prop::collection::vec(any::<prop::sample::Index>(), 1..3);
    (on, 0..4_usize, 0..4_usize, 0..12_usize, 0..101_i64, 0..50_i64)
        .prop_map(|(on, who, whom, what, level, age)| Step { on, who, whom, what, level, age })
}

const USERS: [&str; 4] = ["@creator:x", "@a:x", "@b:y", "@c:z"];

/// A room as it grows; every event stands in `events`, and `states` holds the state after each that was allowed.
struct Simulation {
    version: RoomVersion,
    rules: &'static RoomVersionRules,
    room_id: ruma::OwnedRoomId,
    events: EventMap,
    states: Vec<(OwnedEventId, Snapshot)>,
    reader: Events,
}

impl Simulation {
    fn begin(version: RoomVersion, reader: Events) -> Self {
        let rules = rules_of(version).unwrap();
        let mut simulation = Self {
            version,
            rules,
            room_id: "!room:x".try_into().unwrap(),
            events: EventMap::new(),
            states: Vec::new(),
            reader,
        };
        let mut create = json!({ "type": "m.room.create", "state_key": "", "sender": USERS[0], "depth": 1,
            "content": { "room_version": version.as_str(), "creator": USERS[0] }, "origin_server_ts": 1,
            "prev_events": [], "auth_events": [] });
        if version != RoomVersion::V12 {
            create["room_id"] = json!(simulation.room_id);
        }
        let pdu = Unverified::from_object(create.as_object().unwrap().clone(), version).unwrap().pdu().clone();
        simulation.room_id = pdu.room_id.clone();
        simulation.keep(pdu, &Snapshot::default());
        let mut levels = json!({ "users": { USERS[1]: 60 }, "events": { "m.room.power_levels": 50 } });
        if version != RoomVersion::V12 {
            levels["users"][USERS[0]] = json!(100);
        }
        for (kind, state_key, sender, content) in [
            ("m.room.member", USERS[0], USERS[0], json!({ "membership": "join" })),
            ("m.room.power_levels", "", USERS[0], levels),
            ("m.room.join_rules", "", USERS[0], json!({ "join_rule": "public" })),
            ("m.room.member", USERS[1], USERS[1], json!({ "membership": "join" })),
        ] {
            let last = simulation.states.len() - 1;
            assert!(simulation.add(&[last], sender, kind, state_key, content, 100));
        }
        simulation
    }

    fn keep(&mut self, pdu: Pdu, before: &Snapshot) {
        let id = self.states.len() as i64 + 1;
        let mut map = before.map.clone();
        map.insert((pdu.kind.to_string(), pdu.state_key.clone().unwrap()), pdu.event_id.clone());
        let after = Snapshot { id, weight: 0, map };
        let event = Stored { groups: Some(Groups { before: before.id, after: id }), ..Stored::new(pdu) };
        self.states.push((event.pdu.event_id.clone(), after));
        self.events.insert(event.pdu.event_id.clone(), Arc::new(event));
    }

    /// Adds an event after others, if the state that they make allows it.
    fn add(&mut self, on: &[usize], sender: &str, kind: &str, state_key: &str, content: Value, ts: i64) -> bool {
        let parents: Vec<_> = on.iter().map(|index| self.states[*index].clone()).collect();
        let before = self.resolve_with_all(&parents.iter().map(|(_, state)| state.clone()).collect::<Vec<_>>());
        let raw = serde_json::value::to_raw_value(&content).unwrap();
        let keys = ruma::state_res::auth_types_for_event(
            &TimelineEventType::from(kind),
            sender.try_into().unwrap(),
            Some(state_key),
            &raw,
            &self.rules.authorization,
        )
        .unwrap();
        let auth: Vec<_> =
            keys.into_iter().filter_map(|(kind, key)| before.map.get(&(kind.to_string(), key))).collect();
        let depth = parents.iter().map(|(id, _)| self.events[id].pdu.depth).max().unwrap() + 1;
        let event = json!({ "type": kind, "state_key": state_key, "sender": sender, "content": content,
            "room_id": self.room_id, "origin_server_ts": ts, "depth": depth, "auth_events": auth,
            "prev_events": parents.iter().map(|(id, _)| id).collect::<Vec<_>>() });
        let pdu = Unverified::from_object(event.as_object().unwrap().clone(), self.version).unwrap().pdu().clone();
        if self.events.contains_key(&pdu.event_id) {
            return false;
        }
        let stored = Stored::new(pdu.clone());
        let keys = keys_needed(&pdu, &self.rules.authorization).unwrap();
        let state: AuthState = keys
            .into_iter()
            .filter_map(|key| Some((key.clone(), self.events[before.map.get(&key)?].clone())))
            .collect();
        let allowed = check_against(&stored, &state, &self.rules.authorization).is_ok();
        if allowed {
            self.keep(pdu, &before);
        }
        allowed
    }

    fn try_step(&mut self, step: &Step) {
        let mut on: Vec<usize> = step.on.iter().map(|index| index.index(self.states.len())).collect();
        on.dedup();
        let (who, whom) = (USERS[step.who], USERS[step.whom]);
        let ts = 10_000 - step.age;
        let member = |membership: &str| json!({ "membership": membership, "n": step.level });
        match step.what {
            0 | 1 => self.add(&on, who, "m.room.member", who, member("join"), ts),
            2 => self.add(&on, who, "m.room.member", who, member("leave"), ts),
            3 => self.add(&on, who, "m.room.member", whom, member("leave"), ts),
            4 => self.add(&on, who, "m.room.member", whom, member("ban"), ts),
            5 => self.add(&on, who, "m.room.member", whom, member("invite"), ts),
            6 | 7 => {
                let mut users = json!({ whom: step.level, USERS[1]: 60 });
                if self.version == RoomVersion::V12 {
                    users.as_object_mut().unwrap().remove(USERS[0]);
                } else {
                    users[USERS[0]] = json!(100);
                }
                let levels = json!({ "users": users, "events": { "m.room.power_levels": 50, "n": step.level } });
                self.add(&on, who, "m.room.power_levels", "", levels, ts)
            }
            8 => {
                let rule = if step.level % 2 == 0 { "public" } else { "invite" };
                self.add(&on, who, "m.room.join_rules", "", json!({ "join_rule": rule }), ts)
            }
            _ => {
                let content = json!({ "topic": format!("{} {}", step.level, step.age) });
                self.add(&on, who, "m.room.topic", "", content, ts)
            }
        };
    }

    fn chain(&self, roots: impl Iterator<Item = OwnedEventId>) -> EventIdSet<OwnedEventId> {
        let mut chain = EventIdSet::new();
        let mut level: Vec<_> = roots.flat_map(|id| self.events[&id].pdu.auth_events.clone()).collect();
        while let Some(id) = level.pop() {
            if chain.insert(id.clone()) {
                level.extend(self.events[&id].pdu.auth_events.clone());
            }
        }
        chain
    }

    /// ruma's resolution over whole states and whole auth chains, and the subgraph by its definition.
    fn resolve_with_all(&self, states: &[Snapshot]) -> Snapshot {
        let mut states = states.to_vec();
        states.sort_by_key(|state| state.id);
        states.dedup_by_key(|state| state.id);
        if states.len() == 1 {
            return states.remove(0);
        }
        let maps: Vec<StateMap<OwnedEventId>> = states
            .iter()
            .map(|state| {
                let entry = |((kind, key), id): (&StateKey, &OwnedEventId)| {
                    ((StateEventType::from(kind.as_str()), key.clone()), id.clone())
                };
                state.map.iter().map(entry).collect()
            })
            .collect();
        let chains: Vec<_> = states.iter().map(|state| self.chain(state.map.values().cloned())).collect();
        let subgraph = |conflicted: &StateMap<Vec<OwnedEventId>>| {
            let ids: Vec<OwnedEventId> = conflicted.values().flatten().cloned().collect();
            Some(self.subgraph(&ids).into_iter().collect())
        };
        let resolved = state_res::resolve::<Arc<Stored>, _>(
            &self.rules.authorization,
            self.rules.state_res.v2_rules().unwrap(),
            &maps,
            chains,
            |id| self.events.get(id).cloned(),
            subgraph,
        )
        .unwrap();
        let map = resolved.into_iter().map(|((kind, key), id)| ((kind.to_string(), key), id)).collect();
        Snapshot { id: -1, weight: 0, map }
    }

    /// Everything between two conflicted events, by the definition.
    fn subgraph(&self, conflicted: &[OwnedEventId]) -> BTreeSet<OwnedEventId> {
        let below = |id: &OwnedEventId| self.chain(std::iter::once(id.clone()));
        let chains: Vec<_> = conflicted.iter().map(below).collect();
        let between = |id: &&OwnedEventId| {
            let own = below(id);
            let reaches = conflicted.iter().any(|other| own.contains(other));
            conflicted.contains(id) || reaches && chains.iter().any(|chain| chain.contains(id))
        };
        self.events.keys().filter(between).cloned().collect()
    }

    /// Compares what is given to ruma with what the definitions say of whole states.
    async fn compare_inputs(&self, states: &[Snapshot]) {
        let keys = conflicted_keys(states);
        if keys.is_empty() {
            return;
        }
        let found = Inputs::gather(&self.reader, &self.events, &self.room_id, self.rules, states, &keys).await.unwrap();
        let chains: Vec<_> = states.iter().map(|state| self.chain(state.map.values().cloned())).collect();
        let expected: BTreeSet<_> = self
            .events
            .keys()
            .filter(|id| {
                let holding = chains.iter().filter(|chain| chain.contains(id)).count();
                holding > 0 && holding < chains.len()
            })
            .cloned()
            .collect();
        assert_eq!(found.auth_difference.into_iter().collect::<BTreeSet<_>>(), expected, "auth difference");
        let conflicted: Vec<_> =
            states.iter().flat_map(|state| keys.iter().filter_map(|key| state.map.get(key).cloned())).collect();
        let expected = self.subgraph(&conflicted);
        assert_eq!(found.subgraph.into_iter().collect::<BTreeSet<_>>(), expected, "conflicted state subgraph");
    }

    async fn compare(&self, states: &[Snapshot]) {
        let expected = self.resolve_with_all(states);
        let mut distinct = states.to_vec();
        distinct.sort_by_key(|state| state.id);
        distinct.dedup_by_key(|state| state.id);
        self.compare_inputs(&distinct).await;
        let changes = resolve(&self.reader, &self.events, &self.room_id, self.rules, &distinct).await.unwrap();
        let (found, _) = distinct[0].with(0, &changes).unwrap();
        let (found, expected): (Vec<_>, Vec<_>) = (found.map.iter().collect(), expected.map.iter().collect());
        assert_eq!(found, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn hc_44_a_resolution_with_less_input_has_the_same_result(
        version in prop::sample::select(vec![RoomVersion::V6, RoomVersion::V10, RoomVersion::V11, RoomVersion::V12]),
        steps in prop::collection::vec(step(), 5..40),
        pairs in prop::collection::vec(prop::collection::vec(any::<prop::sample::Index>(), 2..4), 6),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open(&format!("sqlite://{}", directory.path().join("db").display())).await.unwrap();
            let mut simulation = Simulation::begin(version, Events::new(store.clone(), 10, 10));
            for step in &steps {
                simulation.try_step(step);
            }
            let count = simulation.states.len();
            for pair in &pairs {
                let states: Vec<_> = pair.iter().map(|index| simulation.states[index.index(count)].1.clone()).collect();
                simulation.compare(&states).await;
            }
            store.close().await;
        });
    }
}

#[tokio::test]
async fn a_resolution_that_would_take_too_many_events_is_refused_and_names_the_bound() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("sqlite://{}", directory.path().join("db").display())).await.unwrap();
    let mut simulation = Simulation::begin(RoomVersion::V11, Events::new(store.clone(), 10, 10));
    for ts in [100, 101] {
        assert!(simulation.add(&[4], USERS[0], "m.room.topic", "", json!({}), ts));
    }
    let states: Vec<_> = simulation.states[5..].iter().map(|(_, state)| state.clone()).collect();
    simulation.compare(&states).await;
    // Create event, the creator's join, power levels.
    for (bound, fits) in [(3, true), (2, false)] {
        simulation.reader.max_auth_chain = bound;
        let result =
            resolve(&simulation.reader, &simulation.events, &simulation.room_id, simulation.rules, &states).await;
        assert_eq!(result.is_ok(), fits);
        if let Err(refusal) = result {
            assert_eq!((refusal.code(), refusal.is_transient()), ("too_many_events", false));
            assert!(refusal.to_string().contains("more than 2 events"), "{refusal}");
        }
    }
    store.close().await;
}

#[tokio::test]
async fn states_that_cannot_be_resolved_are_a_verdict_on_the_event_that_joins_them() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("sqlite://{}", directory.path().join("db").display())).await.unwrap();
    let mut simulation = Simulation::begin(RoomVersion::V11, Events::new(store.clone(), 10, 10));
    let (create, join, base) =
        (simulation.states[0].0.clone(), simulation.states[1].0.clone(), simulation.states[4].clone());
    // What no check lets in, but a room may hold from before.
    let mut levels = |levels: Value, auth: &OwnedEventId| {
        let event = json!({ "type": "m.room.power_levels", "state_key": "", "sender": USERS[0], "depth": 9,
            "room_id": simulation.room_id, "content": levels, "origin_server_ts": 200, "prev_events": [base.0],
            "auth_events": [create, join, auth] });
        let pdu = Unverified::from_object(event.as_object().unwrap().clone(), RoomVersion::V11).unwrap();
        simulation.keep(pdu.pdu().clone(), &base.1);
        simulation.states.last().unwrap().clone()
    };
    let (bad, _) = levels(json!({ "users": "nobody" }), &base.0);
    let states = [levels(json!({ "ban": 1 }), &bad).1, levels(json!({ "ban": 2 }), &bad).1];
    let result = resolve(&simulation.reader, &simulation.events, &simulation.room_id, simulation.rules, &states).await;
    let refusal = result.unwrap_err();
    assert!(matches!(refusal, Refusal::MatrixRule(_)) && !refusal.is_transient(), "{refusal:?}");
    store.close().await;
}
