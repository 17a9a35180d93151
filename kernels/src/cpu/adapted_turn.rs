//! The tasks of one turn of [`super::adapted`].

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::activations::Shared;
use super::adapted::{Floats, Layer, Member, Shrunken, Wanted, Workers};
use super::bands::Bands;
use super::cores::{Line, Shrunk, prepare_shrunk, run_cores};
use super::matmul::{Input, Plan, Product, count_strips};
use super::output::{Addends, Output};
use super::prepared::Prepared;
use super::simd::Fetch;
use crate::backend::{BAND, Expand};
use crate::quant::{FormatError, QMatrix};

/// What is expanded before it is used: 128 KiB, a part of the second level.
const AT_ONCE: usize = 1 << 15;
/// How often a task asks whether the cores are done before it begins without: some microseconds, less than adding to its outputs later.
const POLLS: usize = 1 << 10;
/// Weight rows after which what others are expanded with is fetched: a band, or as many rows, unless more are computed at once.
const FETCHED_ROWS: usize = BAND;
/// Tasks per thread that cores, and what is late, are dealt out in.
const SMALL_TASKS_PER_THREAD: usize = 4;

thread_local! {
    /// What the last task expanded into: memory that is in the cache, and was cleared once.
    static LINES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Rows that a group is for, other than all.
struct Subset<'a> {
    /// Among those that are listed.
    rows: Range<usize>,
    x: OnceLock<Prepared<'a>>,
}

/// One V and the rows it is for.
struct Shrink<'a> {
    v: QMatrix<'a>,
    /// `None`: all rows.
    subset: Option<usize>,
    /// Receives a line per row.
    z: Output<'a>,
    strips_left: AtomicUsize,
    /// The lines, prepared for the cores.
    shrunk: OnceLock<Prepared<'a>>,
}

/// One group of one layer.
struct Part<'a> {
    u: Expand<'a>,
    shrink: usize,
    /// Among those of the turn, as the next.
    places: Range<usize>,
    /// Lines, and the rows of the batch that they are for.
    lines: Range<usize>,
    /// Whether one of these is also a row of a part before it.
    again: bool,
    /// Receives the cores' results, lines of the rank.
    inner: Shared<f32>,
    runs_left: AtomicUsize,
    /// The same, prepared for a U in rows.
    x: OnceLock<Prepared<'a>>,
}

impl Part<'_> {
    /// What some rows of its layer's weight are expanded with, a piece of memory: once, if it is for more than these rows.
    fn bytes(&self, rows: &Range<usize>) -> &[u8] {
        let range = match self.u {
            Expand::Rows(u) => rows.start * u.row_bytes()..rows.end * u.row_bytes(),
            Expand::Bands(u) => Bands::bytes(u, rows),
        };
        &self.u.matrix().bytes()[range]
    }
}

/// A layer's plan and its parts.
struct Adapted<'a> {
    plan: Plan<'a>,
    parts: Range<usize>,
    /// The rows of those of them that have no row in common with one before it.
    rows: Vec<bool>,
    /// One past its last task, counted over all layers.
    end: usize,
}

/// What is still to be done before others go on.
#[derive(Default)]
struct Stage(AtomicUsize);

impl Stage {
    fn done(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }

    fn is_over(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }
}

/// Everything about one call.
pub(super) struct Turn<'a> {
    workers: Workers<'a>,
    x: &'a Prepared<'a>,
    subsets: Vec<Subset<'a>>,
    listed: Vec<u32>,
    shrinks: Vec<Shrink<'a>>,
    /// (shrink, first row of V), strip by strip.
    strips: Vec<(usize, usize)>,
    parts: Vec<Part<'a>>,
    /// See [`Wanted`], as of `listed`.
    places: Vec<usize>,
    lines: Vec<Line<'a>>,
    rows: Vec<u32>,
    /// (part, first line of the part, lines).
    runs: Vec<(usize, usize, usize)>,
    runs_per_task: usize,
    layers: Vec<Adapted<'a>>,
    /// Per task of a layer: 0 until it is done, then 1 + the strips from its first on to which nothing was added.
    states: Vec<AtomicUsize>,
    /// Tasks of layers that come before the cores, and those that come after everything.
    early: usize,
    late: usize,
    shrunk: Stage,
    /// Parts whose lines are not ready to be expanded.
    cores: Stage,
    /// Someone failed, so that others may wait for ever.
    stopped: AtomicBool,
    failure: Mutex<Option<FormatError>>,
}

/// What a task does.
#[derive(Clone, Copy)]
enum Kind {
    Select,
    Shrink,
    Early,
    Cores,
    Layer,
    Late,
}

/// Tells those who wait that a task panicked.
struct OnPanic<'a>(&'a AtomicBool);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Release);
        }
    }
}

impl<'a> Turn<'a> {
    /// With the input in all forms that are wanted, and nothing to do.
    pub fn new(workers: Workers<'a>, x: &'a Prepared<'a>) -> Turn<'a> {
        Turn {
            workers,
            x,
            subsets: Vec::new(),
            listed: Vec::new(),
            shrinks: Vec::new(),
            strips: Vec::new(),
            parts: Vec::new(),
            places: Vec::new(),
            lines: Vec::new(),
            rows: Vec::new(),
            runs: Vec::new(),
            runs_per_task: 1,
            layers: Vec::new(),
            states: Vec::new(),
            early: 0,
            late: 0,
            shrunk: Stage::default(),
            cores: Stage::default(),
            stopped: AtomicBool::new(false),
            failure: Mutex::new(None),
        }
    }

    /// Divides the layers into tasks.
    pub fn plan(&mut self, layers: &[Layer<'a>], members: &[Member<'_>]) {
        let Workers { isa, pool, .. } = self.workers;
        let all_strips = count_strips(isa, layers.iter().map(|layer| layer.weight));
        let mut tasks = 0;
        for (i, layer) in layers.iter().enumerate() {
            let Layer { weight, repacked, out, .. } = *layer;
            out.check(self.x.rows(), weight.rows());
            let plan = Plan::new(isa, pool, &Product { input: 0, weight, repacked, out }, self.x, all_strips);
            // Otherwise several tasks would have the same strips.
            assert!(plan.has_one_block());
            tasks += plan.tasks();
            let parts = members.partition_point(|m| m.layer < i)..members.partition_point(|m| m.layer <= i);
            self.layers.push(Adapted { plan, parts, rows: vec![false; self.x.rows()], end: tasks });
        }
        self.states.resize_with(tasks, AtomicUsize::default);
        // A thread alone finds everything done in its turn.
        if pool.threads() > 1 {
            self.early = pool.threads().min(tasks);
            self.late = (pool.threads() * SMALL_TASKS_PER_THREAD).min(tasks);
        }
    }

    /// Takes over what is wanted, with room for its results.
    pub fn take(&mut self, wanted: Wanted<'a>, mut floats: Floats<'a>) {
        let Wanted { subsets, listed, shrinks, members, places, lines, rows } = wanted;
        self.subsets.extend(subsets.into_iter().map(|rows| Subset { rows, x: OnceLock::new() }));
        (self.listed, self.places, self.lines, self.rows) = (listed, places, lines, rows);
        self.shrinks.reserve(shrinks.len());
        for Shrunken { v, subset, rows } in shrinks {
            let strip = self.x.form(self.workers.isa, v, None).strip(self.workers.isa);
            let before = self.strips.len();
            self.strips.extend((0..v.rows()).step_by(strip).map(|row| (self.shrinks.len(), row)));
            let strips_left = AtomicUsize::new(self.strips.len() - before);
            let z = Output::set(floats.take(rows * v.rows()), v.rows());
            self.shrinks.push(Shrink { v, subset, z, strips_left, shrunk: OnceLock::new() });
        }
        let mut taken = vec![false; self.x.rows()];
        let mut of = 0;
        self.parts.reserve(members.len());
        for Member { layer, u, shrink, places, lines } in members {
            if layer != of {
                taken.fill(false);
                of = layer;
            }
            let before = self.runs.len();
            let runs = Line::runs(&self.lines[lines.clone()]);
            self.runs.extend(runs.map(|(first, n)| (self.parts.len(), first, n)));
            let runs_left = AtomicUsize::new(self.runs.len() - before);
            let (rows, first) = (&self.rows[lines.clone()], &mut self.layers[layer].rows);
            let again = rows.iter().any(|row| taken[*row as usize]);
            for row in rows {
                taken[*row as usize] = true;
                first[*row as usize] |= !again;
            }
            let inner = Shared(floats.take(lines.len() * u.rank()).as_mut_ptr());
            self.parts.push(Part { u, shrink, places, lines, again, inner, runs_left, x: OnceLock::new() });
        }
        self.runs_per_task =
            self.runs.len().div_ceil(self.workers.pool.threads() * SMALL_TASKS_PER_THREAD).max(1);
        self.shrunk = Stage(AtomicUsize::new(self.shrinks.len()));
        self.cores = Stage(AtomicUsize::new(self.parts.len()));
    }

    /// Kinds of tasks in their order, and how many there are of each.
    fn order(&self) -> [(Kind, usize); 6] {
        [
            (Kind::Select, self.subsets.len()),
            (Kind::Shrink, self.strips.len()),
            (Kind::Early, self.early),
            (Kind::Cores, self.runs.len().div_ceil(self.runs_per_task)),
            (Kind::Layer, self.states.len() - self.early),
            (Kind::Late, self.late),
        ]
    }

    /// Runs all tasks.
    pub fn run(self) -> Result<(), FormatError> {
        let order = self.order();
        let tasks = order.iter().map(|(_, n)| n).sum();
        self.workers.pool.run(tasks, &|task| self.task(&order, task));
        self.failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn task(&self, order: &[(Kind, usize)], task: usize) {
        let _guard = OnPanic(&self.stopped);
        let mut number = task;
        let kind = order.iter().find(|(_, n)| {
            let is = number < *n;
            number -= if is { 0 } else { *n };
            is
        });
        let done = match kind {
            Some((Kind::Select, _)) => self.select(number),
            Some((Kind::Shrink, _)) => self.shrink(number),
            Some((Kind::Early, _)) => self.layer(number),
            Some((Kind::Cores, _)) => self.cores(number),
            Some((Kind::Layer, _)) => self.layer(self.early + number),
            Some((Kind::Late, _)) => self.late(number),
            None => Ok(()),
        };
        if let Err(error) = done {
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            self.stopped.store(true, Ordering::Release);
        }
    }

    /// Whether it came to pass; otherwise someone failed.
    fn wait(&self, for_this: impl Fn() -> bool) -> bool {
        let mut polls = 0u32;
        while !for_this() {
            if self.stopped.load(Ordering::Acquire) {
                return false;
            }
            polls = polls.wrapping_add(1);
            if polls.is_multiple_of(1 << 12) {
                // The other thread may wait for this very core.
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        true
    }

    /// The rows of one subset.
    fn select(&self, i: usize) -> Result<(), FormatError> {
        let Subset { rows, x } = &self.subsets[i];
        let rows = &self.listed[rows.clone()];
        let theirs = self.shrinks.iter().filter(|shrink| shrink.subset == Some(i));
        drop(x.set(self.x.select(self.workers.isa, rows, theirs.map(|shrink| shrink.v.ty()))));
        Ok(())
    }

    /// One strip of one V.
    fn shrink(&self, i: usize) -> Result<(), FormatError> {
        self.fetch_core(i * self.runs_per_task);
        let (shrink, first) = self.strips[i];
        let Shrink { v, subset, z, strips_left, shrunk } = &self.shrinks[shrink];
        let x = match subset.map(|i| &self.subsets[i].x) {
            None => self.x,
            Some(x) => {
                self.wait(|| x.get().is_some());
                let Some(x) = x.get() else { return Ok(()) };
                x
            }
        };
        let form = x.form(self.workers.isa, *v, None);
        let rows = first..(first + form.strip(self.workers.isa)).min(v.rows());
        // SAFETY: `z` was made for these rows, and each strip has one task.
        unsafe { form.run_all(self.workers.isa, *v, rows, *z)? };
        if strips_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            // SAFETY: all strips are done.
            let z = unsafe { z.written() };
            let theirs = self.parts.iter().filter(|part| part.shrink == shrink);
            let cores = theirs.flat_map(|part| self.lines_of(part)).flat_map(Line::cores);
            drop(shrunk.set(prepare_shrunk(self.workers.isa, self.workers.serial, z, v.rows(), cores)));
            self.shrunk.done();
        }
        Ok(())
    }

    fn lines_of(&self, part: &Part<'_>) -> &[Line<'a>] {
        &self.lines[part.lines.clone()]
    }

    /// The rows of the batch that its lines are for.
    fn rows_of(&self, part: &Part<'_>) -> &[u32] {
        &self.rows[part.lines.clone()]
    }

    /// Asks for the core of a run, if there is one.
    fn fetch_core(&self, run: usize) {
        if let Some((part, first, _)) = self.runs.get(run)
            && let Some((core, _)) = self.lines_of(&self.parts[*part])[*first].single()
        {
            self.workers.isa.run(Fetch::of(core.bytes()));
        }
    }

    /// Some runs of lines, and the preparation of those parts of which they are the last.
    fn cores(&self, i: usize) -> Result<(), FormatError> {
        if !self.wait(|| self.shrunk.is_over()) {
            return Ok(());
        }
        let end = ((i + 1) * self.runs_per_task).min(self.runs.len());
        for run in i * self.runs_per_task..end {
            let (index, first, n) = self.runs[run];
            let part = &self.parts[index];
            let later = i + self.workers.pool.threads();
            self.fetch_core(if run + 1 < end { run + 1 } else { later * self.runs_per_task });
            let width = part.u.rank();
            let Shrink { z, shrunk, .. } = &self.shrinks[part.shrink];
            let Some(x) = shrunk.get() else { return Ok(()) };
            // SAFETY: all strips are done.
            let z = unsafe { z.written() };
            // SAFETY: each run has its own lines.
            let out = unsafe { part.inner.slice(first * width, n * width) };
            let shrunk = Shrunk { z, x, places: &self.places[part.places.clone()], width };
            run_cores(self.workers.isa, shrunk, &self.lines_of(part)[first..first + n], out)?;
            if part.runs_left.fetch_sub(1, Ordering::AcqRel) == 1 {
                if let Expand::Rows(u) = part.u {
                    // SAFETY: all lines are written.
                    let x = unsafe { part.inner.view(0, part.lines.len() * width) };
                    let input = Input { x, rows: part.lines.len(), columns: width };
                    let Workers { isa, serial, .. } = self.workers;
                    drop(part.x.set(Prepared::new(isa, serial, input, std::iter::once(u.ty()))));
                }
                self.cores.done();
            }
        }
        Ok(())
    }

    /// The layer of a task, and its strips.
    fn strips_of(&self, task: usize) -> (&Adapted<'_>, Range<usize>) {
        let i = self.layers.partition_point(|layer| layer.end <= task);
        let first = i.checked_sub(1).map_or(0, |before| self.layers[before].end);
        (&self.layers[i], self.layers[i].plan.strips_of(task - first))
    }

    /// A task of a layer, with what is added if that is known.
    fn layer(&self, task: usize) -> Result<(), FormatError> {
        let (layer, strips) = self.strips_of(task);
        let at_once = (AT_ONCE / (self.x.rows() * layer.plan.strip())).max(1);
        // Taken, for nothing else that runs in this thread has it.
        let (mut bare, mut lines) = (0, LINES.take());
        for first in strips.clone().step_by(at_once) {
            let piece = first..(first + at_once).min(strips.end);
            let ahead = match piece.end < strips.end {
                true => (layer, piece.end..strips.end),
                // As far as can be told, what this thread does next.
                false => match task + self.workers.pool.threads() {
                    next if next < self.states.len() => self.strips_of(next),
                    _ => (layer, 0..0),
                },
            };
            // SAFETY: each strip has one task; the output was checked.
            unsafe {
                if !layer.parts.is_empty()
                    && (self.cores.is_over() || task >= self.early && self.cores_are_over_soon())
                {
                    self.write_adapted(layer, piece, ahead, &mut lines)?;
                } else {
                    bare = piece.end - strips.start;
                    self.strips(layer, piece, ahead, layer.plan.out)?;
                }
            }
        }
        LINES.set(lines);
        self.states[task].store(1 + bare, Ordering::Release);
        Ok(())
    }

    /// Waits a little.
    fn cores_are_over_soon(&self) -> bool {
        (0..POLLS).any(|_| {
            std::hint::spin_loop();
            self.cores.is_over()
        })
    }

    /// Some strips of a layer; meanwhile what others will be expanded with is fetched.
    ///
    /// # Safety
    /// No one else uses the strips.
    unsafe fn strips(
        &self,
        layer: &Adapted<'_>,
        strips: Range<usize>,
        (next, ahead): (&Adapted<'_>, Range<usize>),
        out: Output<'_>,
    ) -> Result<(), FormatError> {
        let (first, end) = (strips.start, strips.end);
        let step = (FETCHED_ROWS.max(layer.plan.at_once(self.workers.isa)) / layer.plan.strip()).max(1);
        let goes_on = std::ptr::eq(layer, next) && !ahead.is_empty();
        for strip in strips.step_by(step) {
            let these = strip..(strip + step).min(end);
            let then = if these.end < end { Some(these.end) } else { Some(ahead.start).filter(|_| goes_on) };
            let ahead = (ahead.start + strip - first).min(ahead.end)..ahead.end;
            self.fetch_parts(
                next,
                next.plan.weight_rows(&(ahead.start..(ahead.start + step).min(ahead.end))),
            );
            // SAFETY: the caller's promise.
            unsafe { layer.plan.strips(self.workers.isa, these, 0, then, out)? };
        }
        Ok(())
    }

    /// Some strips of a layer with all that is added. The sum of two numbers does not depend on which is computed first: what is added is
    /// put into `lines`, where it stays in the cache until the strips are written, since a layer's own lines are whole pages apart, of
    /// which the caches keep only a few. The cores are done.
    ///
    /// # Safety
    /// No one else uses the strips.
    unsafe fn write_adapted(
        &self,
        layer: &Adapted<'_>,
        strips: Range<usize>,
        ahead: (&Adapted<'_>, Range<usize>),
        lines: &mut Vec<f32>,
    ) -> Result<(), FormatError> {
        let plan = &layer.plan;
        let rows = plan.weight_rows(&strips);
        let width = rows.len();
        let len = self.x.rows() * width;
        lines.resize(lines.len().max(len), 0.0);
        let lines = &mut lines[..len];
        let parts = &self.parts[layer.parts.clone()];
        let out = Output::set_from(lines, width, rows.start);
        // SAFETY: the rows of a part are distinct (see `join`), and there is a line for every row.
        let placed = |part: &Part<'a>| unsafe { out.placed(self.rows_of(part)) };
        let first = || parts.iter().filter(|part| !part.again);
        for part in first().filter(|part| matches!(part.u, Expand::Rows(_))) {
            // SAFETY: the lines are this call's alone.
            unsafe { self.expand(part, rows.clone(), placed(part))? };
        }
        // SAFETY: the cores are done.
        let bands = |part| unsafe { Some((self.bands(part)?, placed(part))) };
        // SAFETY: as for those above.
        unsafe { Bands::run_each(self.workers.isa, rows.clone(), &mut first().filter_map(bands))? };
        let addends = Addends { values: lines, width, first: rows.start, lines: &layer.rows };
        // SAFETY: the caller's promise.
        unsafe { self.strips(layer, strips, ahead, plan.out.plus(addends))? };
        for part in parts.iter().filter(|part| part.again) {
            // SAFETY: the strips are written, the rows distinct.
            unsafe { self.expand(part, rows.clone(), plan.out.added(self.rows_of(part)))? };
        }
        Ok(())
    }

    /// Asks for what some rows of a layer's weight are expanded with.
    fn fetch_parts(&self, layer: &Adapted<'_>, rows: Range<usize>) {
        for part in &self.parts[layer.parts.clone()] {
            self.workers.isa.run(Fetch::of(part.bytes(&rows)));
        }
    }

    /// What a part gives for some rows of its layer's weight. The cores are done.
    ///
    /// # Safety
    /// No one else uses the outputs.
    unsafe fn expand(&self, part: &Part<'a>, rows: Range<usize>, out: Output<'_>) -> Result<(), FormatError> {
        let isa = self.workers.isa;
        // SAFETY: the caller's promise.
        unsafe {
            match (part.u, self.bands(part)) {
                (Expand::Rows(u), _) => {
                    let Some(x) = part.x.get() else { return Ok(()) };
                    x.form(isa, u, None).run_all(isa, u, rows, out)
                }
                (_, Some(bands)) => bands.run(isa, rows, out),
                _ => Ok(()),
            }
        }
    }

    /// The lines of a part, for a U in bands.
    ///
    /// # Safety
    /// The cores are done.
    unsafe fn bands(&self, part: &Part<'a>) -> Option<Bands<'a>> {
        let Expand::Bands(u) = part.u else { return None };
        // SAFETY: the cores have written all lines.
        let z = unsafe { part.inner.view(0, part.lines.len() * u.cols() / BAND) };
        Some(Bands { u, z })
    }

    /// Adds what tasks could not that came before the cores were done; every so many-th of them.
    fn late(&self, i: usize) -> Result<(), FormatError> {
        for (task, state) in self.states.iter().enumerate().skip(i).step_by(self.late) {
            if !self.wait(|| state.load(Ordering::Acquire) > 0) || !self.wait(|| self.cores.is_over()) {
                return Ok(());
            }
            let bare = state.load(Ordering::Acquire) - 1;
            let (layer, strips) = self.strips_of(task);
            let rows = layer.plan.weight_rows(&(strips.start..strips.start + bare));
            for part in self.parts[layer.parts.clone()].iter().filter(|_| bare > 0) {
                // SAFETY: the task is over, and this one alone adds to its strips; the rows are distinct (see `join`).
                unsafe { self.expand(part, rows.clone(), layer.plan.out.added(self.rows_of(part)))? };
            }
        }
        Ok(())
    }
}
