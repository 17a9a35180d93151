//! Conversations as files: `/save` and `/load`.

use std::{
    fs,
    io::{BufReader, Write},
    path::Path,
};

use serde_json::{Map, Value, json};

use crate::{
    failure::{Failure, Outcome},
    output::Output,
    prompt::read_text,
};

/// What tells such a file from any other JSON.
const FORMAT: &str = "lory conversation";
const VERSION: u64 = 1;

/// Everything that a conversation consists of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transcript {
    pub system: Option<String>,
    /// User and assistant in turn, beginning with the user.
    pub turns: Vec<(&'static str, String)>,
    /// Names and weights of the adapters that speak.
    pub adapters: Vec<(String, f32)>,
}

impl Transcript {
    /// Writes it as JSON; an older conversation in the file is replaced as a whole, anything else stays.
    ///
    /// # Errors
    /// A file that is no saved conversation, or one that cannot be written.
    pub fn save(&self, path: &Path) -> Outcome {
        if path.is_file() && !is_saved(path) {
            let message =
                format!("{}: is there and is no saved conversation; name another file", path.display());
            return Err(Failure::runtime(message));
        }
        let message = |(role, content): &(&str, String)| json!({ "role": role, "content": content });
        let adapter = |(name, scale): &(String, f32)| json!({ "name": name, "scale": f64::from(*scale) });
        let file = json!({
            "format": FORMAT,
            "version": VERSION,
            "system": self.system,
            "messages": self.turns.iter().map(message).collect::<Vec<_>>(),
            "adapters": self.adapters.iter().map(adapter).collect::<Vec<_>>(),
        });
        let mut out = Output::create(path)?;
        writeln!(out, "{file:#}").map_err(|e| Output::failed(path, &e))?;
        out.finish()
    }

    /// Reads what [`Transcript::save`] wrote.
    pub fn load(path: &Path) -> Outcome<Transcript> {
        let name = path.display();
        if fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir()) {
            return Err(Failure::runtime(format!("{name}: is no ordinary file; name one that /save wrote")));
        }
        let text = read_text(path)?;
        let damaged = |what: &str| Failure::runtime(format!("{name}: is no saved conversation: {what}"));
        let file: Value = serde_json::from_str(&text).map_err(|e| damaged(&e.to_string()))?;
        let file = file.as_object().filter(|f| f.get("format").and_then(Value::as_str) == Some(FORMAT));
        let file = file.ok_or_else(|| damaged(&format!("it has no \"format\": \"{FORMAT}\"")))?;
        match file.get("version").and_then(Value::as_u64) {
            Some(VERSION) => parse(file).map_err(|what| damaged(&what)),
            _ => Err(damaged(&format!("its version is not {VERSION}"))),
        }
    }
}

/// Whether [`Transcript::save`] wrote the file. It is read no further than it is JSON: it may be a model.
fn is_saved(path: &Path) -> bool {
    let Ok(file) = fs::File::open(path) else { return false };
    let json: Option<Value> = serde_json::from_reader(BufReader::new(file)).ok();
    json.is_some_and(|json| json.get("format").and_then(Value::as_str) == Some(FORMAT))
}

fn parse(file: &Map<String, Value>) -> Result<Transcript, String> {
    let system = match file.get("system") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(text.clone()),
        Some(_) => return Err("`system` is no text".into()),
    };
    let list = |key: &str| match file.get(key) {
        Some(Value::Array(items)) => Ok(items.as_slice()),
        _ => Err(format!("`{key}` is no list")),
    };
    let mut turns = Vec::new();
    for (i, message) in list("messages")?.iter().enumerate() {
        let role = ["user", "assistant"][i % 2];
        let text = |key: &str| message.get(key).and_then(Value::as_str);
        match (text("role"), text("content")) {
            (Some(found), Some(content)) if found == role => turns.push((role, content.to_owned())),
            _ => return Err(format!("message {i} is no text of the {role}")),
        }
    }
    let mut adapters = Vec::new();
    for (i, adapter) in list("adapters")?.iter().enumerate() {
        let scale = adapter.get("scale").and_then(Value::as_f64).map(|s| s as f32).filter(|s| s.is_finite());
        match (adapter.get("name").and_then(Value::as_str), scale) {
            (Some(name), Some(scale)) => adapters.push((name.to_owned(), scale)),
            _ => return Err(format!("adapter {i} has no name or no scale")),
        }
    }
    Ok(Transcript { system, turns, adapters })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("talk.json");
        let whole = Transcript {
            system: Some("Be \"brief\".\n".into()),
            turns: vec![("user", "héllo\u{1b}".into()), ("assistant", "".into()), ("user", "?".into())],
            adapters: vec![("poet".into(), 0.3), ("a b:c".into(), -1.0)],
        };
        for transcript in [whole, Transcript::default()] {
            transcript.save(&path).unwrap();
            assert_eq!(Transcript::load(&path).unwrap(), transcript);
        }
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("talk.json");
        let head = r#""format": "lory conversation", "version": 1"#;
        for (text, part) in [
            (String::new(), "EOF"),
            ("[1, 2]".into(), "format"),
            (r#"{"format": "lory conversation", "version": 2}"#.into(), "version"),
            (format!("{{{head}}}"), "messages"),
            (format!(r#"{{{head}, "messages": 3, "adapters": []}}"#), "messages"),
            (format!(r#"{{{head}, "messages": [], "adapters": [{{"name": "x"}}]}}"#), "adapter 0"),
            (format!(r#"{{{head}, "system": 7, "messages": [], "adapters": []}}"#), "system"),
            (
                format!(
                    r#"{{{head}, "messages": [{{"role": "assistant", "content": "x"}}], "adapters": []}}"#
                ),
                "message 0",
            ),
            (format!(r#"{{{head}, "messages": [{{"role": "user"}}], "adapters": []}}"#), "message 0"),
            ("[".repeat(100_000), "recursion"),
        ] {
            fs::write(&path, &text).unwrap();
            let Err(Failure::Runtime(message)) = Transcript::load(&path) else { panic!("{text} was taken") };
            assert!(message.contains("talk.json") && message.contains(part), "{message}");
        }
        assert!(matches!(Transcript::load(dir.path()), Err(Failure::Runtime(m)) if m.contains("directory")));
        assert!(
            matches!(Transcript::load(&dir.path().join("none")), Err(Failure::Runtime(m)) if m.contains("none"))
        );
    }
}
