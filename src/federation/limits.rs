//! How much of other servers' work is taken in at once. A peer that does not wait for the answer to one transaction before
//! it sends the next, and never sends one twice, loses nothing: its transactions stand in line, one is processed at a time,
//! and the line is bounded.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ruma::{OwnedServerName, ServerName};
use tokio::sync::OwnedMutexGuard;

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
        if (requests > 0 && full) || all_bytes > self.limits.all_bytes {
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
        assert_eq!(lock(&lines.state).bytes, 0);
    }
}
