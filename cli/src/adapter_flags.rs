//! Adapters on the command line: `--lora`, `--lora-scaled`, `--pack`, `--adapter`.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use clap::Args;

use crate::failure::{Failure, Outcome};

/// Which adapters are loaded, and which of them speak from the start.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Adapters")]
pub struct AdapterFlags {
    /// A LoRA (a GGUF file or a PEFT folder) to load and use, with an optional weight behind a colon. Repeatable.
    #[arg(long, value_name = "FILE[:SCALE]")]
    pub lora: Vec<OsString>,
    /// The same with a weight that must be there; the last colon separates it. Repeatable.
    #[arg(long, value_name = "FILE:SCALE")]
    pub lora_scaled: Vec<OsString>,
    /// A pack of adapters; they are loaded when they are first used. Repeatable.
    #[arg(long, value_name = "PACK")]
    pub pack: Vec<PathBuf>,
    /// An adapter of a pack to use from the start. Repeatable: several are summed.
    #[arg(long, value_name = "NAME[:SCALE]")]
    pub adapter: Vec<String>,
}

/// A LoRA file and its weight.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraFile {
    /// The file.
    pub path: PathBuf,
    /// λ.
    pub scale: f32,
}

impl AdapterFlags {
    /// An error for flags that can mean nothing, before any file is opened. `packed` says whether there are adapters that no
    /// flag names.
    pub fn check(&self, packed: bool) -> Outcome {
        self.lora_files()?;
        match self.adapter.first() {
            Some(name)
                if !packed && self.pack.is_empty() && self.lora.is_empty() && self.lora_scaled.is_empty() =>
            {
                let message = format!(
                    "--adapter {name}: give the pack that holds it with --pack, or its file with --lora"
                );
                Err(Failure::usage(message))
            }
            _ => Ok(()),
        }
    }

    /// `--lora` and `--lora-scaled`, in this order.
    pub fn lora_files(&self) -> Outcome<Vec<LoraFile>> {
        let plain = self.lora.iter().map(lora);
        let scaled = self.lora_scaled.iter().map(lora_scaled);
        plain.chain(scaled).collect()
    }
}

/// A weight: any finite number.
pub fn parse_scale(text: &str) -> Option<f32> {
    text.parse().ok().filter(|s: &f32| s.is_finite())
}

/// `NAME:SCALE` split at its last colon, if what follows is a number.
pub fn split_scale(text: &str) -> Option<(&str, f32)> {
    let (name, scale) = text.rsplit_once(':')?;
    Some((name, parse_scale(scale)?)).filter(|(name, _)| !name.is_empty())
}

fn lora(arg: &OsString) -> Outcome<LoraFile> {
    let whole = LoraFile { path: arg.into(), scale: 1.0 };
    let Some(text) = arg.to_str() else { return Ok(whole) };
    // A file of exactly this name, colons and all, is what was meant.
    if whole.path.exists() {
        return Ok(whole);
    }
    if let Some((path, scale)) = split_scale(text) {
        return Ok(LoraFile { path: path.into(), scale });
    }
    match text.rsplit_once(':') {
        Some((path, scale)) if Path::new(path).is_file() => Err(not_a_scale("--lora", text, scale)),
        _ => Ok(whole),
    }
}

fn lora_scaled(arg: &OsString) -> Outcome<LoraFile> {
    let text = arg.to_str().ok_or_else(|| {
        Failure::usage(format!("--lora-scaled {}: not valid UTF-8; use --lora", arg.to_string_lossy()))
    })?;
    match (split_scale(text), text.rsplit_once(':')) {
        (Some((path, scale)), _) => Ok(LoraFile { path: path.into(), scale }),
        (None, Some((_, scale))) => Err(not_a_scale("--lora-scaled", text, scale)),
        (None, None) => {
            Err(Failure::usage(format!("--lora-scaled {text}: no weight; write {text}:0.5, or use --lora")))
        }
    }
}

fn not_a_scale(flag: &str, text: &str, scale: &str) -> Failure {
    Failure::usage(format!("{flag} {text}: the weight `{scale}` is not a finite number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(text: &str) -> LoraFile {
        lora(&text.into()).unwrap()
    }

    #[test]
    fn the_last_colon_separates_a_number() {
        let file = |path: &str, scale| LoraFile { path: path.into(), scale };
        assert_eq!(plain("a.gguf"), file("a.gguf", 1.0));
        assert_eq!(plain("a.gguf:0.5"), file("a.gguf", 0.5));
        assert_eq!(plain("C:\\a,b.gguf"), file("C:\\a,b.gguf", 1.0));
        assert_eq!(plain("C:\\a,b.gguf:-2"), file("C:\\a,b.gguf", -2.0));
        assert_eq!(plain("x:1:0.25"), file("x:1", 0.25));
        assert_eq!(plain("a:nan"), file("a:nan", 1.0));
        assert_eq!(plain(":0.5"), file(":0.5", 1.0));
        let scaled = lora_scaled(&"C:\\a.gguf:0.5".into()).unwrap();
        assert_eq!(scaled, file("C:\\a.gguf", 0.5));
    }

    #[test]
    fn a_weight_that_is_none_is_refused() {
        for bad in ["C:\\a.gguf", "a.gguf:abc", "a.gguf:", "a.gguf:inf", "a.gguf"] {
            assert!(matches!(lora_scaled(&bad.into()), Err(Failure::Usage(_))), "{bad}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = format!("{}:abc", file.path().display());
        let Err(Failure::Usage(message)) = lora(&text.into()) else { panic!("accepted") };
        assert!(message.contains("`abc`"), "{message}");
    }

    #[test]
    fn a_file_of_that_very_name_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a:0.5");
        std::fs::write(&path, "x").unwrap();
        assert_eq!(lora(&path.clone().into()).unwrap(), LoraFile { path, scale: 1.0 });
    }
}
