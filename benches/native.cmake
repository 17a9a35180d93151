# llama.cpp for the CPU it is built on, as its own default is; the crate that builds it would take
# AVX2 wherever Rust's target has no more. `.cargo/config.toml` has CMake read this file.
# CMAKE_PROJECT_INCLUDE= in the environment turns it off.
if(NOT CMAKE_CROSSCOMPILING)
  set(GGML_NATIVE ON CACHE BOOL "optimise for this CPU" FORCE)
endif()
