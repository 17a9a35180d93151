//! Result files that appear whole or not at all.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use lory_models::adapter::{
    Existing,
    publish::{Unfinished, folder_of, remove_abandoned},
};

use crate::{
    failure::{Failure, Outcome},
    interrupt,
};

/// A file being written: under a temporary name beside its place until [`Output::finish`].
pub struct Output {
    path: PathBuf,
    to: BufWriter<Target>,
}

enum Target {
    /// Takes its name at the end.
    Whole(Unfinished),
    /// A device or a FIFO: it is written to, not replaced.
    Direct(File),
}

impl Target {
    fn file(&mut self) -> &mut File {
        match self {
            Target::Whole(unfinished) => unfinished.file(),
            Target::Direct(file) => file,
        }
    }
}

impl Output {
    /// Starts to write what will be `path`. An existing file stays until `finish`.
    pub fn create(path: &Path) -> Outcome<Output> {
        let fail = |e: io::Error| Output::failed(path, &e);
        let target = match fs::metadata(path) {
            Ok(m) if m.is_dir() => {
                let message = format!("{}: is a directory; name the file to write", path.display());
                return Err(Failure::runtime(message));
            }
            Ok(m) if !m.is_file() => Target::Direct(File::options().write(true).open(path).map_err(fail)?),
            _ => {
                remove_abandoned(place_of(path)?);
                Target::Whole(Unfinished::create(path).map_err(fail)?)
            }
        };
        Ok(Output { path: path.into(), to: BufWriter::with_capacity(1 << 20, target) })
    }

    /// Puts the file in its place.
    pub fn finish(self) -> Outcome {
        let path = self.path;
        // This flushes; the error keeps what could not be written.
        let target = self.to.into_inner().map_err(|e| Output::failed(&path, e.error()))?;
        match target {
            Target::Whole(file) => file.finish(Existing::Replace).map_err(|e| Output::failed(&path, &e)),
            Target::Direct(_) => Ok(()),
        }
    }

    /// An error of writing here, with the file's name.
    pub fn failed(path: &Path, error: &io::Error) -> Failure {
        Failure::io(&path.to_string_lossy(), error)
    }
}

/// The folder that `path` is to stand in; nothing unfinished stays there when Ctrl+C ends the program.
pub fn place_of(path: &Path) -> Outcome<&Path> {
    let folder = folder_of(path);
    if !folder.is_dir() {
        let (path, folder) = (path.display(), folder.display());
        return Err(Failure::runtime(format!("{path}: there is no folder {folder}; make it first")));
    }
    interrupt::leave_nothing_in(folder);
    Ok(folder)
}

/// Makes the folder that several files go into, and as for [`place_of`].
pub fn make_folder(path: &Path) -> Outcome {
    if path.exists() && !path.is_dir() {
        return Err(Failure::runtime(format!("{}: is a file; name a folder", path.display())));
    }
    fs::create_dir_all(path).map_err(|e| Output::failed(path, &e))?;
    interrupt::leave_nothing_in(path);
    Ok(())
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.to.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

impl Seek for Output {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.to.seek(to)
    }
}

impl Write for Target {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file().flush()
    }
}

impl Seek for Target {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file().seek(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_file_stays_until_the_new_one_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "old").unwrap();
        let mut out = Output::create(&path).unwrap();
        out.write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        out.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        drop(Output::create(&path).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "an abandoned file leaves nothing");
    }

    #[test]
    fn a_directory_and_a_missing_folder_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        assert!(
            matches!(Output::create(dir.path()), Err(Failure::Runtime(m)) if m.contains("is a directory"))
        );
        let lost = dir.path().join("none/x.npy");
        let named = |m: &str| m.contains("x.npy: there is no folder") && m.contains("none; make it first");
        assert!(matches!(Output::create(&lost), Err(Failure::Runtime(m)) if named(&m)));
    }
}
