//! `/health`: whether the gateway does its work, and when not, what is wrong.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use http::StatusCode;
use ruma::OwnedServerName;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Admin;
use super::metrics::METRICS;
use crate::appservice::{HomeserverStatus, Summary};
use crate::federation::QueueStatus;
use crate::media;
use crate::store::overview::{Overview, overview};
use crate::store::{StoreError, gaps, lm};

/// How long an event may wait in the inbox before something is wrong, in milliseconds.
const LONGEST_WAIT: i64 = 10 * 60 * 1000;
/// How long a leave may be owed: that of a join of which nobody knows waits for an hour and a half before it is tried.
const LONGEST_OWED: i64 = 2 * 60 * 60 * 1000;
/// How long a hub that can be reached may take to send an event back, in milliseconds.
const LONGEST_ECHO: i64 = 60 * 60 * 1000;
/// For how long a hub must have made no fault for its faults to be over, in milliseconds.
const FAULTS_PASS: i64 = 10 * 60 * 1000;
/// For how long a server that answers may take nothing of what it gets, in milliseconds.
const LONGEST_REFUSAL: i64 = 5 * 60 * 1000;
/// How many of such servers and rooms are named among the problems.
const REFUSALS_NAMED: usize = 10;
/// How long the store may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// For how long a write that failed is a problem.
const FAILED: Duration = Duration::from_secs(60);
/// How many failing servers are listed.
const LISTED: usize = 50;

/// How the gateway is.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Whether nothing is wrong.
    pub ok: bool,
    /// Whether what is wrong keeps the gateway from working.
    pub status: Status,
    /// What is wrong, each in a sentence.
    pub problems: Vec<String>,
    /// What was wrong in the last hour and is over, each in a sentence.
    #[serde(default)]
    pub past: Vec<String>,
    /// The gateway's server name.
    #[schema(value_type = String)]
    pub server_name: OwnedServerName,
    /// The version of this program.
    pub version: String,
    /// The homeserver, when there is one.
    #[schema(value_type = Option<Object>)]
    pub homeserver: Option<HomeserverStatus>,
    /// Events that wait to be carried over.
    pub inbox: Waiting,
    /// Events that were given to foreign hubs and did not come back yet.
    pub echoes: Waiting,
    /// Events of foreign hubs' logs that could not be had, or not be checked, so far.
    pub missing: Waiting,
    /// Events of Matrix rooms that wait for what is before them, or were taken without, because it could not be had so far.
    pub graph_missing: Waiting,
    /// What foreign hubs did wrong with their logs.
    pub hub_faults: HubFaults,
    /// Leaves of users whose joins other servers may have taken, and which came to nothing here.
    #[serde(default)]
    pub owed_leaves: Waiting,
    /// Those that were given up: the users may be in rooms there for good. They are shown for as long as other records are kept.
    #[serde(default)]
    pub leaves_given_up: i64,
    /// State of shared rooms of which their log has something else than the room, and which could not be corrected.
    pub uncorrected: Uncorrected,
    /// Long parts of foreign hubs' logs, from an absence, that are being fetched.
    pub catching_up: CatchingUp,
    /// Events of other servers, since the start, for rooms that the database does not know. Where there are many, it may be that
    /// the rooms were made with another database.
    pub events_of_unknown_rooms: u64,
    /// Events that wait to be sent.
    pub outbound: Outbound,
    /// Files of media that are kept.
    pub media: Files,
    /// How many portals are in each state.
    pub portals: BTreeMap<String, i64>,
}

/// Files of media on disk.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct Files {
    /// How many.
    pub files: u64,
    /// How many bytes they have.
    pub bytes: u64,
}

impl Files {
    fn of(figures: media::Figures) -> Self {
        Self { files: figures.files, bytes: figures.bytes }
    }
}

/// How bad it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Nothing is wrong.
    #[default]
    Ok,
    /// Something is wrong outside, or somewhere: the rest goes on, and starting the gateway anew mends nothing.
    Degraded,
    /// The gateway can take nothing: its database cannot be read or written.
    Failing,
}

impl Status {
    /// What a monitor is answered. What is only degraded still serves: a supervisor that restarts it then, or sends its traffic
    /// elsewhere, makes it worse.
    pub(super) fn code(self) -> StatusCode {
        match self {
            Self::Ok | Self::Degraded => StatusCode::OK,
            Self::Failing => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// Events that wait for something.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct Waiting {
    /// How many.
    pub waiting: i64,
    /// How long the oldest has waited.
    pub oldest_age_ms: i64,
}

/// What foreign hubs did wrong.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct HubFaults {
    /// How many faults were noticed in the last hour.
    pub count: i64,
    /// In how many rooms.
    pub rooms: i64,
    /// When the last of them was noticed, in milliseconds since the epoch.
    #[serde(default)]
    pub last_ts: Option<i64>,
    /// How many rooms' hubs do not know the log's end as it is here now.
    pub lost: i64,
}

/// State of shared rooms that could not be corrected, as far as these were looked at since the start.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
pub struct Uncorrected {
    /// In how many rooms.
    pub rooms: usize,
    /// Of how many types and state keys.
    pub count: usize,
}

/// Parts of logs that are too long to be fetched at once.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct CatchingUp {
    /// In how many rooms.
    pub rooms: i64,
    /// How many events were fetched so far, from the newest on.
    pub fetched: i64,
    /// How many of these are in the logs here, from the oldest on.
    pub taken: i64,
}

/// Events that wait to be sent.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct Outbound {
    /// How many, to all servers.
    pub waiting: i64,
    /// Servers to which the last transaction failed, at most 50.
    pub failing: Vec<Failing>,
    /// Rooms of which something waits for a server that takes what is of others, at most 50.
    pub held: Vec<Held>,
}

/// A room of which something waits because a server fails on one event of it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Held {
    /// The server.
    pub server: String,
    /// The room.
    pub room_id: String,
    /// What waits: `log`, `lpdus`, `graph`, or EDUs as `lm_edus` and `matrix_edus`.
    pub feed: String,
    /// How often the event was tried.
    pub tries: u32,
    /// Since when the server has taken nothing of this, in milliseconds since the epoch.
    pub since: i64,
    /// When it is tried again, in milliseconds since the epoch.
    pub retry_at: i64,
    /// What happened last.
    pub error: String,
}

impl Held {
    /// Of one server.
    pub fn of(queue: &QueueStatus) -> impl Iterator<Item = Self> {
        queue.held.iter().map(|held| Self {
            server: queue.destination.to_string(),
            room_id: held.feed.room_id.to_string(),
            feed: held.feed.kind.as_str().to_owned(),
            tries: held.tries,
            since: held.since,
            retry_at: held.retry_at,
            error: held.error.clone(),
        })
    }
}

/// A server to which the last transaction failed.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Failing {
    /// The server.
    pub server: String,
    /// How much waits for it.
    pub waiting: i64,
    /// Failures in a row.
    pub failures: i64,
    /// Since when it has taken nothing, in milliseconds since the epoch; 0 when that is not known.
    pub since: i64,
    /// Whether it answers, and does not take what it gets. Where it does so for minutes, that is a problem.
    pub answers: bool,
    /// When it is tried again, in milliseconds since the epoch.
    pub retry_at: i64,
    /// What happened last.
    pub error: Option<String>,
}

/// What health is judged by.
struct Findings {
    server_name: OwnedServerName,
    now_ms: i64,
    store: Result<Overview, String>,
    write_lasts: Duration,
    write_failed: Option<(Duration, String)>,
    claim_lost: Option<StoreError>,
    queues: Result<Vec<QueueStatus>, StoreError>,
    homeserver: Option<HomeserverStatus>,
    uncorrected: Uncorrected,
    media: Files,
    media_failed: Option<(Duration, String)>,
}

impl Admin {
    /// How the gateway is now. The gauges of what waits are set by the way.
    pub async fn health(&self) -> Health {
        let context = &self.context;
        let store = match tokio::time::timeout(PATIENCE, overview(&context.store, context.clock.now_ms())).await {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
        };
        let queues = match &store {
            Ok(_) => context.outbound.status().await,
            Err(_) => Ok(Vec::new()),
        };
        let (rooms, count) = self.dag.rooms_uncorrected();
        let findings = Findings {
            uncorrected: Uncorrected { rooms, count },
            server_name: context.server_name.clone(),
            now_ms: context.clock.now_ms(),
            store,
            write_lasts: context.store.write_lasts(),
            write_failed: context.store.write_failed(),
            claim_lost: context.store.claim_lost(),
            queues,
            homeserver: self.appservice.as_ref().map(|appservice| appservice.status()),
            media: Files::of(self.media.figures()),
            media_failed: self.media.problem(),
        };
        let health = judge(findings);
        METRICS.inbox_waiting.set(health.inbox.waiting);
        METRICS.inbox_oldest_seconds.set(health.inbox.oldest_age_ms / 1000);
        METRICS.echoes_waiting.set(health.echoes.waiting);
        METRICS.lm_missing.set(health.missing.waiting);
        METRICS.lm_missing_oldest_seconds.set(health.missing.oldest_age_ms / 1000);
        METRICS.graph_missing.set(health.graph_missing.waiting);
        METRICS.graph_missing_oldest_seconds.set(health.graph_missing.oldest_age_ms / 1000);
        METRICS.outbound_waiting.set(health.outbound.waiting);
        METRICS.outbound_failing.set(i64::try_from(health.outbound.failing.len()).unwrap_or(i64::MAX));
        for state in ["creating", "pending", "active", "degraded", "suspended", "ending", "ended"] {
            let count = health.portals.get(state).copied().unwrap_or_default();
            METRICS.portals.with_label_values(&[state]).set(count);
        }
        health
    }
}

#[async_trait]
impl Summary for Admin {
    async fn summary(&self) -> String {
        as_text(&self.health().await)
    }
}

fn as_text(health: &Health) -> String {
    let mut lines = match health.problems.is_empty() {
        true => vec![format!("{}: everything works.", health.server_name)],
        false => vec![format!("{}: something is wrong.", health.server_name)],
    };
    lines.extend(health.problems.iter().cloned());
    lines.extend(health.past.iter().map(|past| format!("over by now: {past}")));
    let portals: Vec<String> = health.portals.iter().map(|(state, count)| format!("{count} {state}")).collect();
    if !portals.is_empty() {
        lines.push(format!("portals: {}", portals.join(", ")));
    }
    let Health { inbox, echoes, outbound, .. } = health;
    let (inbox, echoes, outbound) = (inbox.waiting, echoes.waiting, outbound.waiting);
    lines.push(format!("events: {inbox} to be carried over, {echoes} at hubs, {outbound} to be sent"));
    for Held { server, room_id, error, .. } in &health.outbound.held {
        lines.push(format!("{server} fails on an event of {room_id}, which holds up that room there: {error}"));
    }
    lines.push(format!("version {}", health.version));
    lines.join("\n")
}

fn judge(findings: Findings) -> Health {
    let (mut problems, mut past) = (Vec::new(), Vec::new());
    let store = findings.store.unwrap_or_else(|error| {
        problems.push(format!("the store does not answer: {error}"));
        Overview::default()
    });
    if findings.write_lasts >= PATIENCE {
        problems.push(format!("the store has not ended a write for {} s", findings.write_lasts.as_secs()));
    }
    if let Some((ago, error)) = findings.write_failed.filter(|(ago, _)| *ago < FAILED) {
        problems.push(format!("{} s ago something could not be written: {error}", ago.as_secs()));
    }
    if let Some(lost) = findings.claim_lost {
        problems.push(format!("nothing is served: {lost}"));
    }
    let queues = findings.queues.unwrap_or_else(|error| {
        problems.push(format!("the outbound queues cannot be read: {error}"));
        Vec::new()
    });
    // All of these are of the gateway's own database; what follows is of others, or of single rooms.
    let is_failing = !problems.is_empty();
    let waiting = |waiting: i64, oldest: Option<i64>| Waiting {
        waiting,
        oldest_age_ms: oldest.map_or(0, |oldest| findings.now_ms.saturating_sub(oldest).max(0)),
    };
    let inbox = waiting(store.inbox_waiting, store.inbox_oldest_ts);
    if inbox.oldest_age_ms > LONGEST_WAIT {
        let minutes = inbox.oldest_age_ms / 60_000;
        problems.push(format!("an accepted event has waited {minutes} minutes to be carried over"));
    }
    let echoes = waiting(store.echoes_waiting, store.echo_oldest_ts);
    // Where a server cannot be reached that is the reason, and it is listed.
    if echoes.oldest_age_ms > LONGEST_ECHO && queues.iter().all(|queue| queue.failures == 0) {
        let minutes = echoes.oldest_age_ms / 60_000;
        problems.push(format!(
            "an event that a hub took {minutes} minutes ago did not come back in its log: `isthmus portal show` says where"
        ));
    }
    let missing = waiting(store.missing.count, store.missing.since);
    let lm::Missing { gaps: rooms, fetched, taken, .. } = store.missing;
    if missing.oldest_age_ms > LONGEST_WAIT {
        let (count, minutes) = (missing.waiting, missing.oldest_age_ms / 60_000);
        let why = store.missing.last_error.as_deref().unwrap_or_default();
        let progress = match rooms {
            0 => String::new(),
            _ => format!("; {fetched} events of long absences were fetched so far, {taken} of them are taken"),
        };
        problems.push(format!(
            "{count} events of foreign hubs' logs are missing here, the first for {minutes} minutes ({why}{progress}): \
             `isthmus portal show` says where"
        ));
    }
    let graph_missing = waiting(store.graph_missing.count, store.graph_missing.since);
    if graph_missing.oldest_age_ms > LONGEST_WAIT {
        let (count, minutes) = (graph_missing.waiting, graph_missing.oldest_age_ms / 60_000);
        let gaps::Missing { waiting, server, last_error, .. } = store.graph_missing;
        let (server, why) = (server.unwrap_or_default(), last_error.unwrap_or_default());
        problems.push(format!(
            "before {count} events of Matrix rooms others are missing here, the first for {minutes} minutes ({server}: {why}); \
             {waiting} of them wait for these: `isthmus portal show` says where"
        ));
    }
    let lm::Faults { count, rooms: faulty, last_ts, lost } = store.faults;
    if lost > 0 {
        problems.push(format!(
            "the hubs of {lost} rooms do not know what they gave before, and nothing is sent to them: \
             `isthmus portal show` says where"
        ));
    }
    if count > 0 {
        // What such a fault leaves behind, as what is missing, is told by itself.
        let ago = findings.now_ms.saturating_sub(last_ts.unwrap_or_default()).max(0);
        let is_over = ago >= FAULTS_PASS;
        let when = if is_over { format!(", the last time {} minutes ago", ago / 60_000) } else { String::new() };
        let told = if is_over { &mut past } else { &mut problems };
        told.push(format!(
            "foreign hubs misbehaved {count} times in the last hour, in {faulty} rooms{when}: `isthmus portal show` says how"
        ));
    }
    let owed_leaves = waiting(store.owed.count, store.owed.since);
    if owed_leaves.oldest_age_ms > LONGEST_OWED {
        let (count, minutes) = (owed_leaves.waiting, owed_leaves.oldest_age_ms / 60_000);
        problems.push(format!(
            "{count} users could not leave rooms again where other servers may have taken a join that came to nothing here, the \
             first for {minutes} minutes: the log says which"
        ));
    }
    let leaves_given_up = store.owed.given_up;
    if leaves_given_up > 0 {
        past.push(format!(
            "{leaves_given_up} users could not leave rooms again for a day, and nobody tries any more: there they may be in the rooms \
             for good"
        ));
    }
    let uncorrected = findings.uncorrected;
    if uncorrected.count > 0 {
        let Uncorrected { rooms, count } = uncorrected;
        problems.push(format!(
            "{count} pieces of state in {rooms} shared rooms are not in their logs as they are in the rooms, and could not be \
             corrected: `isthmus portal show` says why"
        ));
    }
    if let Some(homeserver) = findings.homeserver.as_ref().filter(|homeserver| !homeserver.reachable) {
        let error = homeserver.error.as_deref().unwrap_or("it was not tried yet");
        problems.push(format!("the ping through the homeserver did not come back ({error}): run `isthmus doctor`"));
    }
    if let Some((ago, error)) = findings.media_failed.filter(|(ago, _)| *ago < FAILED) {
        let ago = ago.as_secs();
        problems.push(format!("{ago} s ago a file of media could not be kept, and so not be read: {error}"));
    }
    let mut refusals = queues.iter().flat_map(|queue| refusals(queue, findings.now_ms));
    problems.extend(refusals.by_ref().take(REFUSALS_NAMED));
    let others = refusals.count();
    if others > 0 {
        problems.push(format!("{others} more servers or rooms are like these: `/servers` has them all"));
    }
    let failing = queues.iter().filter(|queue| queue.failures > 0).take(LISTED).map(|queue| Failing {
        server: queue.destination.to_string(),
        waiting: queue.waiting,
        failures: queue.failures,
        since: queue.since,
        answers: queue.answers,
        retry_at: queue.retry_at,
        error: queue.last_error.clone(),
    });
    Health {
        ok: problems.is_empty(),
        status: match (is_failing, problems.is_empty()) {
            (true, _) => Status::Failing,
            (false, false) => Status::Degraded,
            (false, true) => Status::Ok,
        },
        problems,
        past,
        server_name: findings.server_name,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        homeserver: findings.homeserver,
        inbox,
        echoes,
        missing,
        graph_missing,
        hub_faults: HubFaults { count, rooms: faulty, last_ts, lost },
        owed_leaves,
        leaves_given_up,
        uncorrected,
        catching_up: CatchingUp { rooms, fetched, taken },
        events_of_unknown_rooms: METRICS.events_of_unknown_rooms.get(),
        outbound: Outbound {
            waiting: queues.iter().fold(0, |sum, queue| sum.saturating_add(queue.waiting)),
            failing: failing.collect(),
            held: queues.iter().flat_map(Held::of).take(LISTED).collect(),
        },
        media: findings.media,
        portals: store.portals.into_iter().collect(),
    }
}

/// What a server that is there takes nothing of, for minutes already. One that is away is no problem of anybody here.
fn refusals(queue: &QueueStatus, now_ms: i64) -> impl Iterator<Item = String> {
    let QueueStatus { destination, waiting, .. } = queue;
    let lasts = move |since: i64| {
        let lasting = now_ms.saturating_sub(since);
        (since > 0 && lasting >= LONGEST_REFUSAL).then_some(lasting / 60_000)
    };
    let minutes = lasts(queue.since).filter(|_| queue.answers && *waiting > 0);
    let whole = minutes.map(|minutes| {
        let error = queue.last_error.as_deref().unwrap_or_default();
        format!(
            "{destination} answers, and has taken nothing for {minutes} minutes ({error}); {waiting} events wait for it"
        )
    });
    let rooms = queue.held.iter().filter_map(move |held| {
        let (minutes, room, error) = (lasts(held.since)?, &held.feed.room_id, &held.error);
        Some(format!(
            "{destination} has taken nothing of {room} for {minutes} minutes ({error}); {waiting} events wait for it"
        ))
    });
    whole.into_iter().chain(rooms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::federation::{Feed, FeedKind, HeldFeed};
    use crate::store::lm::Missing;
    use crate::store::owed::Owed;

    fn good() -> Findings {
        Findings {
            server_name: "g.example".try_into().unwrap(),
            now_ms: 10_000_000,
            store: Ok(Overview { inbox_waiting: 2, inbox_oldest_ts: Some(9_999_000), ..Overview::default() }),
            write_lasts: Duration::ZERO,
            write_failed: Some((2 * FAILED, "full".to_owned())),
            claim_lost: None,
            queues: Ok(Vec::new()),
            homeserver: Some(HomeserverStatus { reachable: true, ..HomeserverStatus::default() }),
            uncorrected: Uncorrected::default(),
            media: Files::default(),
            media_failed: Some((2 * FAILED, "full".to_owned())),
        }
    }

    #[test]
    fn each_problem_is_named() {
        let health = judge(good());
        assert!(health.ok && health.inbox.oldest_age_ms == 1000, "{health:?}");
        assert!(judge(Findings { homeserver: None, ..good() }).ok);

        let old = Overview { inbox_oldest_ts: Some(10_000_000 - 11 * 60_000), ..Overview::default() };
        let lost =
            Overview { echoes_waiting: 1, echo_oldest_ts: Some(10_000_000 - 90 * 60_000), ..Overview::default() };
        let holes = Missing {
            count: 3,
            since: Some(10_000_000 - 12 * 60_000),
            last_error: Some("hub.example does not give it".to_owned()),
            gaps: 1,
            fetched: 70,
            taken: 30,
        };
        let gap = gaps::Missing {
            count: 4,
            waiting: 1,
            since: Some(10_000_000 - 13 * 60_000),
            server: Some("hs.example".to_owned()),
            last_error: Some("does not give it".to_owned()),
        };
        let gap = Overview { graph_missing: gap, ..Overview::default() };
        let holes = Overview { missing: holes, ..Overview::default() };
        let forked = Overview {
            faults: lm::Faults { count: 57, rooms: 2, last_ts: Some(9_990_000), lost: 0 },
            ..Overview::default()
        };
        let forgot =
            Overview { faults: lm::Faults { count: 0, rooms: 0, last_ts: None, lost: 1 }, ..Overview::default() };
        let owed = Owed { count: 2, since: Some(10_000_000 - 130 * 60_000), given_up: 0 };
        let owed = Overview { owed, ..Overview::default() };
        let down = HomeserverStatus { error: Some("502".to_owned()), ..HomeserverStatus::default() };
        let failing = 5;
        let cases = [
            (Findings { store: Err("gone".to_owned()), ..good() }, "the store does not answer: gone"),
            (Findings { write_lasts: Duration::from_secs(12), ..good() }, "has not ended a write for 12 s"),
            (
                Findings { write_failed: Some((Duration::from_secs(3), "the disk is full".to_owned())), ..good() },
                "3 s ago something could not be written: the disk is full",
            ),
            (Findings { claim_lost: Some(StoreError::InUse), ..good() }, "nothing is served: another isthmus serves"),
            (Findings { queues: Err(StoreError::Closed), ..good() }, "the outbound queues cannot be read"),
            (Findings { store: Ok(old), ..good() }, "has waited 11 minutes"),
            (Findings { store: Ok(lost), ..good() }, "took 90 minutes ago did not come back"),
            (
                Findings { store: Ok(holes), ..good() },
                "first for 12 minutes (hub.example does not give it; 70 events of long absences were fetched so far, 30 of them",
            ),
            (
                Findings { store: Ok(gap), ..good() },
                "before 4 events of Matrix rooms others are missing here, the first for 13 minutes (hs.example: does not give it); 1",
            ),
            (Findings { store: Ok(forked), ..good() }, "misbehaved 57 times in the last hour, in 2 rooms"),
            (Findings { store: Ok(forgot), ..good() }, "the hubs of 1 rooms do not know"),
            (Findings { store: Ok(owed), ..good() }, "2 users could not leave rooms again"),
            (Findings { homeserver: Some(down), ..good() }, "did not come back (502)"),
            (
                Findings { uncorrected: Uncorrected { rooms: 1, count: 3 }, ..good() },
                "3 pieces of state in 1 shared rooms are not in their logs",
            ),
            (
                Findings { media_failed: Some((Duration::from_secs(3), "no space".to_owned())), ..good() },
                "3 s ago a file of media could not be kept, and so not be read: no space",
            ),
        ];
        for (index, (findings, problem)) in cases.into_iter().enumerate() {
            // Who serves federation is not to be restarted because the homeserver is down.
            let status = if index < failing { Status::Failing } else { Status::Degraded };
            let health = judge(findings);
            assert_eq!(health.status.code() == 503, index < failing);
            assert!(!health.ok && health.status == status && health.problems.len() == 1, "{health:?}");
            assert!(health.problems[0].contains(problem), "{health:?}");
        }
    }

    /// A burst of them, that is, after which the hub's log went on.
    #[test]
    fn faults_of_hubs_that_are_over_are_told_and_are_no_problem() {
        let at = |last_ts: i64| {
            let faults = lm::Faults { count: 59, rooms: 1, last_ts: Some(last_ts), lost: 0 };
            judge(Findings { store: Ok(Overview { faults, ..Overview::default() }), ..good() })
        };
        let now = at(10_000_000 - FAULTS_PASS + 1);
        assert!(now.status == Status::Degraded && now.past.is_empty(), "{now:?}");
        let over = at(10_000_000 - FAULTS_PASS);
        assert!(over.ok && over.problems.is_empty() && over.hub_faults.count == 59, "{over:?}");
        let told = "foreign hubs misbehaved 59 times in the last hour, in 1 rooms, the last time 10 minutes ago";
        assert!(over.past[0].starts_with(told) && as_text(&over).contains(&format!("over by now: {told}")), "{over:?}");
        // A clock that was set back does not make it old.
        assert!(!at(20_000_000).ok);
    }

    #[test]
    fn leaves_that_were_given_up_are_told_and_are_no_problem() {
        let owed = Owed { given_up: 2, ..Owed::default() };
        let health = judge(Findings { store: Ok(Overview { owed, ..Overview::default() }), ..good() });
        assert!(health.ok && health.leaves_given_up == 2, "{health:?}");
        assert!(health.past[0].starts_with("2 users could not leave rooms again for a day"), "{health:?}");
    }

    fn held(room_id: &str, since: i64) -> HeldFeed {
        let feed = Feed { kind: FeedKind::Log, room_id: room_id.try_into().unwrap() };
        HeldFeed { feed, tries: 2, since, retry_at: 6, error: "500".to_owned() }
    }

    #[test]
    fn a_server_that_answers_and_takes_nothing_for_minutes_is_a_problem() {
        let queue = |since: i64, answers: bool, waiting: i64| QueueStatus {
            waiting,
            failures: 9,
            since,
            answers,
            last_error: Some("500 M_UNKNOWN: no".to_owned()),
            ..QueueStatus::of("hub.example".try_into().unwrap())
        };
        let of = |queue: QueueStatus| judge(Findings { queues: Ok(vec![queue]), ..good() });
        let long_ago = 10_000_000 - 7 * 60_000;
        let health = of(queue(long_ago, true, 20));
        assert_eq!(
            health.problems,
            ["hub.example answers, and has taken nothing for 7 minutes (500 M_UNKNOWN: no); 20 events wait for it"]
        );
        assert!(health.status == Status::Degraded && health.outbound.failing[0].since == long_ago, "{health:?}");
        // Not at once, not when it is away, not when nothing waits, and not since nobody knows when.
        for queue in [
            queue(10_000_000 - LONGEST_REFUSAL + 1, true, 20),
            queue(long_ago, false, 20),
            queue(long_ago, true, 0),
            queue(0, true, 20),
        ] {
            assert!(of(queue.clone()).ok, "{queue:?}");
        }
        // The same of single rooms, while others go on; of many not each is named.
        let rooms = (0..12).map(|n| held(&format!("!r{n}:g.example"), long_ago)).collect();
        let some = QueueStatus { waiting: 3, held: rooms, ..QueueStatus::of("hub.example".try_into().unwrap()) };
        let problems = of(some).problems;
        assert_eq!(
            problems[0],
            "hub.example has taken nothing of !r0:g.example for 7 minutes (500); 3 events wait for it"
        );
        assert_eq!(
            (problems.len(), &*problems[10]),
            (11, "2 more servers or rooms are like these: `/servers` has them all")
        );
    }

    #[test]
    fn a_dead_destination_is_shown_and_is_no_problem() {
        let queue = QueueStatus {
            waiting: 7,
            failures: 3,
            since: 1,
            retry_at: 5,
            last_error: Some("refused".to_owned()),
            held: vec![held("!r:g.example", 10_000_000 - LONGEST_REFUSAL + 1)],
            ..QueueStatus::of("dead.example".try_into().unwrap())
        };
        let waits_for_it = Overview { echo_oldest_ts: Some(1), ..Overview::default() };
        let health = judge(Findings { queues: Ok(vec![queue]), store: Ok(waits_for_it), ..good() });
        assert!(health.ok && health.outbound.waiting == 7 && health.outbound.failing[0].failures == 3);
        assert_eq!((health.outbound.held[0].feed.as_str(), health.outbound.held[0].tries), ("log", 2));
        let text = as_text(&health);
        assert!(text.contains("dead.example fails on an event of !r:g.example"), "{text}");
    }
}
