//! Files that appear whole or not at all.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

/// What to do with a file that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Take its place; whoever has it open or mapped keeps the old content.
    Replace,
    /// Fail with [`io::ErrorKind::AlreadyExists`]: two writers of one segment must not both win.
    Keep,
}

/// Writes a file beside `path`, brings it to the disk and then gives it its name, so that no
/// reader ever sees half of it. Nothing is left behind when `write` fails.
pub fn publish<T, E: From<io::Error>>(
    path: &Path,
    existing: Existing,
    write: impl FnOnce(&mut File) -> Result<T, E>,
) -> Result<T, E> {
    let mut new = Unfinished::create(path)?;
    let value = write(new.file())?;
    new.finish(existing)?;
    Ok(value)
}

/// A file that is being written, under another name beside its place; dropped, it is gone.
///
/// While it is written it is locked, so that [`remove_abandoned`] can tell what a program that was killed has left.
#[derive(Debug)]
pub struct Unfinished {
    file: File,
    path: PathBuf,
    temporary: PathBuf,
}

impl Unfinished {
    /// Starts what will be `path`. A file that is there stays until [`Unfinished::finish`].
    ///
    /// # Errors
    /// A place where a folder or a device stands, or where no file can be written.
    pub fn create(path: &Path) -> io::Result<Unfinished> {
        // A rename would put a file where a device or a folder was.
        if fs::metadata(path).is_ok_and(|m| !m.is_file()) {
            let message = "is there already and is no regular file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let prefix = temporary_prefix(path)?;
        for attempt in 0..1000 {
            let temporary = path.with_file_name(format!("{prefix}{attempt}{TEMPORARY}"));
            let file = match File::options().read(true).write(true).create_new(true).open(&temporary) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                file => file?,
            };
            // Someone may have taken it for an abandoned one before it was locked.
            let taken = matches!(file.try_lock(), Err(TryLockError::WouldBlock)) || !is_at(&file, &temporary);
            if !taken {
                return Ok(Unfinished { file, path: path.into(), temporary });
            }
        }
        let message = format!("too many unfinished files beside {}", path.display());
        Err(io::Error::new(io::ErrorKind::AlreadyExists, message))
    }

    /// What is written to.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Brings it to the disk and gives it its name.
    ///
    /// # Errors
    /// A disk that is full; with [`Existing::Keep`] a name that is taken.
    pub fn finish(self, existing: Existing) -> io::Result<()> {
        self.file.sync_all()?;
        match existing {
            Existing::Replace => fs::rename(&self.temporary, &self.path)?,
            Existing::Keep => link_new(&self.temporary, &self.path)?,
        }
        sync_folder(&self.path);
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After a rename there is nothing left to remove.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// How the names of unfinished files end.
pub const TEMPORARY: &str = ".lory-tmp";

/// How the names of this process' unfinished files for `path` begin; a number and [`TEMPORARY`] follow.
///
/// # Errors
/// A path that ends in no name.
pub fn temporary_prefix(path: &Path) -> io::Result<String> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
    Ok(format!(".{}.{}-", name.to_string_lossy(), std::process::id()))
}

/// The process that a name made with [`temporary_prefix`] is of.
fn writer(name: &str) -> Option<u32> {
    let (_, last) = name.strip_prefix('.')?.strip_suffix(TEMPORARY)?.rsplit_once('.')?;
    let (process, number) = last.split_once('-')?;
    process.parse().ok().filter(|_| number.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// Whether the file's name still leads to it.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |m: fs::Metadata| (m.dev(), m.ino());
    matches!((file.metadata().map(place), fs::metadata(path).map(place)), (Ok(a), Ok(b)) if a == b)
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.exists()
}

/// Removes what programs that were killed while they wrote have left in a folder, whatever was to become of it.
/// Files that are still being written, by this process or another, stay: they are locked.
pub fn remove_abandoned(folder: &Path) {
    for path in unfinished(folder, |_| true) {
        // Nobody is told of a failure: it is not what the caller came for.
        if let Ok(file) = File::open(&path)
            && file.try_lock().is_ok()
        {
            remove(&path);
        }
    }
}

/// Removes this process' own unfinished files in a folder, for the moment before it ends without dropping anything.
pub fn remove_own_unfinished(folder: &Path) {
    unfinished(folder, |process| process == std::process::id()).iter().for_each(|path| remove(path));
}

fn unfinished(folder: &Path, of: impl Fn(u32) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let ours = entries.filter(|e| {
        let kind = e.file_type().is_ok_and(|t| t.is_file() || t.is_dir());
        kind && e.file_name().to_str().and_then(writer).is_some_and(&of)
    });
    ours.map(|e| e.path()).collect()
}

fn remove(path: &Path) {
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

/// A hard link fails where the name is taken, at once and for good; file systems without links
/// get a check and a rename, with a short gap between.
fn link_new(temporary: &Path, path: &Path) -> io::Result<()> {
    match fs::hard_link(temporary, path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(e),
        Err(_) if path.try_exists()? => Err(io::ErrorKind::AlreadyExists.into()),
        Err(_) => fs::rename(temporary, path),
        Ok(()) => Ok(()),
    }
}

/// The new name itself reaches the disk with its folder. Not every system can open one.
fn sync_folder(path: &Path) {
    if let Ok(folder) = File::open(folder_of(path)) {
        let _ = folder.sync_all();
    }
}

/// The folder that a path is in.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
