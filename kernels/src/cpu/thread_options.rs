//! Where the threads of a pool run, and how they wait.

use std::io;
use std::time::Duration;

use super::CpuMask;

/// Where the threads of a pool run, and how they wait; by default where the system puts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadOptions {
    /// Processors that they may run on; if it is empty, the system decides.
    pub cpus: CpuMask,
    /// Whether each stays on a single one of `cpus`.
    pub strict: bool,
    /// Whether each stays on one memory node, in turns over those that have some of `cpus`.
    pub distribute: bool,
    /// How long an idle one polls before it sleeps. A token's operations follow each other within a few microseconds, and waking
    /// through the kernel takes some 50.
    pub poll: Duration,
}

impl Default for ThreadOptions {
    fn default() -> Self {
        ThreadOptions {
            cpus: CpuMask::default(),
            strict: false,
            distribute: false,
            poll: Duration::from_micros(80),
        }
    }
}

impl ThreadOptions {
    /// Puts the calling thread where thread number `thread` of a pool belongs. The pool does so with its own, from 1 on; who calls it is
    /// number 0 and may do so for itself.
    ///
    /// # Errors
    /// The system's, if there is none of these processors for a thread.
    pub fn settle(&self, thread: usize) -> io::Result<()> {
        if self.cpus.is_empty() {
            return Ok(());
        }
        let nodes = if self.distribute { CpuMask::nodes() } else { Vec::new() };
        self.place(thread, &nodes).confine()
    }

    /// Where a thread belongs on a machine with these memory nodes.
    fn place(&self, thread: usize, nodes: &[CpuMask]) -> CpuMask {
        let nodes: Vec<CpuMask> =
            nodes.iter().map(|node| *node & self.cpus).filter(|node| !node.is_empty()).collect();
        // On its node it has a number again.
        let (cpus, number) = match nodes.get(thread % nodes.len().max(1)) {
            Some(node) => (*node, thread / nodes.len()),
            None => (self.cpus, thread),
        };
        if !self.strict {
            return cpus;
        }
        cpus.iter().nth(number % cpus.len().max(1)).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(options: ThreadOptions, nodes: &[CpuMask]) -> Vec<Vec<usize>> {
        (0..5).map(|thread| options.place(thread, nodes).iter().collect()).collect()
    }

    #[test]
    fn threads_are_dealt_to_processors_and_nodes() {
        let mask = |cpus: &[usize]| cpus.iter().copied().collect::<CpuMask>();
        let nodes = [mask(&[0, 1, 2, 3]), mask(&[4, 5, 6, 7]), mask(&[8])];
        let options = ThreadOptions { cpus: mask(&[1, 3, 4, 6, 7]), ..ThreadOptions::default() };
        assert_eq!(places(options, &[]), vec![vec![1, 3, 4, 6, 7]; 5]);
        let strict = ThreadOptions { strict: true, ..options };
        assert_eq!(places(strict, &[]), [[1], [3], [4], [6], [7]]);
        // The third node has none of them.
        let distributed = ThreadOptions { distribute: true, ..options };
        let (first, second) = (vec![1, 3], vec![4, 6, 7]);
        assert_eq!(places(distributed, &nodes), [&first, &second, &first, &second, &first].map(Vec::clone));
        let both = ThreadOptions { strict: true, ..distributed };
        assert_eq!(places(both, &nodes), [[1], [4], [3], [6], [1]]);
        assert_eq!(places(ThreadOptions { cpus: mask(&[2]), ..strict }, &[]), [[2]; 5]);
    }
}
