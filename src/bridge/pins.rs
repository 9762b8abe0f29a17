//! What is pinned in a room: a list of events, each of which is called otherwise across. What has no name across stays where it is:
//! an image of the list takes out nothing that only its own room knows, nor what is beyond `AT_MOST`, as far as one event can hold it.

use std::collections::{HashMap, HashSet};

use ruma::OwnedEventId;
use serde_json::{Value, json};

use super::core::Core;
use super::side::State;
use crate::event::{Object, event_id};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::images;

/// The type of the state that says what is pinned.
pub(super) const PINNED: &str = "m.room.pinned_events";
/// How many pinned events of a room are carried. An event holds some more than that.
const AT_MOST: usize = 1_000;
/// How many bytes the events of an image may have together, so that it fits.
const BYTES: usize = 56 << 10;
/// How many of those that are pinned are waited for, while they wait to cross: the last, since clients put there what is new.
const WAITED_FOR: usize = 200;

/// How events of either room are called across.
pub(super) type Counterparts = HashMap<OwnedEventId, OwnedEventId>;

/// How a list of pinned events is read.
#[derive(Clone, Copy)]
pub(super) enum Pins<'a> {
    /// Not at all: none of its events can be across yet.
    Unknown,
    /// As its image, beside what is pinned across that has no name here.
    Image { there: Option<&'a Object>, names: &'a Counterparts },
    /// As it is, in the order of an image.
    Own { names: &'a Counterparts },
}

impl Pins<'_> {
    /// The content of the state; none where there should be none.
    pub(super) fn content(&self, content: &Object) -> Option<Object> {
        let here = pinned(Some(content));
        let list = match self {
            Self::Unknown => return None,
            Self::Image { there, names } => {
                let images = here.take(AT_MOST).filter_map(|id| names.get(&id).cloned());
                let own = pinned(*there).enumerate();
                let own = own.filter(|(place, id)| *place >= AT_MOST || !names.contains_key(id)).map(|(_, id)| id);
                let (mut list, mut seen, mut bytes) = (Vec::new(), HashSet::new(), 0_usize);
                for id in images.chain(own) {
                    // With its quotes and comma.
                    bytes = bytes.saturating_add(id.as_str().len()).saturating_add(3);
                    if bytes > BYTES {
                        break;
                    }
                    if seen.insert(id.clone()) {
                        list.push(id);
                    }
                }
                if list.is_empty() && there.is_none() {
                    return None;
                }
                list
            }
            Self::Own { names } => {
                let (mut known, own): (Vec<_>, Vec<_>) = here.partition(|id| names.contains_key(id));
                known.extend(own);
                known
            }
        };
        Some(Object::from_iter([("pinned".to_owned(), json!(list))]))
    }
}

/// The events that a content says are pinned.
fn pinned(content: Option<&Object>) -> impl Iterator<Item = OwnedEventId> {
    let list = content.and_then(|content| content.get("pinned")?.as_array()).into_iter().flatten();
    list.filter_map(Value::as_str).filter_map(event_id)
}

/// The events that an image of the list waits for while they wait to cross.
pub(super) fn waited_for(content: &Object) -> Vec<OwnedEventId> {
    let mut list: Vec<_> = pinned(Some(content)).collect();
    list.split_off(list.len().saturating_sub(WAITED_FOR))
}

/// What is said of an image that lacks something of the list.
pub(super) fn left_out(content: &Object) -> Option<String> {
    let beyond = pinned(Some(content)).count().saturating_sub(AT_MOST);
    (beyond > 0).then(|| format!("the last {beyond} of what is pinned: {AT_MOST} are carried"))
}

/// How what is pinned in the room on `side`, and in the one across, is called across, as far as the portal has carried it.
pub(super) async fn counterparts(
    core: &Core,
    portal: i64,
    side: Side,
    here: Option<&Object>,
    across: &State,
) -> Result<Counterparts, Refusal> {
    let store = &core.context.store;
    let mut names = Counterparts::new();
    for (side, ids) in [
        (side, pinned(here).take(AT_MOST).collect::<Vec<_>>()),
        (side.other(), pinned(across.content(PINNED)).collect()),
    ] {
        if ids.is_empty() {
            continue;
        }
        let sources = images::of_sources(store, side, &ids).await?;
        let images = images::of_images(store, side.other(), &ids).await?;
        // What crossed in another portal is not in the room across.
        for row in sources.into_values().chain(images.into_values()).filter(|row| row.portal == portal && !row.pending)
        {
            names.insert(row.source.clone(), row.image.clone());
            names.insert(row.image, row.source);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(ids: &[&str]) -> Object {
        Object::from_iter([("pinned".to_owned(), json!(ids))])
    }

    fn names() -> Counterparts {
        let pairs = [("$a", "$one"), ("$b", "$two")];
        let id = |id: &str| event_id(id).unwrap();
        pairs.into_iter().flat_map(|(here, there)| [(id(here), id(there)), (id(there), id(here))]).collect()
    }

    #[test]
    fn the_image_has_what_is_known_across_and_leaves_there_what_only_that_room_knows() {
        let names = names();
        let image = |here: Object, there: Option<&Object>| Pins::Image { there, names: &names }.content(&here);
        assert_eq!(image(list(&["$b", "$a", "$c"]), None), Some(list(&["$two", "$one"])));
        let there = list(&["$own", "$one"]);
        assert_eq!(image(list(&["$b"]), Some(&there)), Some(list(&["$two", "$own"])));
        assert_eq!(image(list(&[]), Some(&there)), Some(list(&["$own"])));
        // Nobody is told of a list of nothing but where there was one.
        assert_eq!(image(list(&["$c"]), None), None);
        assert_eq!(image(list(&["$c"]), Some(&list(&[]))), Some(list(&[])));
        assert_eq!(Pins::Unknown.content(&list(&["$a"])), None);
    }

    #[test]
    fn a_list_is_the_same_as_its_image_in_whatever_order_what_is_its_own_stands() {
        let names = names();
        let own = |content: &Object| Pins::Own { names: &names }.content(content).unwrap();
        let there = list(&["$own", "$one"]);
        let image = Pins::Image { there: Some(&there), names: &names }.content(&list(&["$a"])).unwrap();
        assert_eq!(own(&there), image);
    }

    #[test]
    fn what_is_no_list_of_events_is_none() {
        let content = json!({ "pinned": ["$a", 7, "x", null, ["$b"]] });
        assert_eq!(pinned(content.as_object()).collect::<Vec<_>>(), ["$a"]);
        assert_eq!(pinned(json!({ "pinned": {} }).as_object()).count(), 0);
    }

    #[test]
    fn however_much_is_pinned_nothing_is_lost_that_is_not_said() {
        let id = |prefix: &str, number: usize| event_id(&format!("${prefix}{number:0>42}")).unwrap();
        let content = |ids: &[OwnedEventId]| Object::from_iter([("pinned".to_owned(), json!(ids))]);
        let ids = |prefix: &str, count: usize| (0..count).map(|number| id(prefix, number)).collect::<Vec<_>>();
        let mut names = Counterparts::new();
        for number in 0..AT_MOST {
            names.insert(id("h", number), id("t", number));
            names.insert(id("t", number), id("h", number));
        }
        let image = |here: &[OwnedEventId], there: &[OwnedEventId]| {
            let there = content(there);
            Pins::Image { there: Some(&there), names: &names }.content(&content(here)).unwrap()
        };
        // What was the bound of what is looked at is none of what is kept.
        let own = ids("o", 300);
        let there: Vec<_> = own.iter().cloned().chain(ids("t", 250)).collect();
        let expected: Vec<_> = ids("t", 251).into_iter().chain(own.clone()).collect();
        assert_eq!(image(&ids("h", 251), &there), content(&expected));
        let again = Pins::Own { names: &names }.content(&content(&expected)).unwrap();
        assert_eq!(again, image(&ids("h", 251), &expected), "and then it is in step");
        assert_eq!(left_out(&content(&ids("h", AT_MOST))), None);
        // Beyond what is carried.
        let more: Vec<_> = ids("h", AT_MOST).into_iter().chain(ids("x", 7)).collect();
        let first = image(&more, &own[..5]);
        assert_eq!(first["pinned"].as_array().unwrap().len(), AT_MOST + 5);
        assert!(left_out(&content(&more)).is_some_and(|note| note.contains("last 7 ")));
        let back = image(&ids("h", 3), &ids("t", AT_MOST).into_iter().chain(own[..5].to_vec()).collect::<Vec<_>>());
        assert_eq!(back["pinned"].as_array().unwrap().len(), 3 + 5, "and what is not pinned any more is not");
        // Whatever is pinned there, an event holds it.
        let long: Vec<_> = (0..250).map(|number| event_id(&format!("${number:a>250}")).unwrap()).collect();
        let full = image(&ids("h", AT_MOST), &long);
        assert!(serde_json::to_vec(&full).unwrap().len() < 60_000);
        assert_eq!(image(&ids("h", AT_MOST), &pinned(Some(&full)).collect::<Vec<_>>()), full);
        assert_eq!(waited_for(&content(&ids("h", 201))), ids("h", 201)[1..]);
    }
}
