//! What the compiler made of the kernels.

use std::ops::Range;

/// `N` bytes at `at`, as a number.
fn number<const N: usize>(file: &[u8], at: usize) -> usize {
    let bytes: [u8; N] = file[at..at + N].try_into().expect("so many");
    bytes.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

/// The names in this program's table of symbols (ELF, 64 bits, little-endian).
fn symbols() -> Vec<String> {
    let file = std::fs::read(std::env::current_exe().expect("a path")).expect("readable");
    let (table, entry, sections) =
        (number::<8>(&file, 0x28), number::<2>(&file, 0x3a), number::<2>(&file, 0x3c));
    let field = |section: usize, offset: usize| table + section * entry + offset;
    let bytes_of = |section: usize| -> Range<usize> {
        let start = number::<8>(&file, field(section, 0x18));
        start..start + number::<8>(&file, field(section, 0x20))
    };
    const SYMTAB: usize = 2;
    let symbols = (0..sections).find(|section| number::<4>(&file, field(*section, 4)) == SYMTAB);
    let symbols = symbols.expect("a program that is not stripped");
    let names = bytes_of(number::<4>(&file, field(symbols, 0x28)));
    let name = |at: usize| {
        let name = &file[names.start + number::<4>(&file, at)..names.end];
        let end = name.iter().position(|byte| *byte == 0).expect("an end");
        String::from_utf8_lossy(&name[..end]).into_owned()
    };
    bytes_of(symbols).step_by(24).map(name).collect()
}

/// A vector operation outside of a function that has its instructions is a call for each of them, and takes many times as long. So it was, for
/// example, in a closure that `array::map` was given.
#[test]
fn no_vector_instruction_is_a_function() {
    let symbols = symbols();
    assert!(symbols.iter().any(|name| name.contains("lory_kernels3cpu4avx2")), "{} symbols", symbols.len());
    let calls: Vec<_> =
        symbols.iter().filter(|name| name.contains("core_arch") && name.contains("_mm")).collect();
    assert!(calls.is_empty(), "{calls:#?}");
}
