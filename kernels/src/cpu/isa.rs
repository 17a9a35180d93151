//! What the processor can do, found out once.

use std::fmt;

use super::int_direct::direct_tiles;
use super::portable;
use super::simd::{Op, Simd};
#[cfg(target_arch = "x86_64")]
use super::{amx, avx2, avx512};

/// Instruction sets with kernels of their own, from the least to the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// What the compiler's target has anyway.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// The same with VNNI instructions on 256 bits (`avxvnni`).
    Avx2Vnni,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with VNNI.
    Avx512Vnni,
    /// The same with BF16.
    Avx512Bf16,
    /// The same with AMX tiles of BF16.
    AmxBf16,
}

impl Level {
    /// All of them, in order.
    pub const ALL: [Level; 7] = [
        Level::Portable,
        Level::Avx2,
        Level::Avx2Vnni,
        Level::Avx512,
        Level::Avx512Vnni,
        Level::Avx512Bf16,
        Level::AmxBf16,
    ];

    /// As `LORY_ISA` names it.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx2Vnni => "avx2-vnni",
            Level::Avx512 => "avx512",
            Level::Avx512Vnni => "avx512-vnni",
            Level::Avx512Bf16 => "avx512-bf16",
            Level::AmxBf16 => "amx-bf16",
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn detected(self) -> bool {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = || has!("avx2") && has!("fma") && has!("f16c");
        let avx512 = || avx2() && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
        let avx512_bf16 = || avx512() && has!("avx512vnni") && has!("avx512bf16");
        match self {
            Level::Portable => true,
            Level::Avx2 => avx2(),
            Level::Avx2Vnni => avx2() && has!("avxvnni"),
            Level::Avx512 => avx512(),
            Level::Avx512Vnni => avx512() && has!("avx512vnni"),
            Level::Avx512Bf16 => avx512_bf16(),
            Level::AmxBf16 => avx512_bf16() && amx::detected(),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detected(self) -> bool {
        self == Level::Portable
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Proof that this processor has a level: there is no way to make one without asking it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

impl Isa {
    /// The best level of this machine.
    pub fn detect() -> Isa {
        Isa::available().last().copied().unwrap_or(Isa(Level::Portable))
    }

    /// All levels of this machine, from the least to the most.
    pub fn available() -> Vec<Isa> {
        Level::ALL.into_iter().filter(|level| level.detected()).map(Isa).collect()
    }

    /// The given level, if this machine has it.
    pub fn at(level: Level) -> Option<Isa> {
        level.detected().then_some(Isa(level))
    }

    /// The level that the environment variable `LORY_ISA` asks for, else the best.
    ///
    /// # Errors
    /// A level that does not exist or that this machine lacks, with the possible ones named.
    pub fn from_env() -> Result<Isa, String> {
        match std::env::var("LORY_ISA") {
            Ok(name) if !name.is_empty() => Isa::parse(&name),
            _ => Ok(Isa::detect()),
        }
    }

    fn parse(name: &str) -> Result<Isa, String> {
        let found = Isa::available().into_iter().find(|isa| isa.0.name().eq_ignore_ascii_case(name));
        found.ok_or_else(|| {
            let names: Vec<_> = Isa::available().iter().map(|isa| isa.0.name()).collect();
            format!("LORY_ISA={name}: this machine has {}", names.join(", "))
        })
    }

    /// Carries out `op` with this level's instructions.
    pub(crate) fn run<O: Op>(self, op: O) -> O::Out {
        match self.0 {
            // SAFETY: an `Isa` of this level exists only where its features were detected.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2::run(op) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2Vnni => unsafe { avx2::run_vnni(op) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512::run(op) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni | Level::Avx512Bf16 | Level::AmxBf16 => unsafe { avx512::run_vnni(op) },
            _ => portable::run(op),
        }
    }

    /// What the level's kernels are shaped like.
    fn shapes(self) -> Shapes {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Shapes::of::<avx2::Avx2<false>>(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2Vnni => Shapes::of::<avx2::Avx2<true>>(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Shapes::of::<avx512::Avx512<false>>(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni | Level::Avx512Bf16 | Level::AmxBf16 => Shapes::of::<avx512::Avx512<true>>(),
            _ => Shapes::of::<portable::Portable>(),
        }
    }

    /// See [`Simd::TILE_ROWS`].
    pub(crate) fn tile_rows(self) -> usize {
        self.shapes().tile_rows
    }

    /// See [`Lanes::DIRECT_ROWS`](super::lanes::Lanes::DIRECT_ROWS).
    pub(crate) fn direct_rows(self) -> usize {
        self.shapes().direct_rows
    }

    /// See [`Simd::DIRECT_TILES`]; for groups of so many columns.
    pub(crate) fn direct_tiles(self, group: usize) -> usize {
        direct_tiles(self.shapes().direct_tiles, group)
    }

    /// See [`Simd::DIRECT_ROWS_NEAR`].
    pub(crate) fn direct_rows_near(self) -> usize {
        self.shapes().direct_rows_near
    }

    /// The most rows of a tile where `rows` are to be divided.
    pub(crate) fn rows_of_tile(self, rows: usize) -> usize {
        if rows <= self.direct_rows() { self.direct_rows() } else { self.tile_rows() }
    }

    /// See [`Simd::TILE_PANELS`].
    pub(crate) fn tile_panels(self) -> usize {
        self.shapes().tile_panels
    }

    /// See [`Lanes::PAIRS`](super::lanes::Lanes::PAIRS).
    pub(crate) fn has_pairs(self) -> bool {
        self.shapes().has_pairs
    }

    /// See [`Lanes::NEIGHBOURS`](super::lanes::Lanes::NEIGHBOURS).
    pub(crate) fn neighbours(self) -> bool {
        self.shapes().neighbours
    }

    /// Which level it proves.
    pub fn level(self) -> Level {
        self.0
    }
}

/// The constants of a level, which every strip asks for.
struct Shapes {
    tile_rows: usize,
    tile_panels: usize,
    direct_rows: usize,
    direct_tiles: usize,
    direct_rows_near: usize,
    has_pairs: bool,
    neighbours: bool,
}

impl Shapes {
    const fn of<S: Simd>() -> Shapes {
        Shapes {
            tile_rows: S::TILE_ROWS,
            tile_panels: S::TILE_PANELS,
            direct_rows: S::DIRECT_ROWS,
            direct_tiles: S::DIRECT_TILES,
            direct_rows_near: S::DIRECT_ROWS_NEAR,
            has_pairs: S::PAIRS,
            neighbours: S::NEIGHBOURS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_levels_name_the_choices() {
        assert_eq!(Isa::parse("PORTABLE").unwrap().level(), Level::Portable);
        let error = Isa::parse("sse9").unwrap_err();
        assert!(error.contains("sse9") && error.contains("portable"), "{error}");
    }

    #[test]
    fn the_best_is_available() {
        assert!(Isa::available().contains(&Isa::detect()));
        assert_eq!(Isa::at(Level::Portable).map(Isa::level), Some(Level::Portable));
    }
}
