# SPDX-License-Identifier: Apache-2.0
# Configures, builds and runs the project in consumer/ in one of the ways that docs/building.md describes (MODE).
include("${CMAKE_CURRENT_LIST_DIR}/common.cmake")

macro(configure_build_run)
  must_run("configuring" "${CMAKE_COMMAND}" -S "${REPOSITORY}/tests/package/consumer" -B "${WORK}/build" ${common}
    "-DKVARN_CONSUME=${MODE}" -DKVARN_XXHASH=ON ${ARGN})
  must_run("building" "${CMAKE_COMMAND}" --build "${WORK}/build")
  execute_process(COMMAND "${WORK}/build/consumer" RESULT_VARIABLE code OUTPUT_VARIABLE text ERROR_VARIABLE text)
  message(STATUS "${text}")
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${MODE}: the program failed (${code})")
  endif()
  must_run("writing and reading a file" "${WORK}/build/consumer_files")
  file(WRITE "${OUTPUT}/${MODE}.txt" "${text}")
endmacro()

if(MODE STREQUAL "add_subdirectory" OR MODE STREQUAL "fetchcontent")
  configure_build_run("-DKVARN_SOURCE=${REPOSITORY}")

elseif(MODE STREQUAL "find_package")
  install_library("${WORK}/staged")
  must_exist("${WORK}/staged/include/kvarn/kvarn.hpp")
  file(RENAME "${WORK}/staged" "${WORK}/prefix")  # an install tree may be moved
  names_no_path_of_this_machine("${WORK}/prefix")
  configure_build_run("-Dkvarn_ROOT=${WORK}/prefix")
  must_run("building with several instruction sets" "${CMAKE_COMMAND}" --build "${WORK}/build" --target consumer_kernels)
  must_run("running with several instruction sets" "${WORK}/build/consumer_kernels")
  message(STATUS "${log}")

elseif(MODE STREQUAL "c_library")
  # A C program with a static library that an installed kvarn makes; embedded it is configured only.
  install_library("${WORK}/staged")
  file(RENAME "${WORK}/staged" "${WORK}/prefix")
  must_exist("${WORK}/prefix/include/kvarn/c/kvarn.h")
  names_no_path_of_this_machine("${WORK}/prefix")
  must_run("configuring" "${CMAKE_COMMAND}" -S "${REPOSITORY}/tests/package/consumer" -B "${WORK}/build" ${common}
    -DKVARN_CONSUME=find_package "-Dkvarn_ROOT=${WORK}/prefix" -DKVARN_C=ON)
  must_run("building" "${CMAKE_COMMAND}" --build "${WORK}/build" --target consumer_c)
  must_run("running" "${WORK}/build/consumer_c")
  message(STATUS "${log}")
  must_run("configuring embedded" "${CMAKE_COMMAND}" -S "${REPOSITORY}/tests/package/consumer" -B "${WORK}/embedded" ${common}
    -DKVARN_CONSUME=add_subdirectory "-DKVARN_SOURCE=${REPOSITORY}" -DKVARN_C=ON)

  # kvarn_add_c_library with these arguments must end with these words.
  function(c_library_says arguments expected)
    execute_process(COMMAND "${CMAKE_COMMAND}" -S "${REPOSITORY}/tests/package/consumer" -B "${WORK}/arguments" ${common}
      -DKVARN_CONSUME=find_package "-Dkvarn_ROOT=${WORK}/prefix" "-DKVARN_C_LIBRARY=${arguments}" ${ARGN}
      RESULT_VARIABLE code OUTPUT_VARIABLE log ERROR_VARIABLE log)
    string(REGEX REPLACE "[ \n]+" " " log "${log}")
    string(FIND "${log}" "${expected}" at)
    if(at EQUAL -1 OR code EQUAL 0)
      message(FATAL_ERROR "kvarn_add_c_library(${arguments}) should have said `${expected}`:\n${log}")
    endif()
  endfunction()
  c_library_says("kvarn_c SHARED" "no ARCHS")
  c_library_says("kvarn_c SHARED ARCHS portable LATER portable" "unknown instruction set `LATER`")
  c_library_says("kvarn_c later ARCHS portable" "unexpected `later`")
  c_library_says("kvarn_c SHARED STATIC ARCHS portable" "SHARED or STATIC, not both")
  c_library_says("consumer ARCHS portable" "there is a target `consumer` already")
  c_library_says("kvarn_c ARCHS portable" "saving and loading need xxhash.h" "-DCMAKE_IGNORE_PATH=${XXHASH_INCLUDE}"
    -UKVARN_XXHASH_INCLUDE_DIR)

elseif(MODE STREQUAL "existing_xsimd")
  # The parent has a target `xsimd`, and none could be found: configuring is enough.
  must_run("configuring" "${CMAKE_COMMAND}" -S "${REPOSITORY}/tests/package/consumer" -B "${WORK}/build" ${common}
    --no-warn-unused-cli -DKVARN_CONSUME=existing_xsimd "-DKVARN_SOURCE=${REPOSITORY}" -DCMAKE_DISABLE_FIND_PACKAGE_xsimd=ON)

elseif(MODE STREQUAL "no_xxhash")
  # Where xxhash.h is not, everything but kvarn::cache_files is there: embedded, and in a package from a machine that has it.
  install_library("${WORK}/prefix")
  list(APPEND common "-DCMAKE_IGNORE_PATH=${XXHASH_INCLUDE}" -DKVARN_XXHASH=OFF)
  foreach(how IN ITEMS "find_package|-Dkvarn_ROOT=${WORK}/prefix" "add_subdirectory|-DKVARN_SOURCE=${REPOSITORY}")
    string(REPLACE "|" ";" how "${how}")
    list(GET how 0 consume)
    list(GET how 1 where)
    must_run("configuring by ${consume}" "${CMAKE_COMMAND}" -S "${REPOSITORY}/tests/package/consumer" -B "${WORK}/${consume}" ${common}
      "-DKVARN_CONSUME=${consume}" "${where}")
  endforeach()

elseif(MODE STREQUAL "kernels_arguments")
  # kvarn_add_kernels with these arguments must end (or, the last, go on) with these words.
  function(kernels_say arguments expected)
    execute_process(COMMAND "${CMAKE_COMMAND}" -S "${REPOSITORY}/tests/package/consumer" -B "${WORK}/build" ${common}
      -DKVARN_CONSUME=add_subdirectory "-DKVARN_SOURCE=${REPOSITORY}" "-DKVARN_KERNELS=${arguments}"
      RESULT_VARIABLE code OUTPUT_VARIABLE log ERROR_VARIABLE log)
    string(REGEX REPLACE "[ \n]+" " " log "${log}")
    string(FIND "${log}" "${expected}" at)
    set(wrong_code OFF)
    if((code EQUAL 0 AND NOT ARGN STREQUAL "accepted") OR (ARGN STREQUAL "accepted" AND NOT code EQUAL 0))
      set(wrong_code ON)
    endif()
    if(at EQUAL -1 OR wrong_code)
      message(FATAL_ERROR "kvarn_add_kernels(${arguments}) should have said `${expected}`:\n${log}")
    endif()
  endfunction()
  kernels_say("consumer_kernels" "no ARCHS")
  kernels_say("consumer_kernels portable" "unexpected `portable`")
  kernels_say("consumer_kernel ARCHS portable" "no target `consumer_kernel`")
  kernels_say("consumer_kernels ARCHS portable avx3" "unknown instruction set `avx3`; known are: portable, sse2, avx2, avxvnni, avx512, avx512vnni, neon64, neon64dot")
  kernels_say("consumer_kernels ARCHS portable ELEMENTS double" "unknown element type `double`; known are: float, half, bfloat16")
  kernels_say("consumer_kernels ARCHS portable avx2 neon64 sse2" "left out, this is" accepted)

elseif(MODE STREQUAL "no_xsimd")
  execute_process(COMMAND "${CMAKE_COMMAND}" -S "${REPOSITORY}" -B "${WORK}/build" ${common} ${quiet_build}
    -DCMAKE_DISABLE_FIND_PACKAGE_xsimd=ON RESULT_VARIABLE code OUTPUT_VARIABLE log ERROR_VARIABLE log)
  if(code EQUAL 0 OR NOT log MATCHES "kvarn needs xsimd")
    message(FATAL_ERROR "without xsimd, configuring should have failed with a hint:\n${log}")
  endif()

elseif(MODE STREQUAL "vcpkg_port")
  # The port's own steps, with vcpkg's functions replaced by what they do for a header-only library.
  set(port "${REPOSITORY}/cmake/vcpkg/ports/kvarn")
  set(PORT kvarn)
  set(CURRENT_PORT_DIR "${port}")
  set(CURRENT_PACKAGES_DIR "${WORK}/packages")
  set(CURRENT_BUILDTREES_DIR "${WORK}/buildtrees")
  function(vcpkg_cmake_configure)
    cmake_parse_arguments(PARSE_ARGV 0 arg "" "SOURCE_PATH" "OPTIONS")
    must_run("the port's configuring" "${CMAKE_COMMAND}" -S "${arg_SOURCE_PATH}" -B "${WORK}/buildtrees" ${common}
      "-DCMAKE_INSTALL_PREFIX=${CURRENT_PACKAGES_DIR}" ${arg_OPTIONS})
  endfunction()
  function(vcpkg_cmake_install)
    must_run("the port's installing" "${CMAKE_COMMAND}" --install "${WORK}/buildtrees")
  endfunction()
  function(vcpkg_cmake_config_fixup)
    must_exist("${CURRENT_PACKAGES_DIR}/share/${PORT}/kvarnConfig.cmake")  # its default for CONFIG_PATH
  endfunction()
  function(vcpkg_fixup_pkgconfig)
    must_exist("${CURRENT_PACKAGES_DIR}/share/pkgconfig/kvarn.pc")
    set(fixed_pkgconfig ON PARENT_SCOPE)
  endfunction()
  function(vcpkg_install_copyright)
    cmake_parse_arguments(PARSE_ARGV 0 arg "" "" "FILE_LIST")
    must_exist(${arg_FILE_LIST})
    file(INSTALL ${arg_FILE_LIST} DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}" RENAME copyright)
  endfunction()
  include("${port}/portfile.cmake")
  must_exist("${WORK}/packages/include/kvarn/kvarn.hpp" "${WORK}/packages/share/kvarn/kvarnTargets.cmake"
    "${WORK}/packages/share/kvarn/kvarnConfigVersion.cmake" "${WORK}/packages/share/kvarn/usage"
    "${WORK}/packages/share/kvarn/copyright")

  # What vcpkg checks when a port is built: only these folders, with something in each, and no path of this machine.
  if(NOT fixed_pkgconfig)
    message(FATAL_ERROR "the port installs a .pc file and does not call vcpkg_fixup_pkgconfig")
  endif()
  file(GLOB_RECURSE installed LIST_DIRECTORIES ON RELATIVE "${WORK}/packages" "${WORK}/packages/*")
  foreach(entry IN LISTS installed)
    if(NOT entry MATCHES "^(include|include/kvarn|include/kvarn/.*|share|share/kvarn|share/kvarn/.*|share/pkgconfig|share/pkgconfig/kvarn.pc)$")
      message(FATAL_ERROR "a header-only port must not leave ${entry}")
    endif()
    file(GLOB inside "${WORK}/packages/${entry}/*")
    if(IS_DIRECTORY "${WORK}/packages/${entry}" AND NOT inside)
      message(FATAL_ERROR "the port leaves the empty folder ${entry}")
    endif()
  endforeach()
  names_no_path_of_this_machine("${WORK}/packages")
  file(READ "${port}/usage" usage)
  if(NOT usage MATCHES "find_package\\(kvarn CONFIG REQUIRED\\)\n +target_link_libraries\\(main PRIVATE kvarn::kvarn\\)")
    message(FATAL_ERROR "the port's usage does not say how it is used")
  endif()

else()
  message(FATAL_ERROR "unknown MODE ${MODE}")
endif()
