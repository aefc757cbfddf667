// SPDX-License-Identifier: Apache-2.0
#pragma once
// Structs of the C interface into those of the library and back. In: what a caller gave, of any size, null or wrong.
// Out: a status, and with ok a valid value. No allocation. For the other headers of c/, which are compiled once
// (c/implementation.hpp).

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include <kvarn/attention/chunk.hpp>
#include <kvarn/attention/task.hpp>
#include <kvarn/base/status.hpp>
#include <kvarn/base/view.hpp>
#include <kvarn/c/kvarn.h>
#include <kvarn/cache/choose.hpp>
#include <kvarn/cache/pool.hpp>
#include <kvarn/layout/encode_options.hpp>
#include <kvarn/layout/format.hpp>
#include <kvarn/layout/record.hpp>

namespace kvarn::c {

// The numbers of both sides are the same, and so are the structs that are not copied.
static_assert(KVARN_OK == static_cast<int>(status::ok) && KVARN_BAD_FORMAT_NAME == static_cast<int>(status::bad_format_name) &&
              KVARN_UNSUPPORTED_HEAD_DIM == static_cast<int>(status::unsupported_head_dim) &&
              KVARN_UNSUPPORTED_BITS == static_cast<int>(status::unsupported_bits) &&
              KVARN_UNSUPPORTED_GROUP == static_cast<int>(status::unsupported_group) &&
              KVARN_UNSUPPORTED_CHANNELS == static_cast<int>(status::unsupported_channels) &&
              KVARN_BAD_ARGUMENT == static_cast<int>(status::bad_argument) &&
              KVARN_NULL_POINTER == static_cast<int>(status::null_pointer) &&
              KVARN_SHAPE_MISMATCH == static_cast<int>(status::shape_mismatch) &&
              KVARN_TOKEN_COUNT_MISMATCH == static_cast<int>(status::token_count_mismatch) &&
              KVARN_BUFFER_TOO_SMALL == static_cast<int>(status::buffer_too_small) &&
              KVARN_NOT_FINITE == static_cast<int>(status::not_finite) &&
              KVARN_SCALE_OVERFLOW == static_cast<int>(status::scale_overflow) &&
              KVARN_OUT_OF_MEMORY == static_cast<int>(status::out_of_memory) &&
              KVARN_NO_ROOM == static_cast<int>(status::no_room) &&
              KVARN_SEQUENCE_FULL == static_cast<int>(status::sequence_full) &&
              KVARN_STALE_HANDLE == static_cast<int>(status::stale_handle) &&
              KVARN_TRUNCATED == static_cast<int>(status::truncated) && KVARN_CORRUPT == static_cast<int>(status::corrupt) &&
              KVARN_IO_ERROR == static_cast<int>(status::io_error) &&
              KVARN_UNSUPPORTED_VERSION == static_cast<int>(status::unsupported_version) &&
              KVARN_OTHER_CONFIGURATION == static_cast<int>(status::other_configuration));
inline constexpr int last_status = KVARN_OTHER_CONFIGURATION;
static_assert(KVARN_F32 == static_cast<int>(input_view::element_type::f32) &&
              KVARN_F16 == static_cast<int>(input_view::element_type::f16) &&
              KVARN_BF16 == static_cast<int>(input_view::element_type::bf16) && KVARN_F32 == static_cast<int>(exact_type::f32) &&
              KVARN_F16 == static_cast<int>(exact_type::f16) && KVARN_BF16 == static_cast<int>(exact_type::bf16));
static_assert(
    KVARN_BASIS_ORIGINAL == static_cast<int>(basis::original) && KVARN_BASIS_ROTATED == static_cast<int>(basis::rotated) &&
    KVARN_ROTATION_NONE == static_cast<int>(rotation::none) && KVARN_ROTATION_HADAMARD == static_cast<int>(rotation::hadamard) &&
    KVARN_ENCODER_PAPER == static_cast<int>(encoder::paper) && KVARN_ENCODER_REFINED == static_cast<int>(encoder::refined) &&
    KVARN_PRECISION_EXACT == static_cast<int>(precision::exact) && KVARN_PRECISION_FINE == static_cast<int>(precision::fine) &&
    KVARN_PRECISION_FAST == static_cast<int>(precision::fast));
static_assert(std::is_standard_layout_v<record_errors> && sizeof(kvarn_record_errors) == sizeof(record_errors) &&
              sizeof(kvarn_part_errors) == 3 * sizeof(float) && offsetof(kvarn_record_errors, v) == offsetof(record_errors, v) &&
              offsetof(kvarn_part_errors, worst_relative_error) == offsetof(part_errors, worst_relative_error) &&
              offsetof(kvarn_part_errors, relative_error) == offsetof(part_errors, relative_error));

static_assert(std::is_standard_layout_v<sequence_room> && sizeof(kvarn_sequence_room) == sizeof(sequence_room) &&
              offsetof(kvarn_sequence_room, tokens) == offsetof(sequence_room, tokens) &&
              sizeof(kvarn_sequence) == sizeof(sequence_id) &&
              offsetof(kvarn_sequence, generation) == offsetof(sequence_id, generation));

[[nodiscard]] KVARN_INLINE kvarn_status code(status s) noexcept
{
    return static_cast<kvarn_status>(s);
}

// --- structs that begin with their size ----------------------------------------------------------------------------

/// What a struct is where nothing is said: the defaults of its _INIT.
template <class T>
struct initial;
#define KVARN_C_INITIAL(type, INIT)                                                                                              \
    template <>                                                                                                                  \
    struct initial<type> {                                                                                                       \
        KVARN_INLINE static type make() noexcept                                                                                 \
        {                                                                                                                        \
            type made = INIT;                                                                                                    \
            return made;                                                                                                         \
        }                                                                                                                        \
    };
KVARN_C_INITIAL(kvarn_format, KVARN_FORMAT_INIT)
KVARN_C_INITIAL(kvarn_record_layout, KVARN_RECORD_LAYOUT_INIT)
KVARN_C_INITIAL(kvarn_support, KVARN_SUPPORT_INIT)
KVARN_C_INITIAL(kvarn_encode_options, KVARN_ENCODE_OPTIONS_INIT)
KVARN_C_INITIAL(kvarn_segment, KVARN_SEGMENT_INIT)
KVARN_C_INITIAL(kvarn_attention_task, KVARN_ATTENTION_TASK_INIT)
KVARN_C_INITIAL(kvarn_attention_options, KVARN_ATTENTION_OPTIONS_INIT)
KVARN_C_INITIAL(kvarn_choose_options, KVARN_CHOOSE_OPTIONS_INIT)
KVARN_C_INITIAL(kvarn_bit_rule, KVARN_BIT_RULE_INIT)
KVARN_C_INITIAL(kvarn_cache_config, KVARN_CACHE_CONFIG_INIT)
KVARN_C_INITIAL(kvarn_cache_plan, KVARN_CACHE_PLAN_INIT)
KVARN_C_INITIAL(kvarn_sequence_plan, KVARN_SEQUENCE_PLAN_INIT)
KVARN_C_INITIAL(kvarn_pool_statistics, KVARN_POOL_STATISTICS_INIT)
KVARN_C_INITIAL(kvarn_sequence_statistics, KVARN_SEQUENCE_STATISTICS_INIT)
KVARN_C_INITIAL(kvarn_seal_report, KVARN_SEAL_REPORT_INIT)
KVARN_C_INITIAL(kvarn_step, KVARN_STEP_INIT)
KVARN_C_INITIAL(kvarn_layer_options, KVARN_LAYER_OPTIONS_INIT)
KVARN_C_INITIAL(kvarn_shift_report, KVARN_SHIFT_REPORT_INIT)
#undef KVARN_C_INITIAL

/// Nothing that begins with a size will be larger; what says so was never made by its _INIT.
inline constexpr std::size_t largest_struct = 4096;

/// The size that a struct of the caller says it has; 0: none that a struct can have.
[[nodiscard]] KVARN_INLINE std::size_t size_of(const void* given) noexcept
{
    std::size_t size = 0;
    std::memcpy(&size, given, sizeof size);
    return size < sizeof size || size > largest_struct || size % sizeof size != 0 ? 0 : size;
}

/// A struct of the caller with all fields that this library knows.
template <class T>
[[nodiscard]] KVARN_INLINE status take(const void* given, T& full) noexcept
{
    full = initial<T>::make();
    if (given == nullptr) return status::null_pointer;
    const std::size_t size = size_of(given);
    if (size == 0) return status::bad_argument;
    for (std::size_t i = sizeof(T); i < size; ++i)
        if (static_cast<const unsigned char*>(given)[i] != 0) return status::bad_argument;
    std::memcpy(&full, given, size < sizeof(T) ? size : sizeof(T));
    full.size = sizeof(T);
    return status::ok;
}

/// The same, where null means the defaults.
template <class T>
[[nodiscard]] KVARN_INLINE status take_or_default(const void* given, T& full) noexcept
{
    if (given != nullptr) return take(given, full);
    full = initial<T>::make();
    return status::ok;
}

/// Whether give() will succeed: asked before anything is done.
template <class T>
[[nodiscard]] KVARN_INLINE status can_give(const T* to) noexcept
{
    return to == nullptr ? status::null_pointer : size_of(to) == 0 ? status::bad_argument : status::ok;
}

/// Fills a struct of the caller; fields that this library does not know become zero.
template <class T>
KVARN_INLINE void give(const T& full, T* to) noexcept
{
    const std::size_t size = size_of(to);
    std::memcpy(to, &full, size < sizeof(T) ? size : sizeof(T));
    if (size > sizeof(T)) std::memset(reinterpret_cast<unsigned char*>(to) + sizeof(T), 0, size - sizeof(T));
    std::memcpy(to, &size, sizeof size);
}

/// A report may be left out.
template <class T>
[[nodiscard]] KVARN_INLINE status can_report(const T* to) noexcept
{
    return to == nullptr ? status::ok : can_give(to);
}

/// An array of structs of one size.
template <class T>
struct array_of {
    const T* data;
    std::size_t count;

    [[nodiscard]] KVARN_INLINE status sound() const noexcept
    {
        if (count == 0) return status::ok;
        if (data == nullptr) return status::null_pointer;
        const std::size_t size = size_of(data);
        return size == 0 || count > SIZE_MAX / 2 / size ? status::bad_argument : status::ok;
    }
    /// After sound(): element i, where i < count.
    [[nodiscard]] KVARN_INLINE status at(std::size_t i, T& full) const noexcept
    {
        const std::size_t size = size_of(data);
        const void* const element = reinterpret_cast<const unsigned char*>(data) + i * size;
        return size_of(element) != size ? status::bad_argument : take(element, full);
    }
};

// --- values --------------------------------------------------------------------------------------------------------

/// An enumerator 0 ... last.
template <class E>
[[nodiscard]] KVARN_INLINE status enumerator(std::int32_t given, E last, E& value) noexcept
{
    if (given < 0 || given > static_cast<std::int32_t>(last)) return status::bad_argument;
    value = static_cast<E>(given);
    return status::ok;
}
[[nodiscard]] KVARN_INLINE status to_basis(std::int32_t given, basis& value) noexcept
{
    return enumerator(given, basis::rotated, value);
}

[[nodiscard]] KVARN_INLINE bool is_flag(std::int32_t x) noexcept
{
    return x == 0 || x == 1;
}

/// A view that is read, or one that is written; null: one without data.
template <bool Const>
[[nodiscard]] KVARN_INLINE status to_view(const kvarn_view* given, any_view<Const>& view) noexcept
{
    using kind = typename any_view<Const>::element_type;
    view = any_view<Const>();
    if (given == nullptr) return status::ok;
    if (given->type < KVARN_F32 || given->type > KVARN_BF16 || given->reserved != 0) return status::bad_argument;
    view.data = given->data;
    view.type = static_cast<kind>(given->type);
    view.tokens = given->tokens;
    view.heads = given->heads;
    view.channels = given->channels;
    view.token_stride = given->token_stride;
    view.head_stride = given->head_stride;
    view.channel_stride = given->channel_stride;
    return status::ok;
}

/// As elements of a type known to the compiler.
template <class T, bool Const>
[[nodiscard]] KVARN_INLINE kv_view<T> typed(const any_view<Const>& x) noexcept
{
    return {static_cast<T*>(x.data), x.tokens, x.heads, x.channels, x.token_stride, x.head_stride, x.channel_stride};
}

/// Calls f with the type of `x` as std::type_identity.
template <bool Const, class F>
KVARN_INLINE auto with_type(const any_view<Const>& x, F&& f) noexcept
{
    using kind = typename any_view<Const>::element_type;
    if (x.type == kind::f32) return f(std::type_identity<float>{});
    if (x.type == kind::f16) return f(std::type_identity<half>{});
    return f(std::type_identity<bfloat16>{});
}

/// K and V of one call have one type, where both are there.
[[nodiscard]] KVARN_INLINE status same_type(const void* k, int k_type, const void* v, int v_type) noexcept
{
    return k != nullptr && v != nullptr && k_type != v_type ? status::bad_argument : status::ok;
}

[[nodiscard]] KVARN_INLINE std::span<std::byte> bytes_at(void* data, std::size_t bytes) noexcept
{
    return {static_cast<std::byte*>(data), data != nullptr ? bytes : 0};
}

[[nodiscard]] KVARN_INLINE status to_format(const kvarn_format* given, format& f) noexcept
{
    kvarn_format full;
    if (const status s = take(given, full); s != status::ok) return s;
    format_spec spec;
    spec.head_dim_k = full.head_dim_k;
    spec.head_dim_v = full.head_dim_v;
    spec.key_bits = full.key_bits;
    spec.value_bits = full.value_bits;
    spec.group = full.group;
    spec.exact_channels = full.exact_channels;
    if (const status s = enumerator(full.key_rotation, rotation::hadamard, spec.key_rotation); s != status::ok) return s;
    if (const status s = enumerator(full.value_rotation, rotation::hadamard, spec.value_rotation); s != status::ok) return s;
    const auto made = make_format(spec);
    if (!made) return made.error;
    f = *made;
    return status::ok;
}

KVARN_INLINE void give_format(const format& f, kvarn_format* to) noexcept
{
    const format_spec& spec = f.spec();
    kvarn_format full = initial<kvarn_format>::make();
    full.head_dim_k = spec.head_dim_k;
    full.head_dim_v = spec.head_dim_v;
    full.key_bits = spec.key_bits;
    full.value_bits = spec.value_bits;
    full.group = spec.group;
    full.key_rotation = static_cast<std::int32_t>(spec.key_rotation);
    full.value_rotation = static_cast<std::int32_t>(spec.value_rotation);
    full.exact_channels = spec.exact_channels;
    give(full, to);
}

[[nodiscard]] KVARN_INLINE status to_encode_options(const kvarn_encode_options* given, encode_options& o) noexcept
{
    kvarn_encode_options full;
    if (const status s = take_or_default(given, full); s != status::ok) return s;
    if (full.reserved != 0) return status::bad_argument;
    o.iterations = full.iterations;
    o.refined_iterations = full.refined_iterations;
    o.refit_rounds = full.refit_rounds;
    o.clip_steps = full.clip_steps;
    if (const status s = enumerator(full.encoder, encoder::refined, o.encoder); s != status::ok) return s;
    if (const status s = to_basis(full.key_basis, o.key_basis); s != status::ok) return s;
    if (const status s = to_basis(full.value_basis, o.value_basis); s != status::ok) return s;
    return detail::is_valid(o) ? status::ok : status::bad_argument;
}

[[nodiscard]] KVARN_INLINE status to_choose_options(const kvarn_choose_options* given, choose_options& o) noexcept
{
    kvarn_choose_options full;
    if (const status s = take_or_default(given, full); s != status::ok) return s;
    o.margin = full.margin;
    o.value_margin = full.value_margin;
    o.most_key_error = full.most_key_error;
    o.most_value_error = full.most_value_error;
    return to_encode_options(full.encode, o.encode);
}

[[nodiscard]] KVARN_INLINE status to_attention_options(const kvarn_attention_options* given, attention_options& o) noexcept
{
    kvarn_attention_options full;
    if (const status s = take_or_default(given, full); s != status::ok) return s;
    if (!is_flag(full.causal) || full.reserved != 0) return status::bad_argument;
    o.fast_bound = full.fast_bound;
    o.softmax_scale = full.softmax_scale;
    o.logit_soft_cap = full.logit_soft_cap;
    o.window = full.window;
    o.causal = full.causal != 0;
    if (const status s = to_basis(full.query_basis, o.query_basis); s != status::ok) return s;
    if (const status s = to_basis(full.output_basis, o.output_basis); s != status::ok) return s;
    if (const status s = enumerator(full.precision, precision::fast, o.precision); s != status::ok) return s;
    return detail::check_options(o);
}

[[nodiscard]] KVARN_INLINE record_grid<std::byte> to_grid(const kvarn_records& r) noexcept
{
    return {static_cast<std::byte*>(r.data), r.bytes, r.tiles, r.heads, r.tile_stride, r.head_stride, r.record_bytes};
}

}  // namespace kvarn::c
