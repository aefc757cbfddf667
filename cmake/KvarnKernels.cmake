# SPDX-License-Identifier: Apache-2.0
# One binary for many processors (docs/building.md):
#
#   kvarn_add_kernels(<target> ARCHS <set> ... [ELEMENTS <type> ...] [CACHE])
#
# adds one source file for each instruction set to <target>, compiled with that set's flags, and tells <target> by private
# definitions which ones there are; its own files then include <kvarn/dispatch.hpp>. Nothing else of <target> changes.
#   ARCHS     portable, sse2, avx2, avxvnni, avx512, avx512vnni, neon64 (alias neon), neon64dot; those of other processors, and those
#             that the compiler does not know, are left out
#   ELEMENTS  float, half, bfloat16; default half. Each one costs compile time
#   CACHE     the functions of a whole cache too (kvarn/dispatch/cache.hpp)
# <target> is a target that has sources, and links kvarn::kvarn.

cmake_policy(VERSION 3.20)  # for this file alone, also where a project with older policies includes it by find_package

function(kvarn_add_kernels target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "CACHE" "" "ARCHS;ELEMENTS")
  set(usage "kvarn_add_kernels(<target> ARCHS portable|sse2|avx2|avxvnni|avx512|avx512vnni|neon64|neon64dot ... [ELEMENTS float|half|bfloat16 ...] [CACHE])")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_ARCHS)
    message(FATAL_ERROR "${usage}: unexpected `${arg_UNPARSED_ARGUMENTS}`, or no ARCHS")
  endif()
  if(NOT TARGET ${target})
    message(FATAL_ERROR "${usage}: there is no target `${target}`")
  endif()
  get_target_property(already ${target} KVARN_KERNELS)
  if(already)
    message(FATAL_ERROR "${usage}: `${target}` has kernels (${already}): name all of them in one call")
  endif()

  # What to build.
  set(elements ${arg_ELEMENTS})
  if(NOT elements)
    set(elements half)
  endif()
  set(known_elements float half bfloat16)
  foreach(element IN LISTS elements)
    if(NOT element IN_LIST known_elements)
      message(FATAL_ERROR "${usage}: unknown element type `${element}`; known are: float, half, bfloat16")
    endif()
  endforeach()

  set(processor "${CMAKE_SYSTEM_PROCESSOR}")
  if(CMAKE_OSX_ARCHITECTURES)
    set(processor "${CMAKE_OSX_ARCHITECTURES}")
  endif()
  set(here portable)
  if(processor MATCHES ";")
    message(FATAL_ERROR "kvarn_add_kernels: one processor at a time, not ${processor}; join the programs with lipo")
  elseif(processor MATCHES "^(x86_64|amd64|AMD64|x64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
    list(APPEND here sse2 avx2 avxvnni avx512 avx512vnni)
  elseif(processor MATCHES "^(x86_64|amd64|AMD64|x64|x86|i[3-6]86)$")  # 32 bits
    list(APPEND here sse2)
  elseif(processor MATCHES "^(aarch64|arm64|ARM64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
    list(APPEND here neon64 neon64dot)
  endif()
  # MinGW-w64's GCC aligns the stack to 16 bytes only, but may keep larger registers there with instructions that fault unless they
  # are aligned (GCC bug 54412; some distributions patch it). An assembler from binutils 2.38 on can make them the others.
  set(vector_moves "")
  if(MINGW AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND "avx2" IN_LIST here)
    include(CheckCXXCompilerFlag)
    set(vector_moves -Wa,-muse-unaligned-vector-move)
    check_cxx_compiler_flag(${vector_moves} KVARN_HAS_UNALIGNED_VECTOR_MOVE)
    if(NOT KVARN_HAS_UNALIGNED_VECTOR_MOVE)
      list(REMOVE_ITEM here avx2 avxvnni avx512 avx512vnni)
      message(WARNING "kvarn_add_kernels: this GCC may put AVX registers where they are not aligned (GCC bug 54412), and its assembler "
        "does not help: avx2, avx512 and their kin are left out. Take binutils 2.38 or newer, or Clang.")
    endif()
  endif()
  # What a compiler may be too old for.
  set(extra_flag_avxvnni -mavxvnni)
  set(extra_flag_avx512vnni -mavx512vnni)
  set(extra_flag_neon64dot -march=armv8.2-a+dotprod)
  set(unknown "")
  foreach(arch IN ITEMS avxvnni avx512vnni neon64dot)
    if(arch IN_LIST arg_ARCHS AND arch IN_LIST here)
      include(CheckCXXCompilerFlag)
      string(TOUPPER "KVARN_COMPILES_${arch}" compiles)
      check_cxx_compiler_flag(${extra_flag_${arch}} ${compiles})
      if(NOT ${compiles})
        list(APPEND unknown ${arch})
      endif()
    endif()
  endforeach()
  set(known_archs portable sse2 avx2 avxvnni avx512 avx512vnni neon64 neon64dot)
  set(archs "")
  foreach(arch IN LISTS arg_ARCHS)
    if(arch STREQUAL "neon")
      set(arch neon64)
    endif()
    if(NOT arch IN_LIST known_archs)
      message(FATAL_ERROR "${usage}: unknown instruction set `${arch}`; known are: portable, sse2, avx2, avxvnni, "
        "avx512, avx512vnni, neon64, neon64dot, neon (neon64)")
    elseif(NOT arch IN_LIST here)
      message(STATUS "kvarn: ${target}: ${arch} left out, this is ${processor}")
    elseif(arch IN_LIST unknown)
      message(STATUS "kvarn: ${target}: ${arch} left out, the compiler does not know ${extra_flag_${arch}}")
    else()
      list(APPEND archs ${arch})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES archs)
  if(NOT archs)
    message(FATAL_ERROR "kvarn_add_kernels: none of `${arg_ARCHS}` exists on ${processor}; add portable")
  endif()

  # How to compile it. An instruction set's flags come after the target's and the build type's, so that they win.
  set(common "")
  foreach(arch IN LISTS known_archs)
    set(flags_${arch} "")
  endforeach()
  if(CMAKE_CXX_COMPILER_FRONTEND_VARIANT STREQUAL "MSVC" OR MSVC)
    set(flags_avx2 /arch:AVX2)
    set(flags_avxvnni /arch:AVX2 ${extra_flag_avxvnni})
    set(flags_avx512 /arch:AVX512)
    set(flags_avx512vnni /arch:AVX512 ${extra_flag_avx512vnni})
    set(flags_neon64dot ${extra_flag_neon64dot})
  else()
    # Without optimisation the standard library's small functions would be emitted with this set's instructions, and the linker
    # might take them for the rest of the program; besides, the kernels would be useless.
    set(common -fno-fast-math "$<$<NOT:$<CONFIG:Release,RelWithDebInfo,MinSizeRel>>:-O2>")
    if("sse2" IN_LIST here AND CMAKE_SIZEOF_VOID_P EQUAL 8)
      set(flags_portable -march=x86-64)
    elseif("sse2" IN_LIST here)
      set(flags_portable -msse2 -mfpmath=sse)
    endif()
    set(flags_sse2 ${flags_portable})
    set(flags_avx2 -march=x86-64-v3 ${vector_moves})
    set(flags_avx512 -march=x86-64-v4 ${vector_moves})
    set(flags_avxvnni ${flags_avx2} ${extra_flag_avxvnni})
    set(flags_neon64dot ${extra_flag_neon64dot})
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
      list(APPEND flags_avx512 -Wno-uninitialized -Wno-maybe-uninitialized)  # its AVX-512 headers, GCC bug 105593
    endif()
    set(flags_avx512vnni ${flags_avx512} ${extra_flag_avx512vnni})
  endif()

  set(definitions "")
  foreach(name IN LISTS archs elements)
    string(TOUPPER "KVARN_KERNELS_${name}" definition)
    list(APPEND definitions ${definition})
  endforeach()
  if(arg_CACHE)
    list(APPEND definitions KVARN_KERNELS_CACHE)
  endif()
  target_compile_definitions(${target} PRIVATE ${definitions})
  foreach(arch IN LISTS archs)
    set(source "${CMAKE_CURRENT_BINARY_DIR}/kvarn_kernels/${target}/kvarn_${arch}.cpp")
    configure_file("${CMAKE_CURRENT_FUNCTION_LIST_DIR}/kvarn_kernels.cpp.in" "${source}" @ONLY)
    target_sources(${target} PRIVATE "${source}")
    # Together with files of other flags, as a part of a unity build or with their precompiled header, it would be wrong.
    set_source_files_properties("${source}" TARGET_DIRECTORY ${target} PROPERTIES
      COMPILE_OPTIONS "${common};${flags_${arch}}"
      SKIP_UNITY_BUILD_INCLUSION ON SKIP_PRECOMPILE_HEADERS ON SKIP_AUTOGEN ON CXX_SCAN_FOR_MODULES OFF)
  endforeach()
  set_target_properties(${target} PROPERTIES KVARN_KERNELS "${archs}")
endfunction()
