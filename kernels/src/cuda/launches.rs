//! Launches on their way to the driver, and graphs of those that come again.
//!
//! A launch takes the host some 2.5 µs and there are 650 in a step of 32 layers; a graph of them is one call. So launches are
//! noted first and sent together: when there are enough of them, or when something has to come after them
//! ([`Launches::send`], which [`super::device`] calls before everything else that it puts on the stream or waits for). What is sent at once is a
//! *run*. Steps consist of the same runs: one that comes for the second time is made a graph, and launched as such from
//! then on. Nodes whose grid or arguments are not those of the last time are set first.
//!
//! The first run after a wait is short, so that the device gets work soon, and each one twice as long as the one before: the host notes
//! the next while the device does the last.
//!
//! A graph is a chain: kernels follow each other as they do on the stream. If the driver refuses anything about graphs,
//! that is no error: from then on every launch goes alone, at once.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

/// Oldest driver whose graphs are used, as the driver counts: in CUDA 12.0 a kernel node's parameters got the form that they have here.
const OLDEST_DRIVER: i32 = 12_000;
/// Launches of the first run after a wait, and of the longest.
const FIRST: usize = 32;
const LONGEST: usize = 256;
/// A shorter run is not worth a graph.
const SHORTEST: usize = 8;
/// Runs that are remembered: those of a dozen shapes of a batch. The one used longest ago gives way.
const MOST: usize = 128;
/// A run is the same as before if at most one launch in so many has another grid or other arguments: that of the next layer, with
/// its own weights, is another one.
const CHANGED: usize = 4;

/// How kernels were launched so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaunchCounts {
    /// Kernels that were launched one by one.
    pub plain: u64,
    /// Kernels that were launched as part of a graph.
    pub in_graphs: u64,
    /// Launches of graphs.
    pub graphs: u64,
    /// Graphs that were made.
    pub made: u64,
    /// Nodes that got another grid or other arguments.
    pub changed: u64,
}

/// A kernel as the driver has it.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub name: &'static str,
    pub function: sys::CUfunction,
    /// Threads of a block.
    pub threads: u32,
}

/// A launch that the driver refused.
pub(super) struct Failure {
    pub kernel: &'static str,
    pub cause: DriverError,
}

struct Launch {
    kernel: Kernel,
    grid: [u32; 3],
    /// Which words of the run are its arguments.
    arguments: (usize, usize),
}

/// Launches in order. Of runs of the same kernels each argument is at the same place in `words`.
#[derive(Default)]
struct Run {
    launches: Vec<Launch>,
    words: Vec<u64>,
}

impl Run {
    fn arguments(&self, launch: &Launch) -> &[u64] {
        &self.words[launch.arguments.0..launch.arguments.1]
    }

    /// Where the driver reads the arguments of a launch.
    fn pointers(&self, launch: &Launch) -> Vec<*mut c_void> {
        self.arguments(launch).iter().map(|word| std::ptr::from_ref(word).cast_mut().cast()).collect()
    }

    fn has_kernels_of(&self, other: &Run) -> bool {
        self.launches.len() == other.launches.len()
            && self.launches.iter().zip(&other.launches).all(|(a, b)| a.kernel.function == b.kernel.function)
    }

    /// Numbers of the launches that are not as in a run of the same kernels.
    fn changed<'a>(&'a self, other: &'a Run) -> impl Iterator<Item = usize> + 'a {
        let pairs = self.launches.iter().zip(&other.launches).enumerate();
        pairs
            .filter(|(_, (a, b))| a.grid != b.grid || self.arguments(a) != other.arguments(b))
            .map(|(i, _)| i)
    }

    fn clear(&mut self) {
        self.launches.clear();
        self.words.clear();
    }

    /// What a node is made of; valid as long as `pointers` are, and the run.
    fn node(launch: &Launch, pointers: &mut [*mut c_void]) -> sys::CUDA_KERNEL_NODE_PARAMS {
        let [x, y, z] = launch.grid;
        sys::CUDA_KERNEL_NODE_PARAMS {
            func: launch.kernel.function,
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            kernelParams: pointers.as_mut_ptr(),
            extra: null_mut(),
            kern: null_mut(),
            ctx: null_mut(),
        }
    }
}

/// A run as the driver launches it at once.
struct Graph {
    /// What `executable` was made of; nodes are known by those of this one.
    template: sys::CUgraph,
    nodes: Vec<sys::CUgraphNode>,
    executable: sys::CUgraphExec,
}

impl Graph {
    /// # Safety
    /// The context is current; the run's arguments are those of its kernels.
    unsafe fn of(run: &Run) -> Result<Graph, DriverError> {
        let mut graph = Graph { template: null_mut(), nodes: Vec::new(), executable: null_mut() };
        // SAFETY: writes a handle.
        unsafe { sys::cuGraphCreate(&mut graph.template, 0) }.result()?;
        for launch in &run.launches {
            let mut pointers = run.pointers(launch);
            let parameters = Run::node(launch, &mut pointers);
            let before = graph.nodes.last().map_or(null(), std::ptr::from_ref);
            let (mut node, count) = (null_mut(), usize::from(!before.is_null()));
            // SAFETY: the node before is one of this graph; the driver copies parameters and arguments before it returns.
            unsafe { sys::cuGraphAddKernelNode_v2(&mut node, graph.template, before, count, &parameters) }
                .result()?;
            graph.nodes.push(node);
        }
        // SAFETY: the graph was made above.
        graph.executable =
            unsafe { result::graph::instantiate(graph.template, sys::CUgraphInstantiate_flags(0)) }?;
        Ok(graph)
    }

    /// Launch number `i` as it is in `run`, from the next launch of the graph on.
    ///
    /// # Safety
    /// As [`Graph::of`]; the run has the graph's kernels.
    unsafe fn set(&self, i: usize, run: &Run) -> Result<(), DriverError> {
        let launch = &run.launches[i];
        let mut pointers = run.pointers(launch);
        let parameters = Run::node(launch, &mut pointers);
        // SAFETY: the node is one of the graph, with this kernel; the driver copies the arguments before it returns.
        unsafe { sys::cuGraphExecKernelNodeSetParams_v2(self.executable, self.nodes[i], &parameters) }
            .result()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `of` and not used after; one that is running goes when it has ended. Errors have nobody to tell.
        unsafe {
            if !self.executable.is_null() {
                let _ = result::graph::exec_destroy(self.executable);
            }
            if !self.template.is_null() {
                let _ = result::graph::destroy(self.template);
            }
        }
    }
}

/// A run that was sent.
struct Known {
    run: Run,
    /// From its second time on.
    graph: Option<Graph>,
    /// The sending in which it was last.
    last_used: u64,
}

/// Launches that are noted, and runs that were sent.
pub(super) struct Launches {
    /// Whether the driver has what graphs need and has refused nothing so far.
    offered: bool,
    wanted: bool,
    noted: Run,
    /// Launches that are noted before they are sent.
    most: usize,
    known: Vec<Known>,
    /// The known run that came after the last one when it was first sent.
    next: usize,
    sendings: u64,
    /// What nobody has been told. Until somebody is, nothing is sent.
    failure: Option<Failure>,
    failures: u64,
    counts: LaunchCounts,
}

impl Launches {
    /// With graphs, if this driver has them.
    pub fn new(driver: i32) -> Launches {
        Launches {
            offered: driver >= OLDEST_DRIVER && symbols(),
            wanted: true,
            noted: Run::default(),
            most: FIRST,
            known: Vec::new(),
            next: 0,
            sendings: 0,
            failure: None,
            failures: 0,
            counts: LaunchCounts::default(),
        }
    }

    pub fn counts(&self) -> LaunchCounts {
        self.counts
    }

    /// Whether graphs are used. Nothing is noted; the context is current.
    pub fn want(&mut self, graphs: bool) {
        self.wanted = graphs;
        self.known.clear();
    }

    /// Notes a launch, and sends what is noted if there is enough of it.
    ///
    /// # Safety
    /// As [`super::device::Device::launch`]; the context is current, and the stream is its.
    pub unsafe fn note(
        &mut self,
        kernel: Kernel,
        grid: [u32; 3],
        arguments: impl Iterator<Item = u64>,
        stream: sys::CUstream,
    ) -> Result<(), Failure> {
        let first = self.noted.words.len();
        self.noted.words.extend(arguments);
        let arguments = (first, self.noted.words.len());
        self.noted.launches.push(Launch { kernel, grid, arguments });
        if self.offered && self.wanted {
            if self.noted.launches.len() < self.most {
                return Ok(());
            }
            self.most = (2 * self.most).min(LONGEST);
        }
        // SAFETY: the caller's promise.
        unsafe { self.send(stream) }
    }

    /// Whether a launch that is noted has this word among its arguments.
    pub fn names(&self, word: u64) -> bool {
        self.noted.words.contains(&word)
    }

    /// The host waits next, for all that was sent: the device will have nothing to do.
    pub fn settle(&mut self) {
        self.most = FIRST;
    }

    /// Nothing that is noted is sent, and all graphs go. The context is current.
    pub fn end(&mut self) {
        self.noted.clear();
        self.known.clear();
    }

    /// How many sendings ended with an error: what was noted before the last of them may never have been launched.
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// As [`Launches::send`]; an error is that of the next sending, which sends nothing.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn send_silently(&mut self, stream: sys::CUstream) {
        // SAFETY: the caller's promise.
        self.failure = unsafe { self.send(stream) }.err();
    }

    /// Sends what is noted. After an error it is not noted any more: what came after the launch that failed is dropped, up to the call that
    /// has the error, since it may read what was not written.
    ///
    /// # Safety
    /// What was promised of each launch holds until now; the context is current, and the stream is its.
    pub unsafe fn send(&mut self, stream: sys::CUstream) -> Result<(), Failure> {
        let sent = match self.failure.take() {
            Some(failure) => Err(failure),
            None if self.noted.launches.is_empty() => Ok(()),
            // SAFETY: the caller's promise.
            None => unsafe { self.send_run(stream) },
        };
        self.failures += u64::from(sent.is_err());
        self.noted.clear();
        sent
    }

    /// # Safety
    /// As [`Launches::send`].
    unsafe fn send_run(&mut self, stream: sys::CUstream) -> Result<(), Failure> {
        let remembered = self.offered && self.wanted && self.noted.launches.len() >= SHORTEST;
        self.sendings += 1;
        if remembered && let Some(at) = self.find() {
            // SAFETY: the caller's promise; the run was found by its kernels.
            if unsafe { self.send_graph(at, stream) }.is_ok() {
                return Ok(());
            }
            self.offered = false;
            self.known.clear();
        }
        // SAFETY: the caller's promise.
        unsafe { self.send_plainly(stream) }?;
        if remembered && self.offered {
            self.remember();
        }
        Ok(())
    }

    /// The known run that is the one noted, but for some grids and arguments.
    fn find(&self) -> Option<usize> {
        let changes = |at: usize| {
            let run = &self.known.get(at)?.run;
            let count = run.has_kernels_of(&self.noted).then(|| self.noted.changed(run).count())?;
            (count <= self.noted.launches.len() / CHANGED).then_some((count, at))
        };
        let best = changes(self.next).or_else(|| (0..self.known.len()).filter_map(changes).min());
        best.map(|(_, at)| at)
    }

    /// # Safety
    /// As [`Launches::send`]; `at` is a known run with the kernels of the one noted.
    unsafe fn send_graph(&mut self, at: usize, stream: sys::CUstream) -> Result<(), DriverError> {
        let Launches { noted, known, counts, next, sendings, .. } = self;
        let Known { run, graph, last_used } = &mut known[at];
        let graph = match graph {
            Some(graph) => {
                for i in noted.changed(run) {
                    // SAFETY: the caller's promise.
                    unsafe { graph.set(i, noted) }?;
                    counts.changed += 1;
                }
                graph
            }
            none => {
                counts.made += 1;
                // SAFETY: the caller's promise.
                none.insert(unsafe { Graph::of(noted) }?)
            }
        };
        // SAFETY: graph and stream are of this context.
        unsafe { result::graph::launch(graph.executable, stream) }?;
        counts.graphs += 1;
        counts.in_graphs += noted.launches.len() as u64;
        *last_used = *sendings;
        std::mem::swap(run, noted);
        *next = at + 1;
        Ok(())
    }

    /// # Safety
    /// As [`Launches::send`].
    unsafe fn send_plainly(&mut self, stream: sys::CUstream) -> Result<(), Failure> {
        for launch in &self.noted.launches {
            let Launch { kernel: Kernel { name, function, threads }, grid: [x, y, z], .. } = *launch;
            let mut pointers = self.noted.pointers(launch);
            // SAFETY: the driver copies the arguments before it returns; the rest is the caller's promise.
            unsafe { result::launch_kernel(function, (x, y, z), (threads, 1, 1), 0, stream, &mut pointers) }
                .map_err(|cause| Failure { kernel: name, cause })?;
            self.counts.plain += 1;
        }
        Ok(())
    }

    /// What is noted was sent for the first time.
    fn remember(&mut self) {
        let run = std::mem::take(&mut self.noted);
        let known = Known { run, graph: None, last_used: self.sendings };
        let oldest = (0..self.known.len()).min_by_key(|at| self.known[*at].last_used);
        let at = match oldest.filter(|_| self.known.len() >= MOST) {
            Some(at) => {
                self.known[at] = known;
                at
            }
            None => {
                self.known.push(known);
                self.known.len() - 1
            }
        };
        self.next = at + 1;
    }
}

/// Whether the driver's library has the functions that graphs need: the bindings look each one up when it is called first, and panic
/// if it is missing.
fn symbols() -> bool {
    let names: [&[u8]; 7] = [
        b"cuGraphCreate",
        b"cuGraphAddKernelNode_v2",
        b"cuGraphInstantiateWithFlags",
        b"cuGraphExecKernelNodeSetParams_v2",
        b"cuGraphLaunch",
        b"cuGraphExecDestroy",
        b"cuGraphDestroy",
    ];
    // SAFETY: the library has been loaded, and what is found is not called here.
    names.iter().all(|name| unsafe { sys::culib().get::<unsafe extern "C" fn()>(*name) }.is_ok())
}
