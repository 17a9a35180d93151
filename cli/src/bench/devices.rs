//! `--list-devices`: what there is to compute on.

use std::io::{Write, stdout};

use lory_kernels::{
    Backend, Device, DeviceChoice,
    cpu::{Isa, ThreadOptions},
};

use crate::{
    failure::{Failure, Outcome},
    terminal::bytes,
};

/// Prints them, each with the name that --device takes before the rest.
pub fn list() -> Outcome {
    let isa = Isa::from_env().map_err(Failure::runtime)?;
    let open = |choice| Device::open(choice, None, &ThreadOptions::default(), isa);
    let mut text = String::from("Available devices:\n");
    let cpu = open(DeviceChoice::Cpu).map_err(|e| Failure::runtime(e.to_string()))?;
    text += &format!("  {}\n", cpu.label());
    match open(DeviceChoice::Cuda(0)) {
        Ok(cuda) => {
            let memory = cuda.memory().ok().flatten().map_or(String::new(), |(free, total)| {
                format!(" ({}, {} free)", bytes(total as u64), bytes(free as u64))
            });
            text += &format!("  {}{memory}\n", cuda.label());
        }
        Err(e) => text += &format!("  {e}\n"),
    }
    Ok(stdout().lock().write_all(text.as_bytes())?)
}
