# SPDX-License-Identifier: Apache-2.0
# Install rules: headers, a relocatable CMake package and a pkg-config file, the same for every architecture and machine.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(kvarn_package_dir "${CMAKE_INSTALL_DATADIR}/kvarn")

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/kvarn" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh" PATTERN "*.h")
install(TARGETS kvarn EXPORT kvarnTargets INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
if(TARGET kvarn_cuda)
  install(TARGETS kvarn_cuda EXPORT kvarnTargets)
endif()
install(EXPORT kvarnTargets NAMESPACE kvarn:: DESTINATION "${kvarn_package_dir}")
install(TARGETS kvarn_cache_files EXPORT kvarnFilesTargets)  # for those who have xxhash.h
install(EXPORT kvarnFilesTargets NAMESPACE kvarn:: DESTINATION "${kvarn_package_dir}")

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/kvarnConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/kvarnConfig.cmake" INSTALL_DESTINATION "${kvarn_package_dir}"
  NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/kvarnConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/kvarnConfig.cmake" "${PROJECT_BINARY_DIR}/kvarnConfigVersion.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/KvarnKernels.cmake" "${PROJECT_SOURCE_DIR}/cmake/kvarn_kernels.cpp.in"
  "${PROJECT_SOURCE_DIR}/cmake/KvarnCLibrary.cmake" "${PROJECT_SOURCE_DIR}/cmake/kvarn_c.cpp.in"
  DESTINATION "${kvarn_package_dir}")

# The build folder is a package too, for a parent project that exports its own build folder with a PUBLIC use of kvarn.
export(EXPORT kvarnTargets NAMESPACE kvarn:: FILE "${PROJECT_BINARY_DIR}/kvarnTargets.cmake")
export(EXPORT kvarnFilesTargets NAMESPACE kvarn:: FILE "${PROJECT_BINARY_DIR}/kvarnFilesTargets.cmake")
foreach(file IN ITEMS KvarnKernels.cmake kvarn_kernels.cpp.in KvarnCLibrary.cmake kvarn_c.cpp.in)
  configure_file("${PROJECT_SOURCE_DIR}/cmake/${file}" "${PROJECT_BINARY_DIR}/${file}" COPYONLY)
endforeach()

# pkg-config: relative to the file itself, unless the folders are absolute paths outside the prefix.
if(IS_ABSOLUTE "${CMAKE_INSTALL_DATADIR}")
  set(kvarn_pc_prefix "${CMAKE_INSTALL_PREFIX}")
else()
  file(RELATIVE_PATH kvarn_pc_prefix "/prefix/${CMAKE_INSTALL_DATADIR}/pkgconfig" /prefix)
  string(REGEX REPLACE "/$" "" kvarn_pc_prefix "\${pcfiledir}/${kvarn_pc_prefix}")
endif()
if(IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
  set(kvarn_pc_include_dir "${CMAKE_INSTALL_INCLUDEDIR}")
else()
  set(kvarn_pc_include_dir "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
endif()
configure_file("${PROJECT_SOURCE_DIR}/cmake/kvarn.pc.in" "${PROJECT_BINARY_DIR}/kvarn.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/kvarn.pc" DESTINATION "${CMAKE_INSTALL_DATADIR}/pkgconfig")
