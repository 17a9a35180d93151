//! What a line that begins with `/` asks for.

use std::path::PathBuf;

/// The text of `/help`.
pub const HELP: &str = "\
/help                   this text
/exit                   end (also Ctrl+D; Ctrl+C stops an answer, drops what is typed, and twice ends)
/clear                  forget the conversation, keep the adapters
/regen                  answer the last message once more
/system TEXT            set the system message; /system shows it, /system none removes it
/NAME [TEXT]            speak with this adapter alone, and perhaps say TEXT; /none is the base (also /skill NAME)
/adapter NAME[:SCALE]   the same with a weight; list lists them
/mix A=0.5 B=0.5        speak with a weighted sum of adapters
/lora add X [SCALE]     add an adapter, by name or file, to those that speak
/lora scale X SCALE     change its weight
/lora rm X              take it out
/lora list              all adapters, those that speak marked with *
/compare A B … [TEXT]   ask several adapters (or none) the same, side by side; without TEXT the last message.
                        TEXT begins at the first word that is no adapter's name, or behind --
/cost [NAME]            what an adapter costs: its bytes, those it shares, the time of a switch
/skills [FAMILY|NAME]   what the adapters of the built-in demo can do
/save FILE              write the conversation and the names of its adapters to a file
/load FILE              go on with a saved conversation
//TEXT                  say /TEXT instead of taking it for a command
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
    "/skill ",
    "/skills ",
    "/mix ",
    "/lora ",
    "/compare ",
    "/cost ",
    "/save ",
    "/load ",
];
/// Most adapters that answer side by side.
const MOST_COMPARED: usize = 8;
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
    /// `/NAME`, and perhaps something to say to it.
    Speak {
        /// As it was typed.
        name: String,
        /// What to say.
        text: Option<String>,
        /// Whether it stood in the place of a command, so that it may have been meant for one.
        bare: bool,
    },
    /// Adapters with their weights, each as it was typed.
    Mix(Vec<String>),
    /// A family, a skill, or nothing for all families.
    Skills(String),
    /// An adapter, or nothing for those that speak.
    Cost(String),
    Save(PathBuf),
    Load(PathBuf),
    /// Everything behind the command: see [`comparison`].
    Compare(String),
}

impl Command {
    /// Reads a line; `None` if it is no command. An error is what to tell the user.
    pub fn parse(line: &str) -> Option<Result<Command, String>> {
        let line = line.trim();
        if !line.starts_with('/') || line.starts_with("//") {
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
            ("/compare", rest) => Ok(Command::Compare(rest.into())),
            ("/skill", "") => Err("write /skill NAME; /skills lists them".into()),
            ("/skill", rest) => Ok(speak(rest, false)),
            ("/skills", rest) => Ok(Command::Skills(whole(rest))),
            ("/cost", rest) => Ok(Command::Cost(whole(rest))),
            ("/mix", "") => {
                Err("write /mix A=0.5 B=0.5, with the names of adapters and their weights".into())
            }
            ("/mix", rest) => Ok(Command::Mix(words(rest))),
            ("/save", "") => Err("write /save FILE".into()),
            ("/save", file) => Ok(Command::Save(path(whole(file)).into())),
            ("/load", "") => Err("write /load FILE".into()),
            ("/load", file) => Ok(Command::Load(path(whole(file)).into())),
            _ => Ok(speak(line.trim_start_matches('/'), true)),
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
        ("add", (what, scale)) if !what.is_empty() => Ok(Command::LoraAdd { what: path(what), scale }),
        ("add", _) => Err("write /lora add NAME-OR-FILE [SCALE]".into()),
        ("rm" | "remove", _) if !rest.trim().is_empty() => Ok(Command::LoraRemove(whole(rest.trim()))),
        ("rm" | "remove", _) => Err("write /lora rm NAME".into()),
        ("scale", (name, Some(scale))) => Ok(Command::LoraScale { name, scale }),
        ("scale", _) => Err("write /lora scale NAME SCALE, with a number such as 0.3".into()),
        (other, _) => Err(format!("no /lora {other}; there are add, rm, list and scale")),
    }
}

/// A line as it is said: `//` stands for the `/` that would begin a command.
pub fn said(line: &str) -> &str {
    if line.starts_with("//") { &line[1..] } else { line }
}

fn speak(rest: &str, bare: bool) -> Command {
    let (name, text) = word(rest).unwrap_or_default();
    Command::Speak { name, text: Some(text.trim().to_owned()).filter(|t| !t.is_empty()), bare }
}

/// What `/compare` is to ask whom: the first two words and those after them for which `is_name` holds; then the text, or
/// nothing. `--` ends the names.
pub fn comparison(
    rest: &str,
    is_name: impl Fn(&str) -> bool,
) -> Result<(Vec<String>, Option<String>), String> {
    let mut names = Vec::new();
    let mut rest = rest.trim_start();
    while let Some((next, after)) = word(rest) {
        if next == "--" && names.len() >= 2 {
            rest = after;
            break;
        }
        if names.len() >= 2 && !is_name(&next) {
            break;
        }
        names.push(next);
        rest = after;
    }
    match names.len() {
        0 | 1 => Err("write /compare A B [TEXT], with the names of two adapters or more, or none".into()),
        n if n > MOST_COMPARED => {
            Err(format!("at most {MOST_COMPARED} adapters are compared at once, not {n}"))
        }
        _ => Ok((names, Some(rest.trim().to_owned()).filter(|t| !t.is_empty()))),
    }
}

/// One word of `/mix`: a name, and the weight behind `=` if there is one. `is_name` says what is a name as it stands.
pub fn weighted(word: &str, is_name: impl Fn(&str) -> bool) -> Result<(&str, Option<f32>), String> {
    match word.rsplit_once('=') {
        Some((name, scale)) if !is_name(word) => match crate::adapter_flags::parse_scale(scale) {
            Some(scale) if !name.is_empty() => Ok((name, Some(scale))),
            Some(_) => Err(format!("`{word}` has no name; write NAME=WEIGHT")),
            None => Err(format!("{word}: the weight `{scale}` is not a finite number; write {name}=0.5")),
        },
        _ => Ok((word, None)),
    }
}

fn words(text: &str) -> Vec<String> {
    let mut rest = text;
    let mut words = Vec::new();
    while let Some((next, after)) = word(rest) {
        words.push(next);
        rest = after;
    }
    words
}

/// The next word, and what follows it. Spaces are part of it in quotes of either kind, and behind a backslash.
fn word(text: &str) -> Option<(String, &str)> {
    let text = text.trim_start();
    if let Some((inner, rest)) = quoted(text) {
        return Some((inner.into(), rest));
    }
    let mut escaped = false;
    let ends = |c: char| {
        let ends = c.is_whitespace() && !escaped;
        escaped = ESCAPES && c == '\\' && !escaped;
        ends
    };
    let (word, rest) = text.split_at(text.find(ends).unwrap_or(text.len()));
    (!word.is_empty()).then(|| (unescaped(word), rest))
}

fn quoted(text: &str) -> Option<(&str, &str)> {
    let mark = text.chars().next().filter(|c| ['"', '\''].contains(c))?;
    text.strip_prefix(mark)?.split_once(mark)
}

/// All of a text as one word: here spaces need no quotes.
fn whole(text: &str) -> String {
    match quoted(text) {
        Some((inner, "")) => inner.into(),
        _ => unescaped(text),
    }
}

/// Whether a backslash takes the meaning from what follows it; where it separates folders, it does not.
const ESCAPES: bool = cfg!(not(windows));
/// What Tab writes a backslash before. Elsewhere a backslash is one.
const ESCAPED: &str = " \t\"\\'`@$><=;|&{(";

fn unescaped(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let next = chars.next_if(|next| ESCAPES && c == '\\' && ESCAPED.contains(*next));
        plain.push(next.unwrap_or(c));
    }
    plain
}

/// A file as a shell would take it: `~/` is the user's folder.
fn path(word: String) -> String {
    match (word.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest).to_string_lossy().into_owned(),
        _ => word,
    }
}

/// Splits a weight off the end: `my file.gguf 0.5`.
fn trailing_number(text: &str) -> (String, Option<f32>) {
    let text = text.trim();
    let split = text.rsplit_once(char::is_whitespace);
    match split.and_then(|(rest, last)| Some((rest, crate::adapter_flags::parse_scale(last)?))) {
        Some((rest, scale)) => (whole(rest.trim()), Some(scale)),
        None => (whole(text), None),
    }
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
        assert_eq!((Command::parse("//etc"), said("//etc"), said("a//b")), (None, "/etc", "a//b"));
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
        assert_eq!(ok("/lora add 'a b' -1"), add("a b", Some(-1.0)));
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
        assert_eq!(ok("/load 'a b.json'"), Command::Load("a b.json".into()));
        assert_eq!(ok("/load 'a' b.json"), Command::Load("'a' b.json".into()));
        let home = std::env::home_dir().expect("a user");
        assert_eq!(ok("/save ~/x y.json"), Command::Save(home.join("x y.json")));
        assert_eq!(ok("/save ~x"), Command::Save("~x".into()));
        assert!(Command::parse("/save").unwrap().is_err() && Command::parse("/load ").unwrap().is_err());
    }

    #[test]
    fn any_other_word_may_be_an_adapter() {
        let speak = |name: &str, text: Option<&str>, bare| Command::Speak {
            name: name.into(),
            text: text.map(str::to_owned),
            bare,
        };
        assert_eq!(ok("/rot13"), speak("rot13", None, true));
        assert_eq!(ok("/rot13  hello world "), speak("rot13", Some("hello world"), true));
        assert_eq!(ok("/skill \"a b\" c"), speak("a b", Some("c"), false));
        assert_eq!(ok("/skill 'a b' c"), speak("a b", Some("c"), false));
        assert_eq!(ok("/skill 'tis so"), speak("'tis", Some("so"), false));
        assert_eq!(ok("/"), speak("", None, true));
        assert!(Command::parse("/skill").unwrap().is_err());
        assert_eq!((ok("/skills"), ok("/cost x")), (Command::Skills("".into()), Command::Cost("x".into())));
    }

    #[test]
    fn compare_takes_names_and_perhaps_a_text() {
        let known = |w: &str| ["a", "b", "c", "none"].contains(&w);
        let compare = |rest: &str| {
            let (names, text) = comparison(rest, known).unwrap();
            (names.join(" "), text)
        };
        let want = |names: &str, text: Option<&str>| (names.to_owned(), text.map(str::to_owned));
        assert_eq!(compare("a b"), want("a b", None));
        assert_eq!(compare("x y who are you?"), want("x y", Some("who are you?")));
        assert_eq!(compare("a b c  none who a?"), want("a b c none", Some("who a?")));
        assert_eq!(compare("\"a b\" none -- c b"), want("a b none", Some("c b")));
        assert!(comparison("a", known).is_err() && comparison("", known).is_err());
        assert!(comparison("a b c a b c a b c", known).unwrap_err().contains("at most 8"));
    }

    #[test]
    fn mixes_have_weights() {
        assert_eq!(ok("/mix a=0.5 \"b c=1\""), Command::Mix(vec!["a=0.5".into(), "b c=1".into()]));
        assert!(Command::parse("/mix").unwrap().is_err());
        let none = |_: &str| false;
        assert_eq!(weighted("a=-0.5", none), Ok(("a", Some(-0.5))));
        assert_eq!(weighted("a", none), Ok(("a", None)));
        assert_eq!(weighted("k=1", |w| w == "k=1"), Ok(("k=1", None)));
        assert!(weighted("a=0,5", none).unwrap_err().contains("`0,5`"));
        assert!(weighted("=1", none).is_err() && weighted("a=inf", none).is_err());
    }
}
