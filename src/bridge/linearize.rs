//! The order in which accepted events of a room cross. Rows come in the order of acceptance, which is a linear extension of
//! the graph (or the log itself). A row that cannot go yet holds back the later rows of its sender, those that relate to it,
//! and whatever may descend from it, so that ancestors stay before descendants (INV-2); one that has waited long, or waits for
//! somebody who is not sure to answer, holds back less ([`Hold`]). Pure.

use std::collections::HashMap;

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
    /// Whether it takes somebody else out of the room, or redacts.
    pub(super) moderates: bool,
    /// Whether it cannot go now, whatever is before it, and what it holds back meanwhile.
    pub(super) hold: Option<Hold>,
}

/// What a row that cannot go holds back, each more than the one before. What waits for it alone holds back as much and no
/// more: a row that others may pass would else stop the room by the next thing that its sender says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hold {
    /// What names it, and what is about or by the user whose membership it changes. For an invite that another server has
    /// to sign: it may never answer, and nobody is to be mute for that.
    Named,
    /// Its sender's later rows too. For what has waited long, or waits for its server's budget: one dead or flooding
    /// server would else stop a room.
    Sender,
    /// All that may descend from it too.
    Descendants,
}

/// The largest depth that an event can have; among these a descendant is no deeper than its ancestor.
const DEEPEST: i64 = (1 << 53) - 1;

/// Which of `rows`, in the order of acceptance, may go now (none), and what the others hold back. What goes is carried over
/// in this order; when one of them fails after all, the rest is asked for again.
pub(super) fn holds<'a>(rows: impl IntoIterator<Item = &'a Waiting>) -> Vec<Option<Hold>> {
    let mut order = Order::default();
    rows.into_iter().map(|row| order.take(row)).collect()
}

/// What stays behind so far.
#[derive(Default)]
struct Order<'a> {
    events: HashMap<&'a OwnedEventId, Hold>,
    senders: HashMap<&'a OwnedUserId, Hold>,
    members: HashMap<&'a OwnedUserId, Hold>,
    /// The smallest order of a row that holds back its descendants.
    floor: Option<i64>,
}

impl<'a> Order<'a> {
    /// Nothing when `row` may go; if not, it is remembered as staying behind.
    fn take(&mut self, row: &'a Waiting) -> Option<Hold> {
        let descends = self.floor.is_some_and(|floor| row.order > floor || row.order >= DEEPEST);
        let own = [self.senders.get(&row.sender), self.members.get(&row.sender)].into_iter().flatten().copied();
        let named = row.needs.iter().filter_map(|need| self.events.get(need)).copied();
        let named = named.filter(|hold| !(row.moderates && *hold == Hold::Sender));
        let member = row.member.iter().filter(|member| **member != row.sender);
        let about = member.flat_map(|user| [self.senders.get(user), self.members.get(user)]).flatten();
        let about = about.filter_map(|hold| match hold {
            // A flood does not keep away who ends it.
            Hold::Sender if row.moderates => None,
            // Nor is anybody mute because of those whom they are concerned with.
            Hold::Sender => Some(Hold::Named),
            hold => Some(*hold),
        });
        let hold = own.chain(named).chain(about).chain(row.hold).chain(descends.then_some(Hold::Descendants)).max()?;
        remember(&mut self.events, &row.event_id, hold);
        if let Some(member) = &row.member {
            remember(&mut self.members, member, hold);
        }
        if hold >= Hold::Sender {
            remember(&mut self.senders, &row.sender, hold);
        }
        if hold == Hold::Descendants {
            self.floor = Some(self.floor.map_or(row.order, |floor| floor.min(row.order)));
        }
        Some(hold)
    }
}

fn remember<'a, K: std::hash::Hash + Eq>(held: &mut HashMap<&'a K, Hold>, key: &'a K, hold: Hold) {
    let known = held.entry(key).or_insert(hold);
    *known = hold.max(*known);
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
            moderates: false,
            hold: None,
        }
    }

    fn ready<'a>(rows: impl IntoIterator<Item = &'a Waiting>) -> Vec<usize> {
        let holds = holds(rows).into_iter().enumerate();
        holds.filter(|(_, hold)| hold.is_none()).map(|(index, _)| index).collect()
    }

    #[test]
    fn a_held_row_holds_what_depends_on_it_and_nothing_else() {
        let held = Waiting { hold: Some(Hold::Descendants), ..row("a", "alice", 5) };
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
        let overtaken = Waiting { hold: Some(Hold::Sender), ..held };
        let rows: Vec<_> = std::iter::once(overtaken).chain(rows.into_iter().skip(1)).collect();
        assert_eq!(ready(&rows), [1, 3], "c and e wait for what others may pass, and so others pass them");
        let firm = Waiting { hold: Some(Hold::Descendants), ..row("c", "carol", 4) };
        let rows: Vec<_> =
            rows.into_iter().map(|row| if *row.event_id == *firm.event_id { firm.clone() } else { row }).collect();
        assert_eq!(ready(&rows), [1], "d may descend from c");
    }

    #[test]
    fn an_invite_that_nobody_answers_holds_back_what_is_about_the_invited_alone() {
        let about = |event: &str, sender: &str, member: &str, order| Waiting {
            member: Some(format!("@{member}:h").try_into().unwrap()),
            ..row(event, sender, order)
        };
        let invite = Waiting { hold: Some(Hold::Named), ..about("invite", "alice", "ghost", 1) };
        let redaction = Waiting { needs: vec![invite.event_id.clone()], ..row("redaction", "carol", 5) };
        let rows = [
            invite,
            row("a", "alice", 2),
            about("kick", "alice", "ghost", 3),
            about("again", "bob", "ghost", 4),
            redaction,
            about("other", "alice", "dave", 6),
            row("b", "bob", 7),
            row("c", "carol", 8),
        ];
        // The kick, the second invite and the redaction wait for the first one, and nobody waits for those.
        assert_eq!(ready(&rows), [1, 5, 6, 7]);
        let holds = holds(&rows);
        assert!(holds.iter().flatten().all(|hold| *hold == Hold::Named), "{holds:?}");
    }

    #[test]
    fn a_sender_waits_for_its_membership_and_a_kick_for_what_was_said_before() {
        let join =
            Waiting { hold: Some(Hold::Sender), member: Some("@bob:h".try_into().unwrap()), ..row("join", "bob", 1) };
        let invite = Waiting { member: Some("@carol:h".try_into().unwrap()), ..join.clone() };
        assert_eq!(ready(&[join.clone(), row("b", "bob", 2), row("c", "carol", 2)]), [2]);
        assert_eq!(ready(&[invite, row("c", "carol", 2), row("d", "dave", 2)]), [2]);
        let kick = Waiting { member: Some("@bob:h".try_into().unwrap()), moderates: true, ..row("kick", "alice", 1) };
        let said = Waiting { hold: Some(Hold::Descendants), ..row("b", "bob", 1) };
        assert_eq!(ready(&[said, kick]), Vec::<usize>::new());
    }

    #[test]
    fn hc_23_at_the_deepest_depth_order_is_kept_by_acceptance() {
        let rows = [Waiting { hold: Some(Hold::Descendants), ..row("a", "alice", DEEPEST) }, row("b", "bob", DEEPEST)];
        assert_eq!(ready(&rows), Vec::<usize>::new());
    }

    #[test]
    fn who_floods_is_taken_out_and_redacted_and_mutes_nobody() {
        let flood = |event: &str| Waiting { hold: Some(Hold::Sender), ..row(event, "flood", 1) };
        let about = |event: &str, moderates: bool| Waiting {
            member: Some("@flood:h".try_into().unwrap()),
            moderates,
            ..row(event, "admin", 2)
        };
        let redaction =
            Waiting { needs: vec![flood("a").event_id], moderates: true, ..row("redaction", "moderator", 2) };
        let rows =
            [flood("a"), flood("b"), redaction, row("m", "moderator", 3), about("ban", true), row("n", "admin", 3)];
        assert_eq!(ready(&rows), [2, 3, 4, 5]);
        // An invite goes after what the invited said, and who invites is heard.
        assert_eq!(ready(&[flood("a"), about("invite", false), row("n", "admin", 3)]), [2]);
        // Who redacts their own flood has to wait for it.
        let own = Waiting { needs: vec![flood("a").event_id], moderates: true, ..row("own", "flood", 2) };
        assert_eq!(ready(&[flood("a"), own]), Vec::<usize>::new());
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
        /// What those hold back that are held.
        hold: Hold,
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
                prop_oneof![Just(Hold::Descendants), Just(Hold::Sender)],
            )
                .prop_map(|(parents, senders, needs, held, arrivals, hold)| Plan {
                    parents,
                    senders,
                    needs,
                    held,
                    arrivals,
                    hold,
                })
        })
    }

    proptest! {
        /// INV-2: whatever fails for a while, ancestors cross before descendants, and each sender's events in order; these
        /// also when others may pass.
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
                    hold: (held[index] > 0).then_some(plan.hold),
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
                for &ancestor in above.iter().filter(|_| plan.hold == Hold::Descendants) {
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
