//! What a line that begins with `/` asks for.

use std::path::PathBuf;

/// The text of `/help`.
pub const HELP: &str = "\
/help                   this text
/exit                   end (also Ctrl+D; Ctrl+C stops an answer, at the prompt it ends)
/clear                  forget the conversation, keep the adapters
/regen                  answer the last message once more
/system TEXT            set the system message; /system shows it, /system none removes it
/adapter NAME[:SCALE]   speak with this adapter alone; none is the base; list lists them
/lora add X [SCALE]     add an adapter, by name or file, to those that speak
/lora scale X SCALE     change its weight
/lora rm X              take it out
/lora list              all adapters, those that speak marked with *
/save FILE              write the conversation and the names of its adapters to a file
/load FILE              go on with a saved conversation
/compare A B [TEXT]     ask two adapters (or none) the same, side by side; without TEXT the last message
\"\"\"                     begins and ends a message of several lines
Tab completes commands, adapters and files.";

/// The commands, for completion: with a space where something follows.
pub const NAMES: &[&str] = &[
    "/help",
    "/exit",
    "/clear",
    "/regen",
    "/system ",
    "/adapter ",
    "/lora ",
    "/compare ",
    "/save ",
    "/load ",
];
/// What follows `/lora`, in the same way.
pub const LORA_VERBS: &[&str] = &["add ", "rm ", "list", "scale "];

/// A command with its arguments.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    Help,
    Exit,
    Clear,
    Regen,
    ShowSystem,
    /// An empty text removes it.
    System(String),
    /// As it was typed: whether a colon belongs to the name is for the store to say.
    Adapter(String),
    /// With the beginning of the names to list.
    ListAdapters(String),
    LoraAdd {
        /// A name or a file.
        what: String,
        /// λ, if it was given.
        scale: Option<f32>,
    },
    LoraScale {
        name: String,
        scale: f32,
    },
    LoraRemove(String),
    Save(PathBuf),
    Load(PathBuf),
    Compare {
        first: String,
        second: String,
        text: Option<String>,
    },
}

impl Command {
    /// Reads a line; `None` if it is no command. An error is what to tell the user.
    pub fn parse(line: &str) -> Option<Result<Command, String>> {
        let line = line.trim();
        if !line.starts_with('/') {
            return None;
        }
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        Some(match (name, rest) {
            ("/help" | "/?", _) => Ok(Command::Help),
            ("/exit" | "/quit" | "/bye", _) => Ok(Command::Exit),
            ("/clear", _) => Ok(Command::Clear),
            ("/regen", _) => Ok(Command::Regen),
            ("/system", "") => Ok(Command::ShowSystem),
            ("/system", "none") => Ok(Command::System(String::new())),
            ("/system", text) => Ok(Command::System(text.into())),
            ("/adapter", "" | "list") => Ok(Command::ListAdapters(String::new())),
            ("/adapter", rest) => adapter(rest),
            ("/lora", rest) => lora(rest),
            ("/compare", rest) => compare(rest),
            ("/save", "") => Err("write /save FILE".into()),
            ("/save", file) => Ok(Command::Save(unquote(file).into())),
            ("/load", "") => Err("write /load FILE".into()),
            ("/load", file) => Ok(Command::Load(unquote(file).into())),
            _ => Err(format!("no command {name}; /help lists them")),
        })
    }
}

fn adapter(rest: &str) -> Result<Command, String> {
    if let Some(prefix) = rest.strip_prefix("list ") {
        return Ok(Command::ListAdapters(prefix.trim().into()));
    }
    match trailing_number(rest) {
        (name, Some(scale)) => Ok(Command::Adapter(format!("{name}:{scale}"))),
        (name, None) => Ok(Command::Adapter(name)),
    }
}

fn lora(rest: &str) -> Result<Command, String> {
    let (verb, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    match (verb, trailing_number(rest)) {
        ("" | "list", _) => Ok(Command::ListAdapters(rest.trim().into())),
        ("add", (what, scale)) if !what.is_empty() => Ok(Command::LoraAdd { what, scale }),
        ("add", _) => Err("write /lora add NAME-OR-FILE [SCALE]".into()),
        ("rm" | "remove", _) if !rest.trim().is_empty() => Ok(Command::LoraRemove(unquote(rest.trim()))),
        ("rm" | "remove", _) => Err("write /lora rm NAME".into()),
        ("scale", (name, Some(scale))) => Ok(Command::LoraScale { name, scale }),
        ("scale", _) => Err("write /lora scale NAME SCALE, with a number such as 0.3".into()),
        (other, _) => Err(format!("no /lora {other}; there are add, rm, list and scale")),
    }
}

fn compare(rest: &str) -> Result<Command, String> {
    let usage = || "write /compare A B [TEXT], with the names of two adapters or none".to_string();
    let (first, rest) = word(rest).ok_or_else(usage)?;
    let (second, rest) = word(rest).ok_or_else(usage)?;
    let text = Some(rest.trim().to_owned()).filter(|t| !t.is_empty());
    Ok(Command::Compare { first, second, text })
}

/// The next word, quoted if it contains spaces, and what follows it.
fn word(text: &str) -> Option<(String, &str)> {
    let text = text.trim_start();
    if let Some((inner, rest)) = text.strip_prefix('"').and_then(|t| t.split_once('"')) {
        return Some((inner.into(), rest));
    }
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    (!word.is_empty()).then(|| (word.into(), rest))
}

/// Splits a weight off the end: `my file.gguf 0.5`.
fn trailing_number(text: &str) -> (String, Option<f32>) {
    let text = text.trim();
    let split = text.rsplit_once(char::is_whitespace);
    match split.and_then(|(rest, last)| Some((rest, crate::adapter_flags::parse_scale(last)?))) {
        Some((rest, scale)) => (unquote(rest.trim()), Some(scale)),
        None => (unquote(text), None),
    }
}

fn unquote(text: &str) -> String {
    let inner = text.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
    inner.unwrap_or(text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ok(line: &str) -> Command {
        Command::parse(line).expect("a command").expect(line)
    }

    #[test]
    fn text_is_no_command() {
        assert_eq!(Command::parse("hello /help"), None);
        assert_eq!(Command::parse(""), None);
        assert!(Command::parse("/nope x").unwrap().unwrap_err().contains("/nope"));
    }

    #[test]
    fn adapters_are_chosen_by_name_and_weight() {
        assert_eq!(ok("/adapter poet"), Command::Adapter("poet".into()));
        assert_eq!(ok("/adapter none"), Command::Adapter("none".into()));
        assert_eq!(ok("/adapter poet:0.5"), Command::Adapter("poet:0.5".into()));
        assert_eq!(ok("/adapter the poet 0.5"), Command::Adapter("the poet:0.5".into()));
        assert_eq!(ok("/adapter list po"), Command::ListAdapters("po".into()));
        assert_eq!(ok("/adapter"), Command::ListAdapters(String::new()));
    }

    #[test]
    fn lora_takes_names_and_files() {
        let add = |what: &str, scale| Command::LoraAdd { what: what.into(), scale };
        assert_eq!(ok("/lora add poet 0.6"), add("poet", Some(0.6)));
        assert_eq!(ok("/lora add C:\\my files\\a,b.gguf"), add("C:\\my files\\a,b.gguf", None));
        assert_eq!(ok("/lora add \"a b\" -1"), add("a b", Some(-1.0)));
        assert_eq!(ok("/lora scale poet 0.3"), Command::LoraScale { name: "poet".into(), scale: 0.3 });
        assert_eq!(ok("/lora rm poet"), Command::LoraRemove("poet".into()));
        assert_eq!(ok("/lora list"), Command::ListAdapters(String::new()));
        for bad in ["/lora add", "/lora scale poet", "/lora scale poet nan", "/lora rm", "/lora mix"] {
            assert!(Command::parse(bad).unwrap().is_err(), "{bad}");
        }
    }

    #[test]
    fn conversations_go_to_files_and_come_back() {
        assert_eq!(ok("/save my talk.json"), Command::Save("my talk.json".into()));
        assert_eq!(ok("/load \"a b.json\""), Command::Load("a b.json".into()));
        assert!(Command::parse("/save").unwrap().is_err() && Command::parse("/load ").unwrap().is_err());
    }

    #[test]
    fn compare_takes_two_names_and_perhaps_a_text() {
        let compare = |a: &str, b: &str, t: Option<&str>| Command::Compare {
            first: a.into(),
            second: b.into(),
            text: t.map(str::to_owned),
        };
        assert_eq!(ok("/compare a b"), compare("a", "b", None));
        assert_eq!(ok("/compare \"a c\" none  who are you?"), compare("a c", "none", Some("who are you?")));
        assert!(Command::parse("/compare a").unwrap().is_err());
    }
}
