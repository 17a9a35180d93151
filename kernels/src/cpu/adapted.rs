//! Linear layers of one input together with what adapters add, in one turn of the thread pool.
//!
//! Shrink, cores and expand are some per cent of the layer's own work. In turns of their own they would take longer than that: the
//! input would be quantized again, every turn ends with waiting, and the outputs would come back from memory to be added to. So all
//! are tasks of one turn, in an order in which each finds done what it needs, or nearly:
//!
//! 1. select: the rows of each group, unless they are all rows;
//! 2. shrink: `z = Vᵀ x`, each V once for all layers that have it;
//! 3. the first tasks of the layers, so that nobody waits for the last shrink;
//! 4. cores: `λ C z`, summed line by line, and prepared for the product with U by whoever finishes a group;
//! 5. the layers' other tasks, which write the sum of their own products and of `U z'`;
//! 6. late: `U z'` is added to the outputs of tasks that came before the cores were done.
//!
//! Tasks begin in ascending order and wait only for lower ones, so one that waits waits for a task that runs. Bits are those of
//! [`crate::ops::lora`], whoever adds.

use std::ops::Range;

use super::adapted_turn::Turn;
use super::cores::Line;
use super::lora::{ascending, is_plain};
use super::matmul::{Input, is_one_block};
use super::output::Output;
use super::prepared::Prepared;
use super::repack::Repacked;
use super::{Isa, ThreadPool};
use crate::backend::{Expand, LoraGroup};
use crate::quant::{FormatError, QMatrix};

/// One layer.
pub(crate) struct Layer<'a> {
    /// The weight.
    pub weight: QMatrix<'a>,
    /// The same repacked, if it was.
    pub repacked: Option<&'a Repacked>,
    /// Receives lines of `weight.rows()`.
    pub out: Output<'a>,
    /// What is added; such that they [`join`].
    pub groups: &'a [LoraGroup<'a>],
}

/// Whether groups can be added in the layer's own turn: sums of `U C Vᵀ x` are all that they add.
pub(crate) fn join(groups: &[LoraGroup<'_>]) -> bool {
    groups.iter().all(|g| g.v.is_some() && g.u.is_some_and(|u| u.rank() > 0)) && is_plain(groups)
}

/// Who works, and how.
#[derive(Clone, Copy)]
pub(crate) struct Workers<'a> {
    /// The instructions.
    pub isa: Isa,
    /// All threads.
    pub pool: &'a ThreadPool,
    /// The calling thread alone.
    pub serial: &'a ThreadPool,
}

/// The groups of a call, with what they share found out. What each has some of lies one after the other in a list for all: a step plans
/// hundreds of groups, and each would allocate its own.
#[derive(Default)]
pub(super) struct Wanted<'a> {
    /// Lists of rows other than all, parts of `listed`.
    pub subsets: Vec<Range<usize>>,
    /// Rows of the batch.
    pub listed: Vec<u32>,
    /// Each V with its rows once.
    pub shrinks: Vec<Shrunken<'a>>,
    /// In the order of the layers.
    pub members: Vec<Member<'a>>,
    /// Where among the rows of its shrink each row of a group stands.
    pub places: Vec<usize>,
    /// What is expanded.
    pub lines: Vec<Line<'a>>,
    /// The row of the batch that each line is for.
    pub rows: Vec<u32>,
}

/// One V and the rows it is for.
pub(super) struct Shrunken<'a> {
    /// rank × columns of the input.
    pub v: QMatrix<'a>,
    /// Which list of rows; `None`: all.
    pub subset: Option<usize>,
    /// How many they are.
    pub rows: usize,
}

/// One group of one layer.
pub(super) struct Member<'a> {
    /// Which layer.
    pub layer: usize,
    /// Its U.
    pub u: Expand<'a>,
    /// Which of the shrinks.
    pub shrink: usize,
    /// Its part of [`Wanted::places`].
    pub places: Range<usize>,
    /// Its part of [`Wanted::lines`] and [`Wanted::rows`].
    pub lines: Range<usize>,
}

impl<'a> Wanted<'a> {
    fn of(input: Input<'_>, layers: &[Layer<'a>]) -> Wanted<'a> {
        let groups = layers.iter().enumerate().flat_map(|(i, l)| l.groups.iter().map(move |g| (i, g)));
        let (n, rows) = groups.clone().fold((0, 0), |(n, rows), (_, group)| (n + 1, rows + group.rows.len()));
        let mut wanted = Wanted {
            shrinks: Vec::with_capacity(n),
            members: Vec::with_capacity(n),
            places: Vec::with_capacity(rows),
            lines: Vec::with_capacity(rows),
            rows: Vec::with_capacity(rows),
            ..Wanted::default()
        };
        for (layer, group) in groups {
            let (Some(v), Some(u)) = (group.v, group.u) else { continue };
            let lines = wanted.lines.len();
            Line::all(group, &mut wanted.lines);
            let lines = lines..wanted.lines.len();
            if lines.is_empty() {
                continue;
            }
            let outputs = layers[layer].weight.rows();
            assert!(v.cols() == input.columns && u.outputs() == outputs && v.rows() == u.rank());
            assert!(group.rows.iter().all(|(row, _)| (*row as usize) < input.rows));
            wanted.rows.extend(wanted.lines[lines.clone()].iter().map(|line| group.rows[line.index].0));
            let places = wanted.places.len();
            let listed = wanted.listed.len();
            ascending(group, &mut wanted.listed, &mut wanted.places);
            let places = places..wanted.places.len();
            let shrink = wanted.shrink(v, listed, input.rows);
            wanted.members.push(Member { layer, u, shrink, places, lines });
        }
        wanted
    }

    /// The number of the shrink of V for what has been listed, distinct and ascending, from `first` on.
    fn shrink(&mut self, v: QMatrix<'a>, first: usize, all: usize) -> usize {
        let end = self.listed.len();
        let subset = (end - first != all).then(|| {
            let is = |list: &Range<usize>| self.listed[list.clone()] == self.listed[first..];
            self.subsets.iter().position(is).unwrap_or(self.subsets.len())
        });
        match subset {
            Some(new) if new == self.subsets.len() => self.subsets.push(first..end),
            // Known already, or all rows.
            _ => self.listed.truncate(first),
        }
        let place = v.bytes().as_ptr_range();
        let known =
            self.shrinks.iter().position(|s| s.v.bytes().as_ptr_range() == place && s.subset == subset);
        known.unwrap_or_else(|| {
            self.shrinks.push(Shrunken { v, subset, rows: end - first });
            self.shrinks.len() - 1
        })
    }

    /// Floats that shrinks and cores write.
    fn floats(&self) -> usize {
        let shrinks = self.shrinks.iter().map(|s| s.rows * s.v.rows());
        let cores = self.members.iter().map(|m| m.lines.len() * m.u.rank());
        shrinks.chain(cores).sum()
    }
}

/// Zeros that are dealt out.
pub(super) struct Floats<'a>(&'a mut [f32]);

impl<'a> Floats<'a> {
    /// The next `len`. Panics if fewer are left.
    pub fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (taken, rest) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        taken
    }
}

/// Fewer rows in a turn are not worth it: weights would be taken apart, or come from memory, too often.
const LEAST_ROWS: usize = 96;

/// As many rows as a turn can take, in equal parts; `None` if they would be too few.
fn rows_of_turn(isa: Isa, pool: &ThreadPool, rows: usize, weights: &[QMatrix<'_>]) -> Option<usize> {
    let parts = 1..=(rows / LEAST_ROWS).max(1);
    parts.map(|n| rows.div_ceil(n)).find(|rows| is_one_block(isa, pool, *rows, weights))
}

/// What groups do for some rows, which then count from 0.
fn for_rows<'a>(groups: &[LoraGroup<'a>], rows: &Range<usize>) -> Vec<LoraGroup<'a>> {
    let own = |group: &LoraGroup<'a>| {
        let within = group.rows.iter().filter(|(row, _)| rows.contains(&(*row as usize)));
        let rows = within.map(|(row, terms)| (*row - rows.start as u32, terms.clone())).collect();
        LoraGroup { v: group.v, u: group.u, rows }
    };
    groups.iter().map(own).filter(|group| !group.rows.is_empty()).collect()
}

/// `out = x Wᵀ` of all layers and what their groups add, in as many turns as the rows need; or nothing and `false` where turns
/// would have too few.
pub(crate) fn linear(
    workers: Workers<'_>,
    input: Input<'_>,
    layers: &[Layer<'_>],
) -> Result<bool, FormatError> {
    let weights: Vec<_> = layers.iter().map(|layer| layer.weight).collect();
    if input.rows == 0 || weights.iter().any(|weight| weight.rows() == 0) {
        return Ok(false);
    }
    let Some(at_once) = rows_of_turn(workers.isa, workers.pool, input.rows, &weights) else {
        return Ok(false);
    };
    if at_once == input.rows {
        return turn(workers, input, layers).map(|()| true);
    }
    let mut members = layers.iter().flat_map(|layer| layer.groups).flat_map(|group| &group.rows);
    assert!(members.all(|(row, _)| (*row as usize) < input.rows));
    for start in (0..input.rows).step_by(at_once) {
        let rows = start..(start + at_once).min(input.rows);
        let groups: Vec<_> = layers.iter().map(|layer| for_rows(layer.groups, &rows)).collect();
        let mut own = Vec::with_capacity(layers.len());
        for (layer, groups) in layers.iter().zip(&groups) {
            let Layer { weight, repacked, out, .. } = *layer;
            own.push(Layer { weight, repacked, out: out.skip_lines(start), groups });
        }
        let Input { x, columns, .. } = input;
        let x = &x[start * columns..rows.end * columns];
        turn(workers, Input { x, rows: rows.len(), columns }, &own)?;
    }
    Ok(true)
}

/// All rows in one turn.
fn turn(workers: Workers<'_>, input: Input<'_>, layers: &[Layer<'_>]) -> Result<(), FormatError> {
    let Workers { isa, pool, .. } = workers;
    let wanted = Wanted::of(input, layers);
    let weights = layers.iter().map(|layer| layer.weight).chain(wanted.shrinks.iter().map(|shrink| shrink.v));
    let x = Prepared::new(isa, pool, input, weights.map(|weight| weight.ty()));
    let mut floats = vec![0.0; wanted.floats()];
    let mut turn = Turn::new(workers, &x);
    turn.plan(layers, &wanted.members);
    turn.take(wanted, Floats(&mut floats));
    turn.run()
}
