//! File types: which format each tensor of a quantized file gets.
//!
//! The choices are those of llama.cpp's quantizer without an importance matrix (source:
//! `llama-quant.cpp`, `llama_tensor_get_type_impl` and `tensor_type_fallback`), for dense models.

use lory_kernels::QuantType as T;

use super::shape::{Role, Shape, Spec};

/// A file type by llama.cpp's name and number, such as `Q4_K_M` (15).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileType(&'static Row);

#[derive(Debug, PartialEq, Eq)]
struct Row {
    name: &'static str,
    id: u32,
    base: T,
    mix: Mix,
}

/// How a file departs from its base format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mix {
    /// Only the output matrix does.
    Plain,
    Q2K,
    Q2KS,
    Q3KM,
    Q3KL,
    Q4KS,
    /// `Q4_K_M` and `Q5_K_M`: more bits for some layers' `attn_v` and `ffn_down`.
    Medium,
    IQ4,
}

const fn row(name: &'static str, id: u32, base: T, mix: Mix) -> Row {
    Row { name, id, base, mix }
}

static TABLE: &[Row] = &[
    row("F32", 0, T::F32, Mix::Plain),
    row("F16", 1, T::F16, Mix::Plain),
    row("BF16", 32, T::BF16, Mix::Plain),
    row("Q4_0", 2, T::Q4_0, Mix::Plain),
    row("Q4_1", 3, T::Q4_1, Mix::Plain),
    row("Q5_0", 8, T::Q5_0, Mix::Plain),
    row("Q5_1", 9, T::Q5_1, Mix::Plain),
    row("Q8_0", 7, T::Q8_0, Mix::Plain),
    row("Q2_K", 10, T::Q2_K, Mix::Q2K),
    row("Q2_K_S", 21, T::Q2_K, Mix::Q2KS),
    row("Q3_K_S", 11, T::Q3_K, Mix::Plain),
    row("Q3_K_M", 12, T::Q3_K, Mix::Q3KM),
    row("Q3_K_L", 13, T::Q3_K, Mix::Q3KL),
    row("Q4_K_S", 14, T::Q4_K, Mix::Q4KS),
    row("Q4_K_M", 15, T::Q4_K, Mix::Medium),
    row("Q5_K_S", 16, T::Q5_K, Mix::Plain),
    row("Q5_K_M", 17, T::Q5_K, Mix::Medium),
    row("Q6_K", 18, T::Q6_K, Mix::Plain),
    row("IQ4_NL", 25, T::IQ4_NL, Mix::IQ4),
    row("IQ4_XS", 30, T::IQ4_XS, Mix::IQ4),
];

impl FileType {
    /// All of them, in the order in which help texts list them.
    pub fn all() -> impl Iterator<Item = FileType> {
        TABLE.iter().map(FileType)
    }

    /// By name, whatever the letters' case; `Q3_K`, `Q4_K` and `Q5_K` mean the `_M` mixes.
    pub fn from_name(name: &str) -> Option<FileType> {
        let medium = format!("{name}_M");
        let is = |t: &FileType, n: &str| t.name().eq_ignore_ascii_case(n);
        FileType::all().find(|t| is(t, name)).or_else(|| FileType::all().find(|t| is(t, &medium)))
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// llama.cpp's number, the value of `general.file_type`.
    pub fn id(self) -> u32 {
        self.0.id
    }

    pub(super) fn of(self, spec: &Spec, shape: &Shape) -> T {
        let base = self.0.base;
        if spec.role == Role::Small {
            return T::F32;
        }
        if base.block_len() == 1 {
            return base;
        }
        let cols = spec.dims.first().copied().unwrap_or(0);
        fallback(self.wanted(spec, shape, cols), cols)
    }

    fn wanted(self, spec: &Spec, shape: &Shape, cols: usize) -> T {
        let Row { base, mix, .. } = *self.0;
        let (i, n) = (spec.layer, shape.layers);
        let gqa = shape.heads / shape.kv_heads;
        let more_bits = i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
        match (spec.role, mix) {
            // The output matrix, or the embedding that serves as one.
            (Role::Output, _) => match base {
                _ if !cols.is_multiple_of(base.block_len()) => T::Q8_0,
                T::Q8_0 => T::Q8_0,
                _ => T::Q6_K,
            },
            (Role::AttnV, Mix::Q2K) => {
                if gqa >= 4 {
                    T::Q4_K
                } else {
                    T::Q3_K
                }
            }
            (Role::AttnV, Mix::Q2KS) if gqa >= 4 => T::Q4_K,
            (Role::AttnV, Mix::Q3KM) if i < 2 => T::Q5_K,
            (Role::AttnV, Mix::Q3KM) => T::Q4_K,
            (Role::AttnV, Mix::Q3KL) => T::Q5_K,
            (Role::AttnV, Mix::IQ4) if gqa >= 4 => T::Q5_K,
            (Role::AttnV | Role::FfnDown, Mix::Medium) if more_bits => T::Q6_K,
            (Role::AttnV, Mix::Q4KS) if i < 4 => T::Q5_K,
            (Role::FfnDown, Mix::Q2K) => T::Q3_K,
            (Role::FfnDown, Mix::Q2KS) if i < n / 8 => T::Q4_K,
            (Role::FfnDown, Mix::Q3KM) if i < n / 16 => T::Q5_K,
            (Role::FfnDown, Mix::Q3KM) => T::Q4_K,
            (Role::FfnDown, Mix::Q3KL) => T::Q5_K,
            (Role::FfnDown, Mix::IQ4 | Mix::Q4KS) if i < n / 8 => T::Q5_K,
            (Role::AttnOutput, Mix::Q2K) => T::Q3_K,
            (Role::AttnOutput, Mix::Q3KM) => T::Q4_K,
            (Role::AttnOutput, Mix::Q3KL) => T::Q5_K,
            _ => base,
        }
    }
}

impl std::fmt::Display for FileType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// A format of smaller blocks for rows that are not whole blocks of `ty`.
fn fallback(ty: T, cols: usize) -> T {
    let fits = |t: T| cols.is_multiple_of(t.block_len());
    if fits(ty) {
        return ty;
    }
    let smaller = match ty {
        T::IQ4_XS => T::IQ4_NL,
        T::Q2_K | T::Q3_K => T::Q4_0,
        T::Q4_K => T::Q5_0,
        T::Q5_K => T::Q5_1,
        T::Q6_K => T::Q8_0,
        other => other,
    };
    if fits(smaller) { smaller } else { T::F16 }
}

#[cfg(test)]
mod tests {
    use super::{super::shape, *};

    fn types(shape_name: &str, ty: &str) -> impl Fn(&str) -> T {
        let s = shape(shape_name).unwrap();
        let t = FileType::from_name(ty).unwrap();
        let all: Vec<(String, T)> = s.tensors().into_iter().map(|x| (x.name.clone(), t.of(&x, s))).collect();
        move |name| all.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("{name}")).1
    }

    /// The published Llama-3.2-1B Q4_K_M: six-bit `attn_v` and `ffn_down` in layers
    /// 0, 1, 4, 7, 10, 13, 14, 15, and a six-bit tied embedding.
    #[test]
    fn q4_k_m_gives_more_bits_to_half_of_the_layers() {
        let t = types("llama-1b", "q4_k");
        for i in 0..16 {
            let want = if [0, 1, 4, 7, 10, 13, 14, 15].contains(&i) { T::Q6_K } else { T::Q4_K };
            assert_eq!(t(&format!("blk.{i}.attn_v.weight")), want, "{i}");
            assert_eq!(t(&format!("blk.{i}.ffn_down.weight")), want, "{i}");
            assert_eq!(t(&format!("blk.{i}.attn_q.weight")), T::Q4_K);
        }
        assert_eq!(t("token_embd.weight"), T::Q6_K);
        assert_eq!(t("output_norm.weight"), T::F32);
    }

    #[test]
    fn untied_embeddings_keep_the_base_format() {
        let t = types("llama-8b", "Q4_0");
        assert_eq!((t("token_embd.weight"), t("output.weight")), (T::Q4_0, T::Q6_K));
        let t = types("llama-8b", "Q8_0");
        assert_eq!((t("token_embd.weight"), t("output.weight")), (T::Q8_0, T::Q8_0));
        let t = types("llama-8b", "F16");
        assert_eq!((t("token_embd.weight"), t("output.weight")), (T::F16, T::F16));
    }

    #[test]
    fn rows_that_are_no_whole_superblocks_fall_back() {
        // 1152 = 4.5 * 256 columns; the 6912 of ffn_down are 27 * 256.
        let t = types("gemma3-1b", "Q4_K_M");
        assert_eq!(t("token_embd.weight"), T::Q8_0);
        assert_eq!(t("blk.4.attn_q.weight"), T::Q5_0);
        assert_eq!(t("blk.3.ffn_down.weight"), T::Q4_K);
        let t = types("gemma3-1b", "IQ4_XS");
        assert_eq!(t("blk.4.attn_q.weight"), T::IQ4_NL);
    }
}
