//! C++ programs against the wrapper, built when a test runs.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::c_api;

/// Builds `tests/NAME.cpp` into `folder`; `None`, said so, without a compiler.
pub fn compile(name: &str, folder: &Path) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The name that the library is looked for under.
    let soname = folder.join(format!("liblory.so.{}", c_api::LORY_ABI_VERSION));
    std::os::unix::fs::symlink(c_api::library_path(), &soname).expect("a link");
    let program = folder.join(name);
    let mut command = Command::new("c++");
    command.args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pedantic", "-I"]);
    command.arg(root.join("../ffi/include")).arg(root.join(format!("tests/{name}.cpp"))).arg(&soname);
    command.arg(format!("-Wl,-rpath,{}", folder.display())).arg("-o").arg(&program);
    match command.output() {
        Err(e) => {
            eprintln!("skipped: c++: {e}");
            None
        }
        Ok(out) => {
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            Some(program)
        }
    }
}
