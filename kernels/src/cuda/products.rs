//! Matrix products: which form of the activations and which kernel a weight format wants.

use super::backend::State;
use super::device::Argument;
use super::scratch::Slot;
use super::weights::Turn;
use crate::backend::BackendError;
use crate::quant::Q8Block;
use crate::{QMatrix, QuantType};

/// Tokens up to which the small kernels serve: the columns of one matrix instruction.
const SMALL: usize = 8;
/// Weight rows of a block of the small and of the large kernels, and tokens of the latter (`kernels/strands.cuh`).
const SMALL_ROWS: usize = 16;
const LARGE_ROWS: usize = 64;
const LARGE_TOKENS: usize = 64;
/// Threads of a block that takes one value each.
pub(super) const THREADS: usize = 256;

/// What a kernel reads its activations as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// [`Q8Block`]s.
    Blocks,
    /// BF16, padded to 32 columns.
    Bf16,
    /// Floats with 10 bits of mantissa, padded to 32 columns.
    Tf32,
    /// As they are.
    Float,
}

/// The activations' form, and the kernels for few and for many tokens.
fn kernels(ty: QuantType) -> Option<(Form, &'static str, &'static str)> {
    Some(match ty {
        QuantType::Q8_0 => (Form::Blocks, "matmul_small_q8_0", "matmul_large_q8_0"),
        QuantType::Q4_0 => (Form::Blocks, "matmul_small_q4_0", "matmul_large_q4_0"),
        QuantType::Q4_K => (Form::Blocks, "matmul_small_q4_k", "matmul_large_q4_k"),
        QuantType::Q5_K => (Form::Blocks, "matmul_small_q5_k", "matmul_large_q5_k"),
        QuantType::Q6_K => (Form::Blocks, "matmul_small_q6_k", "matmul_large_q6_k"),
        QuantType::BF16 => (Form::Bf16, "matmul_small_bf16", "matmul_large_bf16"),
        QuantType::F16 => (Form::Tf32, "matmul_small_f16", "matmul_large_f16"),
        QuantType::F32 => (Form::Float, "matmul_f32", "matmul_f32"),
        _ => return None,
    })
}

/// Whether the kernels read this format, in products and element by element.
pub(super) fn supports(ty: QuantType) -> bool {
    kernels(ty).is_some()
}

/// A length or count as the kernels take it.
///
/// # Panics
/// Beyond 2³², which no matrix in memory has.
pub(super) fn word(n: usize) -> u32 {
    assert!(n <= u32::MAX as usize, "{n} is more than a dimension can be");
    n as u32
}

/// The grid of a kernel with a thread per value.
///
/// # Panics
/// Beyond 2³¹ blocks, 2 TiB of floats.
pub(super) fn flat(values: usize) -> [u32; 3] {
    let blocks = values.div_ceil(THREADS);
    assert!(blocks <= i32::MAX as usize, "{values} values in one launch");
    [blocks as u32, 1, 1]
}

/// Lines of activations that one or more products read.
pub(super) struct Input {
    /// Address of the matrix they lie in.
    x: u64,
    /// Address of the numbers of the lines, or 0 for the first ones.
    rows: u64,
    tokens: usize,
    width: usize,
    prepared: Option<(Form, u64)>,
}

impl Input {
    /// The first `tokens` lines of `width` floats at `x`.
    pub fn lines(x: u64, tokens: usize, width: usize) -> Input {
        Input { x, rows: 0, tokens, width, prepared: None }
    }

    /// Lines by number: `rows` is the address of `tokens` words.
    pub fn gathered(x: u64, rows: u64, tokens: usize, width: usize) -> Input {
        Input { x, rows, tokens, width, prepared: None }
    }
}

impl State {
    /// An error for formats that the kernels do not read.
    pub fn check_type(&self, ty: QuantType) -> Result<(), BackendError> {
        if supports(ty) { Ok(()) } else { Err(self.unsupported(ty)) }
    }

    fn unsupported(&self, ty: QuantType) -> BackendError {
        BackendError::UnsupportedType { device: self.device.label().into(), ty }
    }

    /// `out[i] = W · x[i]` for the input's lines; `out` is the address of room for tokens × `weight.rows()` floats.
    ///
    /// # Safety
    /// The input's addresses are those of as many lines of floats, and of numbers of such lines; `out` has the room.
    pub unsafe fn product(
        &mut self,
        turn: &mut Turn<'_>,
        weight: QMatrix<'_>,
        input: &mut Input,
        out: u64,
    ) -> Result<(), BackendError> {
        let (form, small, large) = kernels(weight.ty()).ok_or_else(|| self.unsupported(weight.ty()))?;
        let (n, columns, tokens) = (weight.rows(), weight.cols(), input.tokens);
        assert_eq!(columns, input.width, "columns of the weight and width of the input");
        if n == 0 || tokens == 0 || columns == 0 {
            return Ok(());
        }
        let w = turn.address(weight)?;
        // SAFETY: the caller's promise.
        let x = unsafe { self.prepared(form, input) }?;
        let rows = word(n);
        if form == Form::Float {
            let arguments =
                [w.into(), rows.into(), word(columns).into(), input.x.into(), input.rows.into(), out.into()];
            let grid = [word(tokens), word(n.div_ceil(8)), 1];
            // SAFETY: the parameters of `matmul_f32`; the weight is n × columns floats, and the caller vouches for the rest.
            return unsafe { self.device.launch(small, grid, &arguments) };
        }
        let inner = if form == Form::Blocks { columns / Q8Block::LEN } else { columns };
        let arguments: [Argument; 6] =
            [w.into(), rows.into(), word(inner).into(), x.into(), word(tokens).into(), out.into()];
        let (kernel, grid) = if tokens <= SMALL {
            (small, [word(n.div_ceil(SMALL_ROWS)), 1, 1])
        } else {
            (large, [word(n.div_ceil(LARGE_ROWS)), word(tokens.div_ceil(LARGE_TOKENS)), 1])
        };
        // SAFETY: the parameters of `matmul_small_…` and `matmul_large_…`; the weight has whole blocks (`QMatrix`), the
        // activations were prepared for this form and these tokens, and `out` is the caller's promise.
        unsafe { self.device.launch(kernel, grid, &arguments) }
    }

    /// The address of the input in a form.
    ///
    /// # Safety
    /// As [`State::product`].
    unsafe fn prepared(&mut self, form: Form, input: &mut Input) -> Result<u64, BackendError> {
        if let Some((held, address)) = input.prepared
            && held == form
        {
            return Ok(address);
        }
        let (tokens, width) = (input.tokens, input.width);
        let padded = width.next_multiple_of(32);
        let (kernel, element) = match form {
            Form::Blocks => ("quantize_activations", 0),
            Form::Bf16 => ("activations_to_bf16", 2),
            Form::Tf32 => ("activations_to_tf32", 4),
            Form::Float => return Ok(input.x),
        };
        let blocks = tokens * (width / Q8Block::LEN);
        let bytes =
            if form == Form::Blocks { blocks * size_of::<Q8Block>() } else { tokens * padded * element };
        let out = self.scratch.room(Slot::Activations, bytes)?;
        let mut arguments: Vec<Argument> =
            vec![input.x.into(), input.rows.into(), word(tokens).into(), word(width).into()];
        // A block of threads takes eight blocks of activations.
        let grid = if form == Form::Blocks {
            flat(blocks * 32)
        } else {
            arguments.push(word(padded).into());
            flat(tokens * padded)
        };
        arguments.push(out.into());
        // SAFETY: the parameters of these kernels; `out` has room for what they write, and the caller vouches for the input.
        unsafe { self.device.launch(kernel, grid, &arguments) }?;
        input.prepared = Some((form, out));
        Ok(out)
    }
}
