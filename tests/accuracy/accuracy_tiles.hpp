// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the accuracy tests measure on: synthetic K and V with the features of real caches (a few channels eight times as large as
// the others, channel offsets in K, tokens of very different norms), and the activations in examples/data.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "examples/common/measures.hpp"
#include "examples/common/npy.hpp"
#include "tests/support/library.hpp"

namespace accuracy {

using kvarn_cli::matrix;

struct kv_pair {
    matrix k, v;
};

/// [1][tokens][channels], values representable in half precision.
inline matrix synthetic(support::random_source& random, std::size_t tokens, std::size_t channels, bool offsets)
{
    std::vector<double> gain(channels, 1.0), offset(channels, 0.0);
    for (std::size_t c = 0; c < channels; ++c) gain[c] = std::exp(0.3 * random.gaussian());
    for (std::size_t i = 0; i < channels / 32; ++i) gain[random.below(channels)] *= 8.0;
    if (offsets)
        for (std::size_t c = 0; c < channels; ++c) offset[c] = gain[c] * random.gaussian();
    matrix m{1, tokens, channels, std::vector<float>(tokens * channels)};
    for (std::size_t t = 0; t < tokens; ++t) {
        const double scale = std::exp(0.25 * random.gaussian()) * (random.below(64) == 0 ? 4.0 : 1.0);
        for (std::size_t c = 0; c < channels; ++c)
            m.token(0, t)[c] = static_cast<float>(reference::round_to_half(scale * (gain[c] * random.gaussian() + offset[c])));
    }
    return m;
}

inline kv_pair synthetic_pair(std::uint64_t seed, std::size_t tokens = 2048, std::size_t channels = 128)
{
    support::random_source random(seed);
    kv_pair x;
    x.k = synthetic(random, tokens, channels, true);
    x.v = synthetic(random, tokens, channels, false);
    return x;
}

/// A [heads, tokens, head_dim] file of examples/data, cut to whole tiles of 128 tokens.
inline matrix activation(const std::string& name)
{
    const kvarn_cli::tensor array = kvarn_cli::read_npy(std::string(KVARN_EXAMPLE_DATA) + "/" + name);
    matrix m{array.heads, array.tokens / 128 * 128, array.channels, {}};
    m.values.resize(m.heads * m.tokens * m.channels);
    for (std::size_t head = 0; head < m.heads; ++head)
        for (std::size_t i = 0; i < m.tokens * m.channels; ++i)
            m.token(head, 0)[i] = array.value(head * array.tokens * array.channels + i);
    return m;
}

/// K and V through records of a format and back.
inline kv_pair through_records(const kvarn::format& f, const kv_pair& exact, const kvarn::encode_options& options,
                               std::vector<kvarn::record_errors>* errors = nullptr)
{
    kv_pair x = exact;
    const std::size_t tiles = kvarn::full_tiles(f, x.k.tokens);
    std::vector<std::byte> records(kvarn::grid_bytes(f, tiles, x.k.heads)), scratch(kvarn::scratch_bytes(f));
    const auto grid = kvarn::tile_major_records(f, records.data(), records.size(), tiles, x.k.heads);
    if (errors) errors->resize(tiles * x.k.heads);
    support::expect_ok(kvarn::quantize_kv(f, x.k.view(), x.v.view(), grid, std::span<std::byte>(scratch), options, {},
                                          errors ? std::span(*errors) : std::span<kvarn::record_errors>{}));
    support::expect_ok(kvarn::dequantize_kv(f, grid, x.k.view(), x.v.view(), kvarn::basis::original, std::span<std::byte>(scratch)));
    return x;
}

/// The errors of one way to store K and V.
struct figures {
    double bits = 0, k = 0, v = 0, k_scale_p99 = 0, v_scale_p99 = 0, attention = NAN;
};

inline figures measure(const kv_pair& exact, const kv_pair& stored, double bits, const matrix* q = nullptr)
{
    figures f;
    f.bits = bits;
    f.k = kvarn_cli::relative_error(exact.k.values, stored.k.values);
    f.v = kvarn_cli::relative_error(exact.v.values, stored.v.values);
    f.k_scale_p99 = kvarn_cli::spread_of(kvarn_cli::token_scale_errors(exact.k, stored.k)).p99;
    f.v_scale_p99 = kvarn_cli::spread_of(kvarn_cli::token_scale_errors(exact.v, stored.v)).p99;
    if (q != nullptr)
        f.attention = kvarn_cli::relative_error(kvarn_cli::attend(*q, exact.k, exact.v, 1), kvarn_cli::attend(*q, stored.k, stored.v, 1));
    return f;
}

inline figures of_encoder(const kv_pair& exact, const std::string& format, kvarn::encoder encoder, const matrix* q = nullptr)
{
    const auto f = kvarn::parse_format(format, static_cast<int>(exact.k.channels));
    kvarn::encode_options options;
    options.encoder = encoder;
    return measure(exact, through_records(*f, exact, options), kvarn::bits_per_element(*f), q);
}

inline figures of_baseline(const kv_pair& exact, const kvarn_cli::baseline& b, const matrix* q = nullptr)
{
    kv_pair x = exact;
    kvarn_cli::round_trip(b, x.k, true);
    kvarn_cli::round_trip(b, x.v, false);
    const double bytes = kvarn_cli::bytes_per_token(b, x.k.channels, true) + kvarn_cli::bytes_per_token(b, x.v.channels, false);
    return measure(exact, x, 8 * bytes / static_cast<double>(x.k.channels + x.v.channels), q);
}

}  // namespace accuracy
