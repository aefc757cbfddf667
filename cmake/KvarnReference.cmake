# SPDX-License-Identifier: Apache-2.0
# The target `docs`: the reference of all functions and types, by Doxygen, in <build>/reference/html. Sets KVARN_DOXYGEN.
find_program(KVARN_DOXYGEN NAMES doxygen)
mark_as_advanced(KVARN_DOXYGEN)
add_custom_target(docs
  COMMAND sh "${CMAKE_CURRENT_LIST_DIR}/reference.sh" "${KVARN_DOXYGEN}" "${PROJECT_SOURCE_DIR}" "${PROJECT_BINARY_DIR}/reference"
  USES_TERMINAL VERBATIM COMMENT "The reference, by Doxygen")
