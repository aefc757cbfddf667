# SPDX-License-Identifier: Apache-2.0
# kvarn for C and for whatever calls C (docs/c-api.md):
#
#   kvarn_add_c_library(<target> [SHARED|STATIC] ARCHS <set> ... [NO_FILES])
#
# makes a library with the functions of <kvarn/c/kvarn.h>, which chooses among its instruction sets by itself. Who links <target> gets the
# include folder and the definitions that the header wants, and no C++.
#   SHARED, STATIC   as for add_library; without, what BUILD_SHARED_LIBS says
#   ARCHS            as for kvarn_add_kernels
#   NO_FILES         without saving and loading, and so without xxhash.h
# A shared library exports what the header declares and nothing else, with versions where the linker knows them; its SOVERSION is the
# header's KVARN_C_ABI. The target's property KVARN_C_HEADER is the header's path, for who installs it.

cmake_policy(VERSION 3.20)  # for this file alone, also where a project with older policies includes it by find_package

# The folder of kvarn's headers.
function(kvarn_c_include_dir result)
  get_target_property(folders kvarn::kvarn INTERFACE_INCLUDE_DIRECTORIES)
  foreach(folder IN LISTS folders)
    string(REGEX REPLACE "^\\$<BUILD_INTERFACE:(.*)>$" "\\1" folder "${folder}")
    if(EXISTS "${folder}/kvarn/c/kvarn.h")
      set(${result} "${folder}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  message(FATAL_ERROR "kvarn_add_c_library: kvarn::kvarn has no folder with kvarn/c/kvarn.h")
endfunction()

# The functions that a header declares with KVARN_C_API: the one list of them.
function(kvarn_c_functions header result)
  file(READ "${header}" text)
  string(REPLACE ";" "" text "${text}")
  string(REGEX MATCHALL "\nKVARN_C_API [^(]*[ *\n]kvarn_[a-z0-9_]+\\(" declarations "${text}")
  set(names "")
  foreach(declaration IN LISTS declarations)
    string(REGEX MATCH "kvarn_[a-z0-9_]+\\($" name "${declaration}")
    string(REPLACE "(" "" name "${name}")
    list(APPEND names "${name}")
  endforeach()
  list(SORT names)
  set(${result} "${names}" PARENT_SCOPE)
endfunction()

function(kvarn_add_c_library target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "SHARED;STATIC;NO_FILES" "" "ARCHS")
  set(usage "kvarn_add_c_library(<target> [SHARED|STATIC] ARCHS portable|sse2|avx2|avx512|neon64 ... [NO_FILES])")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_ARCHS)
    message(FATAL_ERROR "${usage}: unexpected `${arg_UNPARSED_ARGUMENTS}`, or no ARCHS")
  endif()
  if(arg_SHARED AND arg_STATIC)
    message(FATAL_ERROR "${usage}: SHARED or STATIC, not both")
  endif()
  if(TARGET ${target})
    message(FATAL_ERROR "${usage}: there is a target `${target}` already")
  endif()
  if(NOT arg_NO_FILES AND NOT TARGET kvarn::cache_files)
    message(FATAL_ERROR "${usage}: saving and loading need xxhash.h 0.8 or newer (Debian and Ubuntu libxxhash-dev, vcpkg and conda-forge "
      "xxhash; KVARN_XXHASH_INCLUDE_DIR names its folder). NO_FILES makes a library without them.")
  endif()

  set(type "")
  if(arg_SHARED OR (BUILD_SHARED_LIBS AND NOT arg_STATIC))
    set(type SHARED)
  else()
    set(type STATIC)
  endif()
  set(templates "${CMAKE_CURRENT_FUNCTION_LIST_DIR}")
  set(build "${CMAKE_CURRENT_BINARY_DIR}/kvarn_c/${target}")
  kvarn_c_include_dir(include_dir)
  set(header "${include_dir}/kvarn/c/kvarn.h")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${header}")
  configure_file("${templates}/kvarn_c.cpp.in" "${build}/kvarn_c.cpp" COPYONLY)
  add_library(${target} ${type} "${build}/kvarn_c.cpp")

  # What kvarn::kvarn consists of, without linking it: there is nothing to link, and a static library would name it to who links that.
  set(parts kvarn::kvarn)
  if(NOT arg_NO_FILES)
    list(APPEND parts kvarn::cache_files)
  endif()
  foreach(part IN LISTS parts)
    target_include_directories(${target} SYSTEM PRIVATE "$<TARGET_PROPERTY:${part},INTERFACE_INCLUDE_DIRECTORIES>")
    target_compile_definitions(${target} PRIVATE "$<TARGET_PROPERTY:${part},INTERFACE_COMPILE_DEFINITIONS>")
  endforeach()
  target_compile_features(${target} PRIVATE cxx_std_20)
  target_compile_definitions(${target} PRIVATE KVARN_KERNELS_C)
  if(arg_NO_FILES)
    target_compile_definitions(${target} PRIVATE KVARN_C_NO_FILES)
  endif()
  target_include_directories(${target} INTERFACE "$<BUILD_INTERFACE:${include_dir}>")
  kvarn_add_kernels(${target} ARCHS ${arg_ARCHS} ELEMENTS float half bfloat16 CACHE)
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON CXX_EXTENSIONS OFF
    SKIP_PRECOMPILE_HEADERS ON KVARN_C_HEADER "${header}")
  if(NOT MSVC AND NOT CMAKE_CXX_COMPILER_FRONTEND_VARIANT STREQUAL "MSVC")
    # No exceptions, so that nothing of the C++ library is needed when it runs; -O2 because checksums are slow without.
    target_compile_options(${target} PRIVATE -fno-exceptions -fno-rtti)
    set_source_files_properties("${build}/kvarn_c.cpp" TARGET_DIRECTORY ${target} PROPERTIES
      COMPILE_OPTIONS "-fno-fast-math;$<$<NOT:$<CONFIG:Release,RelWithDebInfo,MinSizeRel>>:-O2>")
  endif()

  if(type STREQUAL "STATIC")
    target_compile_definitions(${target} PUBLIC KVARN_C_STATIC)
    if(UNIX)
      target_link_libraries(${target} INTERFACE m)
    endif()
    return()
  endif()

  file(STRINGS "${header}" abi REGEX "^#define KVARN_C_ABI [0-9]+$")
  string(REGEX MATCH "[0-9]+$" abi "${abi}")
  file(STRINGS "${include_dir}/kvarn/version.hpp" version REGEX "^#define KVARN_VERSION_STRING \"[0-9.]+\"$")
  string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" version "${version}")
  set_target_properties(${target} PROPERTIES SOVERSION ${abi} VERSION "${abi}.${version}")
  target_compile_definitions(${target} PRIVATE KVARN_C_BUILD)
  if(UNIX AND NOT APPLE)
    kvarn_c_functions("${header}" functions)
    list(JOIN functions ";\n    " functions)
    file(CONFIGURE OUTPUT "${build}/kvarn_c.map" CONTENT "KVARN_@abi@ {\n  global:\n    @functions@;\n  local:\n    *;\n};\n" @ONLY)
    # Everything that is needed must be there, and what is not, like the C++ library, is left out.
    target_link_options(${target} PRIVATE "LINKER:--version-script=${build}/kvarn_c.map" LINKER:--as-needed LINKER:-z,defs)
    set_target_properties(${target} PROPERTIES LINK_DEPENDS "${build}/kvarn_c.map")
  endif()
endfunction()
