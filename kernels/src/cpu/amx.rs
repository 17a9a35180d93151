//! AMX: eight registers of 16 lines × 64 bytes, and the instructions that multiply them.
//!
//! The compiler's own intrinsics are not stable, so the instructions are written as assembly ([`super::amx_bf16`]); it uses no tiles
//! itself. Integer formats stay with VNNI: their order of summation wants the sums of every 32 columns, which come out of the tiles through memory
//! (figures in benches/NOTES.md).

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::sync::OnceLock;

use super::{Isa, Level};

/// Whether the processor has BF16 tiles, and the system lets this process use them.
pub(super) fn detected() -> bool {
    static DETECTED: OnceLock<bool> = OnceLock::new();
    *DETECTED.get_or_init(|| has_tiles() && permitted())
}

fn has_tiles() -> bool {
    // CPUID.(7,0).EDX: 22 AMX-BF16, 24 AMX-TILE; CPUID.1.ECX: 27 OSXSAVE; XCR0: 17 and 18 are the tiles' state (source: Intel SDM).
    const NEEDED: u32 = 1 << 22 | 1 << 24;
    const STATE: u64 = 1 << 17 | 1 << 18;
    let is_there = __cpuid_count(7, 0).edx & NEEDED == NEEDED && __cpuid_count(1, 0).ecx & 1 << 27 != 0;
    // SAFETY: OSXSAVE says that `xgetbv` is there.
    is_there && unsafe { _xgetbv(0) } & STATE == STATE
}

/// Asks the system, once for all threads, to save the tiles with a thread's other registers (source: Linux, Documentation/arch/x86/xstate.rst).
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Proof that the processor has the tiles.
#[derive(Clone, Copy)]
pub(super) struct Amx(());

impl Amx {
    /// At the level that has them.
    pub fn of(isa: Isa) -> Option<Amx> {
        (isa.level() == Level::AmxBf16).then_some(Amx(()))
    }
}

/// The shapes of the eight tiles, as `ldtilecfg` reads them (source: Intel SDM).
#[repr(C, align(64))]
pub(super) struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const _: () = assert!(size_of::<Shapes>() == 64);

impl Shapes {
    /// All tiles have 16 lines. Tiles 4 and 5 take 32 columns of weights in BF16; 6 and 7 the same columns of `m` activation rows, in
    /// pairs, and 0 to 3 the sums of 16 weight rows × `m` activation rows in f32. At most 16 rows.
    pub fn new(m: usize) -> Shapes {
        assert!((1..=16).contains(&m));
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        rows[..8].fill(16);
        row_bytes[..8].fill(4 * m as u16);
        row_bytes[4..6].fill(64);
        Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    }

    /// Shapes the tiles of this thread, and clears them.
    pub fn apply(&self, Amx(()): Amx) {
        // SAFETY: the proof; 64 bytes are read, and `new` keeps to the palette's limits of 16 lines and 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) self, options(nostack, readonly)) };
    }
}

/// Empties the tiles of this thread, so that the system need not save them.
pub(super) fn release(Amx(()): Amx) {
    // SAFETY: the proof; whoever reads the tiles shapes them first.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// Products of 16 × 32 × 16 in a step of [`multiply_only`].
pub(crate) const PRODUCTS: usize = 4;

/// Nothing but products of BF16 tiles, [`PRODUCTS`] independent ones in every step; `false` where there are no tiles.
pub(crate) fn multiply_only(steps: usize) -> bool {
    let Some(amx) = Isa::at(Level::AmxBf16).and_then(Amx::of) else { return false };
    Shapes::new(16).apply(amx);
    for _ in 0..steps {
        // SAFETY: the tiles were shaped; no memory is touched.
        unsafe {
            asm!(
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                options(nostack, nomem),
            );
        }
    }
    release(amx);
    true
}
