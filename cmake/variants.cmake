# File suffix -> compiler flags. <op>_cpu.cpp and <op>_dot.cpp are compiled once for each of their ISA levels, with
# STARFLOW_ISA naming the namespace.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(STARFLOW_X86 1)
  set(STARFLOW_CPU_ISAS scalar avx2 avx512)
  set(STARFLOW_DOT_ISAS ${STARFLOW_CPU_ISAS} avx512_bf16 amx)
else()
  set(STARFLOW_X86 0)
  set(STARFLOW_CPU_ISAS scalar)
  set(STARFLOW_DOT_ISAS scalar)
endif()
set(STARFLOW_FLAGS_scalar "")
set(STARFLOW_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(STARFLOW_FLAGS_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC's own AVX-512 header trips these (GCC bug 105593).
  list(APPEND STARFLOW_FLAGS_avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
set(STARFLOW_FLAGS_avx512_bf16 ${STARFLOW_FLAGS_avx512} -mavx512bf16)
set(STARFLOW_FLAGS_amx ${STARFLOW_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16)

# One object library a level; its objects go into `target`.
function(starflow_add_cpu_variants target)
  foreach(isa IN LISTS STARFLOW_DOT_ISAS)
    set(sources ${ARGN})
    if(NOT isa IN_LIST STARFLOW_CPU_ISAS)
      list(FILTER sources INCLUDE REGEX "_dot\\.cpp$")
    endif()
    if(NOT sources)
      continue()
    endif()
    add_library(starflow_${isa} OBJECT ${sources})
    target_include_directories(starflow_${isa} PRIVATE csrc)
    target_compile_definitions(starflow_${isa} PRIVATE STARFLOW_ISA=${isa} STARFLOW_X86=${STARFLOW_X86}
                               STARFLOW_CUDA=${STARFLOW_WITH_CUDA})
    # The same bits wherever the compiler could fuse a product and a sum or not; no errno, so that square roots are one
    # instruction; no exceptions, whose tables would be symbols that a level shares with all.
    target_compile_options(starflow_${isa} PRIVATE ${STARFLOW_FLAGS_${isa}} -ffp-contract=off -fno-math-errno
                           -fno-exceptions)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:starflow_${isa}>)
  endforeach()
endfunction()
