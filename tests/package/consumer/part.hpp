// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <vector>

#include <kvarn/layout/format.hpp>

std::vector<std::byte> quantize_elsewhere(const kvarn::format& format, const std::vector<float>& k, const std::vector<float>& v);
