# Headers and the CPU library of a torch. Not find_package(Torch): it looks for the CUDA that torch was built with, and
# changes the architectures that we build for.
execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_torch.py OUTPUT_VARIABLE STARFLOW_TORCH)
if(NOT STARFLOW_TORCH)
  message(FATAL_ERROR "starflow-ext: ${Python_EXECUTABLE} has no torch 2.11 or later to build with; run `pip install torch==2.13.0` first, or build with pip's isolation, which does (the wheel itself runs with torch 2.10 and later).")
endif()
list(GET STARFLOW_TORCH 0 STARFLOW_TORCH_VERSION)
list(GET STARFLOW_TORCH 1 STARFLOW_TORCH_DIR)
add_library(starflow_torch INTERFACE)
target_include_directories(starflow_torch SYSTEM INTERFACE ${STARFLOW_TORCH_DIR}/include)
target_link_libraries(starflow_torch INTERFACE ${STARFLOW_TORCH_DIR}/lib/libtorch_cpu.so)
# One byte each for major, minor and patch, from the top: torch 2.10. Not 0x0210..., which would be 2.16.
target_compile_definitions(starflow_torch INTERFACE "TORCH_TARGET_VERSION=((2ULL << 56) | (10ULL << 48))")
# torch's headers name themselves in their messages; without the folder of the building machine.
target_compile_options(starflow_torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${STARFLOW_TORCH_DIR}/include/=>)
