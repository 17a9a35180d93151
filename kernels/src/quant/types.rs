//! The table of ggml tensor types.

/// A tensor type as GGUF files number and name it (source: `ggml.h`, `enum ggml_type`).
#[allow(non_camel_case_types, missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum QuantType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q8_1 = 9,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    Q8_K = 15,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    I8 = 24,
    I16 = 25,
    I32 = 26,
    I64 = 27,
    F64 = 28,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    NVFP4 = 40,
    Q1_0 = 41,
    Q2_0 = 42,
}

/// One line of the table: type, name, weights per block, bytes per block.
type Row = (QuantType, &'static str, usize, usize);

use QuantType as T;
const TABLE: &[Row] = &[
    (T::F32, "F32", 1, 4),
    (T::F16, "F16", 1, 2),
    (T::Q4_0, "Q4_0", 32, 18),
    (T::Q4_1, "Q4_1", 32, 20),
    (T::Q5_0, "Q5_0", 32, 22),
    (T::Q5_1, "Q5_1", 32, 24),
    (T::Q8_0, "Q8_0", 32, 34),
    (T::Q8_1, "Q8_1", 32, 36),
    (T::Q2_K, "Q2_K", 256, 84),
    (T::Q3_K, "Q3_K", 256, 110),
    (T::Q4_K, "Q4_K", 256, 144),
    (T::Q5_K, "Q5_K", 256, 176),
    (T::Q6_K, "Q6_K", 256, 210),
    (T::Q8_K, "Q8_K", 256, 292),
    (T::IQ2_XXS, "IQ2_XXS", 256, 66),
    (T::IQ2_XS, "IQ2_XS", 256, 74),
    (T::IQ3_XXS, "IQ3_XXS", 256, 98),
    (T::IQ1_S, "IQ1_S", 256, 50),
    (T::IQ4_NL, "IQ4_NL", 32, 18),
    (T::IQ3_S, "IQ3_S", 256, 110),
    (T::IQ2_S, "IQ2_S", 256, 82),
    (T::IQ4_XS, "IQ4_XS", 256, 136),
    (T::I8, "I8", 1, 1),
    (T::I16, "I16", 1, 2),
    (T::I32, "I32", 1, 4),
    (T::I64, "I64", 1, 8),
    (T::F64, "F64", 1, 8),
    (T::IQ1_M, "IQ1_M", 256, 56),
    (T::BF16, "BF16", 1, 2),
    (T::TQ1_0, "TQ1_0", 256, 54),
    (T::TQ2_0, "TQ2_0", 256, 66),
    (T::MXFP4, "MXFP4", 32, 17),
    (T::NVFP4, "NVFP4", 64, 36),
    (T::Q1_0, "Q1_0", 128, 18),
    (T::Q2_0, "Q2_0", 64, 18),
];

impl QuantType {
    /// Every type of the table, in order of its number.
    pub fn all() -> impl Iterator<Item = QuantType> {
        TABLE.iter().map(|row| row.0)
    }

    /// The type with this number in a GGUF file; `None` for numbers unknown or removed
    /// (4, 5, 31–33 and 36–38 were formats that ggml dropped).
    pub fn from_id(id: u32) -> Option<QuantType> {
        QuantType::all().find(|t| *t as u32 == id)
    }

    /// The type with this name, whatever the letters' case.
    pub fn from_name(name: &str) -> Option<QuantType> {
        TABLE.iter().find(|row| row.1.eq_ignore_ascii_case(name)).map(|row| row.0)
    }

    fn row(self) -> &'static Row {
        // Every variant stands in the table: the test below counts on it.
        TABLE.iter().find(|row| row.0 == self).unwrap_or(&TABLE[0])
    }

    /// ggml's name, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Weights per block.
    pub fn block_len(self) -> usize {
        self.row().2
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        self.row().3
    }

    /// Whether this is a weight format that runs through ggml where the feature `ggml` is built in.
    pub fn ggml_reads(self) -> bool {
        matches!(
            self,
            T::IQ1_S
                | T::IQ1_M
                | T::IQ2_XXS
                | T::IQ2_XS
                | T::IQ2_S
                | T::IQ3_XXS
                | T::IQ3_S
                | T::TQ1_0
                | T::TQ2_0
                | T::MXFP4
                | T::NVFP4
                | T::Q1_0
                | T::Q2_0
        )
    }

    /// Bytes of `n` weights; `None` if `n` is not whole blocks or the product overflows.
    pub fn bytes_for(self, n: usize) -> Option<usize> {
        n.is_multiple_of(self.block_len()).then(|| (n / self.block_len()).checked_mul(self.block_bytes()))?
    }
}

impl std::fmt::Display for QuantType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_in_the_table_once() {
        for t in QuantType::all() {
            assert_eq!(QuantType::from_id(t as u32), Some(t));
            assert_eq!(QuantType::from_name(&t.name().to_lowercase()), Some(t));
            assert_eq!(TABLE.iter().filter(|row| row.0 == t).count(), 1);
        }
        assert_eq!(QuantType::from_id(4), None);
        assert_eq!(QuantType::NVFP4.name(), "NVFP4");
    }

    #[test]
    fn bytes_for_refuses_partial_blocks_and_overflow() {
        assert_eq!(QuantType::Q4_K.bytes_for(512), Some(288));
        assert_eq!(QuantType::Q4_K.bytes_for(100), None);
        assert_eq!(QuantType::F64.bytes_for(usize::MAX), None);
    }
}
