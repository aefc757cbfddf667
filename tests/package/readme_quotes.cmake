# SPDX-License-Identifier: Apache-2.0
# README.md holds PROGRAM verbatim (without its licence line) between ```cpp fences.
file(READ "${README}" readme)
file(READ "${PROGRAM}" program)
string(REGEX REPLACE "^// SPDX-License-Identifier: [^\n]*\n" "" program "${program}")
string(FIND "${readme}" "```cpp\n${program}```" at)
if(at EQUAL -1)
  message(FATAL_ERROR "README.md does not quote ${PROGRAM} verbatim between ```cpp fences")
endif()
