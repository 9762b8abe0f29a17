//! How much of other servers' answers is in memory, from when they arrive until whoever asked is done with them: what is made of
//! them takes some five times as much. Small answers, of which keys and transactions live, have budgets of their own, which no
//! large one can take; what has no room waits a while for it.

use std::net::IpAddr;
use std::time::Duration;

use super::limits::{Held, Shares};
use super::peer_address;

/// Up to how many bytes an answer is of a kind; how many bytes those of the kind have together; and how many those of one server
/// or of one address.
const KINDS: [(usize, usize, usize); 3] = [
    (256 << 10, 16 << 20, 2 << 20),
    (8 << 20, 32 << 20, 16 << 20),
    // One answer with the state of the largest rooms.
    (usize::MAX, 96 << 20, 64 << 20),
];
/// How long an answer waits for room.
const PATIENCE: Duration = Duration::from_secs(30);

/// The budgets for answers; clones share them.
#[derive(Clone)]
pub(super) struct Answers {
    kinds: Vec<(usize, Shares)>,
    patience: Duration,
}

/// The bytes of an answer, given back when this is dropped.
pub struct HeldAnswer {
    answers: Answers,
    whose: Vec<String>,
    /// Of which kind it is by now, and its bytes.
    kind: usize,
    bytes: usize,
    held: Option<Held>,
}

impl Default for Answers {
    fn default() -> Self {
        Self::new(&KINDS, PATIENCE)
    }
}

impl Answers {
    pub(super) fn new(kinds: &[(usize, usize, usize)], patience: Duration) -> Self {
        let kinds = kinds.iter().map(|(up_to, all, each)| (*up_to, Shares::new(*all, *each)));
        Self { kinds: kinds.collect(), patience }
    }

    /// Nothing yet, to be grown.
    pub(super) fn hold(&self, server: &str, address: Option<IpAddr>) -> HeldAnswer {
        let address = address.and_then(peer_address).map(|address| address.to_string());
        let whose = [Some(server.to_owned()), address].into_iter().flatten().collect();
        HeldAnswer { answers: self.clone(), whose, kind: 0, bytes: 0, held: None }
    }
}

impl HeldAnswer {
    /// Takes `bytes` more; false when there is no room for them, also after a while. Then this is of no more use.
    pub(super) async fn grow(&mut self, bytes: usize) -> bool {
        let patience = self.answers.patience;
        tokio::time::timeout(patience, self.take(bytes)).await.unwrap_or(false)
    }

    async fn take(&mut self, bytes: usize) -> bool {
        let total = self.bytes.saturating_add(bytes);
        let kinds = &self.answers.kinds;
        let kind = kinds.iter().position(|(up_to, _)| total <= *up_to).unwrap_or(kinds.len().saturating_sub(1));
        let Some((_, shares)) = kinds.get(kind) else { return false };
        let missing = match &self.held {
            Some(_) if kind == self.kind => bytes,
            _ => total,
        };
        if kind == self.kind
            && let Some(held) = &mut self.held
        {
            if !held.grow_in_time(missing).await {
                return false;
            }
        } else {
            // What it has of the smaller kind is given back when it has this.
            let whose: Vec<&str> = self.whose.iter().map(String::as_str).collect();
            let mut held = shares.hold(&whose);
            if !held.grow_in_time(missing).await {
                return false;
            }
            self.held = Some(held);
            self.kind = kind;
        }
        self.bytes = total;
        true
    }
}
