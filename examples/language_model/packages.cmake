# SPDX-License-Identifier: Apache-2.0
# What the forward pass and the programs over it need; for the folder that includes this, ${example} is its name.

if(NOT TARGET CLI11::CLI11)
  find_package(CLI11 QUIET)
endif()
if(NOT TARGET Eigen3::Eigen)
  find_package(Eigen3 QUIET NO_MODULE)
endif()
if(NOT TARGET nlohmann_json::nlohmann_json)
  find_package(nlohmann_json QUIET)
endif()
foreach(package IN ITEMS "CLI11::CLI11 CLI11 libcli11-dev" "Eigen3::Eigen Eigen libeigen3-dev"
        "nlohmann_json::nlohmann_json nlohmann-json nlohmann-json3-dev")
  separate_arguments(package)
  list(GET package 0 target)
  list(GET package 1 name)
  list(GET package 2 debian)
  if(NOT TARGET ${target})
    message(FATAL_ERROR
      "kvarn's example ${example} needs ${name}: Debian and Ubuntu ${debian}. -DKVARN_BUILD_EXAMPLES=OFF does without.")
  endif()
endforeach()
find_package(Threads REQUIRED)
