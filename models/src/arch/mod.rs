//! The supported families: one small file each, from metadata to [`Config`].

mod gemma;
mod llama;
mod olmo2;
mod phi3;
mod qwen;
mod smollm3;

use lory_kernels::backend::RopeStyle;

use crate::{
    Error, Result,
    config::{Config, Keys},
    gguf::Metadata,
};

/// A model family, as `general.architecture` names it.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arch {
    Llama,
    Qwen2,
    Qwen3,
    Gemma2,
    Gemma3,
    Phi3,
    Olmo2,
    Smollm3,
}

/// Refuses what says of itself that it is something else, an adapter for example.
pub(crate) fn check_is_model(meta: &Metadata) -> Result<()> {
    match meta.opt_str("general.type")?.filter(|t| *t != "model") {
        None => Ok(()),
        Some(kind) => {
            let message = format!("is a GGUF of type `{kind}`, not a model");
            Err(Error::unsupported(meta.file(), message))
        }
    }
}

impl Arch {
    /// Every family that runs.
    pub const ALL: [Arch; 8] = [
        Arch::Llama,
        Arch::Qwen2,
        Arch::Qwen3,
        Arch::Gemma2,
        Arch::Gemma3,
        Arch::Phi3,
        Arch::Olmo2,
        Arch::Smollm3,
    ];

    /// The family's name in files, and the prefix of its keys.
    pub fn prefix(self) -> &'static str {
        match self {
            Arch::Llama => "llama",
            Arch::Qwen2 => "qwen2",
            Arch::Qwen3 => "qwen3",
            Arch::Gemma2 => "gemma2",
            Arch::Gemma3 => "gemma3",
            Arch::Phi3 => "phi3",
            Arch::Olmo2 => "olmo2",
            Arch::Smollm3 => "smollm3",
        }
    }

    /// The family with this name.
    pub fn from_name(name: &str) -> Option<Arch> {
        Arch::ALL.into_iter().find(|a| a.prefix() == name)
    }

    /// Reads `general.architecture`; an adapter or an unknown family is refused by name.
    pub fn from_metadata(meta: &Metadata) -> Result<Arch> {
        check_is_model(meta)?;
        let name = meta.str("general.architecture")?;
        Arch::from_name(name).ok_or_else(|| {
            let known: Vec<_> = Arch::ALL.iter().map(|a| a.prefix()).collect();
            let message = format!("architecture `{name}` is not supported; known are {}", known.join(", "));
            Error::unsupported(meta.file(), message)
        })
    }

    /// Whether the file's q and k rows are permuted for interleaved rotation.
    pub fn rope_style(self) -> RopeStyle {
        match self {
            Arch::Llama | Arch::Smollm3 => RopeStyle::Interleaved,
            _ => RopeStyle::Neox,
        }
    }

    /// What the family adds to the common reading of the keys.
    pub(crate) fn refine(self, keys: &Keys<'_>, config: &mut Config) -> Result<()> {
        match self {
            Arch::Llama => llama::refine(keys, config),
            Arch::Qwen2 | Arch::Qwen3 => qwen::refine(keys, config),
            Arch::Gemma2 | Arch::Gemma3 => gemma::refine(keys, config),
            Arch::Phi3 => phi3::refine(keys, config),
            Arch::Olmo2 => olmo2::refine(keys, config),
            Arch::Smollm3 => smollm3::refine(keys, config),
        }
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.prefix())
    }
}
