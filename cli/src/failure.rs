//! How a command ends when it does not end well: one line, and an exit code.

use std::{
    ffi::OsString,
    io::{self, Write},
    process::ExitCode,
};

/// Results of commands.
pub type Outcome<T = ()> = Result<T, Failure>;

/// Why a command stopped.
#[derive(Debug)]
pub enum Failure {
    /// The command line makes no sense: exit code 2.
    Usage(String),
    /// Something went wrong while running: exit code 1.
    Runtime(String),
    /// Results cannot be printed: exit code 1, and no use in going on.
    Output(String),
    /// What went wrong was told when it did: exit code 1, no message.
    Told,
    /// Ctrl+C: exit code 130, no message.
    Interrupted,
    /// Whoever read standard output has gone: nothing to say, and nobody to say it to.
    BrokenPipe,
    /// What clap prints in full: help and version (exit code 0), help for lack of a command (2).
    Help(clap::Error),
}

impl Failure {
    /// A usage error.
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure::Usage(message.into())
    }

    /// A run-time error.
    pub fn runtime(message: impl Into<String>) -> Failure {
        Failure::Runtime(message.into())
    }

    /// A run-time error of the operating system about `what`.
    pub fn io(what: &str, error: &io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::BrokenPipe,
            _ => Failure::Runtime(format!("{what}: {error}")),
        }
    }

    /// Prints what there is to say, and gives the process's exit code.
    pub fn report(self) -> ExitCode {
        let (message, code) = match self {
            Failure::Usage(message) => (message, 2),
            Failure::Runtime(message) | Failure::Output(message) => (message, 1),
            Failure::Told => return ExitCode::FAILURE,
            Failure::Interrupted => return ExitCode::from(130),
            Failure::BrokenPipe => return ExitCode::SUCCESS,
            Failure::Help(e) => {
                // Nothing can be done about a reader that has gone.
                let _ = e.print();
                return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
            }
        };
        let _ = writeln!(io::stderr(), "error: {}", one_line(&message));
        ExitCode::from(code)
    }
}

/// Errors while printing results.
impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        match Failure::io("standard output", &e) {
            Failure::Runtime(message) => Failure::Output(message),
            other => other,
        }
    }
}

impl From<lory_runtime::Error> for Failure {
    fn from(e: lory_runtime::Error) -> Failure {
        Failure::Runtime(e.to_string())
    }
}

impl From<lory_models::Error> for Failure {
    fn from(e: lory_models::Error) -> Failure {
        Failure::Runtime(e.to_string())
    }
}

/// `message` on one line: names and texts from files may contain anything, also sequences that
/// would command the terminal.
pub fn one_line(message: &str) -> String {
    let mut line = String::with_capacity(message.len());
    for c in message.chars() {
        match c {
            '\n' | '\r' | '\t' => line.push(' '),
            c if c.is_control() => line.extend(c.escape_default()),
            c => line.push(c),
        }
    }
    line
}

/// clap explains over several lines; here it is one, without the usage block that `--help` shows.
pub fn from_clap(e: clap::Error, args: &[OsString]) -> Failure {
    use clap::error::ErrorKind;
    if let Some(message) = negative(&e, args).or_else(|| not_text(&e, args)) {
        return Failure::usage(message);
    }
    if matches!(
        e.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    ) {
        return Failure::Help(e);
    }
    let text = e.render().to_string();
    let lines = text.lines().map(str::trim).take_while(|l| !l.starts_with("Usage:"));
    let lines: Vec<&str> =
        lines.filter(|l| !l.is_empty() && !l.starts_with("For more information")).collect();
    let message = lines.join(" ").replace(" tip: ", "; tip: ");
    let message = message.strip_prefix("error: ").unwrap_or(&message);
    Failure::usage(format!("{message} (try --help)"))
}

/// clap takes a negative number for an unknown flag, and does not say whose value it was to be.
fn negative(e: &clap::Error, args: &[OsString]) -> Option<String> {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let Some(ContextValue::String(unknown)) = e.get(ContextKind::InvalidArg) else { return None };
    let mut pairs =
        args.iter().zip(args.iter().skip(1)).filter_map(|(a, b)| Some((a.to_str()?, b.to_str()?)));
    let (flag, value) = pairs.find(|(flag, value)| {
        flag.starts_with('-') && value.starts_with(unknown.as_str()) && value.parse::<f64>().is_ok()
    })?;
    let known = e.kind() == ErrorKind::UnknownArgument && unknown.starts_with('-');
    known.then(|| format!("{flag} {value}: a negative number has no meaning here (try --help)"))
}

/// clap does not say which argument is no text.
fn not_text(e: &clap::Error, args: &[OsString]) -> Option<String> {
    if e.kind() != clap::error::ErrorKind::InvalidUtf8 {
        return None;
    }
    let at = args.iter().position(|arg| arg.to_str().is_none())?;
    let flag = args.get(at.checked_sub(1)?)?.to_string_lossy();
    let (flag, value) = (flag.starts_with('-').then(|| format!("{flag} ")), args.get(at)?.to_string_lossy());
    Some(format!("{}{value}: is not UTF-8; convert it first", flag.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_stay_on_one_line_and_command_no_terminal() {
        assert_eq!(one_line("a\nb\r\tc"), "a b  c");
        assert_eq!(one_line("key \u{1b}[31m é"), "key \\u{1b}[31m é");
    }
}
