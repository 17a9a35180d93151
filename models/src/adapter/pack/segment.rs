//! Segments beside a pack: `NAME.gguf` grows by `NAME.seg-0001.gguf`, `NAME.seg-0002.gguf` …

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::adapter::publish::folder_of;

/// The file name of a pack's segment `number`, which has at least four digits.
pub fn segment_file_name(pack: &Path, number: u32) -> PathBuf {
    let stem = pack.file_stem().unwrap_or_default().to_string_lossy();
    pack.with_file_name(format!("{stem}.seg-{number:04}.gguf"))
}

/// The number of a segment of `pack`, if `candidate` is the name of one.
pub fn segment_number(pack: &Path, candidate: &Path) -> Option<u32> {
    let stem = pack.file_stem()?.to_str()?;
    let rest = candidate.file_name()?.to_str()?.strip_prefix(stem)?.strip_prefix(".seg-")?;
    let digits = rest.strip_suffix(".gguf")?;
    let number: u32 = digits.parse().ok().filter(|n| *n > 0)?;
    (segment_file_name(pack, number).file_name() == candidate.file_name()).then_some(number)
}

/// The segments beside `pack`, in ascending order. [`open_segments`] opens them.
pub fn segment_files(pack: &Path) -> io::Result<Vec<PathBuf>> {
    let folder = folder_of(pack);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if let Some(number) = segment_number(pack, &path) {
            found.push((number, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Opens the segments beside `pack`, in ascending order, also while another program merges them into it. The pack itself is to
/// be opened **afterwards**: a merge replaces it first and deletes the segments that it took in then, so that segments opened first and a
/// pack opened last always fit together.
///
/// # Errors
/// That of reading the folder, which `unlisted` makes one of the caller's; that of `open`, if the segments are still the
/// same: one that is gone was taken in, and the next list is short of it.
pub fn open_segments<T, E>(
    pack: &Path,
    unlisted: impl Fn(io::Error) -> E,
    open: impl Fn(&Path) -> Result<T, E>,
) -> Result<Vec<T>, E> {
    let mut failed = None;
    loop {
        let listed = segment_files(pack).map_err(&unlisted)?;
        match listed.iter().map(|path| open(path)).collect() {
            Err(_) if failed.as_ref() != Some(&listed) => failed = Some(listed),
            opened => return opened,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_names_go_both_ways() {
        let pack = Path::new("dir/my.pack.gguf");
        let name = segment_file_name(pack, 7);
        assert_eq!(name, Path::new("dir/my.pack.seg-0007.gguf"));
        assert_eq!(segment_number(pack, &name), Some(7));
        // Merging does not start the numbers again: a pack may outlive four digits.
        let name = segment_file_name(pack, 10_000);
        assert_eq!(name, Path::new("dir/my.pack.seg-10000.gguf"));
        assert_eq!(segment_number(pack, &name), Some(10_000));
        for other in [
            "my.pack.seg-7.gguf",
            "my.pack.seg-00007.gguf",
            "my.pack.seg-+007.gguf",
            "my.pack.seg-0000.gguf",
            "my.seg-0001.gguf",
            "my.pack.gguf",
        ] {
            assert_eq!(segment_number(pack, Path::new(other)), None, "{other}");
        }
    }
}
