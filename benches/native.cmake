# llama.cpp for the CPU it is built on, as its own default is; the crate that builds it would take
# AVX2 wherever Rust's target has no more. `.cargo/config.toml` has CMake read this file.
# GGML_NATIVE=OFF in the environment leaves it at AVX2, FMA and F16C (in a target directory of its own: cargo does not notice).
if(NOT CMAKE_CROSSCOMPILING AND NOT "$ENV{GGML_NATIVE}" STREQUAL "OFF")
  set(GGML_NATIVE ON CACHE BOOL "optimise for this CPU" FORCE)
endif()
