//! Which layers of a model a device with memory of its own gets.

/// How many layers are computed on a device with memory of its own; see [`crate::EngineOptions::gpu_layers`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GpuLayers {
    /// All that there is room for, beside their part of the KV cache and an eighth of the device's memory for adapters, or what
    /// they may have ([`crate::EngineOptions::device_adapter_bytes`]) if that is more.
    #[default]
    Fit,
    /// So many, from the last one on; the output counts as one behind the last. With fewer the processor does the rest.
    Last(usize),
}

/// Bytes on the device.
#[derive(Clone, Debug, Default)]
pub(crate) struct Needs {
    /// The weights of each layer.
    pub layers: Vec<usize>,
    /// Keys and values of a layer.
    pub cache: usize,
    /// The output, and embeddings that it is not tied to.
    pub rest: usize,
    /// Whatever is computed there.
    pub working: usize,
}

/// Who computes what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// The processor everything.
    Host,
    /// The device everything from this layer on but the output.
    From(usize),
    /// The device everything.
    Device,
}

impl Needs {
    /// Bytes for the last `n` layers.
    fn of_last(&self, n: usize) -> usize {
        let layers = self.layers.iter().rev().take(n).map(|weights| weights.saturating_add(self.cache));
        layers.fold(self.working, usize::saturating_add)
    }

    /// Where everything goes with `room` bytes.
    ///
    /// # Errors
    /// What a single layer takes, if not even that fits and as many as fit were asked for.
    pub fn place(&self, wanted: GpuLayers, room: usize) -> Result<Placement, usize> {
        let all = self.layers.len();
        let n = match wanted {
            GpuLayers::Last(n) => n,
            GpuLayers::Fit if self.of_last(all).saturating_add(self.rest) <= room => all + 1,
            GpuLayers::Fit => {
                let fitting = (1..=all).take_while(|n| self.of_last(*n) <= room).last();
                fitting.ok_or_else(|| self.of_last(1))?
            }
        };
        Ok(match n {
            0 => Placement::Host,
            n if n > all => Placement::Device,
            n => Placement::From(all - n),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_as_fit() {
        let needs = Needs { layers: vec![100, 200, 300], cache: 10, rest: 50, working: 5 };
        let fit = |room| needs.place(GpuLayers::Fit, room);
        assert_eq!(fit(685), Ok(Placement::Device));
        assert_eq!(fit(684), Ok(Placement::From(0)));
        assert_eq!(fit(634), Ok(Placement::From(1)));
        assert_eq!(fit(524), Ok(Placement::From(2)));
        assert_eq!(fit(315), Ok(Placement::From(2)));
        assert_eq!(fit(314), Err(315));
        let last = |n| needs.place(GpuLayers::Last(n), 0);
        assert_eq!(
            [last(0), last(1), last(3)].map(Result::unwrap),
            [Placement::Host, Placement::From(2), Placement::From(0)]
        );
        assert_eq!([last(4), last(99)].map(Result::unwrap), [Placement::Device; 2]);
        assert_eq!(Needs::default().place(GpuLayers::Last(0), 0), Ok(Placement::Host));
    }
}
