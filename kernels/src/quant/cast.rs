//! Where bytes become blocks: the only reinterpretation of memory in the project.

use super::Block;

/// `bytes` as blocks of `B`; `None` if they are not a whole number of them.
///
/// The format is the caller's word: any bytes of the right length are valid blocks.
pub fn blocks_of<B: Block>(bytes: &[u8]) -> Option<&[B]> {
    let size = const { nonzero_size::<B>() };
    if !bytes.len().is_multiple_of(size) {
        return None;
    }
    // SAFETY: `Block` promises align 1, no padding and that every bit pattern is valid, so any
    // `len / size` × `size` initialised bytes are blocks; the lifetime is that of `bytes`.
    Some(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<B>(), bytes.len() / size) })
}

/// [`blocks_of`] to write into.
pub fn blocks_of_mut<B: Block>(bytes: &mut [u8]) -> Option<&mut [B]> {
    let size = const { nonzero_size::<B>() };
    if !bytes.len().is_multiple_of(size) {
        return None;
    }
    // SAFETY: as in `blocks_of`; and without padding a written block leaves only initialised
    // bytes behind. The borrow is unique because that of `bytes` is.
    Some(unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast::<B>(), bytes.len() / size) })
}

/// Size of a block, with what the casts rely on checked at compile time.
const fn nonzero_size<B: Block>() -> usize {
    assert!(align_of::<B>() == 1, "a block must have align 1");
    assert!(size_of::<B>() > 0, "a block must not be empty");
    size_of::<B>()
}
