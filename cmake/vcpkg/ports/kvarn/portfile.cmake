# An overlay port that installs the very checkout it lies in:
#   vcpkg install kvarn --overlay-ports=<kvarn>/cmake/vcpkg/ports
# A port for a registry would say vcpkg_from_github(OUT_SOURCE_PATH SOURCE_PATH REPO ... REF "v${VERSION}" SHA512 ...) here.
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../../../.." ABSOLUTE)

set(VCPKG_BUILD_TYPE release)  # header-only library

vcpkg_cmake_configure(
    SOURCE_PATH "${SOURCE_PATH}"
    OPTIONS
        -DKVARN_BUILD_TESTS=OFF
        -DKVARN_BUILD_BENCHMARKS=OFF
        -DKVARN_BUILD_EXAMPLES=OFF
        -DKVARN_INSTALL=ON
)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(PACKAGE_NAME kvarn)

file(INSTALL "${CMAKE_CURRENT_LIST_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
