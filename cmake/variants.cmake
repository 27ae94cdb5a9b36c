# File suffix -> compiler flags. _cpu.cpp, _dot.cpp and _bf16.cpp are compiled once for each of their ISA levels, with
# STARFLOW_ISA naming the namespace.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(STARFLOW_X86 1)
  set(STARFLOW_ISAS scalar avx2 avx512 avx512_bf16 amx)
  set(STARFLOW_ISAS_cpu scalar avx2 avx512)
  set(STARFLOW_ISAS_dot ${STARFLOW_ISAS})
  set(STARFLOW_ISAS_bf16 avx512_bf16)
else()
  set(STARFLOW_X86 0)
  set(STARFLOW_ISAS scalar)
  set(STARFLOW_ISAS_cpu scalar)
  set(STARFLOW_ISAS_dot scalar)
  set(STARFLOW_ISAS_bf16 "")
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
  foreach(isa IN LISTS STARFLOW_ISAS)
    set(sources "")
    foreach(source IN LISTS ARGN)
      string(REGEX MATCH "_([a-z0-9]+)\\.cpp$" _ ${source})
      if(isa IN_LIST STARFLOW_ISAS_${CMAKE_MATCH_1})
        list(APPEND sources ${source})
      endif()
    endforeach()
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
