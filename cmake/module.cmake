# The pybind11 module _C for each interpreter of STARFLOW_PYTHONS. It is small, and all that knows Python, so that one
# wheel carries it for several.
set(STARFLOW_PYTHONS "" CACHE STRING "Interpreters that _C is built for; empty: the running one")
set(PYBIND11_NOPYTHON ON)
find_package(pybind11 CONFIG REQUIRED)

# Sets STARFLOW_MODULES to the targets.
function(starflow_add_modules)
  set(modules "")
  set(pythons ${STARFLOW_PYTHONS})
  if(NOT pythons)
    set(pythons ${Python_EXECUTABLE})
  endif()
  foreach(python IN LISTS pythons)
    execute_process(
      COMMAND ${python} -c "import sysconfig; print(sysconfig.get_path('include'), sysconfig.get_config_var('EXT_SUFFIX'), sep=';', end='')"
      OUTPUT_VARIABLE found RESULT_VARIABLE failed ERROR_QUIET)
    if(NOT failed STREQUAL "0")
      message(FATAL_ERROR "starflow-ext: STARFLOW_PYTHONS has \"${python}\", expected interpreters that run.")
    endif()
    list(GET found 0 include)
    list(GET found 1 suffix)
    if(NOT EXISTS "${include}/Python.h")
      message(FATAL_ERROR "starflow-ext: ${python} has no headers in ${include}; install its development package (python3-dev in Debian).")
    endif()
    string(MAKE_C_IDENTIFIER "_C${suffix}" module)
    add_library(${module} MODULE ${ARGN})
    set_target_properties(${module} PROPERTIES PREFIX "" OUTPUT_NAME _C SUFFIX "${suffix}")
    target_include_directories(${module} PRIVATE csrc ${CMAKE_BINARY_DIR}/generated)
    target_include_directories(${module} SYSTEM PRIVATE ${include})
    # Nothing in it is fast: -Os makes it a third smaller.
    target_compile_options(${module} PRIVATE -Os)
    target_link_libraries(${module} PRIVATE pybind11::headers starflow_ops)
    list(APPEND modules ${module})
  endforeach()
  set(STARFLOW_MODULES ${modules} PARENT_SCOPE)
endfunction()
