//! Where the host's models lie: its memory, its function, its descriptor.

use std::{
    ffi::c_void,
    fs,
    io::{self, Read},
};

use crate::{
    callbacks::{User, lory_release_fn},
    status::{Failure, Result, lory_status::*},
};

/// Memory of the host, given back when the last user is gone.
pub(crate) struct Lent {
    pub(crate) data: *const u8,
    pub(crate) size: usize,
    pub(crate) release: lory_release_fn,
    pub(crate) user: User,
}

// SAFETY: the bytes are read only; the header says that `release` may be called on any thread.
unsafe impl Send for Lent {}
// SAFETY: as above.
unsafe impl Sync for Lent {}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        // NULL, as a container without elements may give it, is no place to read from.
        if self.size == 0 {
            return &[];
        }
        // SAFETY: checked before anybody reads; it stays as it is until `release`.
        unsafe { std::slice::from_raw_parts(self.data, self.size) }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(release) = self.release {
            // SAFETY: the host's function with the host's pointers, once.
            unsafe { release(self.user.0, self.data.cast(), self.size) };
        }
    }
}

/// Reads through the host's function.
pub(crate) struct HostReader {
    pub(crate) function: unsafe extern "C-unwind" fn(*mut c_void, u64, *mut c_void, usize) -> i64,
    pub(crate) user: User,
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

impl Read for HostReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.size - self.offset).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        // SAFETY: the host's function with the host's pointer; `want` bytes can be written.
        let got = unsafe { (self.function)(self.user.0, self.offset, buffer.as_mut_ptr().cast(), want) };
        match usize::try_from(got) {
            Ok(got) if got <= want => {
                self.offset += got as u64;
                Ok(got)
            }
            Ok(got) => Err(io::Error::other(format!("the read callback claims {got} of {want} bytes"))),
            Err(_) => Err(io::Error::other(format!("the read callback gave up with {got}"))),
        }
    }
}

/// A descriptor of our own beside the host's.
#[cfg(unix)]
pub(crate) fn duplicate(fd: i32, name: &str) -> Result<fs::File> {
    use std::os::fd::BorrowedFd;
    if fd < 0 {
        return Err(Failure::new(LORY_E_ARGUMENT, format!("{name}: descriptor {fd} is negative")));
    }
    // SAFETY: not -1, and only borrowed for the call that duplicates it; a number that is no open
    // descriptor gives an error there.
    let own = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
    Ok(own.map_err(|e| lory_runtime::Error::io(name, format!("descriptor {fd}: {e}")))?.into())
}

#[cfg(not(unix))]
pub(crate) fn duplicate(_: i32, name: &str) -> Result<fs::File> {
    Err(Failure::new(LORY_E_UNSUPPORTED, format!("{name}: there are no descriptors on this system")))
}
