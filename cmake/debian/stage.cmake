# SPDX-License-Identifier: Apache-2.0
# Run by cpack when it has staged what is installed: adds what a Debian package needs besides, copyright and changelog.
# With SOURCE_DATE_EPOCH set, as docs/release.md does, one CMake always makes the same bytes.
if(NOT CPACK_GENERATOR STREQUAL "DEB")
  return()
endif()
set(root "${CPACK_TEMPORARY_INSTALL_DIRECTORY}/usr")
set(doc "${root}/share/doc/${CPACK_DEBIAN_PACKAGE_NAME}")

file(COPY "${CMAKE_CURRENT_LIST_DIR}/copyright" "${CMAKE_CURRENT_LIST_DIR}/../../CHANGELOG.md" DESTINATION "${doc}")
string(TIMESTAMP date "%a, %d %b %Y %H:%M:%S +0000" UTC)
file(WRITE "${doc}/changelog" "\
${CPACK_DEBIAN_PACKAGE_NAME} (${CPACK_PACKAGE_VERSION}) unstable; urgency=medium

  * Release ${CPACK_PACKAGE_VERSION} of kvarn; see CHANGELOG.md.

 -- ${CPACK_PACKAGE_CONTACT}  ${date}
")
execute_process(COMMAND gzip -9n "${doc}/changelog" "${doc}/CHANGELOG.md" COMMAND_ERROR_IS_FATAL ANY)

# This package does not move, and pkg-config leaves out -I/usr/include only where it is spelled so: it would upset a cross compiler.
file(READ "${root}/share/pkgconfig/kvarn.pc" pc)
string(REGEX REPLACE "\nprefix=[^\n]*" "\nprefix=/usr" pc "${pc}")
file(WRITE "${root}/share/pkgconfig/kvarn.pc" "${pc}")

execute_process(COMMAND chmod -R u=rwX,go=rX "${root}" COMMAND_ERROR_IS_FATAL ANY)  # whatever the umask was
if(DEFINED ENV{SOURCE_DATE_EPOCH})
  execute_process(COMMAND find "${root}" -exec touch -h -d "@$ENV{SOURCE_DATE_EPOCH}" {} + COMMAND_ERROR_IS_FATAL ANY)
endif()
