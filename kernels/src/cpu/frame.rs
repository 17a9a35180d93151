//! Frames of kernels on the stack.

/// Lets the frame that this is compiled into begin with a line of the cache.
///
/// The compiler itself aligns a frame to 16 bytes, once it has given the frame pointer's register to something else. Of the vectors
/// that it keeps there some then lie across two lines, and, by chance for as long as a thread lives, across two pages: a tile that
/// stores one of those with every group takes a fifth longer. The price is that register, which a kernel that follows many rows of a
/// weight needs more.
#[inline(always)]
pub(crate) fn align() {
    #[cfg(target_arch = "x86_64")]
    {
        #[repr(align(64))]
        struct Line(#[allow(dead_code)] [u8; 64]);
        let mut line = std::mem::MaybeUninit::<Line>::uninit();
        let at = line.as_mut_ptr();
        // SAFETY: there is no instruction. Since one might write the line, there has to be one, and it has to be aligned.
        unsafe { std::arch::asm!("/* {at} */", at = in(reg) at, options(nostack, preserves_flags)) };
    }
}
