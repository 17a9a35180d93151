//! Where the user's lines come from: an editor on a terminal, plain lines from a pipe.

use std::{
    fs,
    io::{self, BufRead},
    path::PathBuf,
};

use lory_runtime::Engine;
use rustyline::{
    Cmd, ConditionalEventHandler, Config, Editor, Event, EventContext, EventHandler, KeyEvent, Movement,
    RepeatCount, error::ReadlineError, history::FileHistory,
};

use super::completion::Completion;
use crate::{
    failure::{Failure, Outcome},
    model_flags::note,
    terminal::{Style, is_interactive},
};

/// Begins and ends a message of several lines.
const FENCE: &str = "\"\"\"";

/// What the user entered.
#[derive(Debug, PartialEq)]
pub enum Entry {
    /// A message or a command.
    Text(String),
    /// Ctrl+D, or the end of the pipe.
    End,
    /// Ctrl+C where nothing was typed.
    Interrupt,
}

/// Ctrl+C drops what stands on the line; on an empty one it has its usual meaning.
struct DropLine;

impl ConditionalEventHandler for DropLine {
    fn handle(&self, _: &Event, _: RepeatCount, _: bool, at: &EventContext<'_>) -> Option<Cmd> {
        (!at.line().is_empty()).then_some(Cmd::Kill(Movement::WholeBuffer))
    }
}

/// The source of lines.
pub enum Input {
    /// A person at a terminal.
    Terminal(Box<Editor<Completion, FileHistory>>, Option<PathBuf>),
    /// A pipe or a file.
    Pipe,
}

impl Input {
    /// An editor if both ends are a terminal. `families` are those of the built-in skills, for completion.
    pub fn open(engine: &Engine, families: Vec<String>, style: Style) -> Outcome<Input> {
        if !is_interactive() {
            return Ok(Input::Pipe);
        }
        let fail = |e: ReadlineError| Failure::runtime(format!("the terminal cannot be used: {e}"));
        let config = Config::builder().auto_add_history(false).build();
        let mut editor = Editor::with_config(config).map_err(fail)?;
        editor.bind_sequence(KeyEvent::ctrl('C'), EventHandler::Conditional(Box::new(DropLine)));
        editor.set_helper(Some(Completion::new(engine.clone(), families, style)));
        let history = history_file();
        if let Some(path) = &history {
            // The first time there is none.
            let _ = editor.load_history(path);
        }
        Ok(Input::Terminal(Box::new(editor), history))
    }

    /// Whether a person is being talked to.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Input::Terminal(..))
    }

    /// The next entry; lines between `"""` are one. Ctrl+C is one only the second time in a row, for at the first it may
    /// have been meant for an answer that has just ended.
    pub fn next(&mut self) -> Outcome<Entry> {
        let mut warned = false;
        loop {
            match self.line("> ")? {
                Entry::Interrupt if !warned => {
                    note("Ctrl+C again or Ctrl+D ends");
                    warned = true;
                }
                Entry::Text(line) => match self.message(line)? {
                    // What was typed so far is dropped.
                    Entry::Interrupt => warned = false,
                    entry => return Ok(entry),
                },
                other => return Ok(other),
            }
        }
    }

    /// The entry that begins with this line.
    fn message(&mut self, first: String) -> Outcome<Entry> {
        let mut message = match first.trim_start().strip_prefix(FENCE) {
            None => return Ok(self.remember(first)),
            Some(rest) => rest.to_owned(),
        };
        loop {
            if let Some(whole) = message.trim_end().strip_suffix(FENCE) {
                let whole = whole.trim_matches('\n').to_owned();
                return Ok(self.remember(whole));
            }
            match self.line(". ")? {
                Entry::Text(line) => {
                    message.push('\n');
                    message.push_str(&line);
                }
                Entry::End => return Ok(self.remember(message.trim_matches('\n').to_owned())),
                Entry::Interrupt => return Ok(Entry::Interrupt),
            }
        }
    }

    fn line(&mut self, prompt: &str) -> Outcome<Entry> {
        match self {
            Input::Terminal(editor, _) => match editor.readline(prompt) {
                Ok(line) => Ok(Entry::Text(line)),
                Err(ReadlineError::Eof) => Ok(Entry::End),
                Err(ReadlineError::Interrupted) => Ok(Entry::Interrupt),
                Err(e) => Err(Failure::runtime(format!("the terminal cannot be read: {e}"))),
            },
            Input::Pipe => piped_line(&mut io::stdin().lock()),
        }
    }

    fn remember(&mut self, text: String) -> Entry {
        if let Input::Terminal(editor, history) = self {
            // Losing the history is no reason to end a conversation.
            if !text.trim().is_empty()
                && editor.add_history_entry(&text).is_ok()
                && let Some(path) = history
            {
                let _ = editor.append_history(path);
            }
        }
        Entry::Text(text)
    }
}

/// A line without its end, whatever bytes it has.
fn piped_line(from: &mut impl BufRead) -> Outcome<Entry> {
    let mut bytes = Vec::new();
    from.read_until(b'\n', &mut bytes).map_err(|e| Failure::io("standard input", &e))?;
    if bytes.is_empty() {
        return Ok(Entry::End);
    }
    let line = String::from_utf8_lossy(&bytes);
    let line = line.strip_suffix('\n').unwrap_or(&line);
    Ok(Entry::Text(line.strip_suffix('\r').unwrap_or(line).to_owned()))
}

/// `lory/history` in the user's folder for states (source: the XDG base directory specification).
fn history_file() -> Option<PathBuf> {
    let given = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let states = given("XDG_STATE_HOME")
        .filter(|p| p.is_absolute())
        .or_else(|| given("LOCALAPPDATA"))
        .or_else(|| given("HOME").map(|home| home.join(".local/state")))?;
    let folder = states.join("lory");
    fs::create_dir_all(&folder).ok()?;
    Some(folder.join("history"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn piped_lines_end_in_any_way() {
        let mut from = "a\r\nb\n\nc".as_bytes();
        let mut next = || piped_line(&mut from).unwrap();
        let text = |t: &str| Entry::Text(t.into());
        assert_eq!(next(), text("a"));
        assert_eq!(next(), text("b"));
        assert_eq!(next(), text(""));
        assert_eq!(next(), text("c"));
        assert_eq!(next(), Entry::End);
    }
}
