//! Small tables from the host: what is on the device already is not copied again.

use lory_kernels::backend::{AttentionParams, AttentionRow, Backend, KvShape, KvType};

use super::adapters::Pack;
use super::{Noise, own_device, put, take};

const SHAPE: KvShape = KvShape { layers: 2, kv_heads: 1, head_dim: 8, page_len: 16, ty: KvType::F32 };

/// Layers ask for the same, and a step for most of what the one before asked for.
#[test]
fn a_step_copies_only_what_changed() {
    let Some(cuda) = own_device() else { return };
    let pack = Pack::new(2);
    pack.load(&cuda);
    (0..2).for_each(|i| pack.prefetch(&cuda, i));
    let x = put(&cuda, &Noise(3).values(8 * 2));
    let (mut kv, mut out) = (cuda.kv_alloc(SHAPE, 4).unwrap(), cuda.alloc(8 * 2).unwrap());
    let params = AttentionParams { n_heads: 1, scale: 1.0, softcap: None, window: None };
    let mut last = cuda.table_copies().copied;
    let mut copied = || {
        let now = cuda.table_copies().copied;
        now - std::mem::replace(&mut last, now)
    };
    for (step, expected) in [(0, [10, 0]), (1, [2, 0]), (2, [2, 0]), (2, [0, 0]), (16, [3, 0])] {
        let pages = [[0, 1], [2, 3]];
        let used = step as usize / 16 + 1;
        let rows = [0, 1].map(|i| AttentionRow { pages: &pages[i][..used], position: step });
        let slots = [step, 32 + step];
        let copies = [0, 1].map(|layer| {
            cuda.kv_write(&mut kv, layer, &x, &x, &slots).unwrap();
            cuda.attention(&kv, layer, &x, &rows, &params, &mut out).unwrap();
            cuda.gather(&x, 8, &[1, 0], &mut out).unwrap();
            pack.launch(&cuda, &[1, 0], true);
            copied()
        });
        take(&cuda, &out, 1);
        // Slots, places, pages, tiles, lines; of the adapters rows, and lines and terms of cores and sums.
        assert_eq!(copies, expected, "step {step}");
    }
}

/// Tables that are asked for while kernels that read others have not run are others.
#[test]
fn many_tables_at_once() {
    let Some(cuda) = own_device() else { return };
    let values: Vec<f32> = (0..100).map(|i| i as f32).collect();
    let x = put(&cuda, &values);
    for round in 0..3 {
        let wanted: Vec<[u32; 2]> = (0..100).map(|i| [i, (i * 7 + round) % 100]).collect();
        let gathered: Vec<_> = wanted
            .iter()
            .map(|rows| {
                let mut out = cuda.alloc(2).unwrap();
                cuda.gather(&x, 1, rows, &mut out).unwrap();
                out
            })
            .collect();
        for (out, rows) in gathered.iter().zip(&wanted) {
            assert_eq!(take(&cuda, out, 2), rows.map(|row| row as f32));
        }
    }
    let usage = cuda.table_copies();
    assert_eq!((usage.asked, usage.bytes), (300, 100 * 256), "{usage:?}");
}

/// However many there are, they have bounded memory, and stay right.
#[test]
fn tables_give_way() {
    let Some(cuda) = own_device() else { return };
    let x = put(&cuda, &[5.0, 6.0, 7.0]);
    let mut out = cuda.alloc(3).unwrap();
    for i in 0..40 {
        // Lines without values: a table of 4 MiB that nothing reads, and one of another size.
        cuda.gather(&x, 0, &vec![i; 1 << 20], &mut out).unwrap();
        cuda.gather(&x, 0, &vec![i; 1 << (i % 20)], &mut out).unwrap();
        cuda.gather(&x, 1, &[2, i % 3, 0], &mut out).unwrap();
        assert!(cuda.table_copies().bytes <= 68 << 20, "{:?}", cuda.table_copies());
        if i % 20 == 19 {
            assert_eq!(take(&cuda, &out, 3), [7.0, [5.0, 6.0, 7.0][i as usize % 3], 5.0]);
        }
    }
}
