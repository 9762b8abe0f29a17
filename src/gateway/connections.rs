//! The connections of a listener: how many there are, of one address and of all, and which ends when there is no place for another.
//! Whoever connects and asks for nothing is cut off, in whatever protocol it says nothing.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::task::AtomicWaker;
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};
use tower::Service;

/// How long a connection may take until its first request is here.
const FIRST_REQUEST: Duration = Duration::from_secs(20);
/// How long a connection is kept on which nothing is asked or answered.
const IDLE: Duration = Duration::from_secs(75);

/// Who is at the other end, where the address says it ([`crate::federation::peer_address`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer(pub Option<IpAddr>);

/// How many connections there may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Of all: each costs some 100 KiB and a descriptor.
    pub all: usize,
    /// Of one address; none where addresses say nothing.
    pub of_one: Option<usize>,
    pub patience: Patience,
}

/// For how long a connection is kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Until its first request is here.
    pub first: Duration,
    /// While nothing is asked or answered.
    pub idle: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { first: FIRST_REQUEST, idle: IDLE }
    }
}

/// The connections of one listener; clones share them.
#[derive(Clone)]
pub(super) struct Connections {
    bounds: Bounds,
    places: Arc<Mutex<Places>>,
}

#[derive(Default)]
struct Places {
    last: u64,
    taken: BTreeMap<u64, Arc<Activity>>,
}

/// The place of a connection, free again when this is dropped.
struct Place {
    number: u64,
    places: Arc<Mutex<Places>>,
}

/// What goes on on a connection.
struct Activity {
    peer: Peer,
    patience: Patience,
    opened: Instant,
    /// How many requests are being answered.
    underway: AtomicUsize,
    /// Whether there was any.
    asked: AtomicBool,
    /// When something was last asked or answered, in milliseconds after it was opened.
    active_ms: AtomicU64,
    ended: AtomicBool,
    waker: AtomicWaker,
}

impl Connections {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { bounds, places: Arc::default() }
    }

    /// Gives a connection a place. When there is none, the one ends that has been idle for longest: of the same address when that
    /// has too many. Fails when all are at work.
    pub(super) fn open<S>(&self, stream: TcpStream, peer: Peer, service: S) -> io::Result<(Watched, Serving<S>)> {
        let activity = Arc::new(Activity {
            peer,
            patience: self.bounds.patience,
            opened: Instant::now(),
            underway: AtomicUsize::new(0),
            asked: AtomicBool::new(false),
            active_ms: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        });
        let mut places = lock(&self.places);
        let of_one = |activity: &Activity| peer.0.is_some() && activity.peer == peer;
        if self.bounds.of_one.is_some_and(|bound| places.count(of_one) >= bound) {
            places.end_idle(of_one)?;
        }
        if places.taken.len() >= self.bounds.all {
            places.end_idle(|_| true)?;
        }
        places.last = places.last.saturating_add(1);
        let number = places.last;
        places.taken.insert(number, activity.clone());
        let place = Arc::new(Place { number, places: self.places.clone() });
        let timer = Box::pin(tokio::time::sleep(self.bounds.patience.first));
        let watched = Watched { stream, activity: activity.clone(), timer, _place: place.clone() };
        Ok((watched, Serving { service, activity, _place: place }))
    }
}

impl Places {
    fn count(&self, is_meant: impl Fn(&Activity) -> bool) -> usize {
        self.taken.values().filter(|activity| is_meant(activity)).count()
    }

    fn end_idle(&mut self, is_meant: impl Fn(&Activity) -> bool) -> io::Result<()> {
        let idle = self.taken.iter().filter(|(_, activity)| is_meant(activity) && activity.is_idle());
        let Some((number, _)) = idle.min_by_key(|(_, activity)| activity.active()) else {
            tracing::warn!("closed a new connection: there are too many, and all of them are at work");
            return Err(io::Error::other("too many connections"));
        };
        let number = *number;
        if let Some(activity) = self.taken.remove(&number) {
            activity.ended.store(true, Ordering::SeqCst);
            activity.waker.wake();
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.places).taken.remove(&self.number);
    }
}

impl Activity {
    fn is_idle(&self) -> bool {
        self.underway.load(Ordering::SeqCst) == 0
    }

    fn active(&self) -> Instant {
        self.opened + Duration::from_millis(self.active_ms.load(Ordering::SeqCst))
    }

    fn touch(&self) {
        let ms = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.active_ms.store(ms, Ordering::SeqCst);
    }

    /// Until when something must be asked.
    fn deadline(&self) -> Instant {
        let Patience { first, idle } = self.patience;
        match (self.is_idle(), self.asked.load(Ordering::SeqCst)) {
            (false, _) => Instant::now() + idle,
            (true, true) => self.active() + idle,
            (true, false) => self.opened + first,
        }
    }
}

/// A request that is being answered.
struct Underway(Arc<Activity>);

impl Underway {
    fn begin(activity: &Arc<Activity>) -> Self {
        activity.underway.fetch_add(1, Ordering::SeqCst);
        activity.asked.store(true, Ordering::SeqCst);
        Self(activity.clone())
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.0.touch();
        self.0.underway.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What answers the requests of a connection: it tells them who asks, and counts them.
#[derive(Clone)]
pub(super) struct Serving<S> {
    service: S,
    activity: Arc<Activity>,
    _place: Arc<Place>,
}

impl<S, B> Service<Request<B>> for Serving<S>
where
    S: Service<Request<B>, Future: Send + 'static>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let underway = Underway::begin(&self.activity);
        request.extensions_mut().insert(self.activity.peer);
        let answering = self.service.call(request);
        Box::pin(async move {
            let answer = answering.await;
            drop(underway);
            answer
        })
    }
}

/// The bytes of a connection, which end when it is idle for too long or another needs its place.
pub(super) struct Watched {
    stream: TcpStream,
    activity: Arc<Activity>,
    timer: Pin<Box<Sleep>>,
    _place: Arc<Place>,
}

impl Watched {
    /// Fails when the connection has to end; wakes whoever polls when that is to be looked at again.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        self.activity.waker.register(context.waker());
        loop {
            if self.activity.ended.load(Ordering::SeqCst) {
                return Err(io::Error::other("another connection has its place"));
            }
            if self.timer.as_mut().poll(context).is_pending() {
                return Ok(());
            }
            let deadline = self.activity.deadline();
            if deadline <= Instant::now() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.timer.as_mut().reset(deadline);
        }
    }

    /// What a write gave; a connection on which answers go out is not idle.
    fn wrote(&mut self, context: &mut Context<'_>, wrote: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if wrote.is_pending() {
            self.check(context)?;
        } else {
            self.activity.touch();
        }
        wrote
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if read.is_pending() {
            self.check(context)?;
        }
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(context, wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.wrote(context, wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        if flushed.is_pending() {
            self.check(context)?;
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
        Poll::Ready(Ok(()))
    }
}

fn lock(places: &Mutex<Places>) -> MutexGuard<'_, Places> {
    // What is inside is whole between any two statements.
    places.lock().unwrap_or_else(PoisonError::into_inner)
}
