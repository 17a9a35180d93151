//! The key-value cache on the device; `kernels/kv.cuh` has the layout.

use super::backend::State;
use super::memory::{CudaBuffer, Memory};
use super::products::word;
use super::tables::Kind;
use crate::backend::{BackendError, KvShape, KvType};
use crate::host::wrong_page;

/// Longest head that the kernels take, in dimensions.
const MOST_DIMS: usize = 512;

/// Keys and values of all layers, in pages.
pub struct CudaKv {
    pub(super) shape: KvShape,
    pub(super) pages: usize,
    memory: Memory,
}

/// The number of a type in the kernels.
pub(super) fn type_number(ty: KvType) -> u32 {
    match ty {
        KvType::F32 => 0,
        KvType::F16 => 1,
        KvType::Q8_0 => 2,
    }
}

impl CudaKv {
    /// Where a page starts.
    fn page_start(&self, layer: usize, page: usize) -> usize {
        let KvShape { layers, .. } = self.shape;
        assert!(layer < layers && page < self.pages, "layer {layer}, page {page} of {}", self.pages);
        (layer * self.pages + page) * self.shape.page_bytes()
    }

    /// The address of a layer's pages.
    pub(super) fn layer(&self, layer: usize) -> u64 {
        let bytes = self.pages * self.shape.page_bytes();
        self.memory.at(layer * bytes, bytes)
    }

    pub(super) fn copy_page(&mut self, from: usize, to: usize) -> Result<(), BackendError> {
        for layer in 0..self.shape.layers {
            let (from, to) = (self.page_start(layer, from), self.page_start(layer, to));
            if from != to {
                self.memory.copy_within(from, to, self.shape.page_bytes())?;
            }
        }
        Ok(())
    }

    pub(super) fn read_page(&self, page: usize) -> Result<Vec<u8>, BackendError> {
        let len = self.shape.page_bytes();
        let mut bytes = vec![0; len * self.shape.layers];
        for (layer, to) in bytes.chunks_exact_mut(len).enumerate() {
            self.memory.read(self.page_start(layer, page), to)?;
        }
        Ok(bytes)
    }

    pub(super) fn write_page(&mut self, label: &str, page: usize, bytes: &[u8]) -> Result<(), BackendError> {
        let len = self.shape.page_bytes();
        if bytes.len() != len * self.shape.layers {
            return Err(wrong_page(label, len * self.shape.layers, bytes.len()));
        }
        for (layer, from) in bytes.chunks_exact(len).enumerate() {
            let start = self.page_start(layer, page);
            self.memory.write(start, from)?;
        }
        Ok(())
    }
}

impl State {
    pub fn kv_alloc(&mut self, shape: KvShape, pages: usize) -> Result<CudaKv, BackendError> {
        if !shape.head_dim.is_multiple_of(8) || shape.head_dim > MOST_DIMS {
            return Err(BackendError::Device {
                device: self.device.label().into(),
                message: format!(
                    "heads of {} dimensions; the attention kernel takes multiples of 8 up to {MOST_DIMS}: run on the CPU",
                    shape.head_dim
                ),
            });
        }
        let bytes = shape.page_bytes().saturating_mul(shape.layers).saturating_mul(pages);
        let memory = Memory::zeros(&self.device, "the key-value cache", bytes)?;
        Ok(CudaKv { shape, pages, memory })
    }

    pub fn kv_write(
        &mut self,
        kv: &mut CudaKv,
        layer: usize,
        k: &CudaBuffer,
        v: &CudaBuffer,
        slots: &[u32],
    ) -> Result<(), BackendError> {
        let KvShape { kv_heads, head_dim, page_len, ty, .. } = kv.shape;
        let room = kv.pages * page_len;
        assert!(slots.iter().all(|slot| (*slot as usize) < room), "a slot beyond {room}");
        let len = slots.len() * kv_heads * head_dim;
        let arguments = [
            k.first(len).into(),
            v.first(len).into(),
            self.tables.address(Kind::Slots, slots)?.into(),
            word(slots.len()).into(),
            kv.layer(layer).into(),
            type_number(ty).into(),
            word(kv_heads).into(),
            word(head_dim).into(),
            word(page_len).into(),
        ];
        let units = slots.len() * kv_heads * head_dim.div_ceil(32);
        // SAFETY: the parameters of `kv_write`; k and v are long enough, and every slot lies in the layer.
        unsafe { self.device.launch("kv_write", [word(units.div_ceil(8)), 2, 1], &arguments) }
    }
}
