# SPDX-License-Identifier: Apache-2.0
# Flags for kvarn's own programs, applied target by target; nothing here reaches a consumer.

# kvarn_own_target(<target> [BASELINE]): warnings, and -march=native where KVARN_NATIVE says so; never for a BASELINE target.
function(kvarn_own_target target)
  cmake_parse_arguments(PARSE_ARGV 1 own "BASELINE" "" "")
  target_link_libraries(${target} PRIVATE kvarn::kvarn)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF)
  if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    target_compile_options(${target} PRIVATE -Wall -Wextra $<$<BOOL:${KVARN_WERROR}>:-Werror>)
    if(own_BASELINE)
      return()
    endif()
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
      target_compile_options(${target} PRIVATE -Wno-uninitialized -Wno-maybe-uninitialized)  # its AVX-512 headers, GCC bug 105593
    endif()
    if(KVARN_NATIVE)
      target_compile_options(${target} PRIVATE -march=native)
    endif()
  endif()
endfunction()
