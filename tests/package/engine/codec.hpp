// SPDX-License-Identifier: Apache-2.0
// What the engine's own users see: nothing of kvarn, unless the engine uses it publicly.
#pragma once
#include <cstddef>
#include <vector>

#ifdef ENGINE_PUBLIC
#include <kvarn/layout/format.hpp>
#endif

namespace engine_static {
std::vector<std::byte> seal(const std::vector<float>& k, const std::vector<float>& v);
}
namespace engine_shared {
std::vector<std::byte> seal(const std::vector<float>& k, const std::vector<float>& v);
}
