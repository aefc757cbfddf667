# An overlay port that installs the very checkout it lies in:
#   vcpkg install kvarn --overlay-ports=<kvarn>/cmake/vcpkg/ports
# A registry's port says instead of the next line (docs/release.md):
#   vcpkg_from_github(OUT_SOURCE_PATH SOURCE_PATH REPO <owner>/kvarn REF "v${VERSION}" SHA512 <of the archive> HEAD_REF main)
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../../../.." ABSOLUTE)

set(VCPKG_BUILD_TYPE release) # header-only port

vcpkg_cmake_configure(
    SOURCE_PATH "${SOURCE_PATH}"
    OPTIONS
        -DKVARN_BUILD_TESTS=OFF
        -DKVARN_BUILD_BENCHMARKS=OFF
        -DKVARN_BUILD_EXAMPLES=OFF
        -DKVARN_INSTALL=ON
)

vcpkg_cmake_install()
vcpkg_cmake_config_fixup()
vcpkg_fixup_pkgconfig()

file(INSTALL "${CMAKE_CURRENT_LIST_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
