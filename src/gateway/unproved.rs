//! Bodies of requests whose origin is not proved yet. Anybody can have one read by naming a server whose keys are known, so each
//! address, or each named server where a proxy hides the addresses, has a share only, and what is small has a reserve of its own.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody as _};
use bytes::BytesMut;
use futures::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::federation::{Held, Pace, Shares};
use crate::refusal::Refusal;

/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a body may pause, and how fast it has to come, in bytes a second.
const PAUSE: Duration = Duration::from_secs(10);
const RATE: u32 = 16 << 10;
/// A body that says that it is no longer than this is read from a reserve.
const SMALL: u64 = 64 << 10;
/// How many bytes of small bodies are read at once, of all and of one share.
const SMALL_BYTES: (usize, usize) = (32 << 20, 8 << 20);
/// The same of all other bodies.
const BYTES: (usize, usize) = (192 << 20, 24 << 20);
/// How many bytes the further copies of bodies have together whose signatures are being checked.
const CHECKED_BYTES: usize = 192 << 20;
/// How many copies those are: in canonical form, in the signed message, and one that grows.
const COPIES: usize = 3;
/// In what units they are counted.
const BLOCK: usize = 4 << 10;
/// How long a body waits for its turn to be checked.
const CHECK_TIMEOUT: Duration = Duration::from_secs(20);

/// How much of bodies nobody has proved is in memory; clones share it.
#[derive(Clone)]
pub struct Unproved {
    small: Shares,
    others: Shares,
    checks: Arc<Semaphore>,
    pause: Duration,
}

/// A body and its place in memory until its signature is checked.
pub(super) struct Unchecked {
    pub raw: Bytes,
    _held: Held,
    _check: OwnedSemaphorePermit,
}

impl Default for Unproved {
    fn default() -> Self {
        Self {
            small: Shares::new(SMALL_BYTES.0, SMALL_BYTES.1),
            others: Shares::new(BYTES.0, BYTES.1),
            checks: Arc::new(Semaphore::new(CHECKED_BYTES / BLOCK)),
            pause: PAUSE,
        }
    }
}

impl Unproved {
    /// Reads a body of at most `limit` bytes within the share of `whose`.
    pub(super) async fn read(
        &self,
        whose: &str,
        body: Body,
        what: &'static str,
        limit: usize,
    ) -> Result<Unchecked, Refusal> {
        let declared = body.size_hint().exact();
        if declared.is_some_and(|size| usize::try_from(size).map_or(true, |size| size > limit)) {
            return Err(too_large(what, limit));
        }
        let small = declared.is_some_and(|size| size <= SMALL);
        let mut held = if small { self.small.hold(&[whose]) } else { self.others.hold(&[whose]) };
        let reading = async {
            let (mut raw, mut pace) = (BytesMut::new(), Pace::new(self.pause, RATE));
            let mut chunks = body.into_data_stream();
            loop {
                let chunk = tokio::time::timeout_at(pace.until(), chunks.next()).await;
                let Some(chunk) = chunk.map_err(|_| too_slow(what))? else { return Ok(raw.freeze()) };
                let chunk =
                    chunk.map_err(|error| Refusal::NotJson(format!("the {what} could not be read: {error}")))?;
                if raw.len().saturating_add(chunk.len()) > limit {
                    return Err(too_large(what, limit));
                }
                if !held.grow(chunk.len()) {
                    return Err(busy());
                }
                raw.extend_from_slice(&chunk);
                pace.took(chunk.len());
            }
        };
        let raw = tokio::time::timeout(BODY_TIMEOUT, reading).await.map_err(|_| too_slow(what))??;
        // Checks are short, so that each comes to its turn.
        let blocks = u32::try_from(raw.len().saturating_mul(COPIES).div_ceil(BLOCK)).map_err(|_| busy())?;
        let turn = tokio::time::timeout(CHECK_TIMEOUT, self.checks.clone().acquire_many_owned(blocks)).await;
        let check = turn.map_err(|_| busy())?.map_err(|_| busy())?;
        Ok(Unchecked { raw, _held: held, _check: check })
    }
}

fn too_large(what: &'static str, limit: usize) -> Refusal {
    Refusal::TooLarge { what, size: limit.saturating_add(1), limit }
}

fn too_slow(what: &'static str) -> Refusal {
    Refusal::NotJson(format!("the {what} did not arrive within {BODY_TIMEOUT:?}, or it paused for {PAUSE:?}"))
}

fn busy() -> Refusal {
    Refusal::Budget { what: "requests being read".to_owned(), retry_after_ms: 2_000 }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// A body of so many bytes, of which the last never comes.
    fn stalled(bytes: usize) -> Body {
        let pieces = std::iter::repeat_n(Ok::<_, Infallible>(Bytes::from(vec![b' '; 1 << 16])), bytes >> 16);
        Body::from_stream(futures::stream::iter(pieces).chain(futures::stream::pending()))
    }

    fn impatient() -> Unproved {
        Unproved { pause: Duration::from_secs(3), ..Unproved::default() }
    }

    #[tokio::test]
    async fn bodies_that_stall_leave_room_for_others_and_do_not_stall_for_long() {
        let unproved = impatient();
        let begin = |whose: &'static str, body: Body| {
            let unproved = unproved.clone();
            tokio::spawn(async move { unproved.read(whose, body, "body", 10 << 20).await.map(|read| read.raw.len()) })
        };
        let stalled: Vec<_> = (0..10).map(|_| begin("a.example", stalled(9 << 20))).collect();
        let refused = || stalled.iter().filter(|read| read.is_finished()).count();
        while refused() < 8 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let large = || Body::from(vec![b' '; 9 << 20]);
        assert_eq!(begin("b.example", large()).await.unwrap(), Ok(9 << 20));
        // Also the server in whose name they come can say small things.
        assert_eq!(begin("a.example", Body::from(vec![b' '; 60 << 10])).await.unwrap(), Ok(60 << 10));
        assert_eq!(begin("a.example", large()).await.unwrap().unwrap_err().errcode(), "M_LIMIT_EXCEEDED");
        assert_eq!(refused(), 8, "two have its share");
        for stalled in stalled {
            assert!(stalled.await.unwrap().is_err());
        }
        assert_eq!(begin("a.example", large()).await.unwrap(), Ok(9 << 20));
    }

    #[tokio::test]
    async fn a_body_that_drips_is_given_up() {
        let drip = futures::stream::unfold((), async |()| {
            tokio::time::sleep(Duration::from_millis(200)).await;
            Some((Ok::<_, Infallible>(Bytes::from_static(b" ")), ()))
        });
        let begun = tokio::time::Instant::now();
        assert!(impatient().read("a", Body::from_stream(drip), "body", 1 << 20).await.is_err());
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
}
