//! A file on its way to who asked for it: as far as it is here, at the pace of the reader, but not for as long as one likes. What does
//! not come to its end is broken off, so that nobody takes half a file for a whole one.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::about::About;
use super::{Begun, Stage};
use crate::admin::metrics;
use crate::federation::{Counted, Pace};

/// How much is read at a time, and how many such pieces wait for the reader.
const PIECE: u64 = 64 << 10;
const AHEAD: usize = 2;
/// How long a reader may pause, and how fast it has to read, in bytes a second.
const PAUSE: Duration = Duration::from_secs(30);
const RATE: u32 = 16 << 10;

/// The bytes of a file; an error when it breaks off.
pub type Passing = BoxStream<'static, io::Result<Bytes>>;

/// A file that was found.
pub struct Served {
    /// What is said about it.
    pub about: About,
    /// How long it is, if that is known.
    pub length: Option<u64>,
    /// What it consists of.
    pub bytes: Passing,
}

impl Served {
    pub(super) fn new(begun: Arc<Begun>, stage: watch::Receiver<Stage>, counted: Counted) -> Self {
        let length = match &*stage.borrow() {
            Stage::Whole(_, length) => Some(*length),
            _ => begun.length,
        };
        let about = begun.about.clone();
        Self { about, length, bytes: to_reader(as_it_comes(begun, stage), Pace::new(PAUSE, RATE), counted) }
    }
}

/// What is here of a file, and more of it as it comes.
fn as_it_comes(begun: Arc<Begun>, stage: watch::Receiver<Stage>) -> Passing {
    let broken = || io::Error::other("the file broke off");
    let read = move |(begun, mut stage, at): (Arc<Begun>, watch::Receiver<Stage>, u64)| async move {
        loop {
            let (here, whole) = match &*stage.borrow_and_update() {
                Stage::Coming(_, here) => (*here, false),
                Stage::Whole(_, here) => (*here, true),
                Stage::Asking | Stage::Failed(_) | Stage::Broken(_) => return Err(broken()),
            };
            let left = here.saturating_sub(at);
            if left > 0 {
                let bytes = begun.readable.read(at, usize::try_from(left.min(PIECE)).unwrap_or_default()).await?;
                if bytes.is_empty() {
                    return Err(broken());
                }
                let at = at.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
                return Ok(Some((bytes, (begun, stage, at))));
            }
            if whole {
                return Ok(None);
            }
            stage.changed().await.map_err(|_| broken())?;
        }
    };
    stream::try_unfold((begun, stage, 0), read).boxed()
}

/// A piece, or the end.
enum Piece {
    Bytes(Bytes),
    End,
}

/// Hands the pieces over to a reader who has to take them at a pace; only its own slowness counts.
fn to_reader(mut bytes: Passing, mut pace: Pace, counted: Counted) -> Passing {
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let _counted = counted;
        loop {
            let since = Instant::now();
            let piece = match bytes.next().await {
                Some(Ok(bytes)) => Piece::Bytes(bytes),
                None => Piece::End,
                Some(Err(_)) => return,
            };
            pace.resume(since);
            let (length, last) = match &piece {
                Piece::Bytes(bytes) => (bytes.len(), false),
                Piece::End => (0, true),
            };
            // Who is too slow, or gone, gets no end.
            if !matches!(tokio::time::timeout_at(pace.until(), sender.send(piece)).await, Ok(Ok(()))) || last {
                return;
            }
            pace.took(length);
            metrics::media_bytes("served", u64::try_from(length).unwrap_or(u64::MAX));
        }
    });
    let receive = |mut receiver: mpsc::Receiver<Piece>| async move {
        match receiver.recv().await {
            Some(Piece::Bytes(bytes)) => Ok(Some((bytes, receiver))),
            Some(Piece::End) => Ok(None),
            None => Err(io::Error::other("the file broke off, or was read too slowly")),
        }
    };
    stream::try_unfold(receiver, receive).boxed()
}
