//! Adapters: shrink and expand as ordinary products over a group's rows, cores and sums by descriptors.

use super::backend::State;
use super::memory::CudaBuffer;
use super::products::{Input, THREADS, word};
use super::scratch::Slot;
use super::tables::Kind;
use super::weights::Turn;
use crate::QMatrix;
use crate::backend::{BackendError, Core, Expand, LoraGroup, LoraJob, LoraTerm};

/// The numbers of `kernels/lora.cu`.
mod number {
    pub const IDENTITY: u32 = 0;
    pub const DIAGONAL: u32 = 1;
    pub const FULL: u32 = 2;
    pub const DELTA: u32 = 0;
    pub const SCALED_DELTA: u32 = 1;
    pub const ROW_SCALE: u32 = 2;
    pub const BIAS: u32 = 3;
}

/// What the kernels are told about a group, in 32-bit words as they read them.
#[derive(Default)]
struct Plan {
    /// `CoreTerm`s of six words.
    terms: Vec<u32>,
    n_terms: usize,
    /// `CoreLine`s of three.
    lines: Vec<u32>,
    n_lines: usize,
    /// `ApplyStep`s of six.
    steps: Vec<u32>,
    n_steps: usize,
    /// `ApplyRow`s of three.
    rows: Vec<u32>,
    n_rows: usize,
}

fn address_words(address: u64) -> [u32; 2] {
    [address as u32, (address >> 32) as u32]
}

impl Plan {
    /// A line of z′ over `terms`, whose sum takes line `source` of z; returns its number.
    fn line(&mut self, terms: &[(u64, u32, u32, f32)], source: u32) -> u32 {
        self.lines.extend([word(self.n_terms), word(terms.len()), source]);
        for (core, ty, kind, scale) in terms {
            let [low, high] = address_words(*core);
            self.terms.extend([low, high, *ty, *kind, scale.to_bits(), 0]);
        }
        self.n_terms += terms.len();
        self.n_lines += 1;
        word(self.n_lines - 1)
    }

    fn step(&mut self, kind: u32, line: (u64, u32), delta: u32, scale: f32) {
        let [low, high] = address_words(line.0);
        self.steps.extend([low, high, line.1, kind, delta, scale.to_bits()]);
        self.n_steps += 1;
    }
}

impl State {
    pub fn lora(
        &mut self,
        x: &CudaBuffer,
        in_width: usize,
        jobs: &mut [LoraJob<'_, CudaBuffer>],
    ) -> Result<(), BackendError> {
        for job in jobs {
            let rows = || job.groups.iter().flat_map(|group| &group.rows);
            let n = rows().map(|(row, _)| *row as usize + 1).max().unwrap_or(0);
            let (x, y) = (x.first(n * in_width), job.out.first(n * job.width));
            let scaled = rows().any(|(_, terms)| terms.iter().any(|term| term.row_scale.is_some()));
            let before = if scaled {
                let bytes = n * job.width * 4;
                let before = self.scratch.room(Slot::Before, bytes)?;
                // SAFETY: `first` has checked the output, and the room was just made.
                unsafe { self.device.copy(y, before, bytes) }?;
                before
            } else {
                0
            };
            for group in job.groups {
                self.group(x, in_width, group, (y, before, job.width))?;
            }
        }
        Ok(())
    }

    /// A line of `width` weights: its address and type.
    fn line_weight(
        &self,
        turn: &mut Turn<'_>,
        line: QMatrix<'_>,
        width: usize,
    ) -> Result<(u64, u32), BackendError> {
        assert_eq!(line.rows() * line.cols(), width, "a line of another length");
        self.weight(turn, line)
    }

    fn weight(&self, turn: &mut Turn<'_>, weight: QMatrix<'_>) -> Result<(u64, u32), BackendError> {
        self.check_type(weight.ty())?;
        Ok((turn.address(weight)?, weight.ty() as u32))
    }

    fn core_term(
        &self,
        turn: &mut Turn<'_>,
        core: Core<'_>,
        rank: usize,
        scale: f32,
    ) -> Result<(u64, u32, u32, f32), BackendError> {
        let (matrix, kind, columns) = match core {
            Core::Identity => return Ok((0, 0, number::IDENTITY, scale)),
            Core::Diagonal(matrix) => (matrix, number::DIAGONAL, 1),
            Core::Full(matrix) => (matrix, number::FULL, rank),
        };
        assert_eq!(matrix.rows() * matrix.cols(), rank * columns, "a core of another rank");
        let (address, ty) = self.weight(turn, matrix)?;
        Ok((address, ty, kind, scale))
    }

    /// Adds one group to y; `(y, before, width)` are the output, its value before any group, and its width.
    fn group(
        &mut self,
        x: u64,
        in_width: usize,
        group: &LoraGroup<'_>,
        (y, before, width): (u64, u64, usize),
    ) -> Result<(), BackendError> {
        let n = group.rows.len();
        if n == 0 {
            return Ok(());
        }
        let weights = self.weights.clone();
        let mut turn = weights.turn();
        // z: the shrunk rows of this group, or all rows of x where the input was shrunk already.
        let (z, rank) = match (group.v, group.u) {
            (Some(v), Some(_)) => {
                let numbers: Vec<u32> = group.rows.iter().map(|(row, _)| *row).collect();
                let numbers = self.tables.address(Kind::GroupRows, &numbers)?;
                let z = self.scratch.room(Slot::Shrunk, n * v.rows() * 4)?;
                // SAFETY: every row of the group lies in x (`lora` has asked for so many), and z has the room.
                unsafe { self.product(&mut turn, v, &mut Input::gathered(x, numbers, n, in_width), z) }?;
                (z, v.rows())
            }
            _ => (x, in_width),
        };
        let mut plan = Plan::default();
        for (i, (row, terms)) in group.rows.iter().enumerate() {
            let source = if group.v.is_some() { word(i) } else { *row };
            let first = plan.n_steps;
            self.row(&mut turn, &mut plan, group.u.is_some().then_some((source, rank)), terms, width)?;
            if plan.n_steps > first {
                plan.rows.extend([*row, word(first), word(plan.n_steps - first)]);
                plan.n_rows += 1;
            }
        }
        let mut deltas = 0;
        if let Some(u) = group.u
            && plan.n_lines > 0
        {
            assert_eq!((u.outputs(), u.rank()), (width, rank), "shape of U");
            let lines = self.tables.address(Kind::CoreLines, &plan.lines)?;
            let terms = self.tables.address(Kind::CoreTerms, &plan.terms)?;
            let cored = self.scratch.room(Slot::Cored, plan.n_lines * rank * 4)?;
            let arguments = [z.into(), word(rank).into(), lines.into(), terms.into(), cored.into()];
            // SAFETY: the parameters of `lora_core`; the lines name terms of the list and lines of z, the terms name cores
            // of this rank that the turn keeps, and there is room for every line.
            unsafe {
                self.device.launch("lora_core", [word(plan.n_lines), word(rank.div_ceil(8)), 1], &arguments)
            }?;
            deltas = self.scratch.room(Slot::Expanded, plan.n_lines * width * 4)?;
            // SAFETY: as many lines as were just written, and room for their products.
            unsafe { self.expand(&mut turn, u, (cored, plan.n_lines), deltas) }?;
        }
        if plan.n_rows == 0 {
            return Ok(());
        }
        let rows = self.tables.address(Kind::ApplyRows, &plan.rows)?;
        let steps = self.tables.address(Kind::ApplySteps, &plan.steps)?;
        let arguments =
            [y.into(), before.into(), deltas.into(), word(width).into(), rows.into(), steps.into()];
        let grid = [word(plan.n_rows), word(width.div_ceil(THREADS)), 1];
        // SAFETY: the parameters of `lora_apply`; rows lie in y (and in `before`, which is there where a step reads it) and
        // are different from each other, deltas are the lines above, and the steps' weights are lines of `width` that the
        // turn keeps.
        unsafe { self.device.launch("lora_apply", grid, &arguments) }
    }

    /// U of some lines.
    ///
    /// # Safety
    /// The lines have the rank, and there is room for as many of all outputs.
    unsafe fn expand(
        &mut self,
        turn: &mut Turn<'_>,
        u: Expand<'_>,
        (lines, n): (u64, usize),
        out: u64,
    ) -> Result<(), BackendError> {
        let rank = u.rank();
        match u {
            // SAFETY: the caller's promise.
            Expand::Rows(u) => unsafe { self.product(turn, u, &mut Input::lines(lines, n, rank), out) },
            Expand::Bands(u) => {
                let (weights, ty) = self.weight(turn, u)?;
                let arguments = [
                    weights.into(),
                    ty.into(),
                    word(u.rows()).into(),
                    lines.into(),
                    word(rank).into(),
                    word(n).into(),
                    out.into(),
                ];
                let grid = [word(u.rows().div_ceil(8)), word(n.div_ceil(8)), 1];
                // SAFETY: the parameters of `lora_expand_bands`; and the caller's promise.
                unsafe { self.device.launch("lora_expand_bands", grid, &arguments) }
            }
        }
    }

    /// The lines and steps of one row; `delta` is its line of z and the rank, where the group has a U.
    fn row(
        &self,
        turn: &mut Turn<'_>,
        plan: &mut Plan,
        delta: Option<(u32, usize)>,
        terms: &[LoraTerm<'_>],
        width: usize,
    ) -> Result<(), BackendError> {
        if let Some((source, rank)) = delta {
            let mut plain = Vec::new();
            for term in terms.iter().filter(|term| term.delta_scale.is_none()) {
                plain.push(self.core_term(turn, term.core, rank, term.scale)?);
            }
            if !plain.is_empty() {
                let line = plan.line(&plain, source);
                plan.step(number::DELTA, (0, 0), line, 1.0);
            }
        }
        for term in terms {
            if let (Some((source, rank)), Some(g)) = (delta, term.delta_scale) {
                let core = self.core_term(turn, term.core, rank, 1.0)?;
                let line = plan.line(&[core], source);
                let g = self.line_weight(turn, g, width)?;
                plan.step(number::SCALED_DELTA, g, line, term.scale);
            }
            if let Some(s) = term.row_scale {
                let s = self.line_weight(turn, s, width)?;
                plan.step(number::ROW_SCALE, s, 0, term.scale);
            }
            if let Some(b) = term.bias {
                let b = self.line_weight(turn, b, width)?;
                plan.step(number::BIAS, b, 0, term.scale);
            }
        }
        Ok(())
    }
}
