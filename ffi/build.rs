//! Names the shared library after its ABI: a program linked to one never loads another. And keeps what it exports to `lory_*`.

use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=src/version.rs");
    let source = fs::read_to_string("src/version.rs").expect("beside this file");
    let abi = source
        .lines()
        .find_map(|line| line.strip_prefix("pub const LORY_ABI_VERSION: u32 = ")?.strip_suffix(';'))
        .expect("version.rs declares the ABI version");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,liblory.so.{abi}");
        // Dependencies have C interfaces of their own, which are nobody's business.
        println!("cargo::rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
    }
}
