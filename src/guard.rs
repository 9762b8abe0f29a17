//! What one event cannot do to others: a check that panics is a verdict on its event. It would panic again whenever the event
//! is sent again, and would hold up all that its server sends.

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

use futures::FutureExt as _;

use crate::refusal::Refusal;

/// A check of the event `id`.
pub async fn guarded<T>(id: &impl Display, check: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
    AssertUnwindSafe(check).catch_unwind().await.unwrap_or_else(|_| Err(fails_on(id)))
}

/// The same without waiting for anything.
pub fn guarded_now<T>(id: &impl Display, check: impl FnOnce() -> Result<T, Refusal>) -> Result<T, Refusal> {
    catch_unwind(AssertUnwindSafe(check)).unwrap_or_else(|_| Err(fails_on(id)))
}

/// The verdict.
pub fn fails_on(id: &impl Display) -> Refusal {
    tracing::error!(event = %id, "this gateway failed on an event");
    Refusal::Fails(id.to_string())
}

/// Where this crate's own tests have a check panic: at the place that an event's type names.
#[cfg(test)]
pub fn trip(place: &str, kind: &impl Display) {
    assert!(kind.to_string().strip_prefix("test.panic.") != Some(place), "as a test wants");
}

/// Nothing: only tests have checks panic.
#[cfg(not(test))]
#[inline]
pub fn trip(_: &str, _: &impl Display) {}
