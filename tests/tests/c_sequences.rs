//! Random sequences of calls through the C interface: what the fuzz target `calls` (see `tests/fuzz`) does,
//! without its search. `LORY_SEQUENCES` sets how many; under valgrind the usual ones take two minutes:
//!
//! ```text
//! valgrind --leak-check=full --errors-for-leak-kinds=definite,indirect --error-exitcode=99 \
//!     target/debug/deps/c_sequences-*
//! ```

#[path = "../fuzz/src/calls.rs"]
mod calls;

/// xorshift64*.
fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed >> 12;
    *seed ^= *seed << 25;
    *seed ^= *seed >> 27;
    seed.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32
}

#[test]
fn any_sequence_of_calls_is_sound() {
    let rounds =
        std::env::var("LORY_SEQUENCES").map_or(150, |n| n.parse().expect("LORY_SEQUENCES is a number"));
    for round in 1..=rounds {
        let mut seed = u64::wrapping_mul(round, 0x9E37_79B9_7F4A_7C15);
        let len = 200 + random(&mut seed) as usize % 800;
        let data: Vec<u8> = (0..len).map(|_| random(&mut seed) as u8).collect();
        calls::calls(&data);
    }
}

/// Inputs that once broke something: `tests/fuzz/findings/calls/<what it was>`.
#[test]
fn findings_stay_fixed() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/findings/calls");
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.expect("a file").path();
        println!("{}", path.display());
        calls::calls(&std::fs::read(path).expect("a file"));
    }
}
