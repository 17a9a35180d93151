//! Where the base and the adapters come from that `lory demo --check` examines.

use std::path::PathBuf;

use clap::Args;
use lory_demo::Skill;
use lory_runtime::{Engine, EngineOptions};

use crate::failure::Outcome;

use super::World;

/// Files in place of what is built in.
#[derive(Args, Default)]
pub struct Sources {
    /// With --check: another base, of the same shape and vocabulary [default: the built-in one].
    #[arg(short = 'm', long, value_name = "FILE", requires = "check")]
    model: Option<PathBuf>,
    /// With --check: another pack, with the same names [default: the built-in one].
    #[arg(long, value_name = "FILE", requires = "check", conflicts_with = "adapters")]
    pack: Option<PathBuf>,
    /// With --check: LoRAs in place of a pack, from a folder with one NAME.gguf for each skill.
    #[arg(long, value_name = "DIR", requires = "check")]
    adapters: Option<PathBuf>,
}

impl Sources {
    /// Whether it is the pack on the base that the recorded accuracies are of.
    pub fn are_built_in(&self) -> bool {
        self.model.is_none() && self.pack.is_none() && self.adapters.is_none()
    }

    /// The base on an engine, with an adapter for each of the skills.
    pub fn open(&self, options: &EngineOptions, skills: &[&Skill]) -> Outcome<Engine> {
        let engine = match &self.model {
            Some(path) => Engine::open(path, options)?,
            None => World::base(options)?,
        };
        let store = engine.adapters();
        match (&self.pack, &self.adapters) {
            (Some(path), _) => {
                store.open_pack(path)?;
            }
            (None, Some(folder)) => {
                for skill in skills {
                    store.load_lora(&folder.join(format!("{}.gguf", skill.name)), Some(&skill.name))?;
                }
            }
            (None, None) => World::open_pack(&engine)?,
        }
        Ok(engine)
    }
}
