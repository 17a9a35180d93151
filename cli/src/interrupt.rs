//! Ctrl+C: the first one stops the answer that is being made, any other ends the program, and so does whoever tells it to
//! end (SIGTERM) or closes its terminal (SIGHUP).

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use lory_models::adapter::publish::remove_own_unfinished;

use crate::{
    failure::{Failure, Outcome},
    terminal::Modes,
};

/// What the next Ctrl+C does; `None` ends the program.
type Action = Option<Box<dyn FnOnce() + Send>>;

static ACTION: Mutex<Action> = Mutex::new(None);

/// Where files are being written that must not outlive the program half-written.
static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn action() -> MutexGuard<'static, Action> {
    ACTION.lock().unwrap_or_else(PoisonError::into_inner)
}

fn folders() -> MutexGuard<'static, Vec<PathBuf>> {
    FOLDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has unfinished files in `folder` removed when Ctrl+C ends the program before they could be finished or dropped.
pub fn leave_nothing_in(folder: &Path) {
    let mut all = folders();
    if !all.iter().any(|f| f == folder) {
        all.push(folder.to_owned());
    }
}

/// Takes over Ctrl+C, SIGTERM and SIGHUP for the process; no other thread may run yet.
pub fn install() -> Outcome {
    let modes = Modes::found();
    #[cfg(unix)]
    end_when_told(modes.clone())?;
    let handler = move || {
        let act = action().take();
        match act {
            Some(act) => act(),
            None => end(130, &modes),
        }
    };
    ctrlc::set_handler(handler).map_err(|e| Failure::runtime(format!("Ctrl+C cannot be handled: {e}")))
}

/// Ends the program, where nothing is dropped, without a trace.
fn end(code: i32, modes: &Modes) -> ! {
    folders().iter().for_each(|folder| remove_own_unfinished(folder));
    modes.restore();
    std::process::exit(code)
}

/// Has SIGTERM and SIGHUP end the program with their own codes, whatever it is doing, unless it was started to ignore them, as by `nohup`.
#[cfg(unix)]
fn end_when_told(modes: Modes) -> Outcome {
    use nix::sys::signal::{SigSet, Signal};
    let fail = |e: std::io::Error| Failure::runtime(format!("signals cannot be handled: {e}"));
    let told: SigSet =
        [Signal::SIGTERM, Signal::SIGHUP].into_iter().filter(|s| !is_ignored(*s as u32)).collect();
    // Threads have the signals blocked that their parent has: the one that waits gets them.
    told.thread_block().map_err(|e| fail(e.into()))?;
    let wait = move || {
        if let Ok(signal) = told.wait() {
            end(128 + signal as i32, &modes);
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map_err(fail)?;
    Ok(())
}

/// Whether a signal is ignored, as far as the system tells.
#[cfg(unix)]
fn is_ignored(signal: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|m| m >> (signal - 1) & 1 == 1)
}

/// While this lives, the first Ctrl+C runs an action instead of ending the program.
pub struct Guard(());

/// Lets the next Ctrl+C run `on_interrupt`; the one after it ends the program.
pub fn catch(on_interrupt: impl FnOnce() + Send + 'static) -> Guard {
    *action() = Some(Box::new(on_interrupt));
    Guard(())
}

impl Drop for Guard {
    fn drop(&mut self) {
        *action() = None;
    }
}
