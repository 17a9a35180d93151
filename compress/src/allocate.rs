//! `--auto`: what represents every adapter at every module, under one byte budget or an error ceiling.
//!
//! The paper gives every module the same rank. Modules differ: where the energy sits in a few shared
//! directions, more rank buys nothing, and where adapters have nothing in common, a truncated SVD of each by
//! itself is cheaper than any basis. So a *unit*, the adapters of one cluster at one module, chooses its basis'
//! rank or none, and each of its adapters chooses the shared core or own factors of some rank. For a price λ per byte every
//! choice that minimises error + λ · bytes is independent of the others; λ is found by bisection, and what the
//! budget leaves over goes where a byte lowers the error most. Factors of their own alone are among the choices,
//! so the result is never behind per-adapter SVDs in the same bytes and formats.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use faer::Mat;

use crate::frozen::Method;
use crate::linalg;
use crate::storage::Storage;

/// What is known of one module and one cluster before ranks are given out.
#[derive(Clone, Debug)]
pub struct Unit {
    /// (d_out, d_in).
    pub shape: (usize, usize),
    /// Per adapter, err² on a shared basis of each rank of [`Prices::steps`], in that order.
    pub shared: Vec<Vec<f64>>,
    /// Per adapter, the squared singular values of its own delta, falling, adding up to 1.
    pub spectra: Vec<Vec<f64>>,
}

/// When to stop giving out bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// At most this many bytes of bases, cores and own factors.
    Bytes(u64),
    /// A mean err² of at most this.
    Error(f64),
}

/// How the pack will store what is given out.
#[derive(Clone, Copy, Debug)]
pub struct Prices<'a> {
    /// Ranks that bases may have, rising.
    pub steps: &'a [usize],
    /// Form of the cores.
    pub method: Method,
    /// Formats of bases and cores; own factors have the bases' format.
    pub storage: Storage,
}

/// What represents one adapter in a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A core on the unit's basis.
    Shared,
    /// A truncated SVD of its own delta; rank 0 is nothing at all.
    Own(usize),
}

/// A unit's choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Rank of its basis; 0 for none.
    pub rank: usize,
    /// One per adapter.
    pub forms: Vec<Form>,
}

/// Choices of all units and what they are expected to give.
#[derive(Clone, Debug)]
pub struct Allocation {
    /// In the order of the units.
    pub choices: Vec<Choice>,
    /// Bytes of bases, cores and own factors.
    pub bytes: u64,
    /// Expected mean err² over adapters and modules.
    pub error: f64,
}

/// Per core, ‖leading r × r block‖² for every r from 0 on, after turning both sides to the energies of all.
pub fn leading_energies(cores: &[Mat<f64>]) -> Vec<Vec<f64>> {
    let Some(first) = cores.first() else { return Vec::new() };
    let (ru, rv) = first.shape();
    let (mut gu, mut gv) = (Mat::<f64>::zeros(ru, ru), Mat::<f64>::zeros(rv, rv));
    for c in cores {
        gu += linalg::mul(c.as_ref(), c.transpose());
        gv += linalg::mul_tn(c.as_ref(), c.as_ref());
    }
    let (_, pu) = linalg::eigen(gu.as_ref());
    let (_, pv) = linalg::eigen(gv.as_ref());
    let r = ru.max(rv);
    let one = |c: &Mat<f64>| {
        let turned = linalg::mul(linalg::mul_tn(pu.as_ref(), c.as_ref()).as_ref(), pv.as_ref());
        // energy[s]: what lies in rows and columns < s; filled by the larger of the two indices.
        let mut energy = vec![0.0; r + 1];
        for j in 0..rv {
            for i in 0..ru {
                energy[i.max(j) + 1] += turned[(i, j)] * turned[(i, j)];
            }
        }
        for s in 1..=r {
            energy[s] += energy[s - 1];
        }
        energy
    };
    cores.iter().map(one).collect()
}

/// The sum of [`leading_energies`] over all cores.
pub fn leading_energy(cores: &[Mat<f64>]) -> Vec<f64> {
    let all = leading_energies(cores);
    let mut sum = vec![0.0; all.first().map_or(1, Vec::len)];
    for energy in &all {
        sum.iter_mut().zip(energy).for_each(|(s, e)| *s += e);
    }
    sum
}

/// Costs and errors of one unit, level 0 without a basis and level i with rank `steps[i - 1]`.
struct Priced<'a> {
    unit: &'a Unit,
    prices: Prices<'a>,
    /// Bytes of own factors by rank.
    own: Vec<f64>,
    /// Per adapter, err² of own factors by rank.
    tails: Vec<Vec<f64>>,
}

impl<'a> Priced<'a> {
    fn new(unit: &'a Unit, prices: Prices<'a>) -> Self {
        let longest = unit.spectra.iter().map(Vec::len).max().unwrap_or(0);
        let own = (0..=longest).map(|k| own_bytes(prices.storage, unit.shape, k) as f64).collect();
        let tail = |s: &Vec<f64>| {
            let mut left = 1.0;
            let after = s.iter().map(|e| {
                left -= e;
                f64::max(left, 0.0)
            });
            std::iter::once(1.0).chain(after).collect()
        };
        Priced { unit, prices, own, tails: unit.spectra.iter().map(tail).collect() }
    }

    fn len(&self) -> usize {
        self.tails.len()
    }

    fn rank(&self, level: usize) -> usize {
        level.checked_sub(1).and_then(|l| self.prices.steps.get(l)).copied().unwrap_or(0)
    }

    fn basis_bytes(&self, level: usize) -> f64 {
        match self.rank(level) {
            0 => 0.0,
            rank => self.prices.storage.basis_bytes(self.unit.shape, rank) as f64,
        }
    }

    fn core_bytes(&self, level: usize) -> f64 {
        self.prices.storage.core_bytes(self.prices.method, self.rank(level)) as f64
    }

    /// (bytes, err²) of one adapter in a form.
    fn of(&self, level: usize, adapter: usize, form: Form) -> (f64, f64) {
        match form {
            Form::Shared => (self.core_bytes(level), self.unit.shared[adapter][level - 1]),
            Form::Own(k) => (self.own[k], self.tails[adapter][k]),
        }
    }

    /// The best form of one adapter at a price per byte.
    fn form(&self, level: usize, adapter: usize, price: f64) -> Form {
        let shared = (level > 0).then_some(Form::Shared);
        let own = (0..self.tails[adapter].len()).map(Form::Own);
        let cost = |f: &Form| {
            let (bytes, error) = self.of(level, adapter, *f);
            error + price * bytes
        };
        let best = own.chain(shared).min_by(|a, b| cost(a).total_cmp(&cost(b)));
        best.unwrap_or(Form::Own(0))
    }

    fn choice(&self, level: usize, price: f64) -> State {
        let forms: Vec<Form> = (0..self.len()).map(|i| self.form(level, i, price)).collect();
        // Nobody on the basis: no basis.
        let level = if forms.contains(&Form::Shared) { level } else { 0 };
        self.state(level, forms)
    }

    fn state(&self, level: usize, forms: Vec<Form>) -> State {
        let (mut bytes, mut error) = (self.basis_bytes(level), 0.0);
        for (i, form) in forms.iter().enumerate() {
            let (b, e) = self.of(level, i, *form);
            bytes += b;
            error += e;
        }
        State { level, forms, bytes, error }
    }

    /// The best choice at a price, out of those with `levels` bases.
    fn best(&self, price: f64, levels: std::ops::RangeInclusive<usize>) -> State {
        let states = levels.map(|l| self.choice(l, price));
        let best = states.min_by(|a, b| (a.error + price * a.bytes).total_cmp(&(b.error + price * b.bytes)));
        best.unwrap_or_else(|| self.state(0, vec![Form::Own(0); self.len()]))
    }
}

/// Bytes of factors of an adapter's own, of a rank.
fn own_bytes(storage: Storage, shape: (usize, usize), rank: usize) -> usize {
    if rank == 0 { 0 } else { storage.basis_bytes(shape, rank) }
}

#[derive(Clone, Debug)]
struct State {
    level: usize,
    forms: Vec<Form>,
    bytes: f64,
    error: f64,
}

struct Whole {
    states: Vec<State>,
    bytes: f64,
    error: f64,
}

impl Whole {
    fn new(states: Vec<State>) -> Whole {
        let bytes = states.iter().map(|s| s.bytes).sum();
        let error = states.iter().map(|s| s.error).sum();
        Whole { states, bytes, error }
    }

    fn put(&mut self, at: usize, state: State) {
        let old = &self.states[at];
        self.bytes += state.bytes - old.bytes;
        self.error += state.error - old.error;
        self.states[at] = state;
    }
}

/// Chooses for every unit until the goal is met with the least bytes, or the bytes are spent on the least error.
///
/// A goal that the largest ranks do not reach gives those; a budget below the least possible gives nothing.
pub fn allocate(units: &[Unit], goal: Goal, prices: Prices<'_>) -> Allocation {
    use rayon::prelude::*;
    let priced: Vec<Priced<'_>> = units.iter().map(|u| Priced::new(u, prices)).collect();
    let entries = priced.iter().map(Priced::len).sum::<usize>().max(1) as f64;
    let all = 0..=prices.steps.len();
    let at = |price: f64, levels: &std::ops::RangeInclusive<usize>| {
        Whole::new(priced.par_iter().map(|p| p.best(price, levels.clone())).collect())
    };
    // Bytes fall and errors rise with the price: the cheapest price that the goal allows.
    let good = |w: &Whole| match goal {
        Goal::Bytes(b) => w.bytes <= b as f64,
        Goal::Error(e) => w.error <= e * entries,
    };
    let search = |levels: std::ops::RangeInclusive<usize>| {
        let (mut low, mut high) = (-60.0f64, 10.0f64);
        let end = match goal {
            Goal::Bytes(_) => high,
            Goal::Error(_) => low,
        };
        let mut best = at(end.exp2(), &levels);
        for _ in 0..48 {
            let middle = 0.5 * (low + high);
            let found = at(middle.exp2(), &levels);
            let fits = good(&found);
            if fits == matches!(goal, Goal::Bytes(_)) {
                high = middle
            } else {
                low = middle
            }
            if fits {
                best = found;
            }
        }
        spend(&mut best, &priced, goal, levels);
        best
    };
    // Mixed, and the two pure kinds: what is left over is spent greedily, so any of them can come out first.
    let candidates = [search(all.clone()), search(0..=0), search(1..=prices.steps.len())];
    let score = |w: &Whole| match goal {
        _ if !good(w) => (1, w.bytes),
        Goal::Bytes(_) => (0, w.error),
        Goal::Error(_) => (0, w.bytes),
    };
    let order = |a: &Whole, b: &Whole| {
        let (a, b) = (score(a), score(b));
        a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
    };
    let best = candidates.into_iter().min_by(order).unwrap_or_else(|| at(f64::INFINITY, &all));
    let choice = |(state, p): (State, &Priced<'_>)| Choice { rank: p.rank(state.level), forms: state.forms };
    Allocation {
        bytes: best.bytes as u64,
        error: best.error / entries,
        choices: best.states.into_iter().zip(&priced).map(choice).collect(),
    }
}

/// Units up to which whole bases are tried for what is left over: each try looks at all of them.
const SMALL: usize = 512;

/// Spends what the budget leaves: on other bases while any fits, then on factors of their own.
fn spend(whole: &mut Whole, priced: &[Priced<'_>], goal: Goal, levels: std::ops::RangeInclusive<usize>) {
    let Goal::Bytes(budget) = goal else { return };
    let budget = budget as f64;
    while priced.len() <= SMALL {
        let left = budget - whole.bytes;
        let mut best: Option<(f64, usize, State)> = None;
        for (u, p) in priced.iter().enumerate() {
            let now = &whole.states[u];
            for level in levels.clone().filter(|l| *l != now.level && *l > 0) {
                // Everyone who is on the basis stays there; the others may come.
                let forms = (0..p.len()).map(|i| {
                    let own = now.forms[i];
                    let better = p.of(level, i, Form::Shared).1 < p.of(now.level, i, own).1;
                    if own == Form::Shared || better { Form::Shared } else { own }
                });
                let next = p.state(level, forms.collect());
                let (cost, gain) = (next.bytes - now.bytes, now.error - next.error);
                if gain <= 0.0 || cost > left {
                    continue;
                }
                let worth = gain / cost.max(1.0);
                if best.as_ref().is_none_or(|b| worth > b.0) {
                    best = Some((worth, u, next));
                }
            }
        }
        let Some((_, unit, state)) = best else { break };
        whole.put(unit, state);
    }
    spend_on_own(whole, priced, budget);
}

/// One adapter's next step to more rank of its own.
struct Step {
    worth: f64,
    unit: usize,
    adapter: usize,
    from: Form,
    to: Form,
}

impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Step {}
impl PartialOrd for Step {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Step {
    fn cmp(&self, other: &Self) -> Ordering {
        let place = |s: &Self| (s.unit, s.adapter);
        self.worth.total_cmp(&other.worth).then(place(other).cmp(&place(self)))
    }
}

fn spend_on_own(whole: &mut Whole, priced: &[Priced<'_>], budget: f64) {
    let next = |whole: &Whole, unit: usize, adapter: usize| {
        let (p, state) = (&priced[unit], &whole.states[unit]);
        let from = state.forms[adapter];
        let (bytes, error) = p.of(state.level, adapter, from);
        let steps = (1..p.tails[adapter].len()).filter_map(|k| {
            let (b, e) = p.of(state.level, adapter, Form::Own(k));
            let fits = e < error && whole.bytes + b - bytes <= budget;
            fits.then_some(Step {
                worth: (error - e) / (b - bytes).max(1.0),
                unit,
                adapter,
                from,
                to: Form::Own(k),
            })
        });
        steps.max()
    };
    let pairs = |w: &Whole| -> Vec<(usize, usize)> {
        w.states.iter().enumerate().flat_map(|(u, s)| (0..s.forms.len()).map(move |i| (u, i))).collect()
    };
    let mut heap: BinaryHeap<Step> =
        pairs(whole).into_iter().filter_map(|(u, i)| next(whole, u, i)).collect();
    while let Some(step) = heap.pop() {
        let (p, state) = (&priced[step.unit], &mut whole.states[step.unit]);
        let (b0, e0) = p.of(state.level, step.adapter, step.from);
        let (b1, e1) = p.of(state.level, step.adapter, step.to);
        if whole.bytes + b1 - b0 <= budget {
            state.forms[step.adapter] = step.to;
            (state.bytes, state.error) = (state.bytes + b1 - b0, state.error + e1 - e0);
            (whole.bytes, whole.error) = (whole.bytes + b1 - b0, whole.error + e1 - e0);
        }
        // What did not fit may do so with less rank; that is a worse step, and comes in its turn.
        heap.extend(next(whole, step.unit, step.adapter).filter(|s| s.to != step.to || s.from != step.from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factors::Stack;
    use crate::factors::tests::random_items;
    use crate::frozen::Frozen;
    use crate::full::{FullOptions, jd_full};
    use lory_kernels::QuantType;

    const HALF: Storage = Storage { basis: QuantType::F16, core: QuantType::F16 };
    const STEPS: [usize; 16] = [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32];

    fn prices() -> Prices<'static> {
        Prices { steps: &STEPS, method: Method::Full, storage: HALF }
    }

    fn unit(stack: &Stack) -> Unit {
        let full = jd_full(stack, FullOptions::new(32, 1));
        let frozen = Frozen::new(full.u[0].clone(), full.v.clone(), Method::Full);
        let at = |e: &Vec<f64>| STEPS.iter().map(|r| (1.0 - e[(*r).min(e.len() - 1)]).max(0.0)).collect();
        Unit {
            shape: (stack.left.nrows(), stack.right.nrows()),
            shared: leading_energies(&frozen.projections(stack)).iter().map(at).collect(),
            spectra: stack.spectra(),
        }
    }

    #[test]
    fn leading_blocks_predict_real_bases_of_smaller_rank() {
        let stack = Stack::new(50, 44, &random_items(20, (50, 44), 3, true));
        let unit = unit(&stack);
        for (step, r) in [(1, 4), (3, 8), (7, 16)] {
            let told: f64 = unit.shared.iter().map(|e| e[step]).sum();
            let real = 20.0 - jd_full(&stack, FullOptions::new(r, 1)).objective.last().unwrap();
            assert!(told >= real - 1e-3 && told < real + 0.05 * 20.0, "{r}: {told} {real}");
        }
    }

    #[test]
    fn beats_the_uniform_rank_at_equal_bytes() {
        // Two modules with structure, two without: the shared ones need less rank.
        let dims = (48, 48);
        let stacks: Vec<Stack> = (0..4)
            .map(|m| {
                let mut items = random_items(24, dims, 3, m < 2);
                for (i, f) in items.iter_mut().filter(|_| m < 2) {
                    // B drawn from few directions too: a low-dimensional family.
                    let u = linalg::random(48, 4, &mut crate::Rng::new(60 + m));
                    let mix = linalg::random(4, 3, &mut crate::Rng::stream(61, *i as u64));
                    f.b = linalg::mul(u.as_ref(), mix.as_ref());
                }
                Stack::new(dims.0, dims.1, &items)
            })
            .collect();
        let units: Vec<Unit> = stacks.iter().map(unit).collect();
        for uniform in [8, 12, 16] {
            let one = HALF.basis_bytes(dims, uniform) + 24 * HALF.core_bytes(Method::Full, uniform);
            let kept: f64 = stacks
                .iter()
                .map(|s| *jd_full(s, FullOptions::new(uniform, 1)).objective.last().unwrap())
                .sum();
            let auto = allocate(&units, Goal::Bytes(4 * one as u64), prices());
            assert!(auto.bytes <= 4 * one as u64);
            let without = 1.0 - kept / (4.0 * 24.0);
            assert!(auto.error < without - 0.005, "uniform {uniform}: {} {without}", auto.error);
        }
    }

    #[test]
    fn is_never_behind_factors_of_their_own() {
        // Nothing in common: a basis cannot pay.
        let stack = Stack::new(48, 40, &random_items(12, (48, 40), 6, false));
        let units = [unit(&stack)];
        let rank_bytes = HALF.basis_bytes((48, 40), 1) as f64;
        let singles: Vec<crate::Single> =
            stack.spectra().into_iter().map(|spectrum| crate::Single { spectrum, rank_bytes }).collect();
        for ranks in [5, 17, 30, 60] {
            let budget = (ranks as f64 * rank_bytes) as u64;
            let auto = allocate(&units, Goal::Bytes(budget), prices());
            let svd = crate::svd_at_equal_bytes(&singles, budget);
            assert!(auto.bytes <= budget);
            assert!(auto.error <= svd + 1e-6, "{ranks}: {} {svd}", auto.error);
        }
    }

    #[test]
    fn an_error_ceiling_is_met_with_few_bytes() {
        let stack = Stack::new(50, 44, &random_items(20, (50, 44), 3, true));
        let units = [unit(&stack)];
        let found = allocate(&units, Goal::Error(0.3), prices());
        assert!(found.error <= 0.3);
        let less = allocate(&units, Goal::Bytes(found.bytes * 9 / 10), prices());
        assert!(less.error > 0.3, "{} {}", less.error, found.error);
        assert!(allocate(&units, Goal::Error(1e-12), prices()).error < 1e-5);
    }
}
