//! Tab: commands, adapter names, files.

use std::borrow::Cow;

use lory_runtime::Engine;
use rustyline::{
    Context, Helper, Hinter, Validator,
    completion::{Completer, FilenameCompleter, Pair},
    highlight::Highlighter,
};

use super::commands::{LORA_VERBS, NAMES};
use crate::terminal::Style;

/// Most names offered at once; a pack may hold thousands.
const MOST: usize = 200;

/// Completes lines of a conversation with `engine`.
#[derive(Helper, Hinter, Validator)]
pub struct Completion {
    engine: Engine,
    /// Of the built-in skills.
    families: Vec<String>,
    style: Style,
    files: FilenameCompleter,
}

impl Completion {
    /// `style` colours the prompt; `families` are those of the built-in skills, if the conversation is with them.
    pub fn new(engine: Engine, families: Vec<String>, style: Style) -> Self {
        Completion { engine, families, style, files: FilenameCompleter::new() }
    }

    fn adapters(&self, extra: &[&str]) -> Vec<String> {
        extra.iter().map(|e| e.to_string()).chain(self.engine.adapters().names()).collect()
    }
}

/// What may stand at the end of `line`.
#[derive(Debug, PartialEq)]
enum Expected {
    /// A command, or an adapter's name behind `/`.
    Commands,
    LoraVerbs,
    /// A family of skills or one of them.
    Skills,
    /// An adapter's name, and words that may stand in its place.
    Adapter(&'static [&'static str]),
    /// An adapter's name or a file.
    AdapterOrFile,
    File,
    Nothing,
}

/// The place where the word at the end begins, and what is expected there.
fn expected(line: &str) -> (usize, Expected) {
    let at = |prefix: &str| line.len() - line[prefix.len()..].trim_start().len();
    if !line.starts_with('/') {
        return (0, Expected::Nothing);
    }
    if !line.contains(' ') {
        return (0, Expected::Commands);
    }
    for (prefix, what) in [
        ("/adapter ", Expected::Adapter(&["none", "list"])),
        ("/skill ", Expected::Adapter(&["none"])),
        ("/skills ", Expected::Skills),
        ("/cost ", Expected::Adapter(&[])),
        ("/lora add ", Expected::AdapterOrFile),
        ("/lora rm ", Expected::Adapter(&[])),
        ("/lora scale ", Expected::Adapter(&[])),
        ("/lora ", Expected::LoraVerbs),
        ("/save ", Expected::File),
        ("/load ", Expected::File),
    ] {
        if line.starts_with(prefix) {
            let at = at(prefix);
            // What is said to a skill is not for completion.
            let text_follows = prefix == "/skill " && line[at..].contains(' ');
            return if text_follows { (0, Expected::Nothing) } else { (at, what) };
        }
    }
    let last = line.rfind(' ').map_or(0, |i| i + 1);
    // Behind the second name a text may begin, but it may also be a third name.
    if line.starts_with("/compare ") {
        return (last, Expected::Adapter(&["none"]));
    }
    if line.starts_with("/mix ") {
        return (last, Expected::Adapter(&[]));
    }
    (0, Expected::Nothing)
}

fn pairs(start: &str, words: impl IntoIterator<Item = impl AsRef<str>>) -> Vec<Pair> {
    let words = words.into_iter();
    let fit = words.filter(|w| w.as_ref().starts_with(start)).take(MOST);
    fit.map(|w| Pair { display: w.as_ref().into(), replacement: w.as_ref().into() }).collect()
}

impl Completer for Completion {
    type Candidate = Pair;

    fn complete(&self, line: &str, pos: usize, ctx: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let (at, what) = expected(&line[..pos]);
        let start = &line[at..pos];
        Ok(match what {
            Expected::Nothing => (pos, Vec::new()),
            Expected::Commands => {
                let adapters = self.adapters(&[]).into_iter().map(|name| format!("/{name} "));
                let commands = NAMES.iter().map(|n| (*n).to_owned());
                (at, pairs(start, commands.chain(adapters)))
            }
            Expected::Skills => (at, pairs(start, self.families.iter().cloned().chain(self.adapters(&[])))),
            Expected::LoraVerbs => (at, pairs(start, LORA_VERBS)),
            Expected::Adapter(extra) => (at, pairs(start, self.adapters(extra))),
            Expected::File => self.files.complete(line, pos, ctx)?,
            Expected::AdapterOrFile => match pairs(start, self.adapters(&[])) {
                names if !names.is_empty() => (at, names),
                _ => self.files.complete(line, pos, ctx)?,
            },
        })
    }
}

impl Highlighter for Completion {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, _default: bool) -> Cow<'b, str> {
        Cow::Owned(self.style.prompt(prompt))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::commands::Command, *};

    #[test]
    fn the_place_says_what_is_expected() {
        assert_eq!(expected("/ad"), (0, Expected::Commands));
        assert_eq!(expected("hello"), (0, Expected::Nothing));
        assert_eq!(expected("/adapter po"), (9, Expected::Adapter(&["none", "list"])));
        assert_eq!(expected("/lora a"), (6, Expected::LoraVerbs));
        assert_eq!(expected("/lora add /tmp/x"), (10, Expected::AdapterOrFile));
        assert_eq!(expected("/lora scale po"), (12, Expected::Adapter(&[])));
        assert_eq!(expected("/load ta"), (6, Expected::File));
        assert_eq!(expected("/compare "), (9, Expected::Adapter(&["none"])));
        assert_eq!(expected("/compare a"), (9, Expected::Adapter(&["none"])));
        assert_eq!(expected("/compare a b"), (11, Expected::Adapter(&["none"])));
        assert_eq!(expected("/compare a b c"), (13, Expected::Adapter(&["none"])));
        assert_eq!(expected("/mix a=0.5 b"), (11, Expected::Adapter(&[])));
        assert_eq!(expected("/skill ro"), (7, Expected::Adapter(&["none"])));
        assert_eq!(expected("/skill rot13 he").1, Expected::Nothing);
        assert_eq!(expected("/skills nu"), (8, Expected::Skills));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_was_completed_is_found() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["my poet's (2).gguf", "a=\"b\" \\c.gguf", "p@l&ce; $5 {x}.gguf"] {
            let file = dir.path().join("sp ace").join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, "").unwrap();
            // The only one that there is: first the folder, then the file in it.
            let completed = |line: &str| {
                let (at, pairs) = FilenameCompleter::new().complete_path(line, line.len()).unwrap();
                format!("{}{}", &line[..at], pairs[0].replacement)
            };
            let whole = completed(&completed(&format!("/load {}/sp", dir.path().display())));
            let Some(Ok(Command::Load(path))) = Command::parse(&whole) else { panic!("{whole}") };
            assert_eq!(path, file, "{whole}");
            std::fs::remove_file(&file).unwrap();
        }
    }

    #[test]
    fn only_what_begins_alike_is_offered() {
        let got: Vec<String> = pairs("/a", NAMES).into_iter().map(|p| p.replacement).collect();
        assert_eq!(got, ["/adapter "]);
    }
}
