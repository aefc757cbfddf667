# SPDX-License-Identifier: Apache-2.0
# cpack in a build folder of the library alone (preset `install`) makes libkvarn-dev_<version>_all.deb: what `cmake --install` would
# install, with prefix /usr, and what Debian wants besides (cmake/debian). docs/release.md says when and how it is checked.

set(CPACK_PACKAGE_NAME kvarn)
set(CPACK_PACKAGE_VENDOR kvarn)
set(CPACK_PACKAGE_CONTACT "Seed 939d5f3b maintainers <maintainers@users.noreply.r-seed-939d5f3b.example>")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "KV-cache quantization for attention (C++20 headers)")
set(CPACK_PACKAGE_DESCRIPTION
"kvarn makes the K and V cache of transformer inference four to six times
smaller: it quantizes the cache to 2 to 8 bits per value with the KVarN method
(a Hadamard rotation, variance normalisation along both axes of a tile of
tokens, asymmetric rounding) and computes attention on the packed codes.
It is header-only, and needs a C++20 compiler. Kernels for AVX2, AVX-512 and
AArch64 NEON write the same bytes as its portable code. Headers for CUDA are
included.")
set(CPACK_RESOURCE_FILE_LICENSE "${PROJECT_SOURCE_DIR}/LICENSE")
set(CPACK_VERBATIM_VARIABLES ON)
set(CPACK_GENERATOR DEB)
set(CPACK_SOURCE_GENERATOR TGZ)
set(CPACK_SOURCE_IGNORE_FILES "/\\.git(/|$)" "/build[^/]*/" "/out/" "/\\.cache/")

set(CPACK_DEBIAN_PACKAGE_NAME libkvarn-dev)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_ARCHITECTURE all)
set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_PACKAGE_DEPENDS "libxsimd-dev (>= 8.1)")
# kvarn/interop/eigen.hpp, kvarn/cache/file.hpp, kvarn/cuda
set(CPACK_DEBIAN_PACKAGE_SUGGESTS "libeigen3-dev, libxxhash-dev (>= 0.8), nvidia-cuda-toolkit (>= 12.4)")
set(CPACK_DEBIAN_PACKAGE_HOMEPAGE "${PROJECT_HOMEPAGE_URL}")
set(CPACK_DEBIAN_COMPRESSION_TYPE xz)
set(CPACK_PRE_BUILD_SCRIPTS "${PROJECT_SOURCE_DIR}/cmake/debian/stage.cmake")
include(CPack)
