// SPDX-License-Identifier: Apache-2.0
#pragma once
// Seals tiles on a GPU: exact tokens to records, the bytes that quantize_kv writes (docs/record-format.md). One launch for
// all tiles, heads and both parts; one thread block for a part, its tile in shared memory or, where it does not fit, in the
// caller's workspace. In: float, half or bfloat16 tokens, original basis or rotated, strided or paged. Out: records. float accumulators. No
// allocation, no synchronisation; may be captured in a graph. Thread safe.
//
// Values that are not finite, or too large for a half scalar, cannot be refused before a launch: `statuses` says it afterwards,
// and the part in question is not written.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/encode.cuh>
#include <kvarn/cuda/refine.cuh>
#include <kvarn/cuda/rotate.cuh>
#include <kvarn/cuda/support.cuh>
#include <kvarn/cuda/tokens.cuh>
#include <kvarn/layout/encode_options.hpp>
#include <kvarn/layout/record.hpp>

namespace kvarn::cuda {

/// What became of a record's two parts: ok, not_finite or scale_overflow. A part that is not ok was not written, the other one
/// was. An attention kernel must not read such a record. Tiles that were left out are ok.
struct record_status {
    status k = status::ok;
    status v = status::ok;
};

/// Shapes: k [tiles * group][heads][head_dim_k + exact_channels], v [tiles * group][heads][head_dim_v] (unused if the format has
/// no values), records [tiles][heads], statuses [tiles][heads] in device memory or null. Nothing may overlap what is written.
/// workspace: seal_workspace_bytes of device memory, 16-byte aligned, its content of no meaning, not shared with a call that may
/// run at the same time; null where none is needed.
struct seal_arguments {
    input_tiles k{}, v{};
    record_tiles<std::byte> records{};
    int tiles = 0;
    int heads = 0;
    record_status* statuses = nullptr;
    float* workspace = nullptr;
};

namespace detail {

/// Threads of a block that seals.
inline constexpr int seal_threads = 256;

/// One part as its block sees it.
struct seal_part {
    input_tiles tokens;
    int dim, bits;
    part_fields at;
    float rotation_scale;  // 0: nothing to rotate
    float safe_magnitude;  // up to here no scalar can overflow
};

/// The argument of the kernel.
struct seal_call {
    seal_part part[2];  // K, V
    record_tiles<std::byte> records;
    record_status* statuses;
    float* workspace;   // [blocks][tile_floats], or null: tiles in shared memory
    int blocks, items;  // items: [tile][head][part]
    int tile_floats;
    int heads, parts, group, group_shift, exact_channels;
    std::uint32_t exact_at, content_bytes, owned_bytes;
    int iterations, refined_iterations, most_rounds, refit_rounds, clip_steps;
    bool refined;
};

inline constexpr float hopeless_magnitude = 1e11f;  // above: no scalar can hold it, and squares may overflow

/// Tokens to the tile, the first four levels of the rotation done if asked. Returns the bits of this thread's largest
/// magnitude.
template <class T, class Team>
KVARN_DEVICE KVARN_INLINE std::uint32_t load_tile(Team& team, const input_tiles& x, int group_shift, int tile, int head, int dim,
                                                  bool rotated, const token_block& to) noexcept
{
    std::uint32_t largest = 0;
    const int group = 1 << group_shift;
    for_each(team, dim / 16 << group_shift, [&](int item) {
        const int t = item & (group - 1), d = item >> group_shift << 4;
        float v[16];
        load16(token_at<const T>(x, group, tile, t, head) + d, v);
        KVARN_UNROLL
        for (int i = 0; i < 16; ++i) largest = magnitude_bits(v[i]) > largest ? magnitude_bits(v[i]) : largest;
        if (rotated) butterflies(v);
        put16(to, t, d, v);
    });
    return largest;
}

/// The channels after head_dim_k: to the record as halves, or only their largest magnitude's bits if `to` is null.
template <class T, class Team>
KVARN_DEVICE KVARN_INLINE std::uint32_t copy_exact(Team& team, const seal_call& c, int tile, int head, half* to) noexcept
{
    std::uint32_t largest = 0;
    const int fours = c.exact_channels / 4;  // of a token
    for_each(team, c.group * fours, [&](int item) {
        const int t = item / fours, d = 4 * (item - t * fours);
        const T* const from = token_at<const T>(c.part[0].tokens, c.group, tile, t, head) + c.part[0].dim + d;
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float x = widen(from[i]);
            largest = magnitude_bits(x) > largest ? magnitude_bits(x) : largest;
            if (to != nullptr) to[4 * item + i] = narrow<half>(x);
        }
    });
    return largest;
}

/// Encodes the tile of a part, or says why not; nothing is written then. `memory`: shared, for the tile's factors.
template <class Team>
KVARN_DEVICE KVARN_INLINE status encode_part(Team& team, const seal_call& c, const seal_part& p, bool keys, const tile_view& tile,
                                             float* memory, float largest, std::uint32_t exact_bits, std::byte* record) noexcept
{
    if (largest > hopeless_magnitude) return status::scale_overflow;
    // In turn: a trial of the paper's scalars, whose overflow is refused for both encoders, as on the CPU; the refined encoder;
    // the paper's. A loop, so that the code of the normaliser is there once.
    enum { trial, refined, paper };
    for (int step = largest > p.safe_magnitude ? trial : refined; step <= paper; ++step) {
        if (step == refined) {
            if (exact_bits >= infinity_bits) return status::not_finite;
            if (bits_as<float>(exact_bits) >= half_overflow) return status::scale_overflow;
            if (!c.refined) continue;
        }
        const tile_view t = place_tile(tile.data, opaque(tile.size0), opaque(tile.size1));
        const tile_factors f = place_factors(memory, t);
        tile_unit unit;
        if (step == refined) {
            std::uint32_t most = 0;
            for_each(team, t.size0 << t.shift1, [&](int item) {
                const std::uint32_t bits = bits_as<std::uint32_t>(t.row(item >> t.shift1)[item & (t.size1 - 1)]) & 0x7fffffffu;
                most = bits > most ? bits : most;
            });
            unit = unit_of(largest_of_all(team, most, reinterpret_cast<std::uint32_t*>(f.scratch)));
        }
        normalize_variance(team, t, step == refined ? c.most_rounds : c.iterations, step == refined ? c.refined_iterations : c.iterations, unit.unit, f);
        if (step == refined) {
            team.barrier();
            if (encode_refined(team, t, f, keys, p.bits, c.refit_rounds, c.clip_steps, unit, record, p.at)) break;
        } else {
            const bool fits = find_ranges(team, t, f, p.bits);
            if (step == paper)
                store_minmax(team, t, f, p.bits, record, p.at);
            else if (!fits)
                return status::scale_overflow;
        }
        team.barrier();
    }
    return status::ok;
}

/// The body of the kernel: part `item` of [tile][head][part]. `shared`: seal_shared_bytes; `place`: the block's tile in the
/// workspace (InWorkspace); both 16-byte aligned.
template <bool InWorkspace, class Team>
KVARN_DEVICE KVARN_INLINE void seal_item(Team& team, const seal_call& c, int item, float* shared, float* place) noexcept
{
    const int which = item % c.parts, record_number = item / c.parts, head = record_number % c.heads,
              tile = record_number / c.heads;
    const bool keys = which == 0;
    const seal_part& p = c.part[which];
    std::byte* const record = record_at(c.records, tile, head);
    const auto report = [&](status s) {
        if (c.statuses == nullptr || team.rank() != 0) return;
        (keys ? c.statuses[record_number].k : c.statuses[record_number].v) = s;
        if (c.parts == 1) c.statuses[record_number].v = status::ok;
    };
    if (record == nullptr || is_left_out(p.tokens, c.group, tile)) return report(status::ok);

    float* const data = InWorkspace ? place : shared;
    const tile_view t = keys ? place_tile(data, p.dim, c.group) : place_tile(data, c.group, p.dim);
    float* const memory = InWorkspace ? shared : shared + t.size0 * t.stride;
    const token_block tokens = keys ? token_block{t.data, 1, t.stride} : token_block{t.data, t.stride, 1};
    const bool rotated = p.rotation_scale != 0.0f;
    std::uint32_t largest = 0, exact = 0;
    with_element(p.tokens.type, [&](auto element) {
        using T = decltype(element);
        largest = load_tile<T>(team, p.tokens, c.group_shift, tile, head, p.dim, rotated, tokens);
        if (keys && c.exact_channels != 0) exact = copy_exact<T>(team, c, tile, head, nullptr);
    });
    std::uint32_t* const room = reinterpret_cast<std::uint32_t*>(memory);
    largest = largest_of_all(team, largest, room);
    if (largest >= infinity_bits) return report(status::not_finite);
    if (keys && c.exact_channels != 0) exact = largest_of_all(team, exact, room);
    if (rotated) {
        finish_rotation(team, tokens, c.group, p.dim, p.rotation_scale);
        team.barrier();
    }
    const status s = encode_part(team, c, p, keys, t, memory, bits_as<float>(largest), exact, record);
    report(s);
    if (s != status::ok || !keys) return;
    if (c.exact_channels != 0)
        with_element(p.tokens.type, [&](auto element) {
            copy_exact<decltype(element)>(team, c, tile, head, reinterpret_cast<half*>(record + c.exact_at));
        });
    for_each(team, static_cast<int>(c.owned_bytes - c.content_bytes),
             [&](int i) { record[c.content_bytes + static_cast<std::uint32_t>(i)] = std::byte{0}; });
}

/// Block `block` of the launch: items block, block + c.blocks, ...
template <bool InWorkspace, class Team>
KVARN_DEVICE KVARN_INLINE void seal_block(Team& team, const seal_call& c, int block, float* shared) noexcept
{
    if constexpr (InWorkspace) {
        float* const place = c.workspace + static_cast<std::ptrdiff_t>(block) * c.tile_floats;
        for (int item = block; item < c.items; item += c.blocks) {
            seal_item<true>(team, c, item, shared, place);
            team.barrier();
        }
    } else {
        seal_item<false>(team, c, block, shared, nullptr);
    }
}

/// Everything that the kernel needs to know, from valid arguments; with less than `shared_bytes` of shared memory for a tile, it
/// goes to the workspace.
[[nodiscard]] inline seal_call make_seal_call(const format& f, const seal_arguments& a, const encode_options& o,
                                              int shared_bytes) noexcept
{
    const record_layout at = layout_of(f);
    const auto offset = [](std::size_t x) { return static_cast<std::uint32_t>(x); };
    const auto part = [&](const input_tiles& tokens, int dim, int bits, bool rotated, const part_fields& fields) {
        const float root = std::sqrt(static_cast<float>(dim > 0 ? dim : 1));
        return seal_part{
            tokens, dim, bits, fields, rotated ? hadamard_scale(dim) : 0.0f, rotated ? 48000.0f / root : 48000.0f};
    };
    seal_call c;
    c.part[0] = part(a.k, f.head_dim_k(), f.key_bits(), kvarn::detail::turns_keys(f, o),
                     {offset(at.k_codes), offset(at.k_channel_scale), offset(at.k_channel_zero), offset(at.k_token_scale)});
    c.part[1] = c.part[0];
    if (f.has_values())
        c.part[1] = part(a.v, f.head_dim_v(), f.value_bits(), kvarn::detail::turns_values(f, o),
                         {offset(at.v_codes), offset(at.v_token_scale), offset(at.v_token_zero), offset(at.v_channel_scale)});
    c.records = a.records;
    c.statuses = a.statuses;
    const bool in_workspace = seals_in_workspace(f, shared_bytes);
    c.workspace = in_workspace ? a.workspace : nullptr;
    c.heads = a.heads;
    c.parts = f.has_values() ? 2 : 1;
    c.items = a.tiles * a.heads * c.parts;
    c.blocks = seal_blocks(c.items, in_workspace);
    c.tile_floats = seal_floats_of(f).tile;
    c.group = f.group();
    c.group_shift = 0;
    while (1 << c.group_shift < c.group) ++c.group_shift;
    c.exact_channels = f.exact_channels();
    c.exact_at = offset(at.exact);
    c.content_bytes = offset(at.content_bytes);
    c.owned_bytes = a.records.record_bytes > at.content_bytes ? offset(a.records.record_bytes) : c.content_bytes;
    c.refined = o.encoder == encoder::refined;
    c.iterations = o.iterations;
    c.refined_iterations = o.refined_iterations;
    c.most_rounds = kvarn::detail::most_rounds(o);
    c.refit_rounds = o.refit_rounds;
    c.clip_steps = o.clip_steps;
    return c;
}

/// What `seal` refuses.
[[nodiscard]] inline status check_seal(const format& f, const seal_arguments& a, const encode_options& o,
                                       int shared_bytes) noexcept
{
    if (!kvarn::detail::is_valid(o)) return status::bad_argument;
    const support s = supports(f, operation::seal, shared_bytes);
    if (!s) return s.error;
    if (a.tiles < 0 || a.heads < 0) return status::bad_argument;
    if (a.tiles == 0 || a.heads == 0) return status::ok;
    if (a.heads > 0x3fffffff / a.tiles) return status::bad_argument;
    if (const status k = check_tokens(a.k, f.group()); k != status::ok) return k;
    if (f.has_values())
        if (const status v = check_tokens(a.v, f.group()); v != status::ok) return v;
    if (s.workspace && a.workspace == nullptr) return status::null_pointer;
    if (s.workspace && !is_aligned(a.workspace, 16)) return status::bad_argument;
    return check_records(f, a.records, a.tiles, a.heads);
}

#if defined(__CUDACC__)
template <bool InWorkspace, class Team>
__global__ void __launch_bounds__(seal_threads, 2) seal_kernel(const __grid_constant__ seal_call c)
{
    extern __shared__ float4 kvarn_shared[];
    Team team;
    seal_block<InWorkspace>(team, c, static_cast<int>(blockIdx.x), reinterpret_cast<float*>(kvarn_shared));
}

/// `seal` on a device that gives a block `shared_bytes` of shared memory.
[[nodiscard]] inline status launch_seal(const format& f, const seal_arguments& a, const encode_options& o, int shared_bytes,
                                        cudaStream_t stream) noexcept
{
    if (const status s = check_seal(f, a, o, shared_bytes); s != status::ok) return s;
    if (a.tiles == 0 || a.heads == 0) return status::ok;
    const seal_call call = make_seal_call(f, a, o, shared_bytes);
    const bool in_workspace = call.workspace != nullptr;
    return launch(in_workspace ? seal_kernel<true, block_team> : seal_kernel<false, block_team>, call.blocks, seal_threads,
                  seal_shared_bytes(f, in_workspace), call, stream);
}
#endif

}  // namespace detail

#if defined(__CUDACC__)
/// Seals tiles on `stream`; returns before they are done. Errors, nothing launched: those of `supports`, null_pointer (a workspace
/// that is needed too), bad_argument (options, alignment, sizes, or a launch that CUDA refused), shape_mismatch. Zero tiles are
/// fine.
[[nodiscard]] inline status seal(const format& f, const seal_arguments& a, const encode_options& options,
                                 cudaStream_t stream) noexcept
{
    return detail::launch_seal(f, a, options, detail::device_shared_bytes(), stream);
}
#endif

}  // namespace kvarn::cuda
