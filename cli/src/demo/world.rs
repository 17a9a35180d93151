//! The built-in base with its adapters, opened where they lie in the program.

use std::sync::Arc;

use lory_demo::{BASE, PACK, Skill, Skills};
use lory_models::adapter::pack::Pack;
use lory_runtime::{
    Engine, EngineOptions, LoadedModel, OpenOptions,
    mapping::{self, File, OpenGguf},
};

use crate::{failure::Outcome, model_flags::EngineFlags, terminal::bytes};

use super::skills;

/// What errors and lists call the two files.
const BASE_NAME: &str = "built-in:base.gguf";
const PACK_NAME: &str = "built-in:skills.gguf";

/// The skills, and what is known about their adapters.
pub struct World {
    skills: &'static Skills,
    pack: Pack,
}

/// What the adapters take, in bytes.
pub struct Sizes {
    /// Of the base's file.
    pub base: usize,
    /// Of the pack's file.
    pub pack: usize,
    /// Of the bases that all adapters share, in the pack.
    pub bases: usize,
    /// Of one adapter as it was trained, in F16.
    pub lora: usize,
}

impl World {
    /// The base on an engine as the flags want it, with all skills at hand.
    pub fn open(flags: &EngineFlags) -> Outcome<(Engine, World)> {
        let engine = flags.engine(base)?;
        let world = World::over(&engine)?;
        Ok((engine, world))
    }

    /// The same with options that no flags gave.
    pub fn open_with(options: &EngineOptions) -> Outcome<(Engine, World)> {
        let engine = World::base(options)?;
        let world = World::over(&engine)?;
        Ok((engine, world))
    }

    /// The base alone.
    pub fn base(options: &EngineOptions) -> Outcome<Engine> {
        Ok(base(options)?)
    }

    /// All skills for an engine.
    pub fn open_pack(engine: &Engine) -> Outcome {
        engine.adapters().open_pack_files(in_memory(PACK, PACK_NAME)?, Vec::new())?;
        Ok(())
    }

    fn over(engine: &Engine) -> Outcome<World> {
        World::open_pack(engine)?;
        let pack = Pack::parse(in_memory(PACK, PACK_NAME)?.gguf, Vec::new())?;
        Ok(World { skills: lory_demo::skills(), pack })
    }

    /// What was recorded about the skills.
    pub fn skills(&self) -> &'static Skills {
        self.skills
    }

    /// The families' names.
    pub fn families(&self) -> Vec<String> {
        self.skills.families().into_iter().map(str::to_owned).collect()
    }

    /// Bytes of a skill's record in the pack.
    pub fn bytes(&self, skill: &Skill) -> Outcome<usize> {
        Ok(self.pack.info(&skill.name)?.bytes)
    }

    /// What base and adapters take.
    pub fn sizes(&self, engine: &Engine) -> Outcome<Sizes> {
        let mut bases = 0;
        for cluster in 0..u32::try_from(self.pack.n_clusters()).unwrap_or(0) {
            bases += self.pack.basis(cluster)?.bytes();
        }
        let projections = engine.model().base.shapes.iter().filter(|(site, _)| site.layer_index().is_some());
        let weights: usize =
            projections.map(|(_, s)| self.skills.rank * (s.in_features + s.out_features)).sum();
        Ok(Sizes { base: BASE.len(), pack: PACK.len(), bases, lora: weights * 2 })
    }

    /// What a person sees who comes without a model.
    pub fn greeting(&self) -> String {
        let mean = self.pack.names().filter_map(|n| self.pack.info(n).ok()).map(|i| i.bytes).sum::<usize>()
            / self.pack.len().max(1);
        let mut text = format!(
            "Lory's built-in demo: one base model of {} and {} adapters of {}, each of them a skill.\n\n",
            bytes(BASE.len() as u64),
            self.pack.len(),
            bytes(mean as u64)
        );
        text += &skills::families(self.skills);
        text += "\n/NAME switches to a skill (Tab completes it), /NAME PROMPT also asks it something; /none is the base alone.\n\
                 /compare A B PROMPT asks several side by side, /mix A=0.5 B=0.5 blends two, /cost says what a skill costs,\n\
                 /skills FAMILY lists what there is.";
        text
    }

    /// What to try after the base has answered alone.
    pub fn advice(&self) -> String {
        let name = skills::best(self.skills.all.iter()).map_or("NAME", |s| s.name.as_str());
        format!(
            "that was the base alone, which has none of the skills: /{name} switches one on, /skills lists them"
        )
    }

    /// `/skills`: all families, one of them, or one skill.
    pub fn describe(&self, what: &str) -> Outcome<String> {
        skills::describe(self.skills, what)
    }

    /// What `/cost` tells about a skill beyond its `own` bytes; nothing for an adapter from elsewhere.
    pub fn cost(&self, engine: &Engine, name: &str, own: usize) -> Vec<String> {
        let (Some(_), Ok(sizes)) = (self.skills.get(name), self.sizes(engine)) else { return Vec::new() };
        vec![
            format!(
                "as it was trained: {} (LoRA of rank {}, F16), {:.0} times as much",
                bytes(sizes.lora as u64),
                self.skills.rank,
                sizes.lora as f64 / own.max(1) as f64
            ),
            format!("shared by all {}: bases of {}", self.pack.len(), bytes(sizes.bases as u64)),
        ]
    }
}

fn base(options: &EngineOptions) -> lory_runtime::Result<Engine> {
    let open = OpenOptions { n_ctx: options.n_ctx, loading: options.loading };
    let model = LoadedModel::from_gguf(in_memory(BASE, BASE_NAME)?, &open)?;
    Engine::with_model(model, options)
}

/// A file that is part of the program: nothing is copied.
fn in_memory(content: &'static [u8], name: &str) -> lory_runtime::Result<OpenGguf> {
    mapping::parse(vec![Arc::new(File::from_owner(Box::new(content), name))])
}
