# One object per instruction set, each with its own flags; csrc/cpu/dispatch.cpp picks one when the
# module loads. -ffp-contract=off: all sets (and CUDA) give the same bits.
function(dpfast_add_instruction_sets target)
  target_sources(${target} PRIVATE csrc/cpu/kernels_baseline.cpp)
  target_compile_options(${target} PRIVATE
    -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    target_sources(${target} PRIVATE csrc/cpu/kernels_avx2.cpp csrc/cpu/kernels_avx512.cpp)
    target_compile_definitions(${target} PRIVATE DPFAST_X86_KERNELS)
    set_source_files_properties(csrc/cpu/kernels_avx2.cpp PROPERTIES
      COMPILE_OPTIONS "-mavx2;-mfma")
    # GCC 12's own AVX-512 header trips these two (GCC bug 105593); the same source is compiled with
    # them for the other instruction sets.
    set_source_files_properties(csrc/cpu/kernels_avx512.cpp PROPERTIES
      COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mprefer-vector-width=512;-Wno-uninitialized;-Wno-maybe-uninitialized")
  endif()
endfunction()
