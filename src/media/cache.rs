//! Files on disk, within a budget: those that nobody has asked for longest go first. A file begins with a line of what is said
//! about it, so that the folder alone says what is in it, and there is nothing that a crash could leave wrong: what is not whole has
//! another name, and goes at the next start.

use std::collections::{BTreeMap, HashMap};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use nix::sys::statvfs::statvfs;
use nix::unistd::AccessFlags;
use rand::RngCore as _;
use rand::rngs::OsRng;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::about::About;
use crate::admin::metrics::{self, METRICS};
use crate::clock::SharedClock;
use crate::identity::Medium;

/// What the names of whole files end with, and of others.
const WHOLE: &str = "file";
const PART: &str = "part";
/// How long the first line of a file may be, in bytes.
const MAX_LINE: u64 = 8 << 10;
/// How much is left on the disk at least, in bytes: the database may be on it.
const SPARE: u64 = 256 << 20;

/// By what a file is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key([u8; 32]);

impl Key {
    pub(super) fn of(medium: &Medium) -> Self {
        Self(Sha256::digest(format!("{}\n{}", medium.home.as_str(), medium.uri())).into())
    }

    fn name(self) -> String {
        data_encoding::HEXLOWER.encode(&self.0)
    }
}

/// The files of one gateway.
pub(super) struct Cache {
    folder: PathBuf,
    budget: u64,
    clock: SharedClock,
    state: Mutex<State>,
    loaded: tokio::sync::OnceCell<()>,
}

#[derive(Default)]
struct State {
    files: HashMap<Key, Kept>,
    /// The files by when they were used last.
    order: BTreeMap<u64, Key>,
    /// What whole files have together, and what those have that are coming.
    bytes: u64,
    coming: u64,
    uses: u64,
    /// When something could not be written last, and why.
    problem: Option<(Instant, String)>,
}

struct Kept {
    bytes: u64,
    used: u64,
    gone: CancellationToken,
}

/// How much there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Whole files.
    pub files: u64,
    /// The bytes of all.
    pub bytes: u64,
}

/// A file that can be read, whole or as far as it has come.
#[derive(Clone)]
pub(super) struct Readable {
    file: Arc<File>,
    /// Where it begins in the file on disk.
    begin: u64,
    gone: CancellationToken,
}

/// A file that is coming.
pub(super) struct Writing {
    cache: Arc<Cache>,
    key: Key,
    path: PathBuf,
    file: Arc<File>,
    readable: Readable,
    /// How much of it is on disk.
    bytes: u64,
    kept: bool,
}

impl Cache {
    pub(super) fn new(folder: PathBuf, budget: u64, clock: SharedClock) -> Arc<Self> {
        Arc::new(Self { folder, budget, clock, state: Mutex::default(), loaded: tokio::sync::OnceCell::new() })
    }

    /// Makes the folder, and finds what is in it; once.
    pub(super) async fn load(self: &Arc<Self>) -> io::Result<()> {
        let load = || {
            let cache = self.clone();
            async move { blocking(move || cache.read_folder()).await }
        };
        self.loaded.get_or_try_init(load).await.map(drop).map_err(|error| self.failed(error))
    }

    fn read_folder(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.folder)? {
            let entry = entry?;
            let name = entry.file_name().into_string().unwrap_or_default();
            if name.ends_with(&format!(".{PART}")) {
                let _ = std::fs::remove_file(entry.path());
            } else if let (Some(key), Ok(about)) = (parse(&name), entry.metadata()) {
                found.push((about.modified().unwrap_or(SystemTime::UNIX_EPOCH), key, about.len()));
            }
        }
        found.sort();
        let count = found.len();
        let mut state = self.state();
        for (_, key, bytes) in found {
            state.insert(key, bytes);
        }
        let too_many = state.make_room(0, self.budget);
        drop(state);
        self.remove(&too_many);
        tracing::info!(folder = %self.folder.display(), files = count, "the files of media that are kept");
        Ok(())
    }

    /// A whole file, what is said about it, and its length. It counts as used.
    pub(super) async fn open(self: &Arc<Self>, key: Key) -> Option<(About, u64, Readable)> {
        let gone = self.state().touch(key)?;
        let (path, cache) = (self.path(key, WHOLE), self.clone());
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(self.clock.now_ms()).unwrap_or(0));
        let opened = blocking(move || {
            let file = File::options().read(true).write(true).open(path)?;
            let (about, begin, length) = read_line(&file)?;
            if file.metadata()?.len() != begin.saturating_add(length) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not as long as it says"));
            }
            // Only the order in which files go at the next start hangs on it.
            let _ = file.set_modified(now);
            Ok((about, length, Readable { file: Arc::new(file), begin, gone }))
        });
        match opened.await {
            Ok(opened) => Some(opened),
            Err(error) => {
                tracing::warn!(%error, "a file of media that was kept cannot be read");
                cache.forget(key);
                None
            }
        }
    }

    /// Whether there is a whole file.
    pub(super) fn has(&self, key: Key) -> bool {
        self.state().files.contains_key(&key)
    }

    /// Begins a file, of so many bytes as far as that is known.
    pub(super) async fn begin(self: &Arc<Self>, key: Key, about: &About, length: Option<u64>) -> io::Result<Writing> {
        self.load().await?;
        let mut random = [0; 8];
        OsRng.fill_bytes(&mut random);
        let path = self.path(key, &format!("{}.{PART}", data_encoding::HEXLOWER.encode(&random)));
        // Its length is written when it is known, into the space that is left for it.
        let line = line(about, 0)?;
        let (folder, at) = (self.folder.clone(), path.clone());
        let opened = blocking(move || {
            let disk = statvfs(&folder)?;
            let left = disk.blocks_available().saturating_mul(disk.fragment_size());
            if left < SPARE.saturating_add(length.unwrap_or(0)) {
                let problem = format!("{} MiB are left on the disk, too little for files of media", left >> 20);
                return Err(io::Error::new(io::ErrorKind::StorageFull, problem));
            }
            let mut file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&at)?;
            let begin = u64::try_from(line.len()).unwrap_or(u64::MAX);
            let written = file.write_all(line.as_bytes());
            if written.is_err() {
                let _ = std::fs::remove_file(&at);
            }
            written.map(|()| (Arc::new(file), begin))
        });
        let (file, begin) = opened.await.map_err(|error| self.failed(error))?;
        let readable = Readable { file: file.clone(), begin, gone: CancellationToken::new() };
        Ok(Writing { cache: self.clone(), key, path, file, readable, bytes: 0, kept: false })
    }

    /// Forgets a file: whoever reads it is cut off.
    pub(super) fn forget(&self, key: Key) -> bool {
        let known = self.state().remove(key);
        if known {
            self.remove(&[key]);
        }
        known
    }

    pub(super) fn figures(&self) -> Figures {
        let state = self.state();
        let files = u64::try_from(state.files.len()).unwrap_or(u64::MAX);
        Figures { files, bytes: state.bytes.saturating_add(state.coming) }
    }

    /// How long ago something could not be written last, and why.
    pub(super) fn problem(&self) -> Option<(Duration, String)> {
        self.state().problem.as_ref().map(|(at, problem)| (at.elapsed(), problem.clone()))
    }

    fn failed(&self, error: io::Error) -> io::Error {
        tracing::error!(folder = %self.folder.display(), %error, "a file of media could not be kept");
        self.state().problem = Some((Instant::now(), error.to_string()));
        error
    }

    fn path(&self, key: Key, ending: &str) -> PathBuf {
        self.folder.join(format!("{}.{ending}", key.name()))
    }

    fn remove(&self, keys: &[Key]) {
        for key in keys {
            let path = self.path(*key, WHOLE);
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "a file of media could not be removed");
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is inside is whole between any two statements, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn insert(&mut self, key: Key, bytes: u64) -> CancellationToken {
        self.remove(key);
        self.uses = self.uses.saturating_add(1);
        let gone = CancellationToken::new();
        self.files.insert(key, Kept { bytes, used: self.uses, gone: gone.clone() });
        self.order.insert(self.uses, key);
        self.bytes = self.bytes.saturating_add(bytes);
        gone
    }

    fn touch(&mut self, key: Key) -> Option<CancellationToken> {
        let kept = self.files.get_mut(&key)?;
        self.order.remove(&kept.used);
        self.uses = self.uses.saturating_add(1);
        kept.used = self.uses;
        self.order.insert(kept.used, key);
        Some(kept.gone.clone())
    }

    fn remove(&mut self, key: Key) -> bool {
        let Some(kept) = self.files.remove(&key) else { return false };
        self.order.remove(&kept.used);
        self.bytes = self.bytes.saturating_sub(kept.bytes);
        kept.gone.cancel();
        true
    }

    /// Takes out files until there is room for so much more. Who reads one of them is cut off: else whoever reads slowly could keep
    /// what nobody else wants.
    fn make_room(&mut self, more: u64, budget: u64) -> Vec<Key> {
        let mut out = Vec::new();
        while self.bytes.saturating_add(self.coming).saturating_add(more) > budget {
            let Some((_, key)) = self.order.first_key_value() else { break };
            let key = *key;
            self.remove(key);
            out.push(key);
        }
        out
    }
}

impl Readable {
    /// Some of it, from `at` on.
    pub(super) async fn read(&self, at: u64, length: usize) -> io::Result<Bytes> {
        if self.gone.is_cancelled() {
            return Err(io::Error::other("it is kept no longer"));
        }
        let (file, at) = (self.file.clone(), self.begin.saturating_add(at));
        let read = move || {
            let mut bytes = vec![0; length];
            let read = file.read_at(&mut bytes, at)?;
            bytes.truncate(read);
            Ok(Bytes::from(bytes))
        };
        blocking(read).await
    }
}

impl Writing {
    pub(super) fn readable(&self) -> Readable {
        self.readable.clone()
    }

    /// Adds to it; false when there is no room.
    pub(super) async fn write(&mut self, bytes: Bytes) -> io::Result<bool> {
        let more = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let out = {
            let mut state = self.cache.state();
            let out = state.make_room(more, self.cache.budget);
            if state.bytes.saturating_add(state.coming).saturating_add(more) <= self.cache.budget {
                state.coming = state.coming.saturating_add(more);
                self.bytes = self.bytes.saturating_add(more);
            } else {
                drop(state);
                self.cache.remove(&out);
                return Ok(false);
            }
            out
        };
        let (file, cache) = (self.file.clone(), self.cache.clone());
        let at = self.readable.begin.saturating_add(self.bytes.saturating_sub(more));
        let write = move || {
            cache.remove(&out);
            file.write_all_at(&bytes, at)
        };
        blocking(write).await.map_err(|error| self.cache.failed(error))?;
        metrics::media_bytes("fetched", more);
        Ok(true)
    }

    /// It is whole: from now on it is found.
    pub(super) async fn finish(mut self, about: &About) -> io::Result<()> {
        let (line, file) = (line(about, self.bytes)?, self.file.clone());
        let (from, to) = (self.path.clone(), self.cache.path(self.key, WHOLE));
        let finish = move || {
            file.write_all_at(line.as_bytes(), 0)?;
            file.sync_data()?;
            std::fs::rename(from, to)
        };
        blocking(finish).await.map_err(|error| self.cache.failed(error))?;
        let mut state = self.cache.state();
        state.insert(self.key, self.bytes.saturating_add(self.readable.begin));
        METRICS.media_kept_bytes.set(i64::try_from(state.bytes).unwrap_or(i64::MAX));
        drop(state);
        self.kept = true;
        Ok(())
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let mut state = self.cache.state();
        state.coming = state.coming.saturating_sub(self.bytes);
        drop(state);
        if !self.kept {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The first line of a file; as long for every length.
fn line(about: &About, length: u64) -> io::Result<String> {
    let about = serde_json::to_string(about)?;
    Ok(format!("{length:020} {about}\n"))
}

/// What the first line says, how long it is, and how long it says that the rest is.
fn read_line(file: &File) -> io::Result<(About, u64, u64)> {
    let wrong = |problem: &str| io::Error::new(io::ErrorKind::InvalidData, problem.to_owned());
    let mut text = Vec::new();
    BufReader::new(io::Read::take(file, MAX_LINE)).read_until(b'\n', &mut text)?;
    let begin = u64::try_from(text.len()).unwrap_or(u64::MAX);
    let text = String::from_utf8(text).map_err(|_| wrong("its first line is no text"))?;
    let (length, about) = text.split_once(' ').ok_or_else(|| wrong("it has no first line"))?;
    let length = length.parse().map_err(|_| wrong("its first line has no length"))?;
    Ok((serde_json::from_str(about)?, begin, length))
}

fn parse(name: &str) -> Option<Key> {
    let (key, ending) = name.split_once('.')?;
    let bytes = data_encoding::HEXLOWER.decode(key.as_bytes()).ok()?;
    Some(Key(bytes.try_into().ok()?)).filter(|_| ending == WHOLE)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Whether files can be kept in a folder, or could when it is made at the start: how much space there is, in bytes. Nothing is changed.
pub(crate) fn usable(folder: &Path) -> io::Result<u64> {
    let there = match folder.metadata() {
        Ok(found) if found.is_dir() => folder,
        Ok(_) => return Err(io::Error::new(io::ErrorKind::NotADirectory, "it is no folder")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // As `DirBuilder` makes all that is missing.
            folder.ancestors().skip(1).find(|parent| parent.is_dir()).ok_or(error)?
        }
        Err(error) => return Err(error),
    };
    nix::unistd::access(there, AccessFlags::W_OK | AccessFlags::X_OK)?;
    let disk = statvfs(there)?;
    Ok(disk.blocks_available().saturating_mul(disk.fragment_size()).saturating_sub(SPARE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::identity::Side;

    fn medium(id: &str) -> Medium {
        Medium { home: Side::Matrix, server: "hs.example".try_into().unwrap(), media_id: id.to_owned() }
    }

    fn about() -> About {
        About { content_type: "image/png".to_owned(), file_name: Some("é.png".to_owned()) }
    }

    fn cache(folder: &Path, budget: u64) -> Arc<Cache> {
        Cache::new(folder.join("media"), budget, ManualClock::new(1_700_000_000_000))
    }

    async fn keep(cache: &Arc<Cache>, id: &str, bytes: &'static [u8]) -> bool {
        let mut writing = cache.begin(Key::of(&medium(id)), &about(), None).await.unwrap();
        for chunk in bytes.chunks(100) {
            if !writing.write(Bytes::from_static(chunk)).await.unwrap() {
                return false;
            }
        }
        writing.finish(&about()).await.unwrap();
        true
    }

    async fn read(cache: &Arc<Cache>, id: &str) -> Option<Vec<u8>> {
        cache.load().await.unwrap();
        let (said, length, readable) = cache.open(Key::of(&medium(id))).await?;
        assert_eq!(said, about());
        let bytes = readable.read(0, 10_000).await.unwrap();
        assert_eq!(u64::try_from(bytes.len()).unwrap(), length);
        Some(bytes.to_vec())
    }

    #[tokio::test]
    async fn what_is_whole_survives_a_restart_and_what_is_not_goes() {
        let directory = tempfile::tempdir().unwrap();
        let first = cache(directory.path(), 10_000);
        assert!(keep(&first, "a", b"one").await);
        let mut half = first.begin(Key::of(&medium("b")), &about(), None).await.unwrap();
        assert!(half.write(Bytes::from_static(b"half")).await.unwrap());
        assert_eq!(half.readable().read(1, 2).await.unwrap(), "al", "it is read while it comes");
        assert!(read(&first, "b").await.is_none());
        // As a crash leaves it.
        std::mem::forget(half);
        let again = cache(directory.path(), 10_000);
        assert_eq!(read(&again, "a").await.unwrap(), b"one");
        assert!(read(&again, "b").await.is_none());
        assert_eq!(std::fs::read_dir(directory.path().join("media")).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn the_file_that_was_used_longest_ago_goes_first_and_the_budget_holds() {
        let directory = tempfile::tempdir().unwrap();
        let kept = cache(directory.path(), 2_000);
        for id in ["a", "b", "c"] {
            assert!(keep(&kept, id, &[7; 500]).await);
        }
        assert!(read(&kept, "a").await.is_some());
        let (_, _, reading) = kept.open(Key::of(&medium("b"))).await.unwrap();
        assert!(read(&kept, "a").await.is_some() && read(&kept, "c").await.is_some());
        assert!(keep(&kept, "d", &[7; 500]).await);
        let left = ["a", "b", "c", "d"].map(|id| kept.has(Key::of(&medium(id))));
        assert_eq!(left, [true, false, true, true]);
        assert!(reading.read(0, 1).await.is_err(), "who reads what goes is cut off");
        assert!(kept.figures().bytes <= 2_000);
        assert!(!keep(&kept, "e", &[7; 2_001]).await, "more than there can be");
        let none = kept.figures();
        assert!(none.files == 0 && none.bytes == 0, "{none:?}");
        assert!(keep(&kept, "f", &[7; 500]).await);
        // A smaller budget holds from the next start on.
        let smaller = cache(directory.path(), 100);
        assert!(read(&smaller, "f").await.is_none());
    }

    #[tokio::test]
    async fn a_file_that_somebody_spoiled_is_not_given() {
        let directory = tempfile::tempdir().unwrap();
        let kept = cache(directory.path(), 10_000);
        for (id, text) in [("a", "short".as_bytes()), ("b", &[0xff; 100]), ("c", b"00000000000000000003 {}\nabc")] {
            assert!(keep(&kept, id, b"whole").await);
            std::fs::write(kept.path(Key::of(&medium(id)), WHOLE), text).unwrap();
            assert!(read(&kept, id).await.is_none() && !kept.has(Key::of(&medium(id))), "{id}");
        }
        assert_eq!(kept.figures(), Figures::default());
    }

    #[tokio::test]
    async fn a_folder_that_cannot_be_made_is_told_of() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("media"), "a file").unwrap();
        let kept = cache(directory.path(), 10_000);
        assert!(kept.begin(Key::of(&medium("a")), &about(), None).await.is_err());
        assert!(kept.problem().is_some());
        assert!(usable(&directory.path().join("media")).is_err());
        assert!(usable(&directory.path().join("other/inner")).is_ok());
        assert!(!directory.path().join("other").exists());
    }
}
