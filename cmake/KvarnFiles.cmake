# SPDX-License-Identifier: Apache-2.0
# kvarn::cache_files: kvarn::kvarn, and the folder of xxhash.h, which <kvarn/cache/file.hpp> and what stands on it include. Exists where
# xxhash.h is found; nothing is linked. A target xxHash::xxhash that the parent project has wins.

set(kvarn_xxhash_include_dirs "")
if(TARGET xxHash::xxhash)
  get_target_property(kvarn_xxhash_include_dirs xxHash::xxhash INTERFACE_INCLUDE_DIRECTORIES)
endif()
if(NOT kvarn_xxhash_include_dirs)
  find_path(KVARN_XXHASH_INCLUDE_DIR xxhash.h DOC "The folder of xxhash.h, for kvarn::cache_files")
  mark_as_advanced(KVARN_XXHASH_INCLUDE_DIR)
  set(kvarn_xxhash_include_dirs "${KVARN_XXHASH_INCLUDE_DIR}")
endif()

# An installed package has it whatever machine made it, and adds the folder on the machine that uses it (kvarnConfig.cmake).
add_library(kvarn_cache_files INTERFACE)
target_link_libraries(kvarn_cache_files INTERFACE kvarn)
set_target_properties(kvarn_cache_files PROPERTIES EXPORT_NAME cache_files)
if(kvarn_xxhash_include_dirs)
  target_include_directories(kvarn_cache_files SYSTEM INTERFACE "$<BUILD_INTERFACE:${kvarn_xxhash_include_dirs}>")
  add_library(kvarn::cache_files ALIAS kvarn_cache_files)
endif()
