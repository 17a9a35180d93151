//! Runs the built program as a user would.

// Each test file uses its own part of this.
#![allow(dead_code, unused_imports)]

#[path = "../../../tests/src/data.rs"]
mod data;

pub use data::{fixture, shared_data};

use std::{
    io::{Read, Write},
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

/// Far beyond any run in these tests: only a program that hangs takes so long.
const HUNG: Duration = Duration::from_secs(120);

/// What a run left behind.
#[derive(Debug)]
pub struct Ran {
    /// The exit code; a signal has none and fails the test.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Asserts the exit code and that standard error is one line `error: …`, and returns it.
    #[track_caller]
    pub fn one_line_error(&self, code: i32) -> &str {
        assert_eq!(self.code, code, "{self:?}");
        let line = self.stderr.strip_suffix('\n').unwrap_or(&self.stderr);
        assert!(line.starts_with("error: ") && !line.contains('\n'), "{self:?}");
        assert!(!line.contains("panicked"), "{self:?}");
        assert!(!line.chars().any(char::is_control), "{self:?}");
        line
    }

    /// Asserts that a piped chat went on past lines that failed, and returns standard output.
    #[track_caller]
    pub fn went_on(&self) -> &str {
        assert_eq!(self.code, 1, "{self:?}");
        assert!(self.stderr.contains("error: ") && !self.stderr.contains("panicked"), "{self:?}");
        &self.stdout
    }

    /// Asserts success, and returns standard output.
    #[track_caller]
    pub fn success(&self) -> &str {
        assert_eq!(self.code, 0, "{self:?}");
        &self.stdout
    }
}

/// The program with these arguments, and no environment that would change what it prints.
pub fn command<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lory"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env_remove("LORY_ISA").env_remove("COLUMNS");
    command
}

/// Runs to the end.
#[track_caller]
pub fn lory<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Ran {
    finish(command(args).spawn().expect("the program starts"))
}

/// Runs to the end with `input` on standard input.
#[track_caller]
pub fn lory_with_input<S: AsRef<std::ffi::OsStr>>(args: &[S], input: &str) -> Ran {
    let mut child = command(args).stdin(Stdio::piped()).spawn().expect("the program starts");
    // A program that ended early does not read all of it.
    let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    finish(child)
}

/// Kills a program that hangs; dropped, it stops watching.
pub fn watch(child: &Child) -> mpsc::Sender<()> {
    let id = child.id();
    let (watched, wait) = mpsc::channel::<()>();
    thread::spawn(move || {
        if wait.recv_timeout(HUNG) == Err(mpsc::RecvTimeoutError::Timeout) {
            send(id, libc::SIGKILL);
        }
    });
    watched
}

/// Waits for the end; a program that hangs is killed, and a signal fails the test.
#[track_caller]
pub fn finish(child: Child) -> Ran {
    let _watched = watch(&child);
    let Output { status, stdout, stderr } = child.wait_with_output().expect("the program can be waited for");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is UTF-8");
    let (stdout, stderr) = (text(stdout), text(stderr));
    let code = status.code().unwrap_or_else(|| panic!("ended by {status}: {stderr}"));
    Ran { code, stdout, stderr }
}

/// Sends a signal.
pub fn signal(child: &Child, signal: i32) {
    send(child.id(), signal);
}

/// Sends a signal to any process.
pub fn send(process: u32, signal: i32) {
    // SAFETY: kill only passes numbers to the system.
    let sent = unsafe { libc::kill(process as i32, signal) };
    assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
}

/// Has a program heed SIGHUP, also where these tests were started to ignore it.
#[cfg(unix)]
pub fn heed_hangups(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    let heed = || {
        // SAFETY: the call may be made between fork and exec.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
        Ok(())
    };
    // SAFETY: it allocates nothing and takes no lock.
    unsafe { command.pre_exec(heed) };
}

/// The program with files that cannot grow beyond `limit` bytes, as if the disk were full.
pub fn command_with_limit<S: AsRef<std::ffi::OsStr>>(args: &[S], limit: u64) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = command(args);
    let limited = move || {
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
        // SAFETY: both calls may be made between fork and exec; `limit` lives through the second. Without the first
        // the system would end the program instead of failing its write.
        let set = unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            libc::setrlimit(libc::RLIMIT_FSIZE, &limit)
        };
        if set == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: it allocates nothing and takes no lock.
    unsafe { command.pre_exec(limited) };
    command
}

/// Reads until `text` has come, and returns all that came.
#[track_caller]
pub fn read_until(from: &mut impl Read, text: &str) -> String {
    let mut got = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&got).contains(text) {
        match from.read(&mut byte).expect("the pipe can be read") {
            0 => panic!("the output ended before `{text}`: {}", String::from_utf8_lossy(&got)),
            _ => got.push(byte[0]),
        }
    }
    String::from_utf8_lossy(&got).into_owned()
}

/// A path as an argument.
pub fn arg(path: &Path) -> String {
    path.to_str().expect("test paths are UTF-8").to_owned()
}
