//! The adapters that speak at a given time, with their weights.

use std::path::Path;

use lory_runtime::{AdapterId, Engine};

use crate::{
    adapter_flags::{AdapterFlags, parse_scale, split_scale},
    failure::{Failure, Outcome},
    terminal::bytes,
};

/// Stands for the base in the place of an adapter's name.
pub const NONE: &str = "none";
/// Why an adapter cannot be called so.
pub const NOT_A_NAME: &str = "an adapter cannot be called `none`, which stands for the base; rename it";

/// One adapter of a mix.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its name in the store.
    pub name: String,
    /// The loading that the name meant when it was added.
    pub id: AdapterId,
    /// λ.
    pub scale: f32,
}

/// Adapters that are summed; none is the base alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mix {
    parts: Vec<Part>,
}

impl Mix {
    /// Loads what the flags name, and mixes what they ask to be used.
    pub fn load(flags: &AdapterFlags, engine: &Engine) -> Outcome<Mix> {
        let files = flags.lora_files()?;
        for pack in &flags.pack {
            engine.adapters().open_pack(pack)?;
        }
        let mut mix = Mix::default();
        for file in files {
            let name = load_lora(engine, &file.path)?;
            mix.set(engine, &name, file.scale)?;
        }
        for given in &flags.adapter {
            let (name, scale) = name_and_scale(engine, given)?;
            mix.set(engine, name, scale)?;
        }
        Ok(mix)
    }

    /// The adapter `name` alone, or the base for [`NONE`].
    pub fn only(engine: &Engine, name: &str, scale: f32) -> Outcome<Mix> {
        let mut mix = Mix::default();
        if name != NONE {
            mix.set(engine, name, scale)?;
        }
        Ok(mix)
    }

    /// Adds an adapter, or changes its weight.
    pub fn set(&mut self, engine: &Engine, name: &str, scale: f32) -> Outcome {
        let id = engine.adapters().resolve(name)?;
        match self.parts.iter_mut().find(|p| p.name == name) {
            Some(part) => (part.id, part.scale) = (id, scale),
            None => self.parts.push(Part { name: name.into(), id, scale }),
        }
        Ok(())
    }

    /// Takes an adapter out; `false` if it was not in.
    pub fn remove(&mut self, name: &str) -> bool {
        let before = self.parts.len();
        self.parts.retain(|p| p.name != name);
        self.parts.len() < before
    }

    /// The parts in the order of their addition.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// What sessions take.
    pub fn entries(&self) -> Vec<(AdapterId, f32)> {
        self.parts.iter().map(|p| (p.id, p.scale)).collect()
    }

    /// `base`, `poet`, `poet:0.5 + chef`.
    pub fn label(&self) -> String {
        let part = |p: &Part| match p.scale {
            1.0 => p.name.clone(),
            scale => format!("{}:{scale}", p.name),
        };
        match self.parts.is_empty() {
            true => "base".into(),
            false => self.parts.iter().map(part).collect::<Vec<_>>().join(" + "),
        }
    }

    /// What the parts occupy for themselves, in words; `None` for the base.
    pub fn size(&self, engine: &Engine) -> Option<String> {
        let infos = self.parts.iter().filter_map(|p| engine.adapters().info(&p.name).ok());
        let sum: usize = infos.map(|i| i.bytes).sum();
        (!self.parts.is_empty()).then(|| bytes(sum as u64))
    }
}

/// Whether `text` is an adapter's name, perhaps with a weight, or [`NONE`].
pub fn is_name(engine: &Engine, text: &str) -> bool {
    name_and_scale(engine, text).is_ok_and(|(name, _)| name == NONE || is_known(engine, name))
}

fn is_known(engine: &Engine, name: &str) -> bool {
    engine.adapters().info(name).is_ok()
}

/// Splits `NAME:SCALE`; an adapter whose name is the whole text comes first.
///
/// # Errors
/// An adapter's name with something behind it that was to be a weight.
pub fn name_and_scale<'t>(engine: &Engine, text: &'t str) -> Outcome<(&'t str, f32)> {
    if is_known(engine, text) {
        return Ok((text, 1.0));
    }
    if let Some(split) = split_scale(text) {
        return Ok(split);
    }
    match text.rsplit_once([':', '=']).filter(|(name, _)| is_known(engine, name)) {
        None => Ok((text, 1.0)),
        Some((name, weight)) => Err(Failure::usage(match parse_scale(weight) {
            Some(scale) => format!("{text}: a weight stands behind a colon; write {name}:{scale}"),
            None => format!("{text}: the weight `{weight}` is not a finite number; write {name}:0.5"),
        })),
    }
}

/// Loads a LoRA and returns its name: the file's stem, or the whole path if that stem is taken.
///
/// # Errors
/// A file that cannot be loaded, or that is loaded under both.
pub fn load_lora(engine: &Engine, path: &Path) -> Outcome<String> {
    let store = engine.adapters();
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let name = match store.info(&stem) {
        Ok(_) => path.to_string_lossy().into_owned(),
        Err(_) => stem,
    };
    if is_known(engine, &name) {
        return Err(Failure::runtime(format!("{name}: is loaded already; give it another weight instead")));
    }
    store.load_lora(path, Some(&name))?;
    Ok(name)
}
