// SPDX-License-Identifier: Apache-2.0
#pragma once
// The commands quantize, dequantize and inspect. Each takes its parsed options and either does all of its work or throws
// a failure and leaves no file behind.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <kvarn/kvarn.hpp>

#include "../common/failure.hpp"
#include "../common/files.hpp"
#include "../common/npy.hpp"
#include "../common/text.hpp"
#include "codec.hpp"
#include "container.hpp"

namespace kvarn_cli {

struct codec_options {
    std::string format = "k4v2_g128";
    kvarn::record_stride stride = kvarn::record_stride::packed;
    kvarn::rotation rotation = kvarn::rotation::hadamard;  ///< none: neither K nor V, whatever the name of the format says
    int exact_channels = 0;
    bool raw = false;
    unsigned threads = 0;  ///< 0: one per core
};

struct quantize_options : codec_options {
    kvarn::encoder encoder = kvarn::encoder::refined;
    std::optional<int> iterations;
    std::string k, v, q, out;  ///< v, q empty: none given
};

struct dequantize_options : codec_options {
    kvarn::basis basis = kvarn::basis::original;
    std::optional<element_type> type;
    int heads = 0, head_dim_k = 0, head_dim_v = 0;
    std::string in, k, v;
};

[[nodiscard]] inline const char* name_of(kvarn::encoder e)
{
    return e == kvarn::encoder::paper ? "paper" : "refined";
}

/// The encoder's defaults, but for the rounds of normalisation if given.
[[nodiscard]] inline kvarn::encode_options encoding(kvarn::encoder encoder, std::optional<int> iterations)
{
    kvarn::encode_options o;
    o.encoder = encoder;
    if (iterations) o.iterations = o.refined_iterations = *iterations;
    return o;
}

/// The name without head dimensions, for example k4v2_g128 or k4v2_g128_ko.
[[nodiscard]] inline std::string name_of(const kvarn::format& f)
{
    const std::string kept = std::string(f.keys_rotated() ? "" : "ko") + (f.values_rotated() ? "" : "vo");
    return text("k%dv%d_g%d%s%s", f.key_bits(), f.value_bits(), f.group(), kept.empty() ? "" : "_", kept.c_str());
}

/// Parses a format name, then applies what the name does not say.
[[nodiscard]] inline kvarn::format make_format(const std::string& name, std::size_t head_dim_k, std::size_t head_dim_v,
                                               kvarn::rotation rotation, int exact_channels)
{
    const auto small = [](std::size_t n) { return static_cast<int>(std::min<std::size_t>(n, 1u << 20)); };
    // The name alone first, so that its errors are not mixed up with those of the sizes.
    const auto named = kvarn::parse_format(name, 128);
    check(named.error, "format " + name);
    kvarn::format_spec spec = named->spec();
    spec.head_dim_k = small(head_dim_k);
    spec.head_dim_v = spec.value_bits != 0 ? small(head_dim_v) : spec.head_dim_k;
    if (rotation == kvarn::rotation::none) spec.key_rotation = spec.value_rotation = rotation;
    spec.exact_channels = exact_channels;
    const auto made = kvarn::make_format(spec);
    check(made.error, text("format %s, head_dim %zu%s", name.c_str(), head_dim_k,
                           spec.value_bits != 0 && head_dim_v != head_dim_k ? text(" (K) and %zu (V)", head_dim_v).c_str() : ""));
    return *made;
}

/// A format as --format and --formats name it.
struct candidate {
    std::string name;
    kvarn::format format;
    bool chooses = false;  ///< each head's basis
};

inline constexpr std::string_view auto_suffix = "_auto";

[[nodiscard]] inline bool chooses_basis(const std::string& name) { return name.size() > auto_suffix.size() && name.ends_with(auto_suffix); }

/// The name without _auto.
[[nodiscard]] inline std::string plain_name(const std::string& name)
{
    return chooses_basis(name) ? name.substr(0, name.size() - auto_suffix.size()) : name;
}

[[nodiscard]] inline candidate parse_candidate(const std::string& name, std::size_t head_dim_k, std::size_t head_dim_v, kvarn::rotation rotation,
                                               int exact_channels)
{
    const auto f = make_format(plain_name(name), head_dim_k, head_dim_v, rotation, exact_channels);
    return {name_of(f) + (chooses_basis(name) ? std::string(auto_suffix) : ""), f, chooses_basis(name)};
}

[[nodiscard]] inline bool stores_values(const std::string& format_name)
{
    const auto parsed = kvarn::parse_format(plain_name(format_name), 128);
    check(parsed.error, "format " + format_name);
    return parsed->has_values();
}

/// V must fit K.
inline void require_same_shape(const tensor& k, const std::string& k_path, const tensor& v, const std::string& v_path)
{
    if (k.heads != v.heads || k.tokens != v.tokens)
        throw failure(text("%s and %s: shapes do not match: %zu heads of %zu tokens, and %zu heads of %zu tokens", k_path.c_str(),
                           v_path.c_str(), k.heads, k.tokens, v.heads, v.tokens));
    if (k.type != v.type)
        throw failure(text("%s and %s: element types do not match: %s and %s", k_path.c_str(), v_path.c_str(), name_of(k.type),
                           name_of(v.type)));
}

/// Queries must fit K: [query heads, tokens, head_dim], query heads a multiple of the KV heads.
inline void require_queries(const tensor& q, const std::string& path, const tensor& k)
{
    if (q.tokens != k.tokens || q.channels != k.channels || q.heads % k.heads != 0)
        throw failure(text("%s: shape does not match K: %zu heads of %zu tokens x %zu channels, K has %zu heads of %zu x %zu", path.c_str(), q.heads,
                           q.tokens, q.channels, k.heads, k.tokens, k.channels));
}

/// The last tokens of every head, as they are.
[[nodiscard]] inline std::vector<std::byte> tail_of(const tensor& array, std::size_t tail_tokens)
{
    std::vector<std::byte> tail;
    if (tail_tokens == 0) return tail;
    const std::size_t head_bytes = array.tokens * array.vector_bytes(), tail_bytes = tail_tokens * array.vector_bytes();
    tail.reserve(array.heads * tail_bytes);
    for (std::size_t head = 0; head < array.heads; ++head) {
        const auto end = array.data.begin() + static_cast<std::ptrdiff_t>((head + 1) * head_bytes);
        tail.insert(tail.end(), end - static_cast<std::ptrdiff_t>(tail_bytes), end);
    }
    return tail;
}

inline void quantize(quantize_options options)
{
    const bool with_values = stores_values(options.format);
    if (!with_values && options.out.empty()) std::swap(options.v, options.out);  // `K.npy OUT`
    if (options.out.empty()) throw failure("OUT is missing: format " + options.format + " needs K.npy V.npy OUT");

    const tensor k = read_npy(options.k);
    tensor v;
    if (options.exact_channels < 0 || static_cast<std::size_t>(options.exact_channels) >= k.channels)
        throw failure(text("--exact-channels %d: must be less than the %zu channels of %s", options.exact_channels, k.channels,
                           options.k.c_str()));
    if (with_values) {
        v = read_npy(options.v);
        require_same_shape(k, options.k, v, options.v);
    }
    const candidate asked = parse_candidate(options.format, k.channels - static_cast<std::size_t>(options.exact_channels), v.channels,
                                            options.rotation, options.exact_channels);
    if (asked.chooses && options.raw)
        throw failure("--raw: bare records do not say which basis each head has chosen; take a container for " + options.format);
    if (asked.chooses && options.rotation == kvarn::rotation::none)
        throw failure("--rotation none: leaves nothing to choose for " + options.format);
    tensor q;
    if (!options.q.empty()) {
        if (!asked.chooses)
            throw failure("--q: is what a basis is chosen by, and " + options.format + " does not choose; append _auto");
        q = read_npy(options.q);
        require_queries(q, options.q, k);
    }
    container c;
    c.formats = {asked.format};
    c.stride = options.stride;
    c.encoder = static_cast<std::uint8_t>(options.encoder);
    const kvarn::encode_options how = encoding(options.encoder, options.iterations);
    c.iterations = static_cast<std::uint32_t>(how.encoder == kvarn::encoder::paper ? how.iterations : how.refined_iterations);
    c.type = k.type;
    c.heads = k.heads;
    c.tokens = k.tokens;
    if (c.heads > UINT32_MAX) throw failure(options.k + ": too many heads");
    if (options.raw && c.tail_tokens() != 0)
        throw failure(text("--raw: %s has %zu tokens, which do not fill the last tile of %zu (%zu left over); bare records hold "
                           "whole tiles only",
                           options.k.c_str(), k.tokens, c.group(), c.tail_tokens()));
    container_sizes sizes;
    if (!sizes_of(c, sizes)) throw failure(options.k + ": too large");
    require_finite(k, options.k);
    if (with_values) require_finite(v, options.v);
    if (q.heads != 0) require_finite(q, options.q);

    output_file out(options.out);  // an impossible target shows before the long work
    const std::size_t whole = c.tiles() * c.group();
    const std::string names = with_values ? options.k + ", " + options.v : options.k;
    const auto run = [&]<class T>(T) {
        const auto keys = view_of<T>(k, whole);
        const auto values = with_values ? view_of<T>(v, whole) : kvarn::kv_view<const T>{};
        std::vector<kvarn::format> of_heads(c.heads, asked.format);
        if (asked.chooses)
            of_heads = q.type == element_type::float16 ? choose_formats(asked.format, keys, values, view_of<kvarn::half>(q, whole), how, names)
                                                       : choose_formats(asked.format, keys, values, view_of<float>(q, whole), how, names);
        c.formats = as_few(of_heads);
        return encode(of_heads, keys, values, c.records, c.stride, how, options.threads);
    };
    check(k.type == element_type::float16 ? run(kvarn::half{}) : run(float{}), names);

    if (options.raw) {
        out.write(transposed(c.records, c.heads, c.tiles(), c.record_bytes(0)));
        out.finish();
    } else {
        c.k_tail = tail_of(k, c.tail_tokens());
        if (with_values) c.v_tail = tail_of(v, c.tail_tokens());
        write_container(out, c);
    }
    out.commit();
}

/// Bare records: everything a container's header says comes from the options and the size of the file.
[[nodiscard]] inline container raw_container(std::vector<std::byte> file, const dequantize_options& options)
{
    if (is_container(file)) throw failure(options.in + ": is a container, not bare records; leave out --raw");
    container c;
    const int head_dim_v = options.head_dim_v != 0 ? options.head_dim_v : options.head_dim_k;
    c.formats = {make_format(options.format, static_cast<std::size_t>(options.head_dim_k), static_cast<std::size_t>(head_dim_v), options.rotation,
                             options.exact_channels)};
    c.stride = options.stride;
    c.heads = static_cast<std::size_t>(options.heads);
    std::size_t per_tile = 0;
    if (!multiply(c.heads, c.record_bytes(0), per_tile)) throw failure("--heads: too large");
    if (file.empty() || file.size() % per_tile != 0)
        throw failure(text("%s: %zu bytes are no whole number of tiles (%zu heads of %zu-byte records: %zu bytes each); "
                           "truncated, or other options are needed",
                           options.in.c_str(), file.size(), c.heads, c.record_bytes(0), per_tile));
    c.tokens = file.size() / per_tile * c.group();
    c.records = transposed(file, c.tiles(), c.heads, c.record_bytes(0));
    return c;
}

/// Copies tail tokens behind the decoded tiles and brings those of the heads that `rotated` into the basis asked for.
template <class Rotated>
void place_tail(const std::vector<std::byte>& tail, const container& c, kvarn::kv_view<float> all, int head_dim, kvarn::basis basis, Rotated rotated)
{
    std::size_t index = 0;
    for (std::size_t head = 0; head < c.heads; ++head) {
        for (std::size_t token = c.tokens - c.tail_tokens(); token < c.tokens; ++token)
            for (std::size_t channel = 0; channel < all.channels; ++channel, ++index) {
                const std::byte* from = tail.data() + index * element_bytes(c.type);
                if (c.type == element_type::float16) {
                    kvarn::half h;
                    std::memcpy(&h, from, sizeof h);
                    all.at(token, head)[channel] = kvarn::to_float(h);
                } else {
                    std::memcpy(all.at(token, head) + channel, from, sizeof(float));
                }
            }
        if (basis != kvarn::basis::rotated || !rotated(c.format_of(head))) continue;
        kvarn::kv_view<float> rotatable = kvarn::token_range(all.head(head), c.tokens - c.tail_tokens(), c.tail_tokens());
        rotatable.channels = static_cast<std::size_t>(head_dim);  // the exact channels behind head_dim are never rotated
        check(kvarn::rotate(rotatable), "tail tokens");
    }
}

inline void dequantize(const dequantize_options& options)
{
    if (!options.v.empty() && options.k == options.v) throw failure(options.k + ": K and V cannot be written to the same file");
    std::vector<std::byte> file = read_file(options.in);
    const container c = options.raw ? raw_container(std::move(file), options) : parse_container(file, options.in);
    file = {};
    const kvarn::format& shape = c.shape();
    const bool with_values = shape.has_values();
    if (with_values && options.v.empty()) throw failure("V.npy is missing: " + options.in + " holds K and V");
    if (!with_values && !options.v.empty()) throw failure(options.v + ": cannot be written: " + options.in + " holds no V");
    const element_type type = options.type.value_or(c.type);

    output_file k_out(options.k);
    std::optional<output_file> v_out;
    if (with_values) v_out.emplace(options.v);

    const auto key_channels = static_cast<std::size_t>(shape.key_channels()), value_channels = static_cast<std::size_t>(shape.head_dim_v());
    std::size_t k_elements = 0, v_elements = 0;
    if (!multiply(c.heads, c.tokens, k_elements) || !multiply(k_elements, value_channels, v_elements) ||
        !multiply(k_elements, key_channels, k_elements))
        throw failure(options.in + ": too large");
    std::vector<float> k(k_elements), v(v_elements);
    kvarn::kv_view<float> k_view = view_of(k, c.heads, c.tokens, key_channels);
    kvarn::kv_view<float> v_view = with_values ? view_of(v, c.heads, c.tokens, value_channels) : kvarn::kv_view<float>{};
    kvarn::kv_view<float> k_tiles = k_view, v_tiles = v_view;
    k_tiles.tokens = c.tiles() * c.group();
    if (with_values) v_tiles.tokens = k_tiles.tokens;
    check(decode(c.formats_of_heads(), c.records, k_tiles, v_tiles, c.stride, options.basis, options.threads), options.in);
    if (c.tail_tokens() != 0) {
        place_tail(c.k_tail, c, k_view, shape.head_dim_k(), options.basis, [](const kvarn::format& f) { return f.keys_rotated(); });
        if (with_values) place_tail(c.v_tail, c, v_view, shape.head_dim_v(), options.basis, [](const kvarn::format& f) { return f.values_rotated(); });
    }
    for (const std::vector<float>* values : {&k, &v})
        for (const float x : *values)
            if (!std::isfinite(x))
                throw failure(options.in + ": its records hold NaN or infinite scales; damaged, or other options are needed");

    write_npy(k_out, type, c.heads, c.tokens, key_channels, k);
    if (with_values) write_npy(*v_out, type, c.heads, c.tokens, value_channels, v);
    const signals_held both_or_none;
    k_out.commit();
    if (with_values) {
        try {
            v_out->commit();
        } catch (...) {
            k_out.revoke();
            throw;
        }
    }
}

/// "0-3, 6": the heads that have a format.
[[nodiscard]] inline std::string heads_with(const container& c, const kvarn::format& f)
{
    std::string out;
    for (std::size_t head = 0; head < c.heads; ++head) {
        if (!(c.format_of(head) == f)) continue;
        const std::size_t first = head;
        while (head + 1 < c.heads && c.format_of(head + 1) == f) ++head;
        out += (out.empty() ? "" : ", ") + (first == head ? text("%zu", first) : text("%zu-%zu", first, head));
    }
    return out;
}

inline void inspect(const std::string& path)
{
    const std::vector<std::byte> file = read_file(path);
    const container c = parse_container(file, path);
    const kvarn::format& shape = c.shape();
    const std::size_t channels = static_cast<std::size_t>(shape.key_channels() + shape.head_dim_v());
    const double elements = static_cast<double>(c.heads) * static_cast<double>(c.tokens) * static_cast<double>(channels);
    const std::size_t sealed = c.tiles() * c.group();
    std::string out;
    const auto row = [&out](const char* name, const std::string& value) { out += text("%-12s%s\n", name, value.c_str()); };

    row("file",
        path + ", " + grouped(file.size()) + " bytes, container version " + std::to_string(kvarn::file_version) + ", checksums ok");
    std::string dims = shape.has_values() && shape.head_dim_v() != shape.head_dim_k()
                           ? text("head_dim %d (K) and %d (V)", shape.head_dim_k(), shape.head_dim_v())
                           : text("head_dim %d", shape.head_dim_k());
    if (!shape.has_values()) dims += ", no V part";
    if (shape.exact_channels() != 0) dims += text(", %d exact channels", shape.exact_channels());
    std::vector<kvarn::format> different;
    for (const kvarn::format& f : c.formats)
        if (std::find(different.begin(), different.end(), f) == different.end()) different.push_back(f);
    for (const kvarn::format& f : different) {
        const char* const rotated = f.keys_rotated() ? f.values_rotated() ? "hadamard" : "hadamard for K, none for V"
                                                     : f.values_rotated() ? "hadamard for V, none for K" : "none";
        row(&f == different.data() ? "format" : "",
            name_of(f) + ", " + dims + ", rotation " + rotated + (different.size() == 1 ? "" : ": heads " + heads_with(c, f)));
    }
    row("encoder", (c.encoder <= static_cast<std::uint8_t>(kvarn::encoder::refined) ? std::string(name_of(static_cast<kvarn::encoder>(c.encoder)))
                                                                                    : text("number %d", int{c.encoder})) +
                       text(", %u iterations", static_cast<unsigned>(c.iterations)));
    row("tokens", text("%s per head (%s in %s tiles, %zu in the exact %s tail), %zu head%s", grouped(c.tokens).c_str(),
                       grouped(sealed).c_str(), grouped(c.tiles()).c_str(), c.tail_tokens(), name_of(c.type), c.heads,
                       c.heads == 1 ? "" : "s"));
    // The sizes of the records that there are, each once.
    std::vector<kvarn::format> sizes;
    const auto same_size = [&](const kvarn::format& a, const kvarn::format& b) { return kvarn::record_bytes(a, c.stride) == kvarn::record_bytes(b, c.stride); };
    for (const kvarn::format& f : different)
        if (std::none_of(sizes.begin(), sizes.end(), [&](const kvarn::format& g) { return same_size(f, g); })) sizes.push_back(f);
    for (const kvarn::format& f : sizes) {
        const std::size_t record = kvarn::record_bytes(f, c.stride);
        std::size_t heads = 0;
        for (std::size_t head = 0; head < c.heads; ++head) heads += c.record_bytes(head) == record ? 1u : 0u;
        row(&f == sizes.data() ? "record" : "",
            text("%s bytes (%s stride), %s records", grouped(record).c_str(), c.stride == kvarn::record_stride::packed ? "packed" : "reference",
                 grouped(c.tiles() * heads).c_str()));
        row("", text("%.2f bytes per token and head, %.4f bits per element", static_cast<double>(record) / f.group(),
                     kvarn::bits_per_element(f, c.stride)));
    }
    row("whole file", text("%.2f bytes per token and head, %.4f bits per element",
                           static_cast<double>(file.size()) / (static_cast<double>(c.heads) * static_cast<double>(c.tokens)),
                           8.0 * static_cast<double>(file.size()) / elements));
    if (c.tiles() == 0) {
        print(out);
        return;
    }

    out += text("\n%-6s%-18s%12s%12s%12s\n", "head", "scale", "min", "mean", "max");
    const auto group = c.group(), dk = static_cast<std::size_t>(shape.head_dim_k()), dv = static_cast<std::size_t>(shape.head_dim_v());
    struct field {
        const char* name;
        std::size_t offset, count;
    };
    std::size_t first = 0;
    for (std::size_t head = 0; head < c.heads; ++head) {
        const kvarn::record_layout at = kvarn::layout_of(c.format_of(head));
        std::vector<field> fields{{"K channel scale", at.k_channel_scale, dk}, {"K token scale", at.k_token_scale, group}};
        if (shape.has_values()) {
            fields.push_back({"V channel scale", at.v_channel_scale, dv});
            fields.push_back({"V token scale", at.v_token_scale, group});
        }
        for (const field& one : fields) {
            double least = INFINITY, most = -INFINITY, sum = 0;
            for (std::size_t tile = 0; tile < c.tiles(); ++tile) {
                const std::byte* record = c.records.data() + first + tile * c.record_bytes(head);
                for (std::size_t i = 0; i < one.count; ++i) {
                    kvarn::half h;
                    std::memcpy(&h, record + one.offset + 2 * i, sizeof h);
                    const double x = static_cast<double>(kvarn::to_float(h));
                    least = std::fmin(least, x);
                    most = std::fmax(most, x);
                    sum += x;
                }
            }
            out += text("%-6zu%-18s%12.5g%12.5g%12.5g\n", head, one.name, least, sum / static_cast<double>(one.count * c.tiles()), most);
        }
        first += c.tiles() * c.record_bytes(head);
    }
    print(out);
}

}  // namespace kvarn_cli
