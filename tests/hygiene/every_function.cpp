// SPDX-License-Identifier: Apache-2.0
// What a consumer's translation unit is at most: every header, and every public function template for every element type. The tests
// compile it under flags that a consumer may have (warnings.sh), and between other people's macros (hostile_macros.sh).
#define KVARN_KERNELS_FLOAT 1
#define KVARN_KERNELS_HALF 1
#define KVARN_KERNELS_BFLOAT16 1

#if defined(KVARN_EIGEN)
#include <kvarn/interop/eigen.hpp>
#endif

#include <kvarn/cache/file.hpp>
#include <kvarn/dispatch/calls.hpp>
#include <kvarn/interop/owning.hpp>
#include <kvarn/kvarn.hpp>

#include <kvarn/cuda/append.cuh>
#include <kvarn/cuda/attention.cuh>
#include <kvarn/cuda/dequantize.cuh>
#include <kvarn/cuda/seal.cuh>
#include <kvarn/cuda/support.cuh>

namespace kvarn {
KVARN_ENTRY_POINTS(template, simd::native_arch)
#if defined(KVARN_HAS_SSE2) || defined(KVARN_HAS_NEON64)
KVARN_ENTRY_POINTS(template, simd::portable)
#endif
}  // namespace kvarn

namespace consumer {

/// An engine's own 16-bit type.
struct fp16 {
    unsigned short bits;
};

}  // namespace consumer

template <>
struct kvarn::storage_of<consumer::fp16> {
    using type = kvarn::half;
};

namespace consumer {

kvarn::result<kvarn::format> formats(const char* name)
{
    kvarn::format_spec spec;
    spec.head_dim_k = spec.head_dim_v = 128;
    if (const auto made = kvarn::make_format(spec)) return kvarn::parse_format(name, made->head_dim_k());
    return kvarn::parse_format(name, 192, 128);
}

template <class T>
kvarn::status tiles(const kvarn::format& f, kvarn::kv_view<const T> k, kvarn::kv_view<T> back, kvarn::record_grid<std::byte> records)
{
    const kvarn::status sealed = kvarn::quantize_kv(f, k, k, records);
    return sealed == kvarn::status::ok ? kvarn::dequantize_kv(f, records, back, back, kvarn::basis::rotated) : sealed;
}
template kvarn::status tiles(const kvarn::format&, kvarn::kv_view<const float>, kvarn::kv_view<float>, kvarn::record_grid<std::byte>);
template kvarn::status tiles(const kvarn::format&, kvarn::kv_view<const fp16>, kvarn::kv_view<fp16>, kvarn::record_grid<std::byte>);

kvarn::status attention(const kvarn::format& f, kvarn::record_grid<std::byte> records, std::span<const fp16> q, std::span<float> out,
                        std::span<const fp16> exact, std::span<std::byte> scratch)
{
    const std::size_t d = static_cast<std::size_t>(f.head_dim_k());
    const auto tail = kvarn::head_major(exact.data(), exact.size() / d, 1, d);
    const kvarn::kv_segment history[] = {kvarn::sealed_tiles(f, records, 0), kvarn::exact_tokens(tail, tail, 0)};
    kvarn::attention_task task;
    task.history = history;
    task.q = kvarn::token_major(q.data(), 1, q.size() / d, d);
    task.out = kvarn::token_major(out.data(), 1, out.size() / d, d);
    return kvarn::dispatch([&](auto arch) { return kvarn::attend<decltype(arch)>(f, task, {}, scratch); });
}

kvarn::status dispatched(const kvarn::format& f, kvarn::kv_view<fp16> k, kvarn::kv_view<const float> x, kvarn::record_grid<std::byte> records,
                         std::span<const kvarn::attention_task> tasks, std::span<std::byte> workspace, std::span<std::byte> scratch)
{
    namespace call = kvarn::dispatched;
    const kvarn::status all[] = {call::quantize_kv(f, k, k, records, scratch),
                                 call::dequantize_kv(f, records, k, k, kvarn::basis::original, scratch),
                                 call::attend(f, tasks[0], {}, scratch),
                                 call::attend_item(f, tasks, {}, 0, 4, workspace, scratch),
                                 call::combine_items(f, tasks, {}, 0, workspace, scratch),
                                 call::convert(x, k),
                                 call::convert(tasks[0].q, tasks[0].out),
                                 call::rotate(k),
                                 call::unrotate(k)};
    for (const kvarn::status s : all)
        if (s != kvarn::status::ok) return s;
    return kvarn::status::ok;
}

double bits(const kvarn::format& f, std::size_t tokens)
{
    const kvarn::bit_rule rules[] = {{.last_layer = 0, .key_bits = 4}, {.first_layer = -1, .key_bits = 4}};
    const auto policy = kvarn::make_policy(f, 32, 8, rules);
    return policy ? kvarn::plan_sequence(*policy, tokens).bits_per_element() : 0;
}

const char* names(kvarn::status s)
{
    kvarn::for_each_arch([&](auto) { s = kvarn::select_arch("avx2"); });
    return s == kvarn::status::ok ? kvarn::active_arch_name() : kvarn::message(s);
}

/// A file in a buffer, and the statuses of reading it in every way.
kvarn::status files(std::span<std::byte> buffer, std::span<const std::byte> payload)
{
    kvarn::counting_writer counting;
    kvarn::buffer_writer writer{kvarn::buffer_sink(buffer)};
    const auto write = [payload](auto& to) {
        kvarn::status s = to.begin(kvarn::file_kind::records);
        if (s == kvarn::status::ok) s = to.chunk(kvarn::chunk_type("data"), 0, payload);
        return s == kvarn::status::ok ? to.finish() : s;
    };
    kvarn::status s = write(counting);
    if (s == kvarn::status::ok) s = write(writer);
    if (s != kvarn::status::ok || writer.bytes() != counting.bytes()) return s;
    kvarn::buffer_reader reader{kvarn::buffer_source(buffer)};
    s = reader.begin(kvarn::file_kind::records);
    for (std::uint64_t i = 0; s == kvarn::status::ok; ++i) {
        const auto head = reader.next();
        if (!head || head->is_end()) return head ? reader.at_end() : head.error;
        std::byte first[1];
        if (reader.left() != 0 && reader.read(first) != kvarn::status::ok) break;
        s = reader.left() == 0 ? reader.end_chunk() : i % 2 != 0 ? reader.skip() : reader.payload().error;
    }
    return s;
}

#if defined(KVARN_EIGEN)
template <class Matrix>
std::size_t rows(Matrix& m)
{
    const Matrix& fixed = m;
    return kvarn::view_of(m).tokens + kvarn::view_of(fixed).tokens;
}
template std::size_t rows(Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>&);
template std::size_t rows(Eigen::Matrix<Eigen::half, Eigen::Dynamic, Eigen::Dynamic>&);
#endif

/// The bodies of the CUDA kernels are templates over the threads that run them: these only have to be called.
struct team {
    int rank() const;
    int size() const;
    void barrier() const;
    void warp_barrier() const;
    template <class T>
    T shuffle_xor(T x, int mask) const;
    void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) const;
    void mma_tf32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) const;
};

kvarn::status kernels(team& t, const kvarn::format& f, const kvarn::cuda::append_arguments& append,
                      const kvarn::cuda::dequantize_arguments& dequantize, const kvarn::cuda::attention_arguments& attention,
                      float* shared)
{
    namespace body = kvarn::cuda::detail;
    const kvarn::encode_options options;
    if (!kvarn::cuda::supports(f, kvarn::cuda::operation::seal)) return kvarn::status::bad_argument;
    if (const kvarn::status s = body::check_seal(f, append.sealed, options, 0); s != kvarn::status::ok) return s;
    const body::seal_call seal = body::make_seal_call(f, append.sealed, options, 0);
    body::seal_block<true>(t, seal, 0, shared);
    body::seal_block<false>(t, seal, 0, shared);
    if (const kvarn::status s = body::check_append(f, append); s != kvarn::status::ok) return s;
    body::append_item(t, body::make_append_call(f, append), 0);
    if (const kvarn::status s = body::check_dequantize(f, dequantize); s != kvarn::status::ok) return s;
    body::dequantize_item(t, body::make_dequantize_call(f, dequantize), 0, shared);
    if (const kvarn::status s = body::check_attention(f, attention, 0); s != kvarn::status::ok) return s;
    const body::attention_call call = body::make_attention_call(f, attention);
    body::attend_item(t, call, 0, shared);
    body::combine_item(t, call, 0, shared);
    return kvarn::status::ok;
}

}  // namespace consumer
