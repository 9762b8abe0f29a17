//! What is pinned in a room: a list of events, each of which is called otherwise across. What has no name across stays where it is:
//! an image of the list takes out nothing of the first `AT_MOST` that only its own room knows.

use std::collections::HashMap;

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
/// How many pinned events of a room are looked at.
const AT_MOST: usize = 200;

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
                let images = here.filter_map(|id| names.get(&id).cloned());
                let own = pinned(*there).filter(|id| !names.contains_key(id));
                let list: Vec<OwnedEventId> = images.chain(own).collect();
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
pub(super) fn pinned(content: Option<&Object>) -> impl Iterator<Item = OwnedEventId> {
    let list = content.and_then(|content| content.get("pinned")?.as_array()).into_iter().flatten();
    list.filter_map(Value::as_str).filter_map(event_id).take(AT_MOST)
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
    for (side, ids) in
        [(side, pinned(here).collect::<Vec<_>>()), (side.other(), pinned(across.content(PINNED)).collect::<Vec<_>>())]
    {
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
        let many = json!({ "pinned": (0..500).map(|number| format!("${number}")).collect::<Vec<_>>() });
        assert_eq!(pinned(many.as_object()).count(), AT_MOST);
    }
}
