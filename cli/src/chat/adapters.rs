//! Who speaks: the commands that choose adapters, list them, and tell what they cost.

use std::path::Path;

use lory_models::adapter::unknown_name;

use super::{
    commands,
    talk::{Talk, print},
};
use crate::{
    failure::{Failure, Outcome},
    mix::{self, Mix},
    switching::switch_time,
    terminal::bytes,
};

/// Adapters listed at once; `/lora list NAME` narrows down.
const LISTED: usize = 50;

impl Talk {
    /// `/NAME` and `/skill NAME`: this adapter alone. A bare name may have been meant for a command.
    pub(super) fn speak(&mut self, given: &str, bare: bool) -> Outcome {
        if bare && !mix::is_name(&self.engine, given) {
            let adapters: Vec<String> =
                self.engine.adapters().names().into_iter().map(|n| format!("/{n}")).collect();
            let commands = commands::NAMES.iter().map(|n| n.trim_end());
            let all: Vec<&str> = commands.chain(adapters.iter().map(String::as_str)).collect();
            let wanted = format!("/{given}");
            // A list of everything would help nobody.
            let hint = match unknown_name(&wanted, &all) {
                hint if hint.starts_with("did you mean") => hint,
                _ => "/help lists the commands, /lora list the adapters; //… says a text that begins with /"
                    .into(),
            };
            return Err(Failure::runtime(format!("no command and no adapter {wanted}: {hint}")));
        }
        self.only(given)
    }

    /// The adapter `NAME[:SCALE]` alone, or the base.
    pub(super) fn only(&mut self, given: &str) -> Outcome {
        let (name, scale) = mix::name_and_scale(&self.engine, given)?;
        self.switch(Mix::only(&self.engine, name, scale)?)
    }

    /// A weighted sum.
    pub(super) fn mix(&mut self, words: &[String]) -> Outcome {
        let mut mix = Mix::default();
        for word in words {
            let known = |text: &str| mix::is_name(&self.engine, text);
            let (name, weight) = commands::weighted(word, known).map_err(Failure::runtime)?;
            let (name, scale) = match weight {
                Some(weight) => (name, weight),
                None => mix::name_and_scale(&self.engine, name)?,
            };
            if mix.parts().iter().any(|p| p.name == name) {
                return Err(Failure::runtime(format!("`{name}` stands there twice; give it one weight")));
            }
            mix.set(&self.engine, name, scale)?;
        }
        self.switch(mix)
    }

    /// Adds an adapter that is known or comes from a file to those that speak.
    pub(super) fn add(&mut self, what: &str, scale: Option<f32>) -> Outcome {
        let (name, named_scale) = mix::name_and_scale(&self.engine, what)?;
        let scale = scale.unwrap_or(named_scale);
        let name = if self.engine.adapters().info(name).is_ok() {
            name.to_owned()
        } else if Path::new(what).exists() {
            mix::load_lora(&self.engine, what.as_ref())?
        } else {
            let message = format!("{what}: neither an adapter's name nor a file; /lora list shows the names");
            return Err(Failure::runtime(message));
        };
        let mut mix = self.conversation.mix().clone();
        mix.set(&self.engine, &name, scale)?;
        self.switch(mix)
    }

    /// Changes the weight of one that speaks.
    pub(super) fn scale(&mut self, name: &str, scale: f32) -> Outcome {
        let mut mix = self.conversation.mix().clone();
        if !mix.parts().iter().any(|p| p.name == name) {
            return Err(not_speaking(name));
        }
        mix.set(&self.engine, name, scale)?;
        self.switch(mix)
    }

    /// Takes one out of those that speak.
    pub(super) fn remove(&mut self, name: &str) -> Outcome {
        let mut mix = self.conversation.mix().clone();
        if mix.remove(name) { self.switch(mix) } else { Err(not_speaking(name)) }
    }

    fn switch(&mut self, mix: Mix) -> Outcome {
        self.conversation.switch(mix)?;
        let mix = self.conversation.mix();
        let size = mix.size(&self.engine).map(|s| format!(" ({s})")).unwrap_or_default();
        self.remark(&format!("now speaking: {}{size}", mix.label()));
        Ok(())
    }

    /// The adapters whose names begin so.
    pub(super) fn list(&self, start: &str) -> Outcome {
        let names: Vec<String> =
            self.engine.adapters().names().into_iter().filter(|n| n.starts_with(start)).collect();
        let parts = self.conversation.mix().parts();
        let mut text = String::new();
        for name in names.iter().take(LISTED) {
            let info = self.engine.adapters().info(name)?;
            let part = parts.iter().find(|p| p.name == *name);
            let mark = part.map_or("  ".into(), |p| format!("* {:<5}", p.scale));
            let size = if info.loaded { bytes(info.bytes as u64) } else { "not loaded yet".into() };
            text += &format!("{mark:<8}{name:<24} {size:>14}  {}\n", info.origin.display());
        }
        if names.len() > LISTED {
            text += &format!("and {} more; /lora list NAME narrows down\n", names.len() - LISTED);
        }
        print(if names.is_empty() { "no adapters" } else { text.trim_end() })
    }

    /// What an adapter costs, or each of those that speak.
    pub(super) fn cost(&self, name: &str) -> Outcome {
        let speaking = self.conversation.mix().parts().iter().map(|p| p.name.clone());
        let names: Vec<String> = if name.is_empty() { speaking.collect() } else { vec![name.into()] };
        if names.is_empty() {
            return Err(Failure::runtime("the base alone speaks; write /cost NAME"));
        }
        let store = self.engine.adapters();
        let mut ids = Vec::new();
        let mut lines = Vec::new();
        for name in &names {
            ids.push(store.resolve(name)?);
            let own = store.info(name)?.bytes;
            lines.push(format!("{name}: {} of its own", bytes(own as u64)));
            if let Some(world) = &self.world {
                lines.extend(world.cost(&self.engine, name, own).into_iter().map(|line| format!("  {line}")));
            }
        }
        let us = switch_time(&self.engine, &ids)?;
        lines.push(format!("switching to it and back: {us:.2} µs each (median)"));
        print(&lines.join("\n"))
    }
}

fn not_speaking(name: &str) -> Failure {
    Failure::runtime(format!("`{name}` is not among the adapters that speak; /lora list shows them"))
}
