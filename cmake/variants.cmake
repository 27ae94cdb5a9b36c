# File suffix -> compiler flags. <op>_cpu.cpp is compiled once for each ISA level, with STARFLOW_ISA naming the namespace.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(STARFLOW_X86 1)
  set(STARFLOW_ISAS scalar avx2 avx512)
else()
  set(STARFLOW_X86 0)
  set(STARFLOW_ISAS scalar)
endif()
set(STARFLOW_FLAGS_scalar "")
set(STARFLOW_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(STARFLOW_FLAGS_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC's own AVX-512 header trips these (GCC bug 105593).
  list(APPEND STARFLOW_FLAGS_avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
endif()

# One object library a level; its objects go into `target`.
function(starflow_add_cpu_variants target)
  foreach(isa IN LISTS STARFLOW_ISAS)
    add_library(starflow_${isa} OBJECT ${ARGN})
    target_include_directories(starflow_${isa} PRIVATE csrc)
    target_compile_definitions(starflow_${isa} PRIVATE STARFLOW_ISA=${isa} STARFLOW_X86=${STARFLOW_X86}
                               STARFLOW_CUDA=${STARFLOW_WITH_CUDA})
    # The same bits wherever the compiler could fuse a product and a sum or not; and no errno, so that square roots are
    # one instruction.
    target_compile_options(starflow_${isa} PRIVATE ${STARFLOW_FLAGS_${isa}} -ffp-contract=off -fno-math-errno)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:starflow_${isa}>)
  endforeach()
endfunction()
