//! Files in memory: the only place that maps, and the only one that opens model files.
//!
//! # What mapping promises
//!
//! A mapped file ([`Loading::Map`]) is read by the operating system when a page is first touched,
//! and its pages are shared with every other process that maps it. In exchange, the file must stay
//! as it is: while it is mapped, nobody may shorten it or write into it. Replacing it by renaming
//! another file over it is harmless (the mapping keeps the old contents); so is deleting it.
//!
//! All lengths are checked against the file's length once, when it is opened. If the file is cut
//! short afterwards, touching a page past the new end raises SIGBUS, which ends the process: no
//! library can turn that into an error without taking over the host's signal handlers.
//! [`File::check_unchanged`] finds out before pages are touched, as far as length and time of
//! modification tell, and costs one system call. The engine asks it about the model's files at the start of
//! every request, about the files of adapters when it reads one and before every step that uses one: what was
//! changed between steps ends the requests that need it with an error, and nobody else's. A file that is cut
//! while a step reads it can still raise SIGBUS. Copying single adapters would not change that, since their bases
//! and the model are read from their mappings in the same step.
//! Where the file is not under the host's control (a network share, a download in place), use
//! [`Loading::Read`], the command line's `--no-mmap`: the file is copied into memory and nothing
//! that happens to it later matters.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use lory_models::gguf::{self, Gguf};
use memmap2::Mmap;

use crate::{Error, Result};

/// How a file comes into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Loading {
    /// Mapped: pages are read when touched and shared between processes.
    #[default]
    Map,
    /// Copied into memory as a whole; later changes of the file do not matter.
    Read,
}

/// Told the bytes read so far and in all; `false` gives up.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// Bytes read between two calls of a [`Progress`].
const CHUNK: u64 = 4 << 20;

const EMPTY: &str = "the file is empty";

/// A file's bytes, mapped or read, or bytes that never were a file.
pub struct File {
    name: Arc<str>,
    bytes: Bytes,
}

enum Bytes {
    Memory(Vec<u8>),
    Owner(Box<dyn AsRef<[u8]> + Send + Sync>),
    Mapped { map: Mmap, handle: fs::File, modified: Option<SystemTime> },
}

impl File {
    /// Opens a regular, non-empty file.
    ///
    /// # Errors
    /// [`Error::Io`] if it does not exist or cannot be read, and for directories, FIFOs, sockets,
    /// devices and empty files. Never waits for a FIFO's other end.
    pub fn open(path: &Path, loading: Loading) -> Result<File> {
        File::open_with(path, loading, &mut |_, _| true)
    }

    /// [`File::open`] with progress. Mapping reads nothing yet: `progress` is told once, at the end.
    pub fn open_with(path: &Path, loading: Loading, progress: Progress<'_>) -> Result<File> {
        File::from_handle(open_regular(path)?, &path.to_string_lossy(), loading, progress)
    }

    /// Takes over an open file (a descriptor from elsewhere becomes one by `fs::File::from`);
    /// `name` is what errors call it. It is read from its start, wherever its cursor stands.
    pub fn from_handle(
        mut handle: fs::File,
        name: &str,
        loading: Loading,
        progress: Progress<'_>,
    ) -> Result<File> {
        // Looked at again: the path may name something else by now.
        let metadata = handle.metadata().map_err(|e| Error::io(name, e))?;
        regular(name, &metadata)?;
        let len = metadata.len();
        if len == 0 {
            return Err(Error::io(name, EMPTY));
        }
        let bytes = match loading {
            Loading::Map => {
                // SAFETY: the handle is a regular file, read-only here; that nobody else cuts it or
                // writes into it while mapped is the promise this module's page asks of the host.
                let map = unsafe { Mmap::map(&handle) }.map_err(|e| Error::io(name, e))?;
                if map.len() as u64 != len {
                    return Err(changed(name, len, map.len() as u64));
                }
                report(progress, name, len, len)?;
                Bytes::Mapped { map, handle, modified: metadata.modified().ok() }
            }
            Loading::Read => {
                use std::io::{Seek, SeekFrom};
                handle.seek(SeekFrom::Start(0)).map_err(|e| Error::io(name, e))?;
                Bytes::Memory(read(&mut handle, name, len, progress)?)
            }
        };
        Ok(File { name: name.into(), bytes })
    }

    /// Bytes that the caller has already; `name` is what errors call them.
    pub fn from_memory(bytes: Vec<u8>, name: &str) -> File {
        File { name: name.into(), bytes: Bytes::Memory(bytes) }
    }

    /// Bytes that somebody else owns and keeps as they are; nothing is copied.
    pub fn from_owner(owner: Box<dyn AsRef<[u8]> + Send + Sync>, name: &str) -> File {
        File { name: name.into(), bytes: Bytes::Owner(owner) }
    }

    /// Reads `len` bytes from a source that is no file.
    ///
    /// # Errors
    /// [`Error::Io`] if it has fewer or more bytes, fails, or there is no memory for them;
    /// [`Error::Aborted`] if `progress` gives up.
    pub fn from_reader(reader: &mut dyn Read, name: &str, len: u64, progress: Progress<'_>) -> Result<File> {
        if len == 0 {
            return Err(Error::io(name, EMPTY));
        }
        Ok(File::from_memory(read(reader, name, len, progress)?, name))
    }

    /// The name given or the path opened.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Whether the bytes are mapped rather than owned.
    pub fn is_mapped(&self) -> bool {
        matches!(self.bytes, Bytes::Mapped { .. })
    }

    /// Compares a mapped file's length and time of modification with those at its opening.
    /// Bytes in memory are always unchanged.
    ///
    /// # Errors
    /// [`Error::Io`] with both lengths if it was changed: its pages must not be touched any more.
    pub fn check_unchanged(&self) -> Result<()> {
        let Bytes::Mapped { map, handle, modified } = &self.bytes else { return Ok(()) };
        let now = handle.metadata().map_err(|e| Error::io(&self.name, e))?;
        if now.len() != map.len() as u64 {
            return Err(changed(&self.name, map.len() as u64, now.len()));
        }
        if now.modified().ok() != *modified {
            return Err(Error::io(&self.name, "was written to since it was mapped; open it again"));
        }
        Ok(())
    }
}

impl File {
    /// Says that all of a mapped file will be read again and again, as weights are: the operating system may then read
    /// it in pages of 2 MiB. A hint; where it is taken (Linux, for pages that are not in memory yet, on file systems
    /// with large folios), reading from memory is faster since far fewer addresses are translated.
    fn expect_all(&self) {
        if let Bytes::Mapped { map, .. } = &self.bytes {
            huge_pages(map.as_ptr(), map.len());
        }
    }
}

impl AsRef<[u8]> for File {
    fn as_ref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Memory(v) => v,
            Bytes::Owner(owner) => (**owner).as_ref(),
            Bytes::Mapped { map, .. } => map,
        }
    }
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = if self.is_mapped() { "mapped" } else { "in memory" };
        write!(f, "{} ({} bytes {how})", self.name, self.as_ref().len())
    }
}

/// A parsed model and the files it lies in, for [`File::check_unchanged`].
#[derive(Debug)]
pub struct OpenGguf {
    /// Keys and tensors.
    pub gguf: Gguf,
    /// Its files, one per shard.
    pub files: Vec<Arc<File>>,
}

impl OpenGguf {
    /// [`File::check_unchanged`] for every file.
    pub fn check_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(|f| f.check_unchanged())
    }
}

/// Opens a GGUF file; if its name is one of a sharded model's (`…-00001-of-00003.gguf`), all of them.
///
/// # Errors
/// As [`File::open`] and [`Gguf::parse`]; a shard that is missing is named.
pub fn open_gguf(path: &Path, loading: Loading) -> Result<OpenGguf> {
    open_gguf_with(path, loading, &mut |_, _| true)
}

/// [`open_gguf`] with progress over all shards together.
///
/// # Errors
/// Also [`Error::Aborted`].
pub fn open_gguf_with(path: &Path, loading: Loading, progress: Progress<'_>) -> Result<OpenGguf> {
    // Names that are not UTF-8 cannot follow the pattern; they are single files.
    let paths: Vec<PathBuf> = match path.to_str().and_then(gguf::shard_name) {
        Some(shard) if shard.count > 1 => shard.siblings().map(PathBuf::from).collect(),
        _ => vec![path.into()],
    };
    // A shard that is missing is reported when its turn comes.
    let sizes: Vec<u64> = paths.iter().map(|p| fs::metadata(p).map_or(0, |m| m.len())).collect();
    let total = sizes.iter().fold(0, |sum: u64, size| sum.saturating_add(*size));
    let mut before = 0;
    let mut files = Vec::new();
    for (path, size) in paths.iter().zip(&sizes) {
        let file = File::open_with(path, loading, &mut |done, _| progress(before + done, total))?;
        files.push(Arc::new(file));
        before += size;
    }
    parse(files)
}

/// Parses files that are open already: one, or all shards of one model in order.
///
/// # Errors
/// [`Error::Io`] for one without a byte; those of [`Gguf::parse`].
pub fn parse(files: Vec<Arc<File>>) -> Result<OpenGguf> {
    if let Some(empty) = files.iter().find(|f| (***f).as_ref().is_empty()) {
        return Err(Error::io(&empty.name, EMPTY));
    }
    files.iter().for_each(|f| f.expect_all());
    let shards = files.iter().map(|f| (f.name.clone(), f.clone() as lory_models::Bytes)).collect();
    Ok(OpenGguf { gguf: Gguf::parse(shards)?, files })
}

fn changed(name: &str, was: u64, is: u64) -> Error {
    Error::io(name, format!("had {was} bytes when it was opened and has {is} now; open it again"))
}

fn regular(name: &str, metadata: &fs::Metadata) -> Result<()> {
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Err(Error::io(name, "is a directory; name the file in it"));
    }
    if !kind.is_file() {
        return Err(Error::io(name, format!("is {}, not a regular file", special(kind))));
    }
    Ok(())
}

/// Opens a regular file, and never waits for the other end of a FIFO.
pub(crate) fn open_regular(path: &Path) -> Result<fs::File> {
    let name = path.to_string_lossy();
    // Looked at before it is opened: opening alone has effects on some devices.
    let metadata = fs::metadata(path).map_err(|e| Error::io(&name, e))?;
    regular(&name, &metadata)?;
    open_without_waiting(path).map_err(|e| Error::io(&name, e))
}

#[cfg(unix)]
fn special(kind: fs::FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    match kind {
        k if k.is_fifo() => "a FIFO",
        k if k.is_socket() => "a socket",
        k if k.is_char_device() || k.is_block_device() => "a device",
        _ => "something special",
    }
}

#[cfg(not(unix))]
fn special(_: fs::FileType) -> &'static str {
    "something special"
}

/// Opening a FIFO waits for a writer; should one have taken the file's place, this does not.
#[cfg(unix)]
fn open_without_waiting(path: &Path) -> std::io::Result<fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

#[cfg(not(unix))]
fn open_without_waiting(path: &Path) -> std::io::Result<fs::File> {
    fs::File::open(path)
}

/// Asks for pages of 2 MiB in the pages that lie wholly within.
#[cfg(target_os = "linux")]
fn huge_pages(start: *const u8, len: usize) {
    let page = 4096;
    let skip = start.align_offset(page);
    if len >= skip + (2 << 20) {
        // SAFETY: a hint that changes no contents, on whole pages of one allocation. That it may fail is part of it.
        unsafe {
            libc::madvise(
                start.wrapping_add(skip).cast_mut().cast(),
                (len - skip) / page * page,
                libc::MADV_HUGEPAGE,
            )
        };
    }
}

#[cfg(not(target_os = "linux"))]
fn huge_pages(_: *const u8, _: usize) {}

fn report(progress: Progress<'_>, name: &str, done: u64, total: u64) -> Result<()> {
    match progress(done, total) {
        true => Ok(()),
        false => Err(Error::Aborted { file: name.into(), done, total }),
    }
}

fn read(reader: &mut dyn Read, name: &str, len: u64, progress: Progress<'_>) -> Result<Vec<u8>> {
    let fail = |e: &dyn std::fmt::Display| Error::io(name, e);
    let mut bytes = Vec::new();
    let size = usize::try_from(len).map_err(|e| fail(&e))?;
    bytes.try_reserve_exact(size).map_err(|_| fail(&format!("no memory for its {len} bytes")))?;
    huge_pages(bytes.as_ptr(), size);
    while (bytes.len() as u64) < len {
        let have = bytes.len() as u64;
        reader.take(CHUNK.min(len - have)).read_to_end(&mut bytes).map_err(|e| fail(&e))?;
        if bytes.len() as u64 == have {
            return Err(changed(name, len, have));
        }
        report(progress, name, bytes.len() as u64, len)?;
    }
    // One byte more than promised shows that the file is growing.
    if reader.read(&mut [0]).map_err(|e| fail(&e))? > 0 {
        return Err(changed(name, len, len + 1));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn model(path: &Path, no: u16, count: u16) {
        let mut w = gguf::Writer::new();
        w.set("split.no", no).set("split.count", count).set("split.tensors.count", i32::from(count));
        let name = format!("t{no}");
        w.tensor(&name, lory_kernels::QuantType::F32, &[4]);
        let mut out = w.start(fs::File::create(path).unwrap()).unwrap();
        out.tensor(&name, &[no as u8; 16]).unwrap();
        out.finish().unwrap();
    }

    fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn mapped_and_read_give_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        model(&path, 0, 1);
        let want = fs::read(&path).unwrap();
        for loading in [Loading::Map, Loading::Read] {
            let f = File::open(&path, loading).unwrap();
            assert_eq!(f.as_ref(), want);
            assert_eq!(f.is_mapped(), loading == Loading::Map);
            f.check_unchanged().unwrap();
            let open = open_gguf(&path, loading).unwrap();
            assert_eq!(open.gguf.tensor("t0").unwrap().rows(), 1);
            open.check_unchanged().unwrap();
        }
        let f = File::from_memory(want.clone(), "given");
        assert_eq!((f.as_ref(), &**f.name()), (&*want, "given"));
        parse(vec![Arc::new(f)]).unwrap();
    }

    #[test]
    fn a_handle_is_read_from_its_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, b"0123456789").unwrap();
        for loading in [Loading::Map, Loading::Read] {
            let mut handle = fs::File::open(&path).unwrap();
            handle.read_exact(&mut [0; 4]).unwrap();
            assert_eq!(
                File::from_handle(handle, "fd", loading, &mut |_, _| true).unwrap().as_ref(),
                b"0123456789"
            );
        }
    }

    #[test]
    fn what_is_no_file_is_refused_by_its_kind() {
        let dir = tempfile::tempdir().unwrap();
        for loading in [Loading::Map, Loading::Read] {
            assert!(message(File::open(dir.path(), loading)).contains("is a directory"));
            let empty = dir.path().join("empty");
            fs::write(&empty, b"").unwrap();
            assert!(message(File::open(&empty, loading)).ends_with("the file is empty"));
            let missing = message(File::open(&dir.path().join("none"), loading));
            assert!(missing.contains("none") && missing.contains("No such file"), "{missing}");
        }
    }

    #[test]
    fn readers_report_progress_and_can_be_given_up() {
        let want: Vec<u8> = (0..9 << 20).map(|i| (i % 251) as u8).collect();
        let len = want.len() as u64;
        let mut seen = Vec::new();
        let mut track = |done, total| {
            seen.push((done, total));
            true
        };
        let file = File::from_reader(&mut &want[..], "reader", len, &mut track).unwrap();
        assert_eq!(file.as_ref(), want);
        assert_eq!(seen, [(CHUNK, len), (2 * CHUNK, len), (len, len)]);
        let stop = |done, _| done < 2 * CHUNK;
        let given_up = File::from_reader(&mut &want[..], "reader", len, &mut { stop });
        assert!(message(given_up).starts_with(&format!("reader: given up by the host after {}", 2 * CHUNK)));
        for wrong in [len - 1, len + 1] {
            let m = message(File::from_reader(&mut &want[..], "reader", wrong, &mut |_, _| true));
            assert!(m.contains(&format!("had {wrong} bytes")), "{m}");
        }
        let huge = message(File::from_reader(&mut &want[..], "reader", u64::MAX, &mut |_, _| true));
        assert!(huge.contains("no memory for its"), "{huge}");
    }

    #[test]
    fn foreign_bytes_are_not_copied() {
        let owner: Box<dyn AsRef<[u8]> + Send + Sync> = Box::new(&b"0123456789"[..]);
        let at = (*owner).as_ref().as_ptr();
        let file = File::from_owner(owner, "host");
        assert_eq!(file.as_ref().as_ptr(), at);
        file.check_unchanged().unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn fifos_sockets_and_devices_are_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        assert!(message(File::open(&fifo, Loading::Map)).ends_with("is a FIFO, not a regular file"));
        // Also when the FIFO takes the file's place between the look and the opening.
        let handle = open_without_waiting(&fifo).unwrap();
        assert!(
            message(File::from_handle(handle, "f", Loading::Read, &mut |_, _| true)).contains("is a FIFO")
        );

        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(message(File::open(&socket, Loading::Map)).contains("is a socket"));
        assert!(message(File::open(Path::new("/dev/null"), Loading::Read)).contains("is a device"));
    }

    #[test]
    fn a_change_after_mapping_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, [1; 100]).unwrap();
        let mapped = File::open(&path, Loading::Map).unwrap();
        let read = File::open(&path, Loading::Read).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(40).unwrap();
        let m = message(mapped.check_unchanged());
        assert!(m.contains("had 100 bytes") && m.contains("has 40 now"), "{m}");
        read.check_unchanged().unwrap();
        assert_eq!(read.as_ref(), [1; 100]);
        file.set_len(100).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert!(message(mapped.check_unchanged()).contains("was written to"));
    }

    #[test]
    fn a_file_replaced_by_renaming_keeps_its_old_contents() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("f"), dir.path().join("g"));
        fs::write(&path, [1; 100]).unwrap();
        let mapped = File::open(&path, Loading::Map).unwrap();
        fs::File::create(&other).unwrap().write_all(&[2; 7]).unwrap();
        fs::rename(&other, &path).unwrap();
        mapped.check_unchanged().unwrap();
        assert_eq!(mapped.as_ref(), [1; 100]);
    }

    #[test]
    fn shards_open_together_whichever_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = |i| dir.path().join(format!("m-{i:05}-of-00003.gguf"));
        (1..=3).for_each(|i| model(&path(i), i - 1, 3));
        for i in 1..=3 {
            let open = open_gguf(&path(i), Loading::Map).unwrap();
            assert_eq!(open.files.len(), 3);
            for no in 0..3u8 {
                let t = open.gguf.tensor(&format!("t{no}")).unwrap();
                assert_eq!(t.matrix().bytes(), [no; 16]);
                assert!(t.file().ends_with(&format!("{:05}-of-00003.gguf", no + 1)));
            }
        }
        fs::remove_file(path(2)).unwrap();
        let m = message(open_gguf(&path(1), Loading::Map));
        assert!(m.contains("m-00002-of-00003.gguf"), "{m}");
        // A shard alone, under another name, says what it needs.
        let alone = dir.path().join("alone.gguf");
        fs::copy(path(1), &alone).unwrap();
        let m = message(open_gguf(&alone, Loading::Map));
        assert!(m.contains("split.count") && m.contains("one shard of several"), "{m}");
    }
}
