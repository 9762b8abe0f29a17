//! Media: files that users of one side send are read on the other through the gateway. It fetches a file from the server that has it
//! when somebody first asks, passes it on as it comes, and keeps it on disk; it never looks into it. Who asks must name it by an ID
//! that the gateway made (`identity/media_names.rs`), so that nobody has fetched what did not cross.

mod about;
mod cache;
mod multipart;
mod serve;
mod source;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use ruma::{OwnedServerName, ServerName};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

pub use self::about::About;
pub use self::cache::Figures;
pub(crate) use self::cache::usable;
use self::cache::{Cache, Key, Readable};
pub use self::serve::{Passing, Served};
use crate::admin::metrics;
use crate::federation::{Context, Shares, Underway};
use crate::identity::Medium;
use crate::refusal::Refusal;

/// How many files are fetched at once from one server, and from all.
const FETCHES_OF_ONE: usize = 8;
const FETCHES: usize = 256;
/// How many files one server may read at once.
const READERS_OF_ONE: usize = 40;
/// What part of the cache the files may have together that come from one server.
const SHARE_OF_ONE: u64 = 4;
/// How long a fetch waits for its turn.
const TURN: Duration = Duration::from_secs(20);
/// How long who asks waits for a file to begin. Homeservers wait a minute.
const PATIENCE: Duration = Duration::from_secs(50);
/// For how long a file is not asked for again that could not be had, and one that is too large.
const NOT_AGAIN: Duration = Duration::from_secs(30);
const TOO_LARGE_AGAIN: Duration = Duration::from_secs(3_600);
/// How many of those are remembered.
const REMEMBERED: u64 = 10_000;

/// The media of both sides; clones share them.
#[derive(Clone)]
pub struct Media {
    inner: Arc<Inner>,
}

struct Inner {
    context: Context,
    cache: Arc<Cache>,
    /// Files that are being fetched: whoever asks for one meanwhile reads along.
    running: Mutex<HashMap<Key, watch::Receiver<Stage>>>,
    /// Why files could not be had, and until when that is the answer.
    failed: moka::future::Cache<Key, (Refusal, Instant)>,
    servers: Mutex<HashMap<OwnedServerName, Weak<Semaphore>>>,
    fetches: Arc<Semaphore>,
    /// The bytes of files that are coming.
    bytes: Shares,
    readers: Underway,
}

/// How far a file is.
#[derive(Clone)]
enum Stage {
    /// Its server has been asked.
    Asking,
    /// It could not be had.
    Failed(Refusal),
    /// So much of it is here.
    Coming(Arc<Begun>, u64),
    /// All of it is.
    Whole(Arc<Begun>, u64),
    /// No more of it comes.
    Broken(Refusal),
}

/// A file of which the beginning is here.
struct Begun {
    about: About,
    length: Option<u64>,
    readable: Readable,
}

impl Media {
    /// The media as the configuration has them.
    pub fn new(context: &Context) -> Self {
        let settings = &context.config.media;
        let all = settings.cache_bytes;
        let each = (all / SHARE_OF_ONE).max(settings.max_bytes);
        let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        Self {
            inner: Arc::new(Inner {
                cache: Cache::new(settings.cache_dir.clone(), all, context.clock.clone()),
                running: Mutex::default(),
                failed: moka::future::Cache::builder().max_capacity(REMEMBERED).time_to_live(TOO_LARGE_AGAIN).build(),
                servers: Mutex::default(),
                fetches: Arc::new(Semaphore::new(FETCHES)),
                bytes: Shares::new(size(all), size(each)),
                readers: Underway::of(READERS_OF_ONE),
                context: context.clone(),
            }),
        }
    }

    /// Finds what is kept. What is wrong with the folder is in [`Media::problem`] then.
    pub async fn load(&self) {
        let _ = self.inner.cache.load().await;
    }

    /// The file with this ID, for the server `asker`.
    pub async fn get(&self, asker: &ServerName, media_id: &str) -> Result<Served, Refusal> {
        let unknown = || Refusal::NotFound(format!("the file {:?}", media_id.chars().take(60).collect::<String>()));
        let medium = self.inner.context.media.behind(media_id).ok_or_else(unknown)?;
        let counted = self.inner.readers.enter(asker)?;
        let mut stage = self.inner.stage(&medium).await?;
        let begun = {
            let waited = stage.wait_for(|stage| !matches!(stage, Stage::Asking));
            let stage = tokio::time::timeout(PATIENCE, waited).await.map_err(|_| silent(&medium.server))?;
            match &*stage.map_err(|_| Refusal::Internal("the fetch of a file ended".to_owned()))? {
                Stage::Coming(begun, _) | Stage::Whole(begun, _) => begun.clone(),
                Stage::Failed(refusal) | Stage::Broken(refusal) => return Err(refusal.clone()),
                Stage::Asking => return Err(broken(&medium.server)),
            }
        };
        Ok(Served::new(begun, stage, counted))
    }

    /// Forgets what is kept of a file; whether there was anything.
    pub async fn forget(&self, medium: &Medium) -> bool {
        let _ = self.inner.cache.load().await;
        self.inner.cache.forget(Key::of(medium))
    }

    /// How much is kept.
    pub fn figures(&self) -> Figures {
        self.inner.cache.figures()
    }

    /// How long ago something could not be written to the disk last, and why.
    pub fn problem(&self) -> Option<(Duration, String)> {
        self.inner.cache.problem()
    }
}

impl Inner {
    /// How far a file is: kept, coming, or fetched from now on.
    async fn stage(self: &Arc<Self>, medium: &Medium) -> Result<watch::Receiver<Stage>, Refusal> {
        let key = Key::of(medium);
        // What cannot be kept is told of when it is to be written.
        let _ = self.cache.load().await;
        loop {
            if let Some((about, length, readable)) = self.cache.open(key).await {
                metrics::media_request("hit");
                let begun = Begun { about, length: Some(length), readable };
                return Ok(watch::channel(Stage::Whole(Arc::new(begun), length)).1);
            }
            if let Some((refusal, until)) = self.failed.get(&key).await
                && Instant::now() < until
            {
                metrics::media_request("failed");
                return Err(refusal);
            }
            let mut running = self.running();
            if let Some(stage) = running.get(&key) {
                metrics::media_request("joined");
                return Ok(stage.clone());
            }
            if self.cache.has(key) {
                // It has become whole since it was looked for.
                continue;
            }
            metrics::media_request("miss");
            let (sender, stage) = watch::channel(Stage::Asking);
            running.insert(key, stage.clone());
            let (inner, medium) = (self.clone(), medium.clone());
            // It goes on when nobody waits for it any more: who gave up asks again.
            tokio::spawn(async move { inner.fetch(key, &medium, sender).await });
            return Ok(stage);
        }
    }

    async fn fetch(&self, key: Key, medium: &Medium, stage: watch::Sender<Stage>) {
        let _running = Running { inner: self, key };
        let Err(refusal) = self.fetch_to(key, medium, &stage).await else { return };
        tracing::info!(server = %medium.server, code = refusal.code(), %refusal, "a file could not be fetched");
        let again = if refusal.errcode() == "M_TOO_LARGE" { TOO_LARGE_AGAIN } else { NOT_AGAIN };
        // What fails here may be mended at once.
        if !refusal.is_failure() {
            self.failed.insert(key, (refusal.clone(), Instant::now() + again)).await;
        }
        stage.send_modify(|stage| {
            *stage = match stage {
                Stage::Asking => Stage::Failed(refusal),
                _ => Stage::Broken(refusal),
            }
        });
    }

    async fn fetch_to(&self, key: Key, medium: &Medium, stage: &watch::Sender<Stage>) -> Result<(), Refusal> {
        let server = &medium.server;
        let max = self.context.config.media.max_bytes;
        let too_large = || source::too_large(server, &format!("of more than {max} bytes,"));
        let over = || Refusal::Budget { what: format!("files of {server} that are coming"), retry_after_ms: 5_000 };
        let _turn = self.turn(server).await?;
        let mut coming = source::ask(&self.context, medium).await?;
        if coming.length.is_some_and(|length| length > max) || coming.at_least > max {
            return Err(too_large());
        }
        let mut held = self.bytes.hold(&[server.as_str()]);
        if let Some(length) = coming.length
            && !held.grow(usize::try_from(length).unwrap_or(usize::MAX))
        {
            return Err(over());
        }
        let failed = |error: std::io::Error| Refusal::Internal(format!("a file of media could not be kept: {error}"));
        let mut writing = self.cache.begin(key, &coming.about, coming.length).await.map_err(failed)?;
        let about = coming.about.clone();
        let begun = Begun { about: about.clone(), length: coming.length, readable: writing.readable() };
        let begun = Arc::new(begun);
        let mut total: u64 = 0;
        stage.send_replace(Stage::Coming(begun.clone(), total));
        while let Some(bytes) = coming.next().await.map_err(|error| source::refusal(error, medium))? {
            let size = bytes.len();
            total = total.saturating_add(u64::try_from(size).unwrap_or(u64::MAX));
            if total > max {
                return Err(too_large());
            }
            if (coming.length.is_none() && !held.grow(size)) || !writing.write(bytes).await.map_err(failed)? {
                return Err(over());
            }
            stage.send_replace(Stage::Coming(begun.clone(), total));
        }
        if coming.length.is_some_and(|length| length != total) {
            return Err(broken(server));
        }
        writing.finish(&about).await.map_err(failed)?;
        stage.send_replace(Stage::Whole(begun, total));
        Ok(())
    }

    /// Waits until one more file may be fetched from a server.
    async fn turn(&self, server: &ServerName) -> Result<(OwnedSemaphorePermit, OwnedSemaphorePermit), Refusal> {
        let of_one = {
            let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
            let known = servers.get(server).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                servers.retain(|_, turns| turns.strong_count() > 0);
                let new = Arc::new(Semaphore::new(FETCHES_OF_ONE));
                servers.insert(server.to_owned(), Arc::downgrade(&new));
                new
            })
        };
        let turns = async { Ok((of_one.acquire_owned().await?, self.fetches.clone().acquire_owned().await?)) };
        match tokio::time::timeout(TURN, turns).await {
            Ok(turns) => turns.map_err(|error: tokio::sync::AcquireError| Refusal::Internal(error.to_string())),
            Err(_) => Err(Refusal::Budget { what: format!("fetches from {server} at once"), retry_after_ms: 5_000 }),
        }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<Key, watch::Receiver<Stage>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A fetch that is among the running ones until this is dropped, also by a panic.
struct Running<'a> {
    inner: &'a Inner,
    key: Key,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.inner.running().remove(&self.key);
    }
}

fn silent(server: &ServerName) -> Refusal {
    Refusal::Declined {
        server: server.to_string(),
        status: 504,
        errcode: "M_UNKNOWN".into(),
        error: format!("the file has not begun to come within {} s", PATIENCE.as_secs()).into(),
        retry_after_ms: None,
    }
}

fn broken(server: &ServerName) -> Refusal {
    Refusal::Remote { server: server.to_string(), problem: "the file broke off".to_owned() }
}
