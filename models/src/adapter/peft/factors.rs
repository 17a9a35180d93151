//! From the tensors of one module to factors per site, in the base's row order.

use std::{collections::BTreeMap, ops::Range};

use crate::{
    Error, Result,
    adapter::{BaseInfo, Site},
};

use super::{
    config::{Kind, PeftConfig},
    container::View,
    modules::{Part, PermutedHeads, original_row},
};

/// A matrix of f32, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// `rows` · `cols` elements.
    pub data: Vec<f32>,
}

impl Matrix {
    fn from_view(view: &View<'_>) -> Result<Matrix> {
        let [rows, cols] = *view.shape.as_slice() else {
            return Err(view.error(format!("has shape {:?}, expected a matrix", view.shape)));
        };
        Ok(Matrix { rows, cols, data: view.to_f32()? })
    }

    /// Row `row`; empty beyond the last.
    pub fn row(&self, row: usize) -> &[f32] {
        self.data.get(row * self.cols..(row + 1) * self.cols).unwrap_or_default()
    }

    fn take_rows(&self, order: impl ExactSizeIterator<Item = usize>) -> Matrix {
        let rows = order.len();
        let mut data = Vec::with_capacity(rows * self.cols);
        order.for_each(|r| data.extend_from_slice(self.row(r)));
        Matrix { rows, cols: self.cols, data }
    }

    /// With rows and columns exchanged.
    pub fn transposed(&self) -> Matrix {
        let mut data = Vec::with_capacity(self.data.len());
        for c in 0..self.cols {
            data.extend(self.data.iter().skip(c).step_by(self.cols));
        }
        Matrix { rows: self.cols, cols: self.rows, data }
    }
}

/// What an adapter adds at one site: `scale · B A`, a bias, and DoRA's row norms.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// r × in_features; for the token embedding, in is the vocabulary.
    pub a: Matrix,
    /// out_features × r, rows in the order of the base's file.
    pub b: Matrix,
    /// Factor of B · A as PEFT resolves it for this module.
    pub scale: f32,
    /// Added to the output, `scale` already in it.
    pub bias: Option<Vec<f32>>,
    /// DoRA: the norm that each row of W + scale · B A is brought to.
    pub magnitude: Option<Vec<f32>>,
}

/// The tensors of one module, each at most once.
pub(super) struct Module<'v, 'a> {
    pub path: String,
    pub parts: BTreeMap<Part, &'v View<'a>>,
}

impl<'v, 'a> Module<'v, 'a> {
    fn require(&self, config: &PeftConfig, part: Part, name: &str) -> Result<&'v View<'a>> {
        self.parts.get(&part).copied().ok_or_else(|| {
            let file = self.parts.values().next().map_or(config.file(), |v| v.file);
            Error::tensor(file, &format!("{}.{name}", self.path), "is missing")
        })
    }

    /// Every tensor that is none of `used`.
    fn refuse_others(&self, used: &[Part]) -> Result<()> {
        match self.parts.iter().find(|(part, _)| !used.contains(part)) {
            None => Ok(()),
            Some((_, view)) => Err(view.error("would not be used: the configuration does not ask for it")),
        }
    }

    /// Factors for each of `places`; none where AdaLoRA kept no rank.
    pub fn factors(
        &self,
        config: &PeftConfig,
        places: &[(Site, Range<usize>)],
        base: &BaseInfo,
        permuted: Option<PermutedHeads>,
    ) -> Result<Vec<(Site, Factors)>> {
        let whole = match places {
            [(Site::TOKEN_EMBD, _)] => self.embedding(config)?,
            _ => self.linear(config)?,
        };
        let outputs: usize = places.iter().map(|(_, range)| range.len()).sum();
        self.check_sizes(&whole, outputs, config.rank(&self.path)?, places, base)?;
        let whole = without_zeros(whole);
        if whole.a.rows == 0 && whole.bias.is_none() && whole.magnitude.is_none() {
            return Ok(Vec::new());
        }
        places.iter().map(|(site, range)| Ok((*site, self.share(&whole, *site, range, permuted)?))).collect()
    }

    fn linear(&self, config: &PeftConfig) -> Result<Factors> {
        let mut used = vec![Part::A, Part::B, Part::BaseWeight];
        let a = self.require(config, Part::A, "lora_A.weight")?;
        let b = self.require(config, Part::B, "lora_B.weight")?;
        let scale = config.scale(&self.path)?;
        let mut found = Factors {
            a: Matrix::from_view(a)?,
            b: Matrix::from_view(b)?,
            scale,
            bias: None,
            magnitude: None,
        };
        let rank = config.rank(&self.path)?;
        for (view, have) in [(a, found.a.rows), (b, found.b.cols)] {
            if have != rank {
                return Err(view.error(format!("has rank {have}, the configuration says {rank} for it")));
            }
        }
        if let Kind::AdaLora { .. } = config.kind() {
            used.push(Part::E);
            scale_rows(&mut found.a, self.require(config, Part::E, "lora_E")?)?;
        }
        if config.lora_bias {
            used.push(Part::BBias);
            let bias = vector(self.require(config, Part::BBias, "lora_B.bias")?, found.b.rows)?;
            found.bias = Some(bias.into_iter().map(|v| v * scale).collect());
        }
        if config.use_dora {
            used.push(Part::Magnitude);
            let view = self.require(config, Part::Magnitude, "lora_magnitude_vector")?;
            found.magnitude = Some(vector(view, found.b.rows)?);
        }
        self.refuse_others(&used)?;
        Ok(found)
    }

    fn embedding(&self, config: &PeftConfig) -> Result<Factors> {
        if config.use_dora {
            let message = format!("DoRA on the embedding (`{}`) is not supported", self.path);
            return Err(Error::unsupported(config.file(), message));
        }
        let a = Matrix::from_view(self.require(config, Part::EmbeddingA, "lora_embedding_A")?)?;
        let b = Matrix::from_view(self.require(config, Part::EmbeddingB, "lora_embedding_B")?)?;
        self.refuse_others(&[Part::EmbeddingA, Part::EmbeddingB, Part::BaseWeight])?;
        Ok(Factors { a, b, scale: config.scale(&self.path)?, bias: None, magnitude: None })
    }

    fn check_sizes(
        &self,
        whole: &Factors,
        outputs: usize,
        rank: usize,
        places: &[(Site, Range<usize>)],
        base: &BaseInfo,
    ) -> Result<()> {
        let inputs = places.first().and_then(|(site, _)| base.shapes.get(*site)).map(|s| s.in_features);
        let have = (whole.b.rows, whole.b.cols, whole.a.rows, whole.a.cols);
        if Some(have) == inputs.map(|n| (outputs, rank, rank, n)) {
            return Ok(());
        }
        let (out, rb, ra, inp) = have;
        let file = self.parts.values().next().map_or("", |v| v.file);
        let message = format!(
            "has factors of `{}` for {inp} inputs and {out} outputs with ranks {ra} and {rb}; the base {} has \
             {} inputs and {outputs} outputs there, and the configuration rank {rank}",
            self.path,
            base.file,
            inputs.unwrap_or_default()
        );
        Err(Error::WrongBase { file: file.into(), message })
    }

    /// The rows of one site, in the base's order.
    fn share(
        &self,
        whole: &Factors,
        site: Site,
        range: &Range<usize>,
        permuted: Option<PermutedHeads>,
    ) -> Result<Factors> {
        let rows = range.len();
        let heads = permuted.and_then(|p| p.of(site));
        if let Some(heads) = heads.filter(|h| *h == 0 || !rows.is_multiple_of(2 * h)) {
            let file = self.parts.values().next().map_or("", |v| v.file);
            let message = format!("{site} of the base has {rows} rows, which are not {heads} even heads");
            return Err(Error::WrongBase { file: file.into(), message });
        }
        let order =
            || (0..rows).map(move |r| range.start + heads.map_or(r, |heads| original_row(r, rows, heads)));
        let pick = |v: &Vec<f32>| order().filter_map(|r| v.get(r).copied()).collect();
        Ok(Factors {
            a: whole.a.clone(),
            b: whole.b.take_rows(order()),
            scale: whole.scale,
            bias: whole.bias.as_ref().map(pick),
            magnitude: whole.magnitude.as_ref().map(pick),
        })
    }
}

fn vector(view: &View<'_>, len: usize) -> Result<Vec<f32>> {
    if view.shape != [len] {
        return Err(view.error(format!("has shape {:?}, expected [{len}]", view.shape)));
    }
    view.to_f32()
}

/// AdaLoRA's E, r × 1, as factors of A's rows.
fn scale_rows(a: &mut Matrix, e: &View<'_>) -> Result<()> {
    if e.shape != [a.rows, 1] {
        return Err(e.error(format!("has shape {:?}, expected [{}, 1]", e.shape, a.rows)));
    }
    for (row, factor) in a.data.chunks_mut(a.cols.max(1)).zip(e.to_f32()?) {
        row.iter_mut().for_each(|v| *v *= factor);
    }
    Ok(())
}

/// Drops ranks that add nothing: AdaLoRA zeroes what it prunes.
fn without_zeros(whole: Factors) -> Factors {
    let keep: Vec<_> = (0..whole.a.rows).filter(|r| whole.a.row(*r).iter().any(|v| *v != 0.0)).collect();
    if keep.len() == whole.a.rows {
        return whole;
    }
    let a = whole.a.take_rows(keep.iter().copied());
    let mut data = Vec::with_capacity(whole.b.rows * keep.len());
    for r in 0..whole.b.rows {
        data.extend(keep.iter().filter_map(|k| whole.b.row(r).get(*k)));
    }
    Factors { a, b: Matrix { rows: whole.b.rows, cols: keep.len(), data }, ..whole }
}
