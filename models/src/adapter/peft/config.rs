//! `adapter_config.json`: what PEFT's LoRA and AdaLoRA compute, or the reason why it is refused.
//!
//! Source: huggingface/peft 0.21, `tuners/lora/{config,model,layer}.py`,
//! `tuners/adalora/{config,model,layer}.py`, `tuners/tuners_utils.py` and `utils/other.py`.

use std::collections::BTreeMap;

use crate::{Error, Result};

use super::{
    settings::{Settings, short},
    targets::Targets,
};

/// Settings that change the result and are not implemented, with the reason.
const REFUSED: [(&str, &str); 14] = [
    ("modules_to_save", "the adapter replaces whole weights of the base: merge it into the base instead"),
    ("trainable_token_indices", "the adapter replaces rows of the embedding: merge it into the base instead"),
    ("target_parameters", "the adapter changes parameters that are no linear layers (experts)"),
    ("layer_replication", "the adapter was trained on a base with repeated layers"),
    ("use_qalora", "the adapter works on pooled inputs (QA-LoRA)"),
    ("use_bdlora", "the adapter's factors are block-diagonal (BD-LoRA)"),
    ("kasa_config", "the adapter takes a part of the base's weights away (KaSA)"),
    ("arrow_config", "the adapter is a router over other adapters (Arrow)"),
    ("monteclora_config", "the adapter samples its weights (MonteCLoRA)"),
    ("velora_config", "VeLoRA is not known to compute a plain LoRA"),
    ("megatron_config", "the adapter was trained with Megatron's parallel layers"),
    ("ensure_weight_tying", "the adapter of the embedding is also the output's, turned around"),
    ("modules_to_tie", "the adapter of the embedding is also the output's, turned around"),
    ("target_modules_to_tie", "the adapter of the embedding is also the output's, turned around"),
];

/// Settings that are read below, or leave the result as it is.
const KNOWN: [&str; 40] = [
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "bias",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "alora_invocation_tokens",
    // Where it came from.
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "peft_version",
    "inference_mode",
    // PEFT itself sets it to false on the linear layers of every architecture that runs here; the
    // factors lie the same way in any case.
    "fan_in_fan_out",
    // Only in training, or only to start it.
    "lora_dropout",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    // AdaLoRA's schedule.
    "target_r",
    "init_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "total_step",
    // Of early releases: whether to merge while evaluating.
    "merge_weights",
];

/// Which rule turns rank and alpha into a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// α / r, or α / √r with `use_rslora`.
    Lora,
    /// α / (init_r + 1e-5), around a diagonal E.
    AdaLora {
        /// Rank before pruning.
        init_r: usize,
    },
}

/// A checked `adapter_config.json`.
#[derive(Debug)]
pub struct PeftConfig {
    file: String,
    kind: Kind,
    r: usize,
    alpha: f64,
    use_rslora: bool,
    pub(super) use_dora: bool,
    pub(super) lora_bias: bool,
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f64)>,
    /// AdaLoRA: ranks kept, by module.
    kept: BTreeMap<String, usize>,
    targets: Targets,
    pub(super) invocation: Vec<u32>,
}

impl PeftConfig {
    /// Reads and checks it; `file` is for error messages.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the adapter type or the setting that is not implemented;
    /// [`Error::Key`] for a value that is missing or makes no sense; [`Error::Container`] for text
    /// that is not a JSON object.
    pub fn parse(file: &str, text: &[u8]) -> Result<PeftConfig> {
        let s = Settings::parse(file, text)?;
        let kind = kind(file, &s)?;
        check_switches(file, &s)?;
        check_initialisation(file, &s)?;
        let pattern = |key: &str, text: &str| Pattern::new(&s, key, text);
        let mut ranks = Vec::new();
        let mut kept = BTreeMap::new();
        for (key, value) in s.pairs("rank_pattern")? {
            match kind {
                Kind::Lora => {
                    ranks.push((pattern("rank_pattern", key)?, s.as_count("rank_pattern", value)?));
                }
                Kind::AdaLora { init_r } => {
                    let (module, rank) = kept_rank(&s, key, value, init_r)?;
                    kept.insert(module, rank);
                }
            }
        }
        let mut alphas = Vec::new();
        for (key, value) in s.pairs("alpha_pattern")? {
            alphas.push((pattern("alpha_pattern", key)?, s.as_number("alpha_pattern", value)?));
        }
        let tokens = s.integers("alora_invocation_tokens")?.unwrap_or_default();
        let invocation = tokens.iter().map(|t| u32::try_from(*t)).collect::<std::result::Result<_, _>>();
        Ok(PeftConfig {
            file: file.into(),
            kind,
            r: match kind {
                Kind::Lora => s.count("r")?,
                Kind::AdaLora { init_r } => init_r,
            },
            alpha: s.number("lora_alpha")?,
            use_rslora: s.flag("use_rslora")?,
            use_dora: s.flag("use_dora")?,
            lora_bias: s.flag("lora_bias")?,
            ranks,
            alphas,
            kept,
            targets: Targets::parse(&s)?,
            invocation: invocation
                .map_err(|_| s.error("alora_invocation_tokens", "has an impossible token"))?,
        })
    }

    /// Which rule its scales follow.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The file it was read from.
    pub(super) fn file(&self) -> &str {
        &self.file
    }

    /// Rank of the module at `path`, as PEFT resolves it: the first pattern in the file that
    /// matches, or the common one. AdaLoRA may have pruned a module to rank 0.
    pub fn rank(&self, path: &str) -> Result<usize> {
        if let Kind::AdaLora { init_r } = self.kind {
            return Ok(self.kept.get(path).copied().unwrap_or(init_r));
        }
        Ok(first_match(&self.file, &self.ranks, path)?.unwrap_or(self.r))
    }

    /// Factor of B · A at the module at `path`.
    pub fn scale(&self, path: &str) -> Result<f32> {
        let rank = self.rank(path)? as f64;
        let scale = match self.kind {
            // PEFT takes AdaLoRA's α from the config alone, and a rank for an α that is not positive.
            Kind::AdaLora { init_r } => {
                let alpha = if self.alpha > 0.0 { self.alpha } else { rank };
                alpha / (init_r as f64 + 1e-5)
            }
            Kind::Lora => {
                let alpha = first_match(&self.file, &self.alphas, path)?.unwrap_or(self.alpha);
                alpha / if self.use_rslora { rank.sqrt() } else { rank }
            }
        };
        Ok(scale as f32)
    }

    /// Whether PEFT would load weights for the module at `path`.
    pub fn targets(&self, path: &str) -> Result<bool> {
        self.targets.contains(&self.file, path)
    }
}

fn kind(file: &str, s: &Settings<'_>) -> Result<Kind> {
    match s.text("peft_type")? {
        Some("LORA") => Ok(Kind::Lora),
        Some("ADALORA") => Ok(Kind::AdaLora { init_r: s.count("init_r")? }),
        Some(other) => Err(Error::unsupported(
            file,
            format!(
                "adapter type `{other}` is not supported; LORA and ADALORA are (PEFT's `save_as_lora` \
                 converts several others)"
            ),
        )),
        None => Err(s.error("peft_type", "is missing: this is no adapter's configuration")),
    }
}

fn check_switches(file: &str, s: &Settings<'_>) -> Result<()> {
    for key in s.switched_on() {
        if let Some((_, why)) = REFUSED.iter().find(|(k, _)| *k == key) {
            return Err(Error::unsupported(file, format!("setting `{key}` is not supported: {why}")));
        }
        if !KNOWN.contains(&key) {
            let message = format!("setting `{key}` is not known, and may change what the adapter computes");
            return Err(Error::unsupported(file, message));
        }
    }
    match s.text("bias")? {
        None | Some("none") => Ok(()),
        Some(other) => {
            let message = format!("setting `bias` is `{other}`: the adapter replaces biases of the base");
            Err(Error::unsupported(file, message))
        }
    }
}

/// Some ways to start training move a part of the base's weights into the adapter.
fn check_initialisation(file: &str, s: &Settings<'_>) -> Result<()> {
    let how = match s.get("init_lora_weights") {
        None | Some(serde_json::Value::Bool(_)) => return Ok(()),
        Some(_) => s.text("init_lora_weights")?.unwrap_or_default(),
    };
    let lower = how.to_lowercase();
    if matches!(lower.as_str(), "gaussian" | "eva" | "orthogonal" | "mica" | "true" | "false") {
        return Ok(());
    }
    let mutates = ["pissa", "olora", "corda", "loftq", "lora_ga"].iter().any(|m| lower.starts_with(m));
    let message = if mutates {
        format!(
            "`init_lora_weights` is `{how}`, which changed the base's weights in training: on the base as it \
             was, the answers would be wrong. Save it again with `path_initial_model_for_weight_conversion`, \
             which makes a plain LoRA of it"
        )
    } else {
        format!("`init_lora_weights` is `{how}`, which is not known and may have changed the base's weights")
    };
    Err(Error::unsupported(file, message))
}

/// `{"model.layers.0.self_attn.q_proj.lora_E": [true, false, …]}`.
fn kept_rank(
    s: &Settings<'_>,
    key: &str,
    value: &serde_json::Value,
    init_r: usize,
) -> Result<(String, usize)> {
    const KEY: &str = "rank_pattern";
    let module = key.split(".lora_E").next().unwrap_or_default();
    let mask = value.as_array().map(Vec::as_slice).unwrap_or_default();
    let flags: Option<Vec<bool>> = mask.iter().map(serde_json::Value::as_bool).collect();
    match flags {
        Some(flags) if flags.len() == init_r && module.len() < key.len() => {
            Ok((module.into(), flags.iter().filter(|f| **f).count()))
        }
        _ => Err(s.error(KEY, format!("at `{key}`: expected {init_r} times true or false for a `lora_E`"))),
    }
}

/// PEFT's way to match a module's path: the whole path, or what follows one of its dots.
#[derive(Debug)]
struct Pattern {
    text: String,
    regex: fancy_regex::Regex,
}

impl Pattern {
    fn new(s: &Settings<'_>, key: &str, text: &str) -> Result<Pattern> {
        let regex = fancy_regex::Regex::new(&format!(r"\A(.*\.)?({text})\z"))
            .map_err(|e| s.error(key, format!("`{}` is not a usable pattern: {}", short(text), short(e))))?;
        Ok(Pattern { text: text.into(), regex })
    }
}

fn first_match<T: Copy>(file: &str, patterns: &[(Pattern, T)], path: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        let hit = pattern.regex.is_match(path).map_err(|e| {
            let (text, path) = (short(&pattern.text), short(path));
            Error::container(file, format!("pattern `{text}` fails on `{path}`: {}", short(e)))
        })?;
        if hit {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}
