//! What stands in the demo's place in a program that was built without it.

use lory_runtime::Engine;

use crate::{
    failure::{Failure, Outcome},
    model_flags::EngineFlags,
};

/// There is none.
pub enum World {}

impl World {
    /// Always an error that says what to do.
    pub fn open(_: &EngineFlags) -> Outcome<(Engine, World)> {
        let message = "no model: name one with -m FILE (this program was built without the demo that it would talk to, \
                       with --no-default-features)";
        Err(Failure::usage(message))
    }

    pub fn families(&self) -> Vec<String> {
        match *self {}
    }

    pub fn greeting(&self) -> String {
        match *self {}
    }

    pub fn advice(&self) -> String {
        match *self {}
    }

    pub fn describe(&self, _: &str) -> Outcome<String> {
        match *self {}
    }

    pub fn cost(&self, _: &Engine, _: &str, _: usize) -> Vec<String> {
        match *self {}
    }
}
