//! Files that appear whole or not at all.

use std::{
    fs::{self, File},
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
    // A rename would put a file where a device or a folder was.
    if fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        let message = "is there already and is no regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message).into());
    }
    let (mut file, temporary) = create_beside(path)?;
    let cleanup = RemoveOnDrop(&temporary);
    let value = write(&mut file)?;
    file.sync_all()?;
    drop(file);
    match existing {
        Existing::Replace => fs::rename(&temporary, path)?,
        Existing::Keep => link_new(&temporary, path)?,
    }
    drop(cleanup);
    sync_folder(path);
    Ok(value)
}

struct RemoveOnDrop<'a>(&'a Path);

impl Drop for RemoveOnDrop<'_> {
    fn drop(&mut self) {
        // After a rename there is nothing left to remove.
        let _ = fs::remove_file(self.0);
    }
}

fn create_beside(path: &Path) -> io::Result<(File, PathBuf)> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_string_lossy();
    for attempt in 0..1000 {
        let temporary = path.with_file_name(format!(".{name}.{}-{attempt}.tmp", std::process::id()));
        match File::options().read(true).write(true).create_new(true).open(&temporary) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            file => return Ok((file?, temporary)),
        }
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("too many unfinished files beside {name}")))
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
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}
