//! Lory beside llama.cpp: the same file, threads and tokens, in one process, in turns.
//!
//! `cargo bench -p lory-benches --features ggml --bench versus -- -m model.gguf`. Pairs of samples are
//! interleaved (A B, B A, …), so that a noisy machine hits both sides; a ratio is that of one pair. The ceilings are
//! measured in the same run, before (the table uses these) and after.
//! First it checks that both sides compute the same logits, for one sequence and for every number of them that is timed.
//!
//! For AVX2 alone on both sides, llama.cpp built once more in a target directory of its own:
//! `GGML_NATIVE=OFF LORY_ISA=avx2 cargo bench --target-dir target/avx2 -p lory-benches --features ggml --bench versus -- -m model.gguf`.

#[cfg(feature = "ggml")]
mod adapters;
#[cfg(feature = "ggml")]
mod check;
#[cfg(feature = "ggml")]
mod llama;
#[cfg(feature = "ggml")]
mod lora_file;
#[cfg(feature = "ggml")]
mod report;
#[cfg(feature = "ggml")]
mod run;
#[cfg(feature = "ggml")]
mod side;
#[cfg(feature = "ggml")]
mod test;

#[cfg(feature = "ggml")]
fn main() -> std::process::ExitCode {
    run::main()
}

#[cfg(not(feature = "ggml"))]
fn main() {
    eprintln!(
        "versus compares with llama.cpp, which is built from source (cmake and libclang are needed):\n  \
         cargo bench -p lory-benches --features ggml --bench versus -- -m MODEL.gguf"
    );
}
