//! Adapters: shrink, core and expand for all sites and rows of a call together.
//!
//! Rows that share a basis go through its V and U as one matrix product; the cores between differ per
//! row and are tiny. Sites with the same rows share the gathered (and quantized) input, so
//! q, k and v cost one preparation. Bits are those of [`crate::ops::lora`].

use std::collections::HashMap;
use std::sync::OnceLock;

use super::activations::Shared;
use super::bands::Bands;
use super::cores::{Line, Shrunk, Terms, prepare_shrunk, run_cores};
use super::matmul::{Input, Product, matmul};
use super::output::Output;
use super::pointwise::{split, try_split};
use super::{Isa, ThreadPool};
use crate::backend::{Expand, LoraGroup, LoraJob, LoraTerm};
use crate::ops::lora::line;
use crate::quant::{FormatError, QMatrix};

/// One group of one job, on its way.
struct Work<'a> {
    job: usize,
    group: &'a LoraGroup<'a>,
    /// Index of its row list, which is in ascending order.
    rows: usize,
    /// Where in that list each row of the group stands.
    places: Vec<usize>,
    /// `None` where the input was shrunk already.
    v: Option<QMatrix<'a>>,
    u: Expand<'a>,
    /// V x, a line per row of the list.
    z: Vec<f32>,
    /// What is expanded: lines of the rank.
    lines: Vec<Line<'a>>,
    inner: Vec<f32>,
    /// Whether U of `inner` is added to the output at once.
    onto: bool,
    /// U of `inner` otherwise.
    delta: Vec<f32>,
}

/// What adapters add to several sites with the same input; see [`crate::Backend::lora`].
pub(crate) fn lora(
    isa: Isa,
    pool: &ThreadPool,
    serial: &ThreadPool,
    x: &[f32],
    in_width: usize,
    jobs: &mut [LoraJob<'_, Vec<f32>>],
) -> Result<(), FormatError> {
    let mut row_lists: Vec<Vec<u32>> = Vec::new();
    let mut work = Vec::new();
    for (job, j) in jobs.iter().enumerate() {
        let onto = is_plain(j.groups);
        for group in j.groups {
            let Some(u) = group.u else { continue };
            let (mut rows, mut places) = (Vec::new(), Vec::new());
            ascending(group, &mut rows, &mut places);
            let known = row_lists.iter().position(|list| *list == rows);
            let rows = known.unwrap_or_else(|| {
                row_lists.push(rows);
                row_lists.len() - 1
            });
            work.push(Work::new(job, group, (rows, places), u, onto));
        }
    }
    shrink(isa, pool, x, in_width, &row_lists, &mut work)?;
    cores(isa, pool, serial, &mut work)?;
    expand_onto(isa, pool, jobs, &work)?;
    expand(isa, pool, &mut work)?;
    add(pool, jobs, &work)
}

/// Appends a group's rows in ascending order, and where each entry of the group stands there.
///
/// Callers sort rows by adapter. In ascending order the rows of a whole batch are its input as it lies there,
/// and groups with the same rows share one.
pub(super) fn ascending(group: &LoraGroup<'_>, rows: &mut Vec<u32>, places: &mut Vec<usize>) {
    let n = group.rows.len();
    if group.rows.is_sorted_by_key(|(row, _)| *row) {
        rows.extend(group.rows.iter().map(|(row, _)| *row));
        places.extend(0..n);
        return;
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|entry| group.rows[*entry].0);
    let first = places.len();
    places.resize(first + n, 0);
    order.iter().enumerate().for_each(|(place, entry)| places[first + entry] = place);
    rows.extend(order.into_iter().map(|entry| group.rows[entry].0));
}

/// Whether no row stands twice in a group.
fn is_distinct(group: &LoraGroup<'_>) -> bool {
    let in_order = || {
        let mut rows: Vec<u32> = group.rows.iter().map(|(row, _)| *row).collect();
        rows.sort_unstable();
        rows.is_sorted_by(|a, b| a < b)
    };
    group.rows.is_sorted_by(|a, b| a.0 < b.0) || in_order()
}

/// Whether sums of `U C Vᵀ x` are all that the groups add, each to distinct rows.
pub(super) fn is_plain(groups: &[LoraGroup<'_>]) -> bool {
    let plain = |t: &LoraTerm<'_>| t.delta_scale.is_none() && t.row_scale.is_none() && t.bias.is_none();
    groups.iter().all(|g| g.rows.iter().all(|(_, terms)| terms.iter().all(plain)) && is_distinct(g))
}

impl<'a> Work<'a> {
    fn new(
        job: usize,
        group: &'a LoraGroup<'a>,
        (rows, places): (usize, Vec<usize>),
        u: Expand<'a>,
        onto: bool,
    ) -> Self {
        let mut lines = Vec::with_capacity(group.rows.len());
        Line::all(group, &mut lines);
        let z = vec![0.0; group.rows.len() * u.rank()];
        let inner = vec![0.0; lines.len() * u.rank()];
        Work { job, group, rows, places, v: group.v, u, z, lines, inner, onto, delta: Vec::new() }
    }
}

fn shrink(
    isa: Isa,
    pool: &ThreadPool,
    x: &[f32],
    in_width: usize,
    row_lists: &[Vec<u32>],
    work: &mut [Work<'_>],
) -> Result<(), FormatError> {
    let gathered: Vec<Option<Vec<f32>>> = row_lists
        .iter()
        .map(|rows| {
            let in_order = rows.iter().enumerate().all(|(i, row)| *row as usize == i);
            (!in_order).then(|| {
                let mut own = Vec::with_capacity(rows.len() * in_width);
                rows.iter().for_each(|row| own.extend_from_slice(&x[*row as usize * in_width..][..in_width]));
                own
            })
        })
        .collect();
    let inputs: Vec<Input<'_>> = row_lists
        .iter()
        .zip(&gathered)
        .map(|(rows, own)| Input { x: own.as_deref().unwrap_or(x), rows: rows.len(), columns: in_width })
        .collect();
    for w in work.iter_mut().filter(|w| w.v.is_none()) {
        let n = w.z.len();
        w.z.copy_from_slice(&inputs[w.rows].x[..n]);
    }
    // Sites that share V (one for q, k and v) are shrunk once.
    let mut seen = HashMap::new();
    let mut twin = |(i, w): (usize, &Work<'_>)| {
        let v = w.v?;
        let first = *seen.entry((v.bytes().as_ptr_range(), w.rows)).or_insert(i);
        (first != i).then_some(first)
    };
    let twins: Vec<Option<usize>> = work.iter().enumerate().map(&mut twin).collect();
    let products: Vec<_> = work
        .iter_mut()
        .zip(&twins)
        .filter(|(_, twin)| twin.is_none())
        .filter_map(|(w, _)| {
            let weight = w.v?;
            Some(Product { input: w.rows, weight, repacked: None, out: Output::set(&mut w.z, weight.rows()) })
        })
        .collect();
    matmul(isa, pool, &inputs, &products)?;
    drop(products);
    for (i, twin) in twins.iter().enumerate() {
        if let (Some(j), (before, after)) = (*twin, work.split_at_mut(i)) {
            after[0].z.copy_from_slice(&before[j].z);
        }
    }
    Ok(())
}

/// `inner[line] = Σ λ C z` of plain terms, `C z` of one with a scale of its own.
fn cores(isa: Isa, pool: &ThreadPool, serial: &ThreadPool, work: &mut [Work<'_>]) -> Result<(), FormatError> {
    // (work, first line, lines), which do not depend on each other.
    let mut runs = Vec::new();
    for (w, work) in work.iter().enumerate() {
        runs.extend(Line::runs(&work.lines).map(|(first, n)| (w, first, n)));
    }
    let inner: Vec<_> = work.iter_mut().map(|w| Shared(w.inner.as_mut_ptr())).collect();
    let work = &*work;
    let shrunk: Vec<_> = work.iter().map(|_| OnceLock::new()).collect();
    let cost = work.iter().map(|w| w.u.rank() * w.u.rank()).max().unwrap_or(0);
    // In a turn of their own: to wait for another thread's would be to sleep.
    split(pool, work.len(), cost, &|range| {
        for (work, shrunk) in work[range.clone()].iter().zip(&shrunk[range]) {
            let cores = work.lines.iter().flat_map(Line::cores);
            drop(shrunk.set(prepare_shrunk(isa, serial, &work.z, work.u.rank(), cores)));
        }
    });
    try_split(pool, runs.len(), cost, &|range| {
        for (w, first, n) in &runs[range] {
            let (work, r) = (&work[*w], work[*w].u.rank());
            // SAFETY: each run owns its lines.
            let out = unsafe { inner[*w].slice(first * r, n * r) };
            let Some(x) = shrunk[*w].get() else { continue };
            let z = Shrunk { z: &work.z, x, places: &work.places, width: r };
            run_cores(isa, z, &work.lines[*first..first + n], out)?;
        }
        Ok(())
    })
}

/// Expands straight onto the outputs, where plain terms are all there is.
fn expand_onto(
    isa: Isa,
    pool: &ThreadPool,
    jobs: &mut [LoraJob<'_, Vec<f32>>],
    work: &[Work<'_>],
) -> Result<(), FormatError> {
    let outs: Vec<_> = jobs.iter_mut().map(|job| (Shared(job.out.as_mut_ptr()), job.out.len())).collect();
    // Groups with a row in common keep their order: a group's turn comes after those of its rows.
    let mut next_turn: Vec<Vec<u32>> = vec![Vec::new(); jobs.len()];
    let mut turns: Vec<Vec<(&Work<'_>, Vec<u32>)>> = Vec::new();
    for w in work.iter().filter(|w| w.onto) {
        let lines: Vec<u32> = w.lines.iter().map(|line| w.group.rows[line.index].0).collect();
        let next = &mut next_turn[w.job];
        let rows = lines.iter().max().map_or(0, |row| *row as usize + 1);
        next.resize(next.len().max(rows), 0);
        let turn = lines.iter().map(|row| next[*row as usize]).max().unwrap_or(0);
        lines.iter().for_each(|row| next[*row as usize] = turn + 1);
        turns.resize_with(turns.len().max(turn as usize + 1), Vec::new);
        turns[turn as usize].push((w, lines));
    }
    for turn in &turns {
        let expansions = turn.iter().map(|(w, lines)| {
            let (out, len) = outs[w.job];
            // SAFETY: `jobs` are borrowed here until the end; the rows of a group are distinct (see
            // `is_plain`), and those of a turn belong to one group each.
            (w.u, &w.inner[..], lines.len(), unsafe { Output::add(out, len, w.u.outputs(), lines) })
        });
        expand_all(isa, pool, expansions)?;
    }
    Ok(())
}

/// Expands what has scales of its own, or other additions in between.
fn expand(isa: Isa, pool: &ThreadPool, work: &mut [Work<'_>]) -> Result<(), FormatError> {
    let expansions = work.iter_mut().filter(|w| !w.onto).map(|w| {
        w.delta = vec![0.0; w.lines.len() * w.u.outputs()];
        (w.u, &w.inner[..], w.lines.len(), Output::set(&mut w.delta, w.u.outputs()))
    });
    expand_all(isa, pool, expansions)
}

/// Several times U of some lines: (U, the lines, their number, where they go).
fn expand_all<'a>(
    isa: Isa,
    pool: &ThreadPool,
    expansions: impl Iterator<Item = (Expand<'a>, &'a [f32], usize, Output<'a>)>,
) -> Result<(), FormatError> {
    let (mut inputs, mut products) = (Vec::new(), Vec::new());
    for (u, x, rows, out) in expansions {
        match u {
            Expand::Rows(weight) => {
                products.push(Product { input: inputs.len(), weight, repacked: None, out });
                inputs.push(Input { x, rows, columns: weight.cols() });
            }
            // SAFETY: an output is for all lines, and the iterator gave each once.
            Expand::Bands(u) => unsafe { Bands { u, z: x }.run_all(isa, pool, out)? },
        }
    }
    matmul(isa, pool, &inputs, &products)
}

/// Adds the deltas, scaled outputs and biases, group after group and term after term.
fn add(pool: &ThreadPool, jobs: &mut [LoraJob<'_, Vec<f32>>], work: &[Work<'_>]) -> Result<(), FormatError> {
    for (j, job) in jobs.iter_mut().enumerate().filter(|(_, job)| !is_plain(job.groups)) {
        let width = job.width;
        let terms = || job.groups.iter().flat_map(|g| &g.rows).flat_map(|(_, terms)| terms);
        let before = terms().any(|t| t.row_scale.is_some()).then(|| job.out.clone());
        let groups = job.groups;
        for group in groups {
            let out = Shared(job.out.as_mut_ptr());
            let len = job.out.len();
            let work = work.iter().find(|w| w.job == j && std::ptr::eq(w.group, group));
            // Distinct rows may go to different threads.
            let distinct = is_distinct(group);
            try_split(pool, group.rows.len(), if distinct { width } else { 0 }, &|range| {
                for (index, (row, terms)) in group.rows.iter().enumerate().take(range.end).skip(range.start) {
                    let start = *row as usize * width;
                    assert!(start + width <= len, "row {row} of the batch");
                    // SAFETY: within `out`, and no other thread has this row.
                    let y = unsafe { out.slice(start, width) };
                    let y0 = before.as_ref().map(|b| &b[start..start + width]);
                    add_row(work, index, terms, y0, y)?;
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

fn add_row(
    work: Option<&Work<'_>>,
    index: usize,
    terms: &[LoraTerm<'_>],
    y0: Option<&[f32]>,
    y: &mut [f32],
) -> Result<(), FormatError> {
    let delta = |wanted: Option<&LoraTerm<'_>>| {
        let work = work?;
        let is = |line: &Line<'_>| {
            line.index == index
                && match (line.terms, wanted) {
                    (Terms::Plain(_), None) => true,
                    (Terms::Scaled(term), Some(wanted)) => std::ptr::eq(term, wanted),
                    _ => false,
                }
        };
        let i = work.lines.iter().position(is)?;
        Some(&work.delta[i * work.u.outputs()..][..work.u.outputs()])
    };
    if let Some(delta) = delta(None) {
        y.iter_mut().zip(delta).for_each(|(y, d)| *y += d);
    }
    for term in terms {
        if let (Some(g), Some(delta)) = (term.delta_scale, delta(Some(term))) {
            for ((y, g), d) in y.iter_mut().zip(line(g)?).zip(delta) {
                *y = (term.scale * g).mul_add(*d, *y);
            }
        }
        if let (Some(s), Some(y0)) = (term.row_scale, y0) {
            for ((y, s), y0) in y.iter_mut().zip(line(s)?).zip(y0) {
                *y = (term.scale * (s - 1.0)).mul_add(*y0, *y);
            }
        }
        if let Some(b) = term.bias {
            for (y, b) in y.iter_mut().zip(line(b)?) {
                *y = term.scale.mul_add(b, *y);
            }
        }
    }
    Ok(())
}
