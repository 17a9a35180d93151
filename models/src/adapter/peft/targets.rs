//! Which modules a PEFT configuration selects.

use fancy_regex::Regex;

use crate::{Error, Result};

use super::settings::{Settings, short};

/// `target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern`.
#[derive(Debug)]
pub(super) struct Targets {
    include: Names,
    exclude: Names,
    layers: Option<Vec<u64>>,
    /// Each with one group, the layer's number.
    layer_patterns: Vec<Regex>,
}

/// One string is a pattern for the whole path, a list holds last parts of paths.
#[derive(Debug)]
enum Names {
    /// Not given. PEFT fills in a default for the architecture when it makes an adapter, so a saved
    /// one without it says nothing.
    Absent,
    AllLinear,
    Pattern(Regex),
    Suffixes(Vec<String>),
}

impl Targets {
    pub fn parse(s: &Settings<'_>) -> Result<Targets> {
        let names = |key: &str| -> Result<Names> {
            let Some((alone, list)) = s.strings(key)? else { return Ok(Names::Absent) };
            Ok(match (alone, list.as_slice()) {
                (_, []) | (true, [""]) => Names::Absent,
                (true, [all]) if all.eq_ignore_ascii_case("all-linear") => Names::AllLinear,
                (true, [text, ..]) => Names::Pattern(regex(s, key, text, &format!(r"\A(?:{text})\z"))?),
                (false, list) => Names::Suffixes(list.iter().map(|n| (*n).into()).collect()),
            })
        };
        let given = s.strings("layers_pattern")?.map(|(_, list)| list).unwrap_or_default();
        // The first number in the path is the layer's.
        let mut layer_patterns = Vec::new();
        for text in given.iter().filter(|t| !t.is_empty()) {
            let pattern = format!(r"\A(?:|.*?\.)(?:{text})\.(?<idx>\d+)\.");
            layer_patterns.push(regex(s, "layers_pattern", text, &pattern)?);
        }
        if layer_patterns.is_empty() {
            layer_patterns.push(regex(s, "layers_pattern", "", r"\A.*?\.[^.]*\.(?<idx>\d+)\.")?);
        }
        Ok(Targets {
            include: names("target_modules")?,
            exclude: names("exclude_modules")?,
            layers: s.integers("layers_to_transform")?.filter(|l| !l.is_empty()),
            layer_patterns,
        })
    }

    pub fn contains(&self, file: &str, path: &str) -> Result<bool> {
        let hit = |r: &Regex| r.is_match(path).map_err(|e| fails(file, r, path, e));
        let excluded = match &self.exclude {
            Names::Absent => false,
            Names::AllLinear => path == "all-linear",
            Names::Pattern(r) => hit(r)?,
            Names::Suffixes(list) => list.iter().any(|n| ends_with(path, n)),
        };
        if excluded {
            return Ok(false);
        }
        match &self.include {
            Names::Absent => Ok(true),
            Names::AllLinear => Ok(!ends_with(path, "embed_tokens") && !ends_with(path, "lm_head")),
            Names::Pattern(r) => hit(r),
            // A whole path is taken at its word, whatever `layers_to_transform` says.
            Names::Suffixes(list) if list.iter().any(|n| n == path) => Ok(true),
            Names::Suffixes(list) => {
                Ok(list.iter().any(|n| ends_with(path, n)) && self.in_layers(file, path)?)
            }
        }
    }

    fn in_layers(&self, file: &str, path: &str) -> Result<bool> {
        let Some(layers) = &self.layers else { return Ok(true) };
        for pattern in &self.layer_patterns {
            let captures = pattern.captures(path).map_err(|e| fails(file, pattern, path, e))?;
            if let Some(index) = captures.and_then(|c| c.name("idx")?.as_str().parse().ok()) {
                return Ok(layers.contains(&index));
            }
        }
        Ok(false)
    }
}

fn ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn regex(s: &Settings<'_>, key: &str, text: &str, pattern: &str) -> Result<Regex> {
    // The reason may hold all of the pattern.
    let fault = |e| s.error(key, format!("`{}` is not a usable pattern: {}", short(text), short(e)));
    Regex::new(pattern).map_err(fault)
}

fn fails(file: &str, pattern: &Regex, path: &str, e: fancy_regex::Error) -> Error {
    Error::container(file, format!("pattern `{}` on `{}`: {}", short(pattern), short(path), short(e)))
}
