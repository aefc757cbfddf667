# SPDX-License-Identifier: Apache-2.0
# An engine that uses kvarn installs and exports its libraries; a program finds them, in the install tree (moved) and in the build
# folder, links them and runs. MODE says how the engine uses kvarn.
include("${CMAKE_CURRENT_LIST_DIR}/common.cmake")
list(APPEND common --no-warn-unused-cli)  # not every project here looks for kvarn and xsimd

# Any file will do for nvcc: nothing is compiled with it, and the target kvarn::cuda exists.
set(cuda -DKVARN_CUDA=ON "-DKVARN_NVCC=${CMAKE_COMMAND}" -DENGINE_CUDA=ON)
set(files -DENGINE_FILES=ON)

macro(configure_engine)
  must_run("configuring the engine" "${CMAKE_COMMAND}" -S "${REPOSITORY}/tests/package/engine" -B "${WORK}/engine" ${common}
    "-DCMAKE_INSTALL_PREFIX=${WORK}/staged" ${ARGN})
endmacro()

# use_engine(<where> <arguments> ...): a program with the engine's package in <where>, install or build.
macro(use_engine where)
  must_run("configuring with the ${where} tree" "${CMAKE_COMMAND}" -S "${REPOSITORY}/tests/package/engine_user"
    -B "${WORK}/user_${where}" ${common} ${ARGN})
  must_run("building with the ${where} tree" "${CMAKE_COMMAND}" --build "${WORK}/user_${where}")
  must_run("running with the ${where} tree" "${WORK}/user_${where}/engine_user")
  string(STRIP "${log}" log)
  message(STATUS "${where}: ${log}")
endmacro()

function(install_engine)
  must_run("building the engine" "${CMAKE_COMMAND}" --build "${WORK}/engine")
  must_run("installing the engine" "${CMAKE_COMMAND}" --install "${WORK}/engine")
  file(RENAME "${WORK}/staged" "${WORK}/prefix")
  names_no_path_of_this_machine("${WORK}/prefix/share/engine")
endfunction()

function(says_nothing_of_kvarn)
  file(GLOB files "${WORK}/prefix/share/engine/*" "${WORK}/engine/engineTargets.cmake" "${WORK}/engine/engineConfig.cmake")
  must_exist("${WORK}/prefix/share/engine/engineTargets.cmake" "${WORK}/engine/engineTargets.cmake")
  foreach(file IN LISTS files)
    file(READ "${file}" text)
    string(REGEX REPLACE "(^|\n)#[^\n]*" "" text "${text}")
    string(REPLACE "${WORK}/" "" text "${text}")  # folders may be named after it
    string(REPLACE "${REPOSITORY}/" "" text "${text}")
    if(text MATCHES "[^\n]*(kvarn|KVARN)[^\n]*")
      message(FATAL_ERROR "${MODE}: ${file} speaks of kvarn, a private matter of the engine:\n${CMAKE_MATCH_0}")
    endif()
  endforeach()
endfunction()

if(MODE STREQUAL "export_private")
  # As docs/building.md has it: a copy of kvarn, PRIVATE, no install rules.
  configure_engine("-DENGINE_KVARN=${REPOSITORY}" -DENGINE_USE=PRIVATE -DENGINE_KERNELS=ON ${cuda} ${files})
  install_engine()
  says_nothing_of_kvarn()
  if(EXISTS "${WORK}/prefix/include/kvarn" OR EXISTS "${WORK}/prefix/share/kvarn")
    message(FATAL_ERROR "an embedded kvarn was installed without being asked to")
  endif()
  set(none -DCMAKE_DISABLE_FIND_PACKAGE_kvarn=ON -DCMAKE_DISABLE_FIND_PACKAGE_xsimd=ON)
  use_engine(install "-Dengine_ROOT=${WORK}/prefix" -DFOUND_KVARN=OFF ${none})
  use_engine(build "-Dengine_DIR=${WORK}/engine" -DFOUND_KVARN=OFF ${none})

elseif(MODE STREQUAL "export_private_install")
  # kvarn is installed beside the engine, which still needs it only to be built; xsimd is a target of the engine.
  configure_engine("-DENGINE_KVARN=${REPOSITORY}" -DENGINE_USE=PRIVATE -DKVARN_INSTALL=ON "-DENGINE_XSIMD=${XSIMD_INCLUDE}")
  install_engine()
  says_nothing_of_kvarn()
  names_no_path_of_this_machine("${WORK}/prefix/share/kvarn")
  must_exist("${WORK}/prefix/include/kvarn/kvarn.hpp" "${WORK}/prefix/share/pkgconfig/kvarn.pc")
  use_engine(install "-Dengine_ROOT=${WORK}/prefix" -DFOUND_KVARN=OFF)
  use_engine(build "-Dengine_DIR=${WORK}/engine" -DFOUND_KVARN=OFF)

elseif(MODE STREQUAL "export_public_install")
  # The engine's headers include kvarn's: its package finds kvarn's package, installed beside it.
  configure_engine("-DENGINE_KVARN=${REPOSITORY}" -DENGINE_USE=PUBLIC -DKVARN_INSTALL=ON
    "-DENGINE_CONFIG=find_dependency(kvarn)" ${cuda} ${files})
  install_engine()
  use_engine(install "-DCMAKE_PREFIX_PATH=${WORK}/prefix;${PREFIX_PATH}" -DFOUND_KVARN=ON)
  use_engine(build "-Dengine_DIR=${WORK}/engine" "-Dkvarn_DIR=${WORK}/engine/kvarn" -DFOUND_KVARN=ON)

elseif(MODE STREQUAL "export_public_embedded")
  # Headers that nobody would have: CMake refuses, with the words that docs/building.md explains.
  execute_process(COMMAND "${CMAKE_COMMAND}" -S "${REPOSITORY}/tests/package/engine" -B "${WORK}/engine" ${common}
    "-DENGINE_KVARN=${REPOSITORY}" -DENGINE_USE=PUBLIC RESULT_VARIABLE code OUTPUT_VARIABLE log ERROR_VARIABLE log)
  string(REGEX REPLACE "[ \n]+" " " log "${log}")
  if(code EQUAL 0 OR NOT log MATCHES "requires target \"kvarn\" that is not in any export set")
    message(FATAL_ERROR "a PUBLIC use of a kvarn that is not installed should not have passed:\n${log}")
  endif()

elseif(MODE STREQUAL "export_found")
  # kvarn is a package itself: CMake names it in the package of a static library, which has to find it,
  install_library("${WORK}/kvarn")
  configure_engine("-Dkvarn_ROOT=${WORK}/kvarn" -DENGINE_USE=PRIVATE "-DENGINE_CONFIG=find_dependency(kvarn)" ${files})
  install_engine()
  use_engine(install "-Dengine_ROOT=${WORK}/prefix" "-Dkvarn_ROOT=${WORK}/kvarn" -DFOUND_KVARN=ON)
  use_engine(build "-Dengine_DIR=${WORK}/engine" "-Dkvarn_ROOT=${WORK}/kvarn" -DFOUND_KVARN=ON)
  # unless the engine links it for building only.
  file(REMOVE_RECURSE "${WORK}/engine" "${WORK}/prefix" "${WORK}/user_install")
  configure_engine("-Dkvarn_ROOT=${WORK}/kvarn" -DENGINE_USE=PRIVATE "-DENGINE_LINK=$<BUILD_INTERFACE:kvarn::kvarn>")
  install_engine()
  use_engine(install "-Dengine_ROOT=${WORK}/prefix" -DFOUND_KVARN=OFF -DCMAKE_DISABLE_FIND_PACKAGE_kvarn=ON)

else()
  message(FATAL_ERROR "unknown MODE ${MODE}")
endif()
