//! The order in which accepted events of a room cross. Rows come in the order of acceptance, which is a linear extension of
//! the graph (or the log itself). A row that cannot go yet holds back the later rows of its sender, those that relate to it,
//! and whatever may descend from it, so that ancestors stay before descendants (INV-2). Pure.

use std::collections::HashSet;

use ruma::{OwnedEventId, OwnedUserId};

/// An event that waits, as far as its order is concerned.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    pub(super) event_id: OwnedEventId,
    pub(super) sender: OwnedUserId,
    /// Grows from ancestor to descendant: depth or position.
    pub(super) order: i64,
    /// What it relates to or redacts.
    pub(super) needs: Vec<OwnedEventId>,
    /// The user whose membership it changes.
    pub(super) member: Option<OwnedUserId>,
    /// Whether it cannot go now, whatever is before it: it failed and is tried again later, or what it needs is on its way.
    pub(super) held: bool,
    /// Whether it has waited so long, or waits for somebody so uncertain (an invited user's server), that only what
    /// depends on it by name waits with it. Without this one dead server would stop a room.
    pub(super) overtaken: bool,
}

/// The largest depth that an event can have; among these a descendant is no deeper than its ancestor.
const DEEPEST: i64 = (1 << 53) - 1;

/// Which of `rows`, in the order of acceptance, may go now, in that order. What goes is carried over in this order; when
/// one of them fails after all, the rest is asked for again.
pub(super) fn ready<'a>(rows: impl IntoIterator<Item = &'a Waiting>) -> Vec<usize> {
    let mut order = Order::default();
    rows.into_iter().enumerate().filter(|(_, row)| order.take(row)).map(|(index, _)| index).collect()
}

/// What stays behind so far.
#[derive(Default)]
struct Order<'a> {
    events: HashSet<&'a OwnedEventId>,
    senders: HashSet<&'a OwnedUserId>,
    members: HashSet<&'a OwnedUserId>,
    /// The smallest order of a row that holds back its descendants.
    floor: Option<i64>,
}

impl<'a> Order<'a> {
    /// Whether `row` may go; if not, it is remembered as staying behind.
    fn take(&mut self, row: &'a Waiting) -> bool {
        let descends = self.floor.is_some_and(|floor| row.order > floor || row.order >= DEEPEST);
        let waits = row.held
            || descends
            || self.senders.contains(&row.sender)
            || self.members.contains(&row.sender)
            || row.member.as_ref().is_some_and(|member| self.senders.contains(member) || self.members.contains(member))
            || row.needs.iter().any(|need| self.events.contains(need));
        if waits {
            self.events.insert(&row.event_id);
            self.senders.insert(&row.sender);
            self.members.extend(&row.member);
            if !row.overtaken {
                self.floor = Some(self.floor.map_or(row.order, |floor| floor.min(row.order)));
            }
        }
        !waits
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn row(event: &str, sender: &str, order: i64) -> Waiting {
        Waiting {
            event_id: format!("${event}").try_into().unwrap(),
            sender: format!("@{sender}:h").try_into().unwrap(),
            order,
            needs: Vec::new(),
            member: None,
            held: false,
            overtaken: false,
        }
    }

    #[test]
    fn a_held_row_holds_what_depends_on_it_and_nothing_else() {
        let held = Waiting { held: true, ..row("a", "alice", 5) };
        let rows = [
            held.clone(),
            row("b", "bob", 5),
            Waiting { needs: vec![held.event_id.clone()], ..row("c", "carol", 4) },
            row("d", "dave", 6),
            row("e", "alice", 3),
            row("f", "carol", 2),
        ];
        // b is no descendant of a; c names it; d may descend from it; e has its sender; f has the sender of c.
        assert_eq!(ready(&rows), [1]);
        let overtaken = Waiting { overtaken: true, ..held };
        let rows: Vec<_> = std::iter::once(overtaken).chain(rows.into_iter().skip(1)).collect();
        assert_eq!(ready(&rows), [1], "c was not overtaken, so d still waits for c");
    }

    #[test]
    fn a_sender_waits_for_its_membership_and_a_kick_for_what_was_said_before() {
        let join = Waiting {
            held: true,
            overtaken: true,
            member: Some("@bob:h".try_into().unwrap()),
            ..row("join", "bob", 1)
        };
        let invite = Waiting { member: Some("@carol:h".try_into().unwrap()), ..join.clone() };
        assert_eq!(ready(&[join.clone(), row("b", "bob", 2), row("c", "carol", 2)]), [2]);
        assert_eq!(ready(&[invite, row("c", "carol", 2), row("d", "dave", 2)]), [2]);
        let kick = Waiting { member: Some("@bob:h".try_into().unwrap()), ..row("kick", "alice", 1) };
        assert_eq!(ready(&[Waiting { held: true, overtaken: true, ..row("b", "bob", 1) }, kick]), Vec::<usize>::new());
    }

    #[test]
    fn hc_23_at_the_deepest_depth_order_is_kept_by_acceptance() {
        let rows = [Waiting { held: true, ..row("a", "alice", DEEPEST) }, row("b", "bob", DEEPEST)];
        assert_eq!(ready(&rows), Vec::<usize>::new());
    }

    #[derive(Debug, Clone)]
    struct Plan {
        parents: Vec<Vec<usize>>,
        senders: Vec<u8>,
        needs: Vec<Option<usize>>,
        /// In how many rounds a row is held.
        held: Vec<u8>,
        /// How many more rows arrive before each round.
        arrivals: Vec<u8>,
    }

    fn plan() -> impl Strategy<Value = Plan> {
        (1_usize..30).prop_flat_map(|count| {
            let parents = (0..count)
                .map(|index| {
                    prop::collection::vec(0..index.max(1), 0..3).prop_map(move |p| if index == 0 { vec![] } else { p })
                })
                .collect::<Vec<_>>();
            let needs = (0..count)
                .map(|index| prop::option::of(0..index.max(1)).prop_map(move |n| n.filter(|_| index > 0)))
                .collect::<Vec<_>>();
            (
                parents,
                prop::collection::vec(0_u8..4, count),
                needs,
                prop::collection::vec(prop_oneof![3 => Just(0_u8), 1 => 1_u8..4], count),
                prop::collection::vec(1_u8..6, count),
            )
                .prop_map(|(parents, senders, needs, held, arrivals)| Plan {
                    parents,
                    senders,
                    needs,
                    held,
                    arrivals,
                })
        })
    }

    proptest! {
        /// INV-2: whatever fails for a while, ancestors cross before descendants, and each sender's events in order.
        #[test]
        fn inv_2_what_crosses_is_a_linear_extension_of_the_graph(plan in plan()) {
            let count = plan.senders.len();
            let mut depths: Vec<i64> = Vec::new();
            let mut ancestors: Vec<BTreeSet<usize>> = Vec::new();
            for parents in &plan.parents {
                depths.push(parents.iter().map(|&parent| depths[parent]).max().unwrap_or(0) + 1);
                let mut own: BTreeSet<usize> = parents.iter().copied().collect();
                for &parent in parents {
                    own.extend(ancestors[parent].clone());
                }
                ancestors.push(own);
            }
            let mut held = plan.held.clone();
            let mut waiting: Vec<usize> = Vec::new();
            let mut crossed: Vec<usize> = Vec::new();
            let mut arrived = 0;
            let mut rounds = 0;
            while crossed.len() < count {
                let more = usize::from(plan.arrivals[rounds % count]).min(count - arrived);
                waiting.extend(arrived..arrived + more);
                arrived += more;
                rounds += 1;
                prop_assert!(rounds < 200, "nothing moves any more: {waiting:?}");
                let rows: Vec<Waiting> = waiting.iter().map(|&index| Waiting {
                    needs: plan.needs[index].iter().map(|need| format!("$e{need}").try_into().unwrap()).collect(),
                    held: held[index] > 0,
                    ..row(&format!("e{index}"), &format!("u{}", plan.senders[index]), depths[index])
                }).collect();
                let go: Vec<usize> = ready(&rows).into_iter().map(|place| waiting[place]).collect();
                for &index in &waiting {
                    held[index] = held[index].saturating_sub(1);
                }
                waiting.retain(|index| !go.contains(index));
                crossed.extend(go);
            }
            let place = |index: usize| crossed.iter().position(|&other| other == index).unwrap();
            for (index, above) in ancestors.iter().enumerate() {
                for &ancestor in above {
                    prop_assert!(place(ancestor) < place(index), "{ancestor} is an ancestor of {index}: {crossed:?}");
                }
                for earlier in (0..index).filter(|&earlier| plan.senders[earlier] == plan.senders[index]) {
                    prop_assert!(place(earlier) < place(index), "{earlier} is of the same sender as {index}: {crossed:?}");
                }
                if let Some(need) = plan.needs[index] {
                    prop_assert!(place(need) < place(index), "{index} relates to {need}: {crossed:?}");
                }
            }
        }
    }
}
