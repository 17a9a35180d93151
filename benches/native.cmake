# llama.cpp for the CPU it is built on, as its own default is; the crate that builds it would take
# AVX2 wherever Rust's target has no more. `.cargo/config.toml` has CMake read this file.
# GGML_NATIVE=OFF in the environment leaves it at AVX2, FMA and F16C (in a target directory of its own: cargo does not notice).
if(NOT CMAKE_CROSSCOMPILING AND NOT "$ENV{GGML_NATIVE}" STREQUAL "OFF")
  set(GGML_NATIVE ON CACHE BOOL "optimise for this CPU" FORCE)
endif()
# GCC before 12.4 and 13.3 drops the shapes that llama.cpp stores for `ldtilecfg` (GCC bug 114098): with AMX it would end with an
# illegal instruction. What this llama.cpp is built for is printed beside every comparison.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64"
   AND (CMAKE_CXX_COMPILER_VERSION VERSION_LESS 12.4
        OR (CMAKE_CXX_COMPILER_VERSION VERSION_GREATER_EQUAL 13 AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13.3)))
  add_compile_options(-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
endif()
