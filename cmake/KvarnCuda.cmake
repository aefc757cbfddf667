# SPDX-License-Identifier: Apache-2.0
# The CUDA headers: KVARN_CUDA = AUTO | ON | OFF, and the target kvarn::cuda for projects that compile CUDA files of their own.
#
# The headers are part of the library's include folder; nothing is compiled here, no language is enabled, and no architecture
# chosen: those are the consumer's (CMAKE_CUDA_ARCHITECTURES; the standard must be C++20). kvarn::cuda is kvarn::kvarn with the
# marker KVARN_HAS_CUDA, and exists where an nvcc was found (AUTO), or always (ON, an error without nvcc). An installed package is
# the same whatever machine made it: it has kvarn::cuda unless KVARN_CUDA is OFF. Sets kvarn_nvcc, empty without one.

set(KVARN_CUDA AUTO CACHE STRING "kvarn's CUDA headers: AUTO (where nvcc is found), ON or OFF")
set_property(CACHE KVARN_CUDA PROPERTY STRINGS AUTO ON OFF)
set(kvarn_nvcc "")
set(kvarn_cuda_language OFF)
if(NOT KVARN_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "kvarn: KVARN_CUDA is `${KVARN_CUDA}`; it must be AUTO, ON or OFF")
endif()
if(KVARN_CUDA STREQUAL "OFF")
  return()
endif()

add_library(kvarn_cuda INTERFACE)
target_link_libraries(kvarn_cuda INTERFACE kvarn)
target_compile_definitions(kvarn_cuda INTERFACE KVARN_HAS_CUDA=1)
set_target_properties(kvarn_cuda PROPERTIES EXPORT_NAME cuda)

if(CMAKE_CUDA_COMPILER)
  set(kvarn_nvcc "${CMAKE_CUDA_COMPILER}")
elseif(DEFINED ENV{CUDACXX} AND EXISTS "$ENV{CUDACXX}")
  set(kvarn_nvcc "$ENV{CUDACXX}")
else()
  find_program(KVARN_NVCC NAMES nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
  mark_as_advanced(KVARN_NVCC)
  if(KVARN_NVCC)
    set(kvarn_nvcc "${KVARN_NVCC}")
  endif()
endif()
if(NOT kvarn_nvcc)
  if(KVARN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "kvarn: KVARN_CUDA=ON needs nvcc (CUDA 12.4 or newer), which was not found. Any one of these will do:\n"
      "  - put nvcc's folder on PATH, or set CUDACXX or -DCMAKE_CUDA_COMPILER to nvcc\n"
      "  - -DKVARN_CUDA=AUTO or OFF does without")
  endif()
  return()
endif()

add_library(kvarn::cuda ALIAS kvarn_cuda)

# Our own programs that run on a GPU need the language. Consumers never get here.
if(kvarn_top_level AND (KVARN_BUILD_TESTS OR KVARN_BUILD_BENCHMARKS OR KVARN_BUILD_EXAMPLES))
  # Not as CMAKE_CUDA_COMPILER, which check_language would take on trust.
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    set(ENV{CUDACXX} "${kvarn_nvcc}")
  endif()
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "80-real;90" CACHE STRING "GPU architectures of kvarn's own programs")
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(kvarn_cuda_language ON)
  elseif(KVARN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "kvarn: KVARN_CUDA=ON, but ${kvarn_nvcc} does not compile a CUDA program")
  else()
    message(STATUS "kvarn: ${kvarn_nvcc} does not compile: the programs for GPUs are left out")
    set(kvarn_nvcc "")
  endif()
endif()

# kvarn_cuda_target(<target>): the standard and warnings for a target of ours whose sources are CUDA files. The standard is a plain
# option, because CMake before 3.26 knows no CUDA20 for this compiler.
function(kvarn_cuda_target target)
  target_link_libraries(${target} PRIVATE kvarn::cuda)
  target_compile_options(${target} PRIVATE -std=c++20 "SHELL:-Xcompiler -Wall,-Wextra"
    "$<$<BOOL:${KVARN_WERROR}>:SHELL:-Werror all-warnings>")
endfunction()
