//! `PUT send`: a transaction of another server, whose events go to the side that each one's room is on. Nothing is
//! answered before everything that was accepted is committed (INV-6).

use std::borrow::Cow;
use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Instant;

use ruma::{OwnedEventId, RoomId, ServerName};
use serde::de::{Error as _, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::edus;
use super::routes::{Answer, Federation, Place, place_of};
use super::signed::SignedTransaction;
use crate::admin::metrics;
use crate::event::RoomVersion;
use crate::federation::Begun;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Raw, Received};
use crate::{dag, lm};

/// How many PDUs a transaction may have.
const MAX_PDUS: usize = 50;
/// How many EDUs a transaction may have.
const MAX_EDUS: usize = 100;

/// How long an event's text may be before it is parsed at all. In canonical form 64 KiB are allowed, which may be longer as
/// it comes: with spaces, or with characters written as escapes.
const MAX_EVENT_TEXT: usize = 256 << 10;

/// When a hub that has to wait may ask again, in milliseconds.
const PAUSE_MS: u64 = 10_000;

/// How often the log tells of events of rooms that are not known, in milliseconds.
const STRAY_EVERY: u64 = 10 * 60 * 1000;

/// In which words the outcome is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// `{"pdus": {ID: {}}}`
    Matrix,
    /// `{"failed_pdus": {ID: {"error": …}}}`
    Lm,
}

impl Dialect {
    fn side(self) -> Side {
        match self {
            Self::Matrix => Side::Matrix,
            Self::Lm => Side::Lm,
        }
    }
}

#[derive(Deserialize)]
struct Transaction<'a> {
    #[serde(borrow)]
    origin: Option<Cow<'a, str>>,
    pdus: Option<AtMost<MAX_PDUS>>,
    edus: Option<AtMost<MAX_EDUS>>,
}

/// A list that is not read beyond `LIMIT` entries, each still text.
struct AtMost<const LIMIT: usize>(Vec<Raw>);

impl<'de, const LIMIT: usize> Deserialize<'de> for AtMost<LIMIT> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Entries::<LIMIT>)
    }
}

struct Entries<const LIMIT: usize>;

impl<'de, const LIMIT: usize> Visitor<'de> for Entries<LIMIT> {
    type Value = AtMost<LIMIT>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a list of at most {LIMIT} entries")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut read = Vec::new();
        while let Some(entry) = entries.next_element::<Raw>()? {
            if read.len() == LIMIT {
                return Err(A::Error::custom(format_args!("more than {LIMIT} entries")));
            }
            read.push(entry);
        }
        Ok(AtMost(read))
    }
}

/// The fields of an event that say to whom it goes: an LPDU has no more than the first.
#[derive(Deserialize)]
struct Peek<'a> {
    #[serde(borrow)]
    room_id: Option<Cow<'a, str>>,
    auth_events: Option<IgnoredAny>,
    prev_events: Option<IgnoredAny>,
}

/// Takes a transaction, once.
pub(super) async fn send(state: &Federation, transaction: &SignedTransaction, dialect: Dialect) -> Answer {
    // Stable and unstable name are the same endpoint; the Matrix one is another.
    let protocol = dialect.side();
    let endpoint = match dialect {
        Dialect::Matrix => "v1/send",
        Dialect::Lm => "v2/send",
    };
    let start = Instant::now();
    let taken = take(state, endpoint, transaction, dialect).await;
    let result = match &taken {
        Ok((_, true)) => "ok",
        Ok((_, false)) => "replayed",
        Err(_) => "refused",
    };
    metrics::inbound_transaction(protocol, result, start.elapsed());
    taken.map(|(answer, _)| answer)
}

/// The answer to a transaction, and whether it is a new one.
async fn take(
    state: &Federation,
    endpoint: &str,
    transaction: &SignedTransaction,
    dialect: Dialect,
) -> Result<(Value, bool), Refusal> {
    let origin = &transaction.origin;
    let _turn = state.lines.enter(origin, transaction.body.len()).await?;
    match state.transactions.begin(origin, endpoint, transaction.segment("txn_id")).await? {
        Begun::Answered(answer) => Ok((answer, false)),
        Begun::Process(processing) => {
            let (answer, said_something) = receive(state, transaction, dialect).await?;
            // One in which nothing was taken and nothing refused is not worth a write: most of them are of EDUs alone.
            let answer = match said_something {
                true => processing.finish(answer).await?,
                false => processing.remember(answer).await,
            };
            Ok((answer, true))
        }
    }
}

/// The answer, and whether it says anything of an event.
async fn receive(
    state: &Federation,
    transaction: &SignedTransaction,
    dialect: Dialect,
) -> Result<(Value, bool), Refusal> {
    let (pdus, edus) = parse(&transaction.body, &transaction.origin)?;
    let (outcomes, waits) = dispatch(state, &transaction.origin, pdus, dialect).await;
    // What failed here is no verdict on the event: the whole is sent again, and what was taken is known then.
    if let Some(failure) = outcomes.iter().find_map(|outcome| match &outcome.result {
        Err(refusal) if refusal.is_failure() => Some(refusal.clone()),
        _ => None,
    }) {
        return Err(failure);
    }
    // The same: what is of other rooms was taken.
    if waits {
        let what = format!("events of {} that wait", transaction.origin);
        return Err(Refusal::Budget { what, retry_after_ms: PAUSE_MS });
    }
    // After the events, which they may be about.
    let (side, txn_id) = (dialect.side(), transaction.segment("txn_id"));
    edus::receive(state, &transaction.origin, side, txn_id, edus).await?;
    let said_something = outcomes.iter().any(|outcome| outcome.event_id.is_some() || outcome.result.is_err());
    Ok((answer(outcomes, dialect), said_something))
}

/// The events and EDUs of a transaction that `signer` has signed, each still text.
pub fn parse(raw: &[u8], signer: &ServerName) -> Result<(Vec<Raw>, Vec<Raw>), Refusal> {
    // A list of the fields' values would be read as well.
    if raw.trim_ascii_start().first() != Some(&b'{') {
        return Err(Refusal::malformed("transaction", "no object"));
    }
    let Transaction { origin, pdus, edus } =
        serde_json::from_slice(raw).map_err(|error| Refusal::malformed("transaction", error.to_string()))?;
    // LM servers may leave it out; one that differs means that somebody is confused about who speaks.
    if let Some(origin) = origin.filter(|origin| *origin != signer.as_str()) {
        return Err(Refusal::malformed("origin", format!("{origin:?}, but the request is signed by {signer}")));
    }
    // The draft allows `edus` to be left out, and a server with nothing but EDUs leaves out `pdus`.
    if pdus.is_none() && edus.is_none() {
        return Err(Refusal::malformed("pdus", "missing, and there are no edus either"));
    }
    Ok((pdus.map_or_else(Vec::new, |pdus| pdus.0), edus.map_or_else(Vec::new, |edus| edus.0)))
}

/// Where an event goes.
enum Way {
    To(Side),
    /// Its room is unknown here.
    Nowhere,
    /// Its room's hub has to wait with it.
    Later,
}

/// Hands the events over, those of one side together, and keeps their order within a side. Also whether some have to wait.
async fn dispatch(state: &Federation, origin: &ServerName, pdus: Vec<Raw>, dialect: Dialect) -> (Vec<Received>, bool) {
    let (mut linear, mut graph, mut outcomes, mut waits) = (Vec::new(), Vec::new(), Vec::new(), false);
    for pdu in pdus {
        match way_of(state, &pdu).await {
            Ok(Way::To(Side::Lm)) => linear.push(pdu),
            Ok(Way::To(Side::Matrix)) => graph.push(pdu),
            Ok(Way::Later) => waits = true,
            Ok(Way::Nowhere) => stray(state, origin, &pdu),
            Err(refusal) => {
                let event_id = id_of(&pdu, dialect);
                outcomes.push(Received { event_id, result: Err(refusal) });
            }
        }
    }
    if !linear.is_empty() {
        outcomes.extend(counted(Side::Lm, state.lm.receive(origin, linear).await));
    }
    if !graph.is_empty() {
        outcomes.extend(counted(Side::Matrix, state.dag.receive(origin, graph).await));
    }
    (outcomes, waits)
}

/// An event of a room that is not known here is dropped. That may be a stranger's mistake, or a room of the gateway's own that
/// another database knows, so now and then it is said.
fn stray(state: &Federation, origin: &ServerName, pdu: &RawValue) {
    let room = serde_json::from_str::<Peek<'_>>(pdu.get()).ok().and_then(|peek| peek.room_id.map(String::from));
    metrics::event_of_unknown_room();
    let now = state.context.clock.now_ms();
    let told = state.stray_told.load(Ordering::Relaxed);
    tracing::debug!(%origin, ?room, "dropped an event of a room that is not known here");
    if now.abs_diff(told) >= STRAY_EVERY {
        state.stray_told.store(now, Ordering::Relaxed);
        tracing::warn!(%origin, ?room, "events come for a room that this database does not know: was it made with another one?");
    }
}

fn counted(side: Side, outcomes: Vec<Received>) -> Vec<Received> {
    for outcome in &outcomes {
        match &outcome.result {
            Ok(()) => metrics::event_accepted(side),
            Err(refusal) => metrics::event_refused(side, refusal),
        }
    }
    outcomes
}

async fn way_of(state: &Federation, pdu: &RawValue) -> Result<Way, Refusal> {
    let size = pdu.get().len();
    if size > MAX_EVENT_TEXT {
        return Err(Refusal::TooLarge { what: "text of an event", size, limit: MAX_EVENT_TEXT });
    }
    let peek: Peek<'_> =
        serde_json::from_str(pdu.get()).map_err(|error| Refusal::malformed("event", error.to_string()))?;
    let room_id = peek.room_id.ok_or_else(|| Refusal::malformed("room_id", "missing"))?;
    let room_id = <&RoomId>::try_from(&*room_id).map_err(|error| Refusal::malformed("room_id", error.to_string()))?;
    if state.between.paused(room_id) {
        return Ok(Way::Later);
    }
    let side = |place| match place {
        Place::On(side) => side,
        Place::Shared if peek.auth_events.is_some() || peek.prev_events.is_some() => Side::Matrix,
        Place::Shared => Side::Lm,
    };
    match place_of(state, room_id).await? {
        Some(place) => Ok(Way::To(side(place))),
        // Somebody may take an invite back.
        None => Ok(state.between.invited_into(room_id).map_or(Way::Nowhere, Way::To)),
    }
}

/// The ID by which the sender of what goes nowhere knows it, where that is not too long to be parsed.
fn id_of(pdu: &Raw, dialect: Dialect) -> Option<OwnedEventId> {
    if pdu.get().len() > MAX_EVENT_TEXT {
        return None;
    }
    match dialect {
        Dialect::Lm => lm::id_as_received(pdu),
        Dialect::Matrix => dag::id_as_received(pdu.get(), RoomVersion::V12),
    }
}

fn answer(outcomes: Vec<Received>, dialect: Dialect) -> Value {
    let mut entries = serde_json::Map::new();
    for Received { event_id, result } in outcomes {
        match (event_id, result) {
            (Some(event_id), Ok(())) if dialect == Dialect::Matrix => {
                entries.insert(event_id.to_string(), json!({}));
            }
            // By this a participant knows that somebody else is to judge its event.
            (Some(event_id), Err(Refusal::WrongHub { hub, found })) => {
                let refusal = Refusal::WrongHub { hub: hub.clone(), found };
                let error = json!({ "errcode": refusal.errcode(), "error": refusal.to_string(), "hub_server": hub });
                entries.insert(event_id.to_string(), error);
            }
            (Some(event_id), Err(refusal)) => {
                entries.insert(event_id.to_string(), json!({ "error": refusal.to_string() }));
            }
            (None, Err(refusal)) => tracing::info!(%refusal, "refused an event that has no ID"),
            (_, Ok(())) => {}
        }
    }
    match dialect {
        Dialect::Matrix => json!({ "pdus": entries }),
        Dialect::Lm => json!({ "failed_pdus": entries }),
    }
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;

    #[test]
    fn a_transaction_has_bounds() {
        let signer = server_name!("a.example");
        let with = |pdus: usize, edus: usize| {
            let list = |count| format!("[{}]", vec!["{}"; count].join(","));
            parse(format!(r#"{{"pdus":{},"edus":{}}}"#, list(pdus), list(edus)).as_bytes(), signer)
                .map(|(pdus, edus)| (pdus.len(), edus.len()))
        };
        assert_eq!(with(MAX_PDUS, MAX_EDUS).unwrap(), (50, 100));
        let refusal = with(MAX_PDUS + 1, 0).unwrap_err();
        assert!(refusal.errcode() == "M_BAD_JSON" && refusal.to_string().contains("more than 50"), "{refusal}");
        assert!(with(0, MAX_EDUS + 1).unwrap_err().to_string().contains("more than 100"));
        assert!(parse(br#"{"pdus":{}}"#, signer).unwrap_err().to_string().contains("a list of at most 50"));
        for neither in [&b"{}"[..], br#"{"pdus":null}"#, br#"{"pdus":null,"edus":null}"#] {
            assert_eq!(parse(neither, signer).unwrap_err().errcode(), "M_BAD_JSON");
        }
        assert_eq!(parse(br#"{"edus":[{}]}"#, signer).map(|(pdus, edus)| (pdus.len(), edus.len())).unwrap(), (0, 1));
        assert_eq!(parse(br#"{"pdus":[]}"#, signer).unwrap().0.len(), 0);
        assert_eq!(parse(br#"["a.example",[],[]]"#, signer).unwrap_err().errcode(), "M_BAD_JSON");
    }

    #[test]
    fn the_id_of_what_is_too_long_is_not_looked_for() {
        let with = |length: usize| {
            let text = format!(r#"{{"room_id":"!r:a.example","type":"t","a":"{}"}}"#, "a".repeat(length));
            RawValue::from_string(text).unwrap()
        };
        for dialect in [Dialect::Lm, Dialect::Matrix] {
            assert!(id_of(&with(70_000), dialect).is_some(), "{dialect:?}");
            assert_eq!(id_of(&with(MAX_EVENT_TEXT), dialect), None, "{dialect:?}");
        }
    }

    #[test]
    fn hc_05_the_body_names_no_other_origin_than_the_signature() {
        let signer = server_name!("a.example");
        assert!(parse(br#"{"origin":"a.example","pdus":[]}"#, signer).is_ok());
        let refusal = parse(br#"{"origin":"b.example","pdus":[]}"#, signer).unwrap_err().to_string();
        assert!(refusal.contains("b.example") && refusal.contains("a.example"), "{refusal}");
    }
}
