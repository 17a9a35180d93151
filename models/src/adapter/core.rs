//! The factors of one delta, and what an adapter adds between them.

use lory_kernels::backend::{BAND, Expand};

use crate::{Error, Result, Tensor};

use super::{Site, SiteShape, finite::to_f32, pack::ULayout};

/// Ranks above this are refused: no trained adapter comes near, and a pack stores ranks in 16 bits.
pub const MAX_RANK: usize = 16_384;

/// Why s and b are refused at [`Site::TOKEN_EMBD`], where an adapter adds to what was looked up and nothing else.
pub(super) const NO_VECTORS: &str = "an embedding has neither a row scale nor a bias";

/// U and V of one site: the delta is `U · C · Vᵀ`.
#[derive(Clone, Debug)]
pub struct Factors {
    u: Tensor,
    v: Tensor,
    /// Whether U lies in bands ([`Expand::Bands`]).
    bands: bool,
}

impl Factors {
    /// Checks the shapes: `u` is out_features × r (a LoRA's B), `v` is r × in_features (a LoRA's A).
    /// For [`Site::TOKEN_EMBD`] `v` is turned, in_features × r: one row per token, to be looked up.
    ///
    /// # Errors
    /// [`Error::Tensor`] with the sizes that do not fit.
    pub fn new(site: Site, shape: SiteShape, u: Tensor, v: Tensor) -> Result<Factors> {
        Factors { u, v, bands: false }.check(site, shape)
    }

    /// The same with U in bands, out_features / 32 × 32 r ([`Expand::Bands`]).
    ///
    /// # Errors
    /// As those of [`Factors::new`].
    pub fn in_bands(site: Site, shape: SiteShape, u: Tensor, v: Tensor) -> Result<Factors> {
        if !u.cols().is_multiple_of(BAND) {
            let m = format!("has rows of {}, which are no bands of {BAND} outputs", u.cols());
            return Err(Error::tensor(u.file(), u.name(), m));
        }
        Factors { u, v, bands: true }.check(site, shape)
    }

    fn check(self, site: Site, shape: SiteShape) -> Result<Factors> {
        let (Factors { u, v, .. }, outputs, rank) = (&self, self.expand().outputs(), self.rank());
        let (v_rank, v_in) = match site {
            Site::TOKEN_EMBD => (v.cols(), v.rows()),
            _ => (v.rows(), v.cols()),
        };
        let SiteShape { out_features, in_features } = shape;
        let fail = |t: &Tensor, m: String| Err(Error::tensor(t.file(), t.name(), m));
        if v_in != in_features {
            return fail(v, format!("takes {v_in} inputs, but {site} of the base has {in_features}"));
        }
        if outputs != out_features {
            return fail(u, format!("gives {outputs} outputs, but {site} of the base has {out_features}"));
        }
        if rank != v_rank {
            return fail(u, format!("has rank {rank}, its counterpart {} has rank {v_rank}", v.name()));
        }
        // Not min(): a rank above the smaller side is wasteful but sound, and common where one
        // rank is used for all sites and k and v are narrow.
        let limit = out_features.max(in_features).min(MAX_RANK);
        if v_rank == 0 || v_rank > limit {
            return fail(u, format!("has rank {v_rank}, expected 1 to {limit}"));
        }
        Ok(self)
    }

    /// U as it expands.
    pub fn expand(&self) -> Expand<'_> {
        if self.bands { Expand::Bands(self.u.matrix()) } else { Expand::Rows(self.u.matrix()) }
    }

    /// U as it is stored: out_features × r, or in bands.
    pub fn stored_u(&self) -> &Tensor {
        &self.u
    }

    /// U as numbers, out_features × r.
    ///
    /// # Errors
    /// A format that this program cannot read.
    pub fn u_numbers(&self) -> Result<Vec<f32>> {
        let layout = ULayout { ty: self.u.ty(), rank: self.rank(), bands: self.bands };
        Ok(layout.numbers(to_f32(&self.u)?))
    }

    /// Whether U lies in bands.
    pub fn is_in_bands(&self) -> bool {
        self.bands
    }

    /// r × in_features; for the token embedding in_features × r.
    pub fn v(&self) -> &Tensor {
        &self.v
    }

    /// r.
    pub fn rank(&self) -> usize {
        self.expand().rank()
    }

    /// Bytes of both.
    pub fn bytes(&self) -> usize {
        size(&self.u) + size(&self.v)
    }
}

/// C, between shrink and expand.
#[derive(Clone, Debug)]
pub enum CoreMatrix {
    /// r × r.
    Full(Tensor),
    /// 1 × r: the diagonal.
    Diagonal(Tensor),
    /// A plain LoRA.
    Identity,
}

/// Which factors the core stands between.
#[derive(Clone, Debug)]
pub enum Delta {
    /// The adapter's basis, shared with other adapters.
    Shared(CoreMatrix),
    /// Its own.
    Private(Factors, CoreMatrix),
    /// No delta: only row scale or bias.
    None,
}

/// What one adapter adds at one site:
/// `y = s ⊙ W x + scale · g ⊙ (U · C · Vᵀ x) + b`.
#[derive(Clone, Debug)]
pub struct Core {
    /// `U · C · Vᵀ`.
    pub delta: Delta,
    /// The resolved scale of the delta (α/r, α/√r …), finite.
    pub scale: f32,
    /// g, 1 × out_features.
    pub delta_scale: Option<Tensor>,
    /// s, 1 × out_features; never at [`Site::TOKEN_EMBD`].
    pub row_scale: Option<Tensor>,
    /// b, 1 × out_features; never at [`Site::TOKEN_EMBD`].
    pub bias: Option<Tensor>,
    /// ‖ΔW − U C Vᵀ‖² / ‖ΔW‖² that compression left here, where it is known.
    pub err2: Option<f32>,
}

impl Core {
    /// A delta with its scale and nothing else.
    pub fn new(delta: Delta, scale: f32) -> Core {
        Core { delta, scale, delta_scale: None, row_scale: None, bias: None, err2: None }
    }

    /// The tensors that belong to this adapter alone, in the order in which packs store them.
    pub fn own_tensors(&self) -> impl Iterator<Item = &Tensor> {
        let (factors, matrix) = match &self.delta {
            Delta::Shared(m) => (None, Some(m)),
            Delta::Private(f, m) => (Some(f), Some(m)),
            Delta::None => (None, None),
        };
        let matrix = match matrix {
            Some(CoreMatrix::Full(t) | CoreMatrix::Diagonal(t)) => Some(t),
            Some(CoreMatrix::Identity) | None => None,
        };
        let vectors = [&self.delta_scale, &self.row_scale, &self.bias];
        factors
            .into_iter()
            .flat_map(|f| [&f.v, &f.u])
            .chain(matrix)
            .chain(vectors.into_iter().filter_map(Option::as_ref))
    }

    /// Whether it changes any output. A delta counts as zero if its core, or one of its own factors,
    /// is stored as zero bytes, which every weight format reads as zeros.
    pub(super) fn adds(&self) -> bool {
        let zero = |t: &Tensor| t.matrix().bytes().iter().all(|b| *b == 0);
        let zero_matrix = |m: &CoreMatrix| match m {
            CoreMatrix::Full(c) | CoreMatrix::Diagonal(c) => zero(c),
            CoreMatrix::Identity => false,
        };
        let delta = self.scale != 0.0
            && match &self.delta {
                Delta::Shared(m) => !zero_matrix(m),
                Delta::Private(f, m) => !zero_matrix(m) && !zero(&f.u) && !zero(&f.v),
                Delta::None => false,
            };
        delta || self.row_scale.is_some() || self.bias.is_some()
    }

    /// Checks everything but the factors against the site; `shared` is the basis there.
    pub(super) fn check(
        &self,
        adapter: &str,
        site: Site,
        shape: SiteShape,
        shared: Option<&Factors>,
    ) -> Result<()> {
        let fail = |message: String| Err(Error::Request(format!("adapter `{adapter}`, {site}: {message}")));
        if !self.scale.is_finite() {
            return fail(format!("scale {} is not finite", self.scale));
        }
        if site == Site::TOKEN_EMBD && (self.row_scale.is_some() || self.bias.is_some()) {
            return fail(NO_VECTORS.into());
        }
        let (rank, matrix) = match (&self.delta, shared) {
            (Delta::Shared(m), Some(f)) => (f.rank(), m),
            (Delta::Shared(_), None) => return fail("its basis has no factors there".into()),
            (Delta::Private(f, m), _) => (f.rank(), m),
            (Delta::None, _) => (0, &CoreMatrix::Identity),
        };
        let wrong = |t: &Tensor, what: &str| {
            Err(Error::tensor(
                t.file(),
                t.name(),
                format!(
                    "is {} x {}, the {what} of {site} with rank {rank} is another size",
                    t.rows(),
                    t.cols()
                ),
            ))
        };
        match matrix {
            CoreMatrix::Full(c) if (c.rows(), c.cols()) != (rank, rank) => return wrong(c, "core"),
            CoreMatrix::Diagonal(c) if (c.rows(), c.cols()) != (1, rank) => return wrong(c, "core"),
            _ => {}
        }
        for t in [&self.delta_scale, &self.row_scale, &self.bias].into_iter().flatten() {
            if (t.rows(), t.cols()) != (1, shape.out_features) {
                let m = format!("is {} x {}, expected 1 x {}", t.rows(), t.cols(), shape.out_features);
                return Err(Error::tensor(t.file(), t.name(), m));
            }
        }
        Ok(())
    }
}

/// Shared factors per site, for one cluster of adapters.
#[derive(Clone, Debug)]
pub struct Basis {
    identity: u128,
    cluster: u32,
    sites: Vec<Option<Factors>>,
}

impl Basis {
    /// A basis with these factors. `identity` is a hash of their bytes: bases with the same one
    /// are taken to be the same.
    pub fn new(identity: u128, cluster: u32, factors: impl IntoIterator<Item = (Site, Factors)>) -> Basis {
        let mut sites = Vec::new();
        for (site, factors) in factors {
            let i = site.index();
            if sites.len() <= i {
                sites.resize_with(i + 1, || None);
            }
            sites[i] = Some(factors);
        }
        Basis { identity, cluster, sites }
    }

    /// A hash of its content.
    pub fn identity(&self) -> u128 {
        self.identity
    }

    /// Its number in its pack.
    pub fn cluster(&self) -> u32 {
        self.cluster
    }

    /// The factors at `site`.
    pub fn factors(&self, site: Site) -> Option<&Factors> {
        self.sites.get(site.index())?.as_ref()
    }

    /// Sites with factors, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (Site, &Factors)> {
        self.sites.iter().enumerate().filter_map(|(i, f)| Some((Site::from_index(i), f.as_ref()?)))
    }

    /// Bytes of all factors, a V that several sites share counted once.
    pub fn bytes(&self) -> usize {
        let place = |f: &Factors| f.v.matrix().bytes().as_ptr();
        let mut last = None;
        let mut own = |f: &Factors| {
            let shared = last.replace(place(f)) == Some(place(f));
            size(&f.u) + if shared { 0 } else { size(&f.v) }
        };
        self.sites.iter().flatten().map(&mut own).sum()
    }
}

pub(super) fn size(t: &Tensor) -> usize {
    t.matrix().bytes().len()
}
