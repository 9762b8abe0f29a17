//! How much of other servers' work is taken in at once: bytes that are being read are reserved from a budget, and requests
//! stand in line. A peer that does not wait for the answer to one transaction before
//! it sends the next, and never sends one twice, loses nothing: its transactions stand in line, one is processed at a time,
//! and the line is bounded.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ruma::{OwnedServerName, ServerName};
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

use crate::refusal::Refusal;

/// How long lines may be.
#[derive(Debug, Clone, Copy)]
pub struct LineLimits {
    /// How many requests of one server may be here.
    pub requests: usize,
    /// How many bytes their bodies may have together. One request alone may always come.
    pub bytes: usize,
    /// How many bytes the bodies of all servers may have together.
    pub all_bytes: usize,
}

impl Default for LineLimits {
    fn default() -> Self {
        Self { requests: 500, bytes: 32 << 20, all_bytes: 256 << 20 }
    }
}

/// Lines of requests, one a server; clones share them.
#[derive(Clone, Default)]
pub struct Lines {
    limits: LineLimits,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    lines: HashMap<OwnedServerName, Line>,
    bytes: usize,
}

#[derive(Default)]
struct Line {
    turn: Arc<tokio::sync::Mutex<()>>,
    requests: usize,
    bytes: usize,
}

/// A request whose turn it is; the next one's comes when this is dropped.
#[must_use]
pub struct Turn {
    _turn: OwnedMutexGuard<()>,
    _place: Place,
}

/// A place in a line.
struct Place {
    state: Arc<Mutex<State>>,
    origin: OwnedServerName,
    bytes: usize,
}

impl Lines {
    /// Lines within `limits`.
    pub fn new(limits: LineLimits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// Waits for the turn of a request of `origin` whose body has so many bytes, in the order of arrival; refuses it when
    /// the line is full.
    pub async fn enter(&self, origin: &ServerName, bytes: usize) -> Result<Turn, Refusal> {
        let (place, turn) = self.stand(origin, bytes)?;
        let turn = turn.lock_owned().await;
        Ok(Turn { _turn: turn, _place: place })
    }

    fn stand(&self, origin: &ServerName, bytes: usize) -> Result<(Place, Arc<tokio::sync::Mutex<()>>), Refusal> {
        let mut state = lock(&self.state);
        let all_bytes = state.bytes.saturating_add(bytes);
        let line = state.lines.get(origin);
        let (requests, line_bytes) = line.map_or((0, 0), |line| (line.requests, line.bytes));
        let full = requests >= self.limits.requests || line_bytes.saturating_add(bytes) > self.limits.bytes;
        // Half of all is for servers of which nothing waits, so that those who have much to say keep nobody out.
        let limit = if requests > 0 { self.limits.all_bytes / 2 } else { self.limits.all_bytes };
        if (requests > 0 && full) || all_bytes > limit {
            return Err(Refusal::Budget { what: format!("requests of {origin} that wait"), retry_after_ms: 2_000 });
        }
        state.bytes = all_bytes;
        let line = state.lines.entry(origin.to_owned()).or_default();
        line.requests = line.requests.saturating_add(1);
        line.bytes = line.bytes.saturating_add(bytes);
        let turn = line.turn.clone();
        Ok((Place { state: self.state.clone(), origin: origin.to_owned(), bytes }, turn))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        state.bytes = state.bytes.saturating_sub(self.bytes);
        if let Some(line) = state.lines.get_mut(&self.origin) {
            line.requests = line.requests.saturating_sub(1);
            line.bytes = line.bytes.saturating_sub(self.bytes);
            if line.requests == 0 {
                state.lines.remove(&self.origin);
            }
        }
    }
}

/// How many requests other than transactions are worked on at once, of one server and of all; clones share the count.
#[derive(Clone)]
pub struct Underway {
    counts: Arc<Mutex<HashMap<OwnedServerName, usize>>>,
    limit: usize,
}

/// A request that is worked on until this is dropped.
#[must_use]
pub struct Counted {
    counts: Arc<Mutex<HashMap<OwnedServerName, usize>>>,
    origin: OwnedServerName,
}

/// How many requests of one server. A Synapse that catches up asks for some twenty events at once.
const UNDERWAY: usize = 50;
/// How many of one server that wait for a third one.
const WAITING: usize = 30;
/// How many of all servers.
const ALL_UNDERWAY: usize = 1_000;

impl Default for Underway {
    fn default() -> Self {
        Self { counts: Arc::default(), limit: UNDERWAY }
    }
}

impl Underway {
    /// A count for requests that wait for a third server, which may take its time: those who have many of them hold up no
    /// others.
    pub fn waiting() -> Self {
        Self { limit: WAITING, ..Self::default() }
    }

    /// A count of something else, of which one server may have so many.
    pub fn of(limit: usize) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Counts a request of `origin` in, or refuses it. Half of all is for servers that have nothing under way, so that those who
    /// have much keep nobody out.
    pub fn enter(&self, origin: &ServerName) -> Result<Counted, Refusal> {
        let mut counts = lock(&self.counts);
        let own = counts.get(origin).copied().unwrap_or_default();
        let all = if own > 0 { ALL_UNDERWAY / 2 } else { ALL_UNDERWAY };
        // Every count is at least one and at most the limit, so the sum is cheap and cannot overflow.
        if own >= self.limit || counts.values().sum::<usize>() >= all {
            return Err(Refusal::Budget { what: format!("requests of {origin} under way"), retry_after_ms: 1_000 });
        }
        counts.insert(origin.to_owned(), own.saturating_add(1));
        Ok(Counted { counts: self.counts.clone(), origin: origin.to_owned() })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = lock(&self.counts);
        match counts.get_mut(&self.origin) {
            Some(count) if *count > 1 => *count = count.saturating_sub(1),
            _ => drop(counts.remove(&self.origin)),
        }
    }
}

/// How many bytes may be held at once, by all who share it (clones do), for what peers send and nobody has judged yet.
#[derive(Clone)]
pub struct ByteBudget {
    blocks: Arc<Semaphore>,
}

/// Bytes taken from a budget, given back when this is dropped.
pub struct Reserved {
    blocks: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
    bytes: usize,
}

/// What is reserved at a time.
const BLOCK: usize = 4 << 10;

impl ByteBudget {
    /// A budget of so many bytes, rounded to 4 KiB.
    pub fn new(bytes: usize) -> Self {
        Self { blocks: Arc::new(Semaphore::new(bytes.div_ceil(BLOCK).min(Semaphore::MAX_PERMITS))) }
    }

    /// Nothing yet, to be grown.
    pub fn reserve(&self) -> Reserved {
        Reserved { blocks: self.blocks.clone(), held: None, bytes: 0 }
    }
}

impl Reserved {
    /// Takes `bytes` more; false, and nothing taken, when the budget does not have them.
    #[must_use]
    pub fn grow(&mut self, bytes: usize) -> bool {
        let Some(missing) = self.missing(bytes) else { return false };
        if missing > 0 {
            let Ok(more) = self.blocks.clone().try_acquire_many_owned(missing) else { return false };
            self.merge(more);
        }
        self.bytes = self.bytes.saturating_add(bytes);
        true
    }

    /// The same, waiting in line until the budget has them.
    async fn grow_in_time(&mut self, bytes: usize) -> bool {
        let Some(missing) = self.missing(bytes) else { return false };
        if missing > 0 {
            let Ok(more) = self.blocks.clone().acquire_many_owned(missing).await else { return false };
            self.merge(more);
        }
        self.bytes = self.bytes.saturating_add(bytes);
        true
    }

    /// How many blocks more are needed for so many bytes more.
    fn missing(&self, bytes: usize) -> Option<u32> {
        let total = self.bytes.saturating_add(bytes);
        let held = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        u32::try_from(total.div_ceil(BLOCK).saturating_sub(held)).ok()
    }

    fn merge(&mut self, more: OwnedSemaphorePermit) {
        match &mut self.held {
            Some(held) => held.merge(more),
            None => self.held = Some(more),
        }
    }
}

/// A budget of bytes of which nobody gets more than a share, so that one that sends much leaves room for others; clones
/// share it.
#[derive(Clone)]
pub struct Shares {
    all: ByteBudget,
    each: usize,
    of: Arc<Mutex<HashMap<String, Weak<Semaphore>>>>,
}

/// Bytes taken from a budget and from somebody's shares of it, given back when this is dropped.
pub struct Held {
    all: Reserved,
    own: Vec<Reserved>,
}

impl Shares {
    /// A budget of so many bytes, of which each one gets `each` at most.
    pub fn new(all: usize, each: usize) -> Self {
        Self { all: ByteBudget::new(all), each, of: Arc::default() }
    }

    /// Nothing yet, to be grown; it counts for each of `whose`.
    pub fn hold(&self, whose: &[&str]) -> Held {
        let mut of = lock(&self.of);
        let own = whose.iter().map(|name| {
            let blocks = of.get(*name).and_then(Weak::upgrade);
            let blocks = blocks.unwrap_or_else(|| {
                if of.len() == of.capacity() {
                    of.retain(|_, blocks| blocks.strong_count() > 0);
                }
                let new = ByteBudget::new(self.each).blocks;
                of.insert((*name).to_owned(), Arc::downgrade(&new));
                new
            });
            ByteBudget { blocks }.reserve()
        });
        Held { own: own.collect(), all: self.all.reserve() }
    }
}

impl Held {
    /// Takes `bytes` more; false when the budget or a share of it does not have them. Then this is of no more use.
    #[must_use]
    pub fn grow(&mut self, bytes: usize) -> bool {
        self.own.iter_mut().all(|own| own.grow(bytes)) && self.all.grow(bytes)
    }

    /// The same, waiting until they are there; false when they never can be.
    pub async fn grow_in_time(&mut self, bytes: usize) -> bool {
        for own in &mut self.own {
            if !own.grow_in_time(bytes).await {
                return false;
            }
        }
        self.all.grow_in_time(bytes).await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is whole between any two statements, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use ruma::server_name;

    use super::*;

    #[tokio::test]
    async fn one_request_of_a_server_at_a_time_in_the_order_of_arrival() {
        let lines = Lines::default();
        let origin = server_name!("a.example");
        let first = lines.enter(origin, 10).await.unwrap();
        let (mut second, mut third) = (Box::pin(lines.enter(origin, 10)), Box::pin(lines.enter(origin, 10)));
        assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
        // Others do not wait for it.
        assert!(lines.enter(server_name!("b.example"), 10).now_or_never().unwrap().is_ok());
        drop(first);
        assert!((&mut third).now_or_never().is_none());
        let second = (&mut second).now_or_never().unwrap().unwrap();
        assert!((&mut third).now_or_never().is_none());
        drop(second);
        drop((&mut third).now_or_never().unwrap().unwrap());
        drop(third);
        assert!(lock(&lines.state).lines.is_empty());
    }

    #[tokio::test]
    async fn a_line_is_bounded_in_requests_and_bytes() {
        let lines = Lines::new(LineLimits { requests: 3, bytes: 100, all_bytes: 250 });
        let (a, b) = (server_name!("a.example"), server_name!("b.example"));
        let first = lines.enter(a, 10).await.unwrap();
        let mut waiting = [Box::pin(lines.enter(a, 10)), Box::pin(lines.enter(a, 10))];
        assert!(waiting.iter_mut().all(|wait| wait.now_or_never().is_none()));
        let refusal = lines.enter(a, 10).now_or_never().unwrap().err().unwrap();
        assert_eq!(refusal.errcode(), "M_LIMIT_EXCEEDED");
        drop((first, waiting));
        assert_eq!(lock(&lines.state).bytes, 0);

        let alone = lines.enter(a, 200).now_or_never().unwrap().unwrap();
        assert!(lines.enter(a, 1).now_or_never().unwrap().is_err(), "its bytes are used up");
        let other = lines.enter(b, 50).now_or_never().unwrap().unwrap();
        assert!(lines.enter(server_name!("c.example"), 1).now_or_never().unwrap().is_err(), "all bytes are used up");
        drop((alone, other));
        assert!(lines.enter(a, 1).now_or_never().unwrap().is_ok());

        let (busy, line) = (lines.enter(a, 60).await.unwrap(), lines.stand(a, 40).unwrap());
        let (second, refused) = (lines.enter(b, 20).await.unwrap(), lines.stand(b, 10));
        assert!(refused.is_err(), "those of whom something waits have half of all");
        let quiet = lines.enter(server_name!("c.example"), 100).now_or_never().unwrap();
        assert!(quiet.is_ok(), "of whom nothing waits is let in");
        drop((busy, line, second, quiet));
        assert_eq!(lock(&lines.state).bytes, 0);
    }

    #[test]
    fn bytes_are_reserved_as_they_come_and_given_back() {
        let budget = ByteBudget::new(3 * BLOCK);
        let (mut first, mut second) = (budget.reserve(), budget.clone().reserve());
        assert!(first.grow(BLOCK) && first.grow(1), "two blocks");
        assert!(first.grow(BLOCK - 1), "what is left of the second block");
        assert!(!second.grow(BLOCK + 1), "two blocks of the one that is left");
        assert!(second.grow(BLOCK) && !first.grow(1));
        drop(second);
        assert!(first.grow(1));
        drop(first);
        assert!(budget.reserve().grow(3 * BLOCK) && !budget.reserve().grow(usize::MAX));
    }

    #[test]
    fn no_server_gets_more_than_its_share_and_all_together_no_more_than_there_is() {
        let shares = Shares::new(5 * BLOCK, 2 * BLOCK);
        let (mut first, mut again) = (shares.hold(&["a"]), shares.clone().hold(&["a"]));
        assert!(first.grow(BLOCK) && again.grow(BLOCK) && !shares.hold(&["a"]).grow(1));
        let mut others = [shares.hold(&["b"]), shares.hold(&["c"])];
        assert!(others[0].grow(2 * BLOCK) && !others[1].grow(2 * BLOCK), "one block is left");
        drop((first, again));
        assert!(shares.hold(&["a"]).grow(2 * BLOCK));
        drop(others);
        for server in 0..1000 {
            drop(shares.hold(&[&server.to_string()]));
        }
        assert!(lock(&shares.of).len() < 10, "who holds nothing is forgotten");
    }

    #[test]
    fn requests_under_way_are_bounded_for_one_server_and_for_all() {
        let underway = Underway::default();
        let origin = server_name!("a.example");
        let mut held: Vec<Counted> = (0..UNDERWAY).map(|_| underway.enter(origin).unwrap()).collect();
        assert_eq!(underway.enter(origin).err().unwrap().errcode(), "M_LIMIT_EXCEEDED");
        held.pop();
        held.push(underway.enter(origin).unwrap());
        for number in UNDERWAY..ALL_UNDERWAY {
            let other = ServerName::parse(format!("s{number}.example")).unwrap();
            held.push(underway.enter(&other).unwrap());
        }
        assert!(underway.enter(server_name!("b.example")).is_err());
        drop(held);
        assert!(lock(&underway.counts).is_empty());
    }

    #[test]
    fn those_who_have_much_under_way_leave_half_of_all_to_those_who_have_nothing() {
        let underway = Underway::waiting();
        let name = |number: usize| ServerName::parse(format!("s{number}.example")).unwrap();
        let tried = (0..40 * WAITING).filter_map(|number| underway.enter(&name(number % 40)).ok());
        let held: Vec<Counted> = tried.collect();
        assert_eq!(held.len(), ALL_UNDERWAY / 2, "40 servers could have {}", 40 * WAITING);
        let stranger = underway.enter(server_name!("b.example")).unwrap();
        assert!(underway.enter(server_name!("b.example")).is_err(), "it has something under way now");
        drop((held, stranger));
        assert!(lock(&underway.counts).is_empty());
    }
}
