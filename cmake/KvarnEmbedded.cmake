# SPDX-License-Identifier: Apache-2.0
# Keeps an embedded kvarn out of the packages that the parent project exports.
#
# `target_link_libraries(engine PRIVATE kvarn::kvarn)` on a static or object library also notes $<LINK_ONLY:kvarn::kvarn> among what
# engine's consumers link, since unlinked code may need other libraries at link time. A header-only library has nothing to link, so
# the note changes no build; but install(EXPORT) and export() insist that what it names is exported too. Therefore these notes, and
# nothing else, are removed when the top-level CMakeLists.txt has been read, before CMake generates anything.
# A PUBLIC use is not touched: engine's headers then need kvarn's, and its package must find kvarn (docs/building.md).

function(kvarn_leave_exports directory)
  # Also as `debug`, `optimized` or another plain condition, and as what is linked only while building.
  set(around "\\$<[^;,]*>:|\\$<BUILD_INTERFACE:|\\$<BUILD_LOCAL_INTERFACE:|\\$<TARGET_NAME:")
  set(note "\\$<LINK_ONLY:(${around})?(kvarn::kvarn|kvarn|kvarn::cuda|kvarn_cuda|kvarn::cache_files|kvarn_cache_files)>+")
  get_property(targets DIRECTORY "${directory}" PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target IN LISTS targets)
    get_property(libraries TARGET ${target} PROPERTY INTERFACE_LINK_LIBRARIES)
    if(libraries MATCHES "(^|;)${note}(;|$)")
      # Twice, because neighbours share the semicolon between them.
      string(REGEX REPLACE "(^|;)${note}(;|$)" "\\1\\4" libraries "${libraries}")
      string(REGEX REPLACE "(^|;)${note}(;|$)" "\\1\\4" libraries "${libraries}")
      set_property(TARGET ${target} PROPERTY INTERFACE_LINK_LIBRARIES "${libraries}")
    endif()
  endforeach()
  get_property(subdirectories DIRECTORY "${directory}" PROPERTY SUBDIRECTORIES)
  foreach(subdirectory IN LISTS subdirectories)
    kvarn_leave_exports("${subdirectory}")
  endforeach()
endfunction()

cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL kvarn_leave_exports "${CMAKE_SOURCE_DIR}")
