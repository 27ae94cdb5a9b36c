# STARFLOW_OLDER: what is linked loads on systems of manylinux_2_28 too, however new this machine is (older_symbols.py).
option(STARFLOW_OLDER "Link with the symbols that manylinux_2_28 has" OFF)
if(STARFLOW_OLDER)
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/cmake/older_symbols.py ${CMAKE_BINARY_DIR}/older ${CMAKE_CXX_COMPILER}
    COMMAND_ERROR_IS_FATAL ANY)
  add_link_options(-L${CMAKE_BINARY_DIR}/older)
  # Before torch's library, which has copies of some of the later ones and shows them.
  link_libraries(stdc++)
endif()
