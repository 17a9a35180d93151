//! Where threads run, how they wait and what goes before them: flags as llama.cpp has them.

use std::time::Duration;

use clap::{Args, ValueEnum};
use lory_kernels::cpu::{CpuMask, ThreadOptions, physical_cores};

use crate::failure::{Failure, Outcome};

/// How memory nodes (NUMA) are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Numa {
    /// Threads evenly across all nodes.
    Distribute,
    /// All threads on the node that the program started on.
    Isolate,
    /// As numactl has set it up: processors as the program inherits them, which is so without this flag too.
    Numactl,
}

/// What holds for the whole program.
#[derive(Args, Clone, Copy, Debug)]
pub struct ProcessFlags {
    /// How threads are spread over memory nodes.
    #[arg(long, value_name = "HOW", help_heading = "Threads", value_enum)]
    pub numa: Option<Numa>,
    /// Priority: -1 low, 0 normal, 1 medium, 2 high, 3 as high as there is; above 0 needs permission.
    #[arg(long, value_name = "N", help_heading = "Threads", default_value_t = 0, allow_negative_numbers = true, value_parser = clap::value_parser!(i8).range(-1..=3))]
    prio: i8,
}

impl ProcessFlags {
    /// Takes the priority. Threads that are there already keep theirs.
    pub fn prioritize(self) -> Outcome {
        let nice = match self.prio {
            0 => return Ok(()),
            ..0 => 5,
            1 => -5,
            2 => -10,
            3.. => -20,
        };
        set_nice(nice).map_err(|e| {
            let prio = self.prio;
            Failure::runtime(format!(
                "--prio {prio}: {e}; above 0 it takes root or a limit that allows it (ulimit -e)"
            ))
        })
    }
}

#[cfg(unix)]
fn set_nice(nice: i32) -> std::io::Result<()> {
    Ok(rustix::process::setpriority_process(None, nice)?)
}

#[cfg(not(unix))]
fn set_nice(_: i32) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// What is asked of one set of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// On these; empty is all that there are.
    pub mask: CpuMask,
    /// Each on one of them.
    pub strict: bool,
    /// Of 100.
    pub poll: usize,
}

impl Wanted {
    /// Options for threads of a program that was started where it is now.
    pub fn options(self, numa: Option<Numa>) -> Outcome<ThreadOptions> {
        let Wanted { mask, strict, poll } = self;
        if poll > 100 {
            return Err(Failure::usage(format!("--poll {poll}: expected 0 to 100")));
        }
        let default = ThreadOptions::default();
        let options = ThreadOptions {
            strict,
            distribute: numa == Some(Numa::Distribute),
            // 50, in the middle, is as long as without the flag.
            poll: Duration::from_nanos(default.poll.as_nanos() as u64 * poll as u64 / 50),
            ..default
        };
        if mask.is_empty() && !strict && !matches!(numa, Some(Numa::Distribute | Numa::Isolate)) {
            return Ok(options);
        }
        let cannot = |why: String| Failure::usage(format!("-C, --cpu-strict, --numa: {why}"));
        let mut all = CpuMask::of_this_thread()
            .map_err(|e| cannot(format!("threads cannot be bound to processors here: {e}")))?;
        if numa == Some(Numa::Isolate) {
            let node = CpuMask::of_this_node();
            all = all & node.ok_or_else(|| cannot("this system does not tell of memory nodes".into()))?;
        }
        let cpus = if mask.is_empty() { all } else { all & mask };
        if cpus.is_empty() {
            return Err(Failure::usage(format!(
                "-C {mask}: none of these processors is there; there are {all}"
            )));
        }
        Ok(ThreadOptions { cpus, ..options })
    }
}

/// Flags for one set of threads.
#[derive(Args, Clone, Copy, Debug)]
pub struct ThreadFlags {
    /// Processors to run on, in hexadecimal: 0x5 is numbers 0 and 2 [default: all].
    #[arg(short = 'C', long, value_name = "HEX", help_heading = "Threads")]
    cpu_mask: Option<CpuMask>,
    /// Whether each thread stays on one of them.
    #[arg(long, value_name = "0|1", help_heading = "Threads", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=1))]
    cpu_strict: u8,
    /// How long an idle thread polls before it sleeps, 0 to 100: 50 is 80 µs, 0 is not at all.
    #[arg(long, value_name = "N", help_heading = "Threads", default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    poll: u8,
    #[command(flatten)]
    process: ProcessFlags,
}

impl ThreadFlags {
    /// Settles the program and the calling thread, and says how many threads there are to be, unless somebody has given a number, and
    /// where they belong.
    pub fn settle(self, threads: Option<u16>) -> Outcome<(usize, ThreadOptions)> {
        let wanted = Wanted {
            mask: self.cpu_mask.unwrap_or_default(),
            strict: self.cpu_strict == 1,
            poll: self.poll.into(),
        };
        let options = wanted.options(self.process.numa)?;
        // Afterwards this thread may see no more than one processor.
        let threads = threads.map_or_else(|| default_threads(&options), usize::from);
        self.process.prioritize()?;
        settle(&options)?;
        Ok((threads, options))
    }
}

/// Threads that nobody gave a number: the physical cores, or as many as there are processors for them.
pub fn default_threads(options: &ThreadOptions) -> usize {
    match options.cpus.len() {
        0 => physical_cores(),
        cpus => physical_cores().min(cpus),
    }
}

/// Puts the calling thread where the first of a pool belongs.
pub fn settle(options: &ThreadOptions) -> Outcome {
    options.settle(0).map_err(|e| Failure::runtime(format!("processors {}: {e}", options.cpus)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_asked_is_the_default() {
        let nothing = Wanted { mask: CpuMask::default(), strict: false, poll: 50 };
        assert_eq!(nothing.options(None).unwrap(), ThreadOptions::default());
        assert_eq!(nothing.options(Some(Numa::Numactl)).unwrap(), ThreadOptions::default());
        let poll = |poll| Wanted { poll, ..nothing }.options(None).map(|options| options.poll.as_micros());
        assert_eq!((poll(0).unwrap(), poll(25).unwrap(), poll(100).unwrap()), (0, 40, 160));
        assert!(poll(101).is_err());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn masks_are_of_processors_that_are_there() {
        let all = CpuMask::of_this_thread().unwrap();
        let first: CpuMask = all.iter().take(1).collect();
        let wanted = |mask: CpuMask| Wanted { mask, strict: false, poll: 50 };
        let everything: CpuMask = (0..CpuMask::MAX).collect();
        assert_eq!(wanted(everything).options(None).unwrap().cpus, all);
        assert_eq!(wanted(first).options(None).unwrap().cpus, first);
        assert_eq!(default_threads(&wanted(first).options(None).unwrap()), 1);
        let strict = Wanted { strict: true, ..wanted(CpuMask::default()) };
        assert_eq!(strict.options(None).unwrap().cpus, all);
        let absent: CpuMask = (0..CpuMask::MAX).filter(|cpu| !all.contains(*cpu)).collect();
        let Err(Failure::Usage(message)) = wanted(absent).options(None) else {
            panic!("there are none of these")
        };
        assert!(message.ends_with(&format!("there are {all}")), "{message}");
        if let Some(node) = CpuMask::of_this_node() {
            let isolated = wanted(CpuMask::default()).options(Some(Numa::Isolate)).unwrap();
            assert!(
                !isolated.cpus.is_empty() && isolated.cpus & all == isolated.cpus,
                "{node:?}: {isolated:?}"
            );
        }
    }

    /// A thread of Linux has a priority of its own, so that this lowers no other.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_priority_is_taken() {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let before = rustix::process::getpriority_process(None).unwrap();
                ProcessFlags { numa: None, prio: 0 }.prioritize().unwrap();
                assert_eq!(rustix::process::getpriority_process(None).unwrap(), before);
                // A thread that is below already cannot rise.
                if before <= 5 {
                    ProcessFlags { numa: None, prio: -1 }.prioritize().unwrap();
                    assert_eq!(rustix::process::getpriority_process(None).unwrap(), 5);
                }
            });
        });
    }
}
