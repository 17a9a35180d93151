//! What the terminal can do, and whether to use it.

use std::io::{IsTerminal, Write, stderr, stdin, stdout};

/// When to use colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always.
    #[value(alias = "always")]
    On,
    /// Never.
    #[value(alias = "never")]
    Off,
}

/// Escape sequences, or nothing.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    on: bool,
}

impl Style {
    /// For text on standard output.
    pub fn stdout(choice: ColorChoice) -> Style {
        Style { on: wanted(choice, stdout().is_terminal()) }
    }

    /// For text on standard error.
    pub fn stderr(choice: ColorChoice) -> Style {
        Style { on: wanted(choice, stderr().is_terminal()) }
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// For what is beside the point.
    pub fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    /// For the place where the user types.
    pub fn prompt(self, text: &str) -> String {
        self.wrap("1;32", text)
    }
}

fn wanted(choice: ColorChoice, is_terminal: bool) -> bool {
    match choice {
        ColorChoice::On => true,
        ColorChoice::Off => false,
        ColorChoice::Auto => {
            // Read as no-color.org asks: set to anything but the empty string.
            let refused = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
            is_terminal && !refused && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
        }
    }
}

/// How the terminal treats keys, as the program found it; an editor of lines changes that.
#[derive(Clone)]
pub struct Modes {
    #[cfg(unix)]
    found: Option<nix::sys::termios::Termios>,
}

#[cfg(unix)]
impl Modes {
    /// Those of the terminal on standard input, if there is one.
    pub fn found() -> Modes {
        Modes { found: nix::sys::termios::tcgetattr(stdin()).ok() }
    }

    /// Brings them back, where they have changed and are this program's to change.
    pub fn restore(&self) {
        use nix::{
            sys::termios::{SetArg, tcgetattr, tcsetattr},
            unistd::{getpgrp, tcgetpgrp},
        };
        let Some(found) = &self.found else { return };
        let in_front = tcgetpgrp(stdin()).is_ok_and(|group| group == getpgrp());
        if in_front && tcgetattr(stdin()).is_ok_and(|now| now != *found) {
            // There is nothing more that could be done.
            let _ = tcsetattr(stdin(), SetArg::TCSANOW, found);
            // The editor has pastes bracketed, and the cursor is behind its prompt.
            let _ = writeln!(stdout(), "\x1b[?2004l");
        }
    }
}

#[cfg(not(unix))]
impl Modes {
    /// The system's editor of lines looks after them itself.
    pub fn found() -> Modes {
        Modes {}
    }

    /// Nothing to bring back.
    pub fn restore(&self) {}
}

/// Whether a person sits at both ends, so that a line can be edited.
pub fn is_interactive() -> bool {
    stdin().is_terminal() && stdout().is_terminal()
}

/// `n` bytes in a unit that people read.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_readable() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 30), "3.0 GiB");
    }

    #[test]
    fn styles_can_be_forced() {
        assert_eq!(Style { on: false }.dim("x"), "x");
        assert_eq!(Style { on: true }.dim("x"), "\x1b[2mx\x1b[0m");
        assert!(wanted(ColorChoice::On, false) && !wanted(ColorChoice::Off, true));
    }
}
