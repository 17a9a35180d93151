//! Bars on standard error for what takes long; nothing where that is no terminal.

use std::{
    io::{IsTerminal, Write as _, stderr},
    sync::mpsc::{self, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use lory_runtime::Watch;

/// A prompt that is read in less time shows no bar.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between two looks at a prompt.
const REFRESH: Duration = Duration::from_millis(100);

/// A bar for bytes of which `total` will come; 0 if that is not known.
pub fn bytes_bar(total: u64) -> ProgressBar {
    let (bar, template) = match total {
        0 => (ProgressBar::new_spinner(), "{spinner} {bytes} written"),
        n => (ProgressBar::new(n), "{bar:40} {bytes} of {total_bytes}, {eta} left"),
    };
    styled(bar, template)
}

/// A bar for `total` things, named in the plural.
#[cfg(feature = "demo")]
pub fn counting_bar(total: u64, things: &str) -> ProgressBar {
    styled(ProgressBar::new(total), &format!("{{bar:40}} {{pos}} of {{len}} {things}, {{eta}} left"))
}

/// A count of things of which nobody knows how many will come, named in the plural.
pub fn counter(things: &str) -> ProgressBar {
    styled(ProgressBar::new_spinner(), &format!("{{spinner}} {{pos}} {things}"))
}

/// What is being measured. No thread draws it, and it is drawn between samples: it costs them nothing.
pub struct Measured {
    bar: ProgressBar,
    /// Whether each sample is a line of its own, also where no terminal is.
    lines: bool,
    task: String,
}

impl Measured {
    /// Nothing yet; if `lines`, with a line on the standard error for each sample instead of one that changes.
    pub fn new(lines: bool) -> Measured {
        Measured { bar: styled(ProgressBar::new_spinner(), "{msg}"), lines, task: String::new() }
    }

    /// What the next samples are of.
    pub fn begin(&mut self, task: String) {
        self.task = task;
    }

    /// Which of them comes next.
    pub fn step(&self, thing: &str, n: usize, of: usize) {
        let said = format!("{}, {thing} {n}/{of}", self.task);
        if self.lines {
            // Like any other message: who closed it does not want it.
            let _ = writeln!(stderr(), "{said}");
        } else {
            self.bar.set_message(said);
        }
    }

    /// Prints a result, which must not land behind the line.
    pub fn print<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }

    /// Takes the line away.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

fn styled(bar: ProgressBar, template: &str) -> ProgressBar {
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Shows how far the reading of a prompt has come, until it is dropped.
pub struct Prompt {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Prompt {
    /// Watches a generation whose session has `total` tokens to begin with.
    pub fn watch(watch: Watch, total: usize) -> Prompt {
        let mut prompt = Prompt { stop: None, thread: None };
        if stderr().is_terminal() {
            let (stop, stopped) = mpsc::channel();
            // Without the thread there is no bar, and that is all.
            prompt.thread = thread::Builder::new().spawn(move || show(&watch, total, &stopped)).ok();
            prompt.stop = Some(stop);
        }
        prompt
    }
}

fn show(watch: &Watch, total: usize, stopped: &mpsc::Receiver<()>) {
    if stopped.recv_timeout(PATIENCE) != Err(RecvTimeoutError::Timeout) {
        return;
    }
    let bar = styled(ProgressBar::new(total as u64), "reading {bar:40} {pos} of {len} tokens");
    while stopped.recv_timeout(REFRESH) == Err(RecvTimeoutError::Timeout) {
        let stats = watch.stats();
        bar.set_position((stats.cached_tokens + stats.prompt_tokens).min(total) as u64);
    }
    bar.finish_and_clear();
}

impl Drop for Prompt {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // The bar must be gone before text is written over it.
            let _ = thread.join();
        }
    }
}
