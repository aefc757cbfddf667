# SPDX-License-Identifier: Apache-2.0
# Install rules: headers, and a relocatable CMake package that works for every architecture.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(kvarn_package_dir "${CMAKE_INSTALL_DATADIR}/kvarn")

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/kvarn" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh")
install(TARGETS kvarn EXPORT kvarnTargets INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT kvarnTargets NAMESPACE kvarn:: DESTINATION "${kvarn_package_dir}")

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/kvarnConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/kvarnConfig.cmake" INSTALL_DESTINATION "${kvarn_package_dir}"
  NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/kvarnConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/kvarnConfig.cmake" "${PROJECT_BINARY_DIR}/kvarnConfigVersion.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/KvarnKernels.cmake" "${PROJECT_SOURCE_DIR}/cmake/kvarn_kernels.cpp.in"
  DESTINATION "${kvarn_package_dir}")
