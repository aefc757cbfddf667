// SPDX-License-Identifier: Apache-2.0
#pragma once
// Random operations on a cache and its model (model.hpp). A script is data: any operation may be left out and the rest keeps its meaning, so a
// script that fails can be made short. Used by random_test.cpp and tests/fuzz/cache.cpp.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.hpp"

namespace cache_model {

struct script {
    std::uint64_t setup = 0;
    std::vector<operation> operations;
};

/// How often each operation comes, for sequences that grow more often than they end.
using weights = std::array<unsigned, static_cast<std::size_t>(action::count)>;
inline constexpr weights usual_weights = {8, 2, 6, 6, 8, 8, 10, 5, 60, 4, 3, 3, 12, 14, 12, 6, 8, 2, 1, 1, 12, 5};

/// The operation that a number below the sum of the weights stands for.
inline action action_at(const weights& w, std::size_t at)
{
    std::size_t what = 0;
    while (at >= w[what]) at -= w[what++];
    return static_cast<action>(what);
}

/// What a script of this seed does. One in some has few or many of one kind of operation, so that states come up that the average does not reach.
inline script random_script(std::uint64_t seed, std::size_t operations)
{
    support::random_source random(seed ^ 0x517cc1b727220a95u);
    script s{seed, {}};
    weights mine = usual_weights;
    for (unsigned& w : mine) {
        const std::size_t kind = random.below(8);
        if (kind == 0) w *= 4;
        if (kind == 1) w /= 4;
    }
    const std::size_t all = std::accumulate(mine.begin(), mine.end(), std::size_t{0});
    for (std::size_t i = 0; i < operations; ++i) {
        operation o;
        o.what = action_at(mine, random.below(all));
        o.who = static_cast<std::uint8_t>(random.below(256) & random.below(256));  // small numbers more often
        o.other = static_cast<std::uint8_t>(random.below(256));
        o.a = static_cast<std::uint16_t>(random.below(65536));
        o.b = static_cast<std::uint16_t>(random.below(65536));
        o.seed = static_cast<std::uint32_t>(random.bits());
        s.operations.push_back(o);
    }
    return s;
}

/// A script as bytes: two of the setup, then eleven for each operation.
inline constexpr std::size_t operation_bytes = 11;
inline script script_from(std::span<const std::uint8_t> bytes)
{
    constexpr std::size_t all = std::accumulate(usual_weights.begin(), usual_weights.end(), std::size_t{0});
    script s;
    if (bytes.size() < 2) return s;
    const auto u16 = [](std::span<const std::uint8_t> at) { return static_cast<std::uint16_t>(at[0] | at[1] << 8); };
    s.setup = u16(bytes);
    for (bytes = bytes.subspan(2); bytes.size() >= operation_bytes; bytes = bytes.subspan(operation_bytes)) {
        operation o;
        o.what = action_at(usual_weights, bytes[0] % all);
        o.who = bytes[1];
        o.other = bytes[2];
        o.a = u16(bytes.subspan(3));
        o.b = u16(bytes.subspan(5));
        o.seed = u16(bytes.subspan(7)) | static_cast<std::uint32_t>(u16(bytes.subspan(9))) << 16;
        s.operations.push_back(o);
    }
    return s;
}

/// A script as text that can be put into a test.
inline std::string text_of(const script& s)
{
    std::string text = "script{" + std::to_string(s.setup) + "u, {\n";
    for (const operation& o : s.operations)
        text += "    {action::" + std::string(action_names[static_cast<std::size_t>(o.what)]) + ", " + std::to_string(o.who) + ", " +
                std::to_string(o.other) + ", " + std::to_string(o.a) + ", " + std::to_string(o.b) + ", " + std::to_string(o.seed) + "u},\n";
    return text + "}}";
}

/// What went wrong, or nothing.
struct outcome {
    std::optional<std::string> failure{};
    coverage seen{};
};

inline outcome run_script(const script& s)
{
    outcome result;
    std::size_t at = 0;
    try {
        machine m(s.setup);
        for (; at < s.operations.size(); ++at) m.execute(s.operations[at]);
        m.finish();
        result.seen = m.seen();
    } catch (const std::runtime_error& e) {
        const char* const name = at < s.operations.size() ? action_names[static_cast<std::size_t>(s.operations[at].what)] : "the end";
        result.failure = "operation " + std::to_string(at) + " (" + name + "): " + e.what();
    }
    return result;
}

/// The shortest script that still fails, by leaving out ever smaller pieces.
inline script shortened(script s)
{
    for (std::size_t piece = std::max<std::size_t>(s.operations.size() / 2, 1); piece != 0;) {
        bool shorter = false;
        for (std::size_t at = 0; at < s.operations.size();) {
            script less = s;
            const std::size_t end = std::min(at + piece, s.operations.size());
            less.operations.erase(less.operations.begin() + static_cast<std::ptrdiff_t>(at), less.operations.begin() + static_cast<std::ptrdiff_t>(end));
            if (run_script(less).failure) {
                s = less;
                shorter = true;
            } else {
                at += piece;
            }
        }
        if (piece == 1 && !shorter) break;
        piece = std::max<std::size_t>(piece / 2, 1);
    }
    return s;
}

}  // namespace cache_model
