//! Result files that appear whole or not at all.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

use crate::failure::{Failure, Outcome};

/// A file being written: under a temporary name beside its place until [`Output::finish`].
pub struct Output {
    path: PathBuf,
    to: BufWriter<Target>,
}

enum Target {
    /// Renamed at the end.
    Replace(NamedTempFile),
    /// A device or a FIFO: it is written to, not replaced.
    Direct(File),
}

impl Output {
    /// Starts to write what will be `path`. An existing file stays until `finish`.
    pub fn create(path: &Path) -> Outcome<Output> {
        let fail = |e: io::Error| Failure::io(&path.to_string_lossy(), &e);
        let target = match fs::metadata(path) {
            Ok(m) if m.is_dir() => {
                let message = format!("{}: is a directory; name the file to write", path.display());
                return Err(Failure::runtime(message));
            }
            Ok(m) if !m.is_file() => Target::Direct(File::options().write(true).open(path).map_err(fail)?),
            _ => Target::Replace(temporary(path).map_err(fail)?),
        };
        Ok(Output { path: path.into(), to: BufWriter::with_capacity(1 << 20, target) })
    }

    /// Puts the file in its place.
    pub fn finish(mut self) -> Outcome {
        let path = self.path;
        self.to.flush().map_err(|e| Failure::io(&path.to_string_lossy(), &e))?;
        match self.to.into_inner() {
            Ok(Target::Replace(file)) => {
                file.persist(&path).map_err(|e| Failure::io(&path.to_string_lossy(), &e.error))?;
                Ok(())
            }
            Ok(Target::Direct(_)) => Ok(()),
            Err(e) => Err(Failure::io(&path.to_string_lossy(), e.error())),
        }
    }

    /// An error of writing here, with the file's name.
    pub fn failed(path: &Path, error: &io::Error) -> Failure {
        Failure::io(&path.to_string_lossy(), error)
    }
}

fn temporary(path: &Path) -> io::Result<NamedTempFile> {
    // Beside its place: a rename within one file system is atomic.
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".lory-").suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // As for any new file, the umask decides; temporary files would be private.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
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
        match self {
            Target::Replace(f) => f.write(bytes),
            Target::Direct(f) => f.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Target::Replace(f) => f.flush(),
            Target::Direct(f) => f.flush(),
        }
    }
}

impl Seek for Target {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match self {
            Target::Replace(f) => f.seek(to),
            Target::Direct(f) => f.seek(to),
        }
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
        assert!(matches!(Output::create(&lost), Err(Failure::Runtime(m)) if m.contains("x.npy")));
    }
}
