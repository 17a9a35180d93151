//! Threads that are there when a product needs them.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::ThreadOptions;

/// A fixed set of threads that work off numbered tasks together with the caller.
///
/// Workers poll for a short while after each job and then sleep. A worker that comes late
/// finds the job closed and is not waited for, so that a busy machine costs no more than the tasks that
/// its slow threads have already taken. Which thread does a task is open; nothing else is.
pub struct ThreadPool {
    shared: Arc<Shared>,
    /// Held for the duration of a job: callers take turns.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Number of the job in the upper 48 bits; in the lower, the workers inside, and [`OPEN`].
    state: AtomicU64,
    /// Valid while `state` is open or counts workers.
    job: UnsafeCell<Option<Job>>,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: Mutex<usize>,
    wake: Condvar,
    stop: AtomicBool,
    /// How long an idle worker polls before it sleeps.
    poll: Duration,
}

// SAFETY: `job` is written only by the caller whose turn it is, while the state is closed and
// counts no workers; workers read it only after entering an open state.
unsafe impl Sync for Shared {}
// SAFETY: the pointer inside `job` is to a `Sync` closure, used only while its job runs.
unsafe impl Send for Shared {}

const OPEN: u64 = 1 << 15;
const NUMBER: u64 = 1 << 16;

#[derive(Clone, Copy)]
struct Job {
    run: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Tasks run outside of all locks, so a poisoned one still guards sound data.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ThreadPool {
    /// A pool in which `threads` work at once, the caller among them (at least 1).
    pub fn new(threads: usize) -> ThreadPool {
        ThreadPool::with_options(threads, &ThreadOptions::default())
    }

    /// The same, with its own threads where they are to be; the caller stays where it is ([`ThreadOptions::settle`]).
    pub fn with_options(threads: usize, options: &ThreadOptions) -> ThreadPool {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            poll: options.poll,
        });
        let worker = |i| {
            let (shared, options) = (Arc::clone(&shared), *options);
            let builder = std::thread::Builder::new().name(format!("lory-{i}"));
            // A system that refuses a thread leaves the pool smaller, not the program dead.
            let work = move || {
                // Somewhere else it does the same work.
                let _ = options.settle(i);
                shared.work();
            };
            builder.spawn(work).ok()
        };
        let workers = (1..threads).map_while(worker).collect();
        ThreadPool { shared, turn: Mutex::new(()), workers }
    }

    /// How many threads work at once.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// As [`ThreadPool::run`], for tasks that may fail: an error of one of them, if there is any. The others run all the same.
    ///
    /// # Panics
    /// As there.
    pub fn try_run<E: Send>(
        &self,
        tasks: usize,
        task: &(dyn Fn(usize) -> Result<(), E> + Sync),
    ) -> Result<(), E> {
        let failure = Mutex::new(None);
        self.run(tasks, &|i| {
            if let Err(error) = task(i) {
                *lock(&failure) = Some(error);
            }
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Runs `task(0)`, …, `task(tasks - 1)`, each once, and returns when all are done.
    ///
    /// A task must not call `run` of the same pool: it would wait for itself.
    ///
    /// # Panics
    /// With the first panic of a task, after the others have ended. Remaining tasks are skipped.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; no worker uses the pointer after this function has
        // closed the job and seen the last one leave.
        let run: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        // SAFETY: it is this caller's turn and the last job was closed and left.
        unsafe { *shared.job.get() = Some(Job { run, tasks }) };
        shared.next.store(0, Ordering::Relaxed);
        let number = shared.state.load(Ordering::Relaxed) / NUMBER + 1;
        shared.state.store((number * NUMBER) | OPEN, Ordering::SeqCst);
        if *lock(&shared.sleepers) > 0 {
            shared.wake.notify_all();
        }
        shared.work_off(Job { run, tasks });
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut polls = 0u32;
        while !shared.state.load(Ordering::Acquire).is_multiple_of(NUMBER) {
            polls += 1;
            if polls.is_multiple_of(1 << 12) {
                // The worker may wait for this very core.
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        let panic = lock(&shared.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        {
            // Under the lock, so that no worker is between its last look and its sleep.
            let _sleepers = lock(&self.shared.sleepers);
            self.shared.stop.store(true, Ordering::SeqCst);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of tasks and has none of its own.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work_off(&self, job: Job) {
        // SAFETY: the caller keeps the closure alive until all workers have left.
        let run = unsafe { &*job.run };
        let mut task = self.next.fetch_add(1, Ordering::Relaxed);
        while task < job.tasks {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(task))) {
                lock(&self.panic).get_or_insert(panic);
                self.next.store(job.tasks, Ordering::Relaxed);
            }
            task = self.next.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn work(&self) {
        let mut last = 0;
        while let Some(number) = self.wait(last) {
            last = number;
            if self.enter(number) {
                // SAFETY: entering succeeded, so the job of this number is open and stays until `leave`.
                if let Some(job) = unsafe { *self.job.get() } {
                    self.work_off(job);
                }
                self.state.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Counts this worker in, unless job `number` is over.
    fn enter(&self, number: u64) -> bool {
        let enter = |state: u64| (state / NUMBER == number && state & OPEN != 0).then_some(state + 1);
        self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, enter).is_ok()
    }

    /// The number of an open job other than `last`; `None` when the pool ends.
    fn wait(&self, last: u64) -> Option<u64> {
        let open = || {
            let state = self.state.load(Ordering::SeqCst);
            (state / NUMBER != last && state & OPEN != 0).then_some(state / NUMBER)
        };
        let start = Instant::now();
        while start.elapsed() < self.poll {
            for _ in 0..64 {
                if let Some(number) = open() {
                    return Some(number);
                }
                std::hint::spin_loop();
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
        }
        let mut sleepers = lock(&self.sleepers);
        loop {
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            if let Some(number) = open() {
                return Some(number);
            }
            *sleepers += 1;
            sleepers = self.wake.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
            *sleepers -= 1;
        }
    }
}

/// Cores of this machine, without the second threads of each, as far as the system tells.
pub fn physical_cores() -> usize {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = cores_of(|cpu| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        std::fs::read_to_string(path).ok()
    });
    if cores == 0 { available } else { cores.min(available) }
}

/// Cores by the siblings of each processor; one that is switched off has none.
fn cores_of(siblings: impl Fn(usize) -> Option<String>) -> usize {
    (0..4096).filter_map(siblings).collect::<std::collections::HashSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = ThreadPool::new(threads);
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for round in 1..=20 {
                    pool.run(tasks, &|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == round));
                }
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(4);
        for _ in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, &|i| assert!(i != 37, "task {i}"));
            }));
            let message = result.unwrap_err();
            assert_eq!(message.downcast_ref::<String>().map(String::as_str), Some("task 37"));
            let done = AtomicUsize::new(0);
            pool.run(50, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 50);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn threads_stay_on_their_processors() {
        use crate::cpu::CpuMask;

        let all = CpuMask::of_this_thread().unwrap();
        let options = ThreadOptions { cpus: all, strict: true, poll: Duration::ZERO, ..Default::default() };
        let pool = ThreadPool::with_options(3, &options);
        // As many tasks as threads, and none ends before all have begun: each thread has one.
        let (begun, seen) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let caller = std::thread::current().id();
        pool.run(3, &|_| {
            begun.fetch_add(1, Ordering::SeqCst);
            while begun.load(Ordering::SeqCst) < 3 {
                std::thread::yield_now();
            }
            let cpus: Vec<usize> = CpuMask::of_this_thread().unwrap().iter().collect();
            lock(&seen).push((std::thread::current().id() != caller, cpus));
        });
        let mut seen = seen.into_inner().unwrap();
        seen.sort();
        let (caller, workers) = seen.split_at(1);
        assert_eq!(caller, [(false, all.iter().collect())], "the caller was left alone");
        let mut want: Vec<_> = (1..3).map(|i| (true, vec![all.iter().nth(i % all.len()).unwrap()])).collect();
        want.sort();
        assert_eq!(workers, want);
    }

    #[test]
    fn several_callers_take_turns() {
        let pool = ThreadPool::new(3);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(9, &|i| {
                            total.fetch_add(i, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 50 * 36);
    }

    #[test]
    fn cores_are_counted() {
        assert!(
            (1..=std::thread::available_parallelism().map_or(1, usize::from)).contains(&physical_cores())
        );
        // Four cores, neighbours being one: with both, with the second of each switched off, with only one left.
        let pairs = |cpu: usize| (cpu < 8).then(|| format!("{}-{}\n", cpu / 2 * 2, cpu / 2 * 2 + 1));
        assert_eq!(cores_of(pairs), 4);
        assert_eq!(cores_of(|cpu| (cpu % 2 == 0 && cpu < 8).then(|| format!("{cpu}\n"))), 4);
        assert_eq!(cores_of(|cpu| (cpu == 5).then(|| "5\n".into())), 1);
        assert_eq!(cores_of(|_| None), 0);
    }
}
