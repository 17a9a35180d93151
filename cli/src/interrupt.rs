//! Ctrl+C: the first one stops the answer that is being made, any other ends the program.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use lory_models::adapter::publish::remove_own_unfinished;

use crate::failure::{Failure, Outcome};

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

/// Takes over Ctrl+C (SIGINT, SIGTERM, SIGHUP) for the process.
pub fn install() -> Outcome {
    let handler = || {
        let act = action().take();
        match act {
            Some(act) => act(),
            None => {
                folders().iter().for_each(|folder| remove_own_unfinished(folder));
                std::process::exit(130)
            }
        }
    };
    ctrlc::set_handler(handler).map_err(|e| Failure::runtime(format!("Ctrl+C cannot be handled: {e}")))
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
