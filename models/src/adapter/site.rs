//! Where adapters enter a model: one small number per linear layer.

use std::fmt;

/// One of the seven projections of a transformer block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Projection {
    AttnQ,
    AttnK,
    AttnV,
    AttnOutput,
    FfnGate,
    FfnUp,
    FfnDown,
}

impl Projection {
    /// All of them, in the order of their numbers.
    pub const ALL: [Projection; 7] = [
        Projection::AttnQ,
        Projection::AttnK,
        Projection::AttnV,
        Projection::AttnOutput,
        Projection::FfnGate,
        Projection::FfnUp,
        Projection::FfnDown,
    ];

    /// As GGUF names the tensor: `attn_q`.
    pub fn name(self) -> &'static str {
        match self {
            Projection::AttnQ => "attn_q",
            Projection::AttnK => "attn_k",
            Projection::AttnV => "attn_v",
            Projection::AttnOutput => "attn_output",
            Projection::FfnGate => "ffn_gate",
            Projection::FfnUp => "ffn_up",
            Projection::FfnDown => "ffn_down",
        }
    }
}

/// A linear layer of a model: (layer, projection), the token embedding or the output.
///
/// Numbers are dense: 0 is the embedding, 1 the output, `2 + 7 · layer + projection` the rest, so
/// that tables of a model with `n` layers have [`Site::count`] entries. Packs store these numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Site(u32);

/// More layers than any model has; keeps arithmetic on site numbers far from overflow.
pub(crate) const MAX_LAYERS: u32 = 1 << 16;

impl Site {
    /// The token embedding, `token_embd`.
    pub const TOKEN_EMBD: Site = Site(0);
    /// The output projection, `output`.
    pub const OUTPUT: Site = Site(1);

    /// A projection of block `layer`, counted from 0.
    pub const fn layer(layer: usize, projection: Projection) -> Site {
        Site(2 + 7 * layer as u32 + projection as u32)
    }

    /// The site with this number, for any model.
    pub const fn from_index(index: usize) -> Site {
        Site(index as u32)
    }

    /// Its number.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// How many sites a model with `n_layers` blocks has.
    pub const fn count(n_layers: usize) -> usize {
        2 + 7 * n_layers
    }

    /// All sites of a model with `n_layers` blocks, in ascending order.
    pub fn all(n_layers: usize) -> impl Iterator<Item = Site> {
        (0..Site::count(n_layers)).map(Site::from_index)
    }

    /// The block, or `None` for embedding and output.
    pub fn layer_index(self) -> Option<usize> {
        self.0.checked_sub(2).map(|i| (i / 7) as usize)
    }

    /// The projection, or `None` for embedding and output.
    pub fn projection(self) -> Option<Projection> {
        let i = self.0.checked_sub(2)? % 7;
        Projection::ALL.get(i as usize).copied()
    }

    /// What it reads, by the first site with the same input: q stands for q, k and v of a block, gate for gate
    /// and up, every other site for itself.
    pub fn input(self) -> Site {
        let first = match self.projection() {
            Some(Projection::AttnQ | Projection::AttnK | Projection::AttnV) => Projection::AttnQ,
            Some(Projection::FfnGate | Projection::FfnUp) => Projection::FfnGate,
            _ => return self,
        };
        self.layer_index().map_or(self, |layer| Site::layer(layer, first))
    }

    /// Reads `blk.3.attn_q`, `token_embd` or `output`, written exactly so: each site has one name.
    pub fn parse(name: &str) -> Option<Site> {
        match name {
            "token_embd" => return Some(Site::TOKEN_EMBD),
            "output" => return Some(Site::OUTPUT),
            _ => {}
        }
        let (layer, projection) = name.strip_prefix("blk.")?.split_once('.')?;
        let projection = Projection::ALL.into_iter().find(|p| p.name() == projection)?;
        let canonical = layer == "0" || !layer.starts_with(['0', '+']);
        let layer: u32 = layer.parse().ok().filter(|&l| canonical && l < MAX_LAYERS)?;
        Some(Site::layer(layer as usize, projection))
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.layer_index(), self.projection()) {
            (Some(layer), Some(projection)) => write!(f, "blk.{layer}.{}", projection.name()),
            _ if *self == Site::TOKEN_EMBD => f.write_str("token_embd"),
            _ => f.write_str("output"),
        }
    }
}

impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Sizes of one linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SiteShape {
    /// Length of what it gives. For the embedding, n_embd.
    pub out_features: usize,
    /// Length of what it takes. For the embedding, the number of token ids.
    pub in_features: usize,
}

/// The shapes of all linear layers of one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SiteShapes {
    n_layers: usize,
    shapes: Vec<Option<SiteShape>>,
}

impl SiteShapes {
    /// No site yet, for a model with `n_layers` blocks.
    pub fn new(n_layers: usize) -> Self {
        SiteShapes { n_layers, shapes: vec![None; Site::count(n_layers)] }
    }

    /// Sets one; a site beyond the last layer is not kept.
    pub fn set(&mut self, site: Site, out_features: usize, in_features: usize) {
        if let Some(shape) = self.shapes.get_mut(site.index()) {
            *shape = Some(SiteShape { out_features, in_features });
        }
    }

    /// Number of blocks.
    pub fn n_layers(&self) -> usize {
        self.n_layers
    }

    /// The shape of `site`, if the model has it.
    pub fn get(&self, site: Site) -> Option<SiteShape> {
        self.shapes.get(site.index()).copied().flatten()
    }

    /// Sites that the model has, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (Site, SiteShape)> {
        self.shapes.iter().enumerate().filter_map(|(i, s)| Some((Site::from_index(i), (*s)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_go_both_ways() {
        for site in Site::all(3) {
            assert_eq!(Site::parse(&site.to_string()), Some(site));
            assert_eq!(Site::from_index(site.index()), site);
        }
        assert_eq!(Site::all(3).count(), 23);
        assert_eq!(Site::layer(3, Projection::AttnQ).to_string(), "blk.3.attn_q");
        assert_eq!(Site::layer(2, Projection::FfnDown).layer_index(), Some(2));
        assert_eq!(Site::OUTPUT.layer_index(), None);
    }

    #[test]
    fn other_spellings_are_not_sites() {
        for name in [
            "blk.03.attn_q",
            "blk.+3.attn_q",
            "blk..attn_q",
            "blk.-1.attn_q",
            "blk.3.attn_qkv",
            "blk.3",
            "output.weight",
            "blk.4294967295.attn_q",
            "",
        ] {
            assert_eq!(Site::parse(name), None, "{name}");
        }
    }
}
