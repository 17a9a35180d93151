//! Copies to the device, which may still be on their way when the call that asked for them has returned.

use lory_kernels::backend::Backend;

use super::{own_device, take};

/// The source of a copy may change at once: small and large ones, more of them than the pinned buffers hold.
#[test]
fn a_source_may_change() {
    let Some(cuda) = own_device() else { return };
    let mut source = vec![0f32; 3_000_001];
    let lengths = [5, 1 << 20, 3_000_001, 7, 2_500_000, 1, 16 << 10, 1 << 21];
    let copies: Vec<_> = (1..)
        .zip(lengths)
        .map(|(i, len)| {
            let mut buffer = cuda.alloc(len).unwrap();
            let source = &mut source[..len];
            (0..).zip(&mut *source).for_each(|(at, value)| *value = (i * 4_000_000 + at) as f32);
            cuda.upload(source, &mut buffer).unwrap();
            source.fill(f32::NAN);
            (i, len, buffer)
        })
        .collect();
    for (i, len, buffer) in copies {
        let got = take(&cuda, &buffer, len);
        assert!((0..).zip(got).all(|(at, value)| value == (i * 4_000_000 + at) as f32), "copy {i} of {len}");
    }
}
