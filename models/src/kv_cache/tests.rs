use std::sync::Arc;

use lory_kernels::{
    backend::{KvShape, KvType},
    ops::Reference,
};

use super::*;
use crate::adapter::AdapterSet;

const PAGE: usize = 4;

fn cache(pages: usize) -> KvCache<Reference> {
    let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 2, page_len: PAGE, ty: KvType::F32 };
    KvCache::new(&Reference, shape, pages).unwrap().with_sharing()
}

fn tokens(n: usize, salt: u32) -> Vec<u32> {
    (0..n as u32).map(|i| i * 7 + salt).collect()
}

fn base() -> Phases {
    Phases::new(&Arc::new(AdapterSet::default()), &[])
}

/// A sequence that has run all of `tokens`.
fn run(cache: &mut KvCache<Reference>, tokens: &[u32]) -> Pages {
    let mut pages = Pages::default();
    let found = cache.adopt(&mut pages, tokens, &base());
    cache.extend(&Reference, &mut pages, tokens.len() - found).unwrap();
    cache.publish(&mut pages, tokens, &base());
    pages
}

#[test]
fn full_pages_are_found_again_also_after_their_sequence_has_gone() {
    let mut cache = cache(8);
    let text = tokens(10, 0);
    let mut first = run(&mut cache, &text);
    let ids = first.ids().to_vec();
    let mut second = Pages::default();
    assert_eq!(cache.adopt(&mut second, &text, &base()), 8, "the last page is not full");
    assert_eq!(second.ids(), &ids[..2]);
    cache.release(&mut first);
    cache.release(&mut second);
    assert_eq!((cache.free_pages(), cache.kept_pages()), (8, 2));
    let mut third = Pages::default();
    assert_eq!(cache.adopt(&mut third, &text[..9], &base()), 8);
    assert_eq!(third.ids(), &ids[..2]);
    // Another beginning, or the same page behind another one: nothing.
    let mut other = Pages::default();
    assert_eq!(cache.adopt(&mut other, &tokens(10, 1), &base()), 0);
    assert_eq!(cache.adopt(&mut other, &text[4..], &base()), 0);
}

#[test]
fn what_two_computed_at_once_is_kept_once() {
    let mut cache = cache(8);
    let text = tokens(8, 0);
    let (mut a, mut b) = (Pages::default(), Pages::default());
    cache.extend(&Reference, &mut a, 8).unwrap();
    cache.extend(&Reference, &mut b, 8).unwrap();
    assert_eq!(cache.free_pages(), 4);
    cache.publish(&mut a, &text, &base());
    cache.publish(&mut b, &text, &base());
    assert_eq!(a.ids(), b.ids());
    assert_eq!(cache.free_pages(), 6);
}

#[test]
fn room_is_made_from_the_end_of_what_was_idle_for_longest() {
    let mut cache = cache(6);
    let (old, young) = (tokens(12, 0), tokens(12, 1));
    let mut a = run(&mut cache, &old);
    let mut b = run(&mut cache, &young);
    cache.release(&mut a);
    cache.release(&mut b);
    let mut c = Pages::default();
    cache.extend(&Reference, &mut c, 2 * PAGE).unwrap();
    assert_eq!(cache.dropped_pages(), 2);
    let mut again = Pages::default();
    assert_eq!(cache.adopt(&mut again, &old, &base()), 4, "its beginning is still there");
    assert_eq!(cache.adopt(&mut Pages::default(), &young, &base()), 12);
}

#[test]
fn a_rewound_sequence_does_not_write_into_what_others_find() {
    let mut cache = cache(8);
    let text = tokens(8, 0);
    let mut a = run(&mut cache, &text);
    let mut b = Pages::default();
    cache.adopt(&mut b, &text, &base());
    cache.truncate(&mut b, 6);
    let slots = cache.extend(&Reference, &mut b, 2).unwrap();
    assert_ne!(b.ids()[1], a.ids()[1], "it was copied");
    assert_eq!(slots[0], b.ids()[1] * PAGE as u32 + 2);
    // Without another holder the page is its own again, and is found no more.
    cache.release(&mut b);
    cache.truncate(&mut a, 6);
    let own = a.ids()[1];
    cache.extend(&Reference, &mut a, 1).unwrap();
    assert_eq!(a.ids()[1], own);
    assert_eq!(cache.adopt(&mut Pages::default(), &text, &base()), 4);
}

#[test]
fn every_page_comes_back() {
    let mut cache = cache(16);
    let mut state = 1u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let mut held: Vec<(Pages, Vec<u32>)> = Vec::new();
    for _ in 0..20_000 {
        let i = random(held.len() + 1);
        match random(5) {
            0 | 1 if held.len() < 6 => {
                let text = tokens(1 + random(14), random(3) as u32);
                let mut pages = Pages::default();
                let found = cache.adopt(&mut pages, &text, &base());
                if cache.extend(&Reference, &mut pages, text.len() - found).is_err() {
                    cache.release(&mut pages);
                    continue;
                }
                cache.publish(&mut pages, &text, &base());
                held.push((pages, text));
            }
            2 if i < held.len() => {
                let (mut pages, _) = held.swap_remove(i);
                cache.release(&mut pages);
            }
            3 if i < held.len() => {
                let (pages, text) = &mut held[i];
                let len = random(text.len() + 1);
                cache.truncate(pages, len);
                text.truncate(len);
                text.push(99);
                if cache.extend(&Reference, pages, 1).is_err() {
                    cache.truncate(pages, len);
                    text.truncate(len);
                }
                cache.publish(pages, text, &base());
            }
            4 if i < held.len() && held.len() < 6 => {
                let copy = (cache.fork(&held[i].0, held[i].0.len()), held[i].1.clone());
                held.push(copy);
            }
            _ => {}
        }
        // Pages with the same tokens up to their end may be one; others never are.
        for (a, x) in &held {
            for (b, y) in &held {
                for (i, page) in a.ids().iter().enumerate() {
                    let Some(j) = b.ids().iter().position(|p| p == page) else { continue };
                    let end = x.len().min(y.len()).min((i + 1) * PAGE);
                    assert!(i == j && x[..end] == y[..end], "{x:?} {y:?} share page {i}");
                }
            }
        }
    }
    held.iter_mut().for_each(|(pages, _)| cache.release(pages));
    assert_eq!(cache.free_pages(), 16);
}
