//! Random sequences of calls through the C interface, on stable Rust (see `tests/fuzz`).

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
    for round in 1..=150u64 {
        let mut seed = round.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let len = 200 + random(&mut seed) as usize % 800;
        let data: Vec<u8> = (0..len).map(|_| random(&mut seed) as u8).collect();
        calls::calls(&data);
    }
}
