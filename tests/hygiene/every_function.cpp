// SPDX-License-Identifier: Apache-2.0
// What a consumer's translation unit is at most: every header, and every public function template for every element type. The tests
// compile it under flags that a consumer may have (warnings.sh), and between other people's macros (hostile_macros.sh).
#define KVARN_KERNELS_FLOAT 1
#define KVARN_KERNELS_HALF 1
#define KVARN_KERNELS_BFLOAT16 1

#if defined(KVARN_EIGEN)
#include <kvarn/interop/eigen.hpp>
#endif

#include <kvarn/cache/choose.hpp>
#include <kvarn/cache/load.hpp>
#include <kvarn/cache/shift.hpp>
#include <kvarn/dispatch/cache.hpp>
#include <kvarn/dispatch/calls.hpp>
#include <kvarn/interop/owning.hpp>
#include <kvarn/kvarn.hpp>

#define KVARN_C_BUILD 1
#include <kvarn/c/implementation.hpp>
#include <kvarn/cuda/append.cuh>
#include <kvarn/cuda/attention.cuh>
#include <kvarn/cuda/dequantize.cuh>
#include <kvarn/cuda/seal.cuh>
#include <kvarn/cuda/support.cuh>

namespace kvarn {
KVARN_ENTRY_POINTS(template, simd::native_arch)
KVARN_CACHE_ENTRY_POINTS(template, simd::native_arch)
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

/// A sequence of a cache from its pool to its end, in steps that are planned as items.
kvarn::status sequences(const kvarn::cache_config& given, std::span<std::byte> memory, std::span<std::byte> scratch, kvarn::sequence_step step)
{
    const auto fitted = kvarn::fit_cache(given, memory.size());
    if (!fitted) return fitted.error;
    const kvarn::cache_config& config = *fitted;
    if (const auto plan = kvarn::plan_cache(config); !plan || plan->bytes() > memory.size()) return kvarn::status::no_room;
    const auto made = kvarn::make_pool(config, memory);
    if (!made) return made.error;
    kvarn::cache_pool pool = *made;
    const std::size_t shown[] = {kvarn::blocks_of(config, 4096, 16).exact, kvarn::cache_elements(config, 1), pool.plan().bytes(),
                                 pool.layers() * pool.heads(), kvarn::layer_memory_bound(config, 1, 8, 4), kvarn::cache_scratch_bytes(config)};
    const auto id = pool.open();
    if (!id || shown[0] == 0) return id.error;
    step.sequence = *id;
    const std::size_t path[] = {0, 2};
    const kvarn::sequence_room rooms[] = {{*id, 1}};
    std::size_t without = 0;
    if (pool.reserve(rooms, &without) != kvarn::status::ok) return without == 0 ? kvarn::status::no_room : pool.commit(*id, 0);
    kvarn::status all[] = {pool.set_format(0, 0, pool.format_of(0, 0)), pool.reserve(*id, step.q.tokens),
                           kvarn::store(pool, *id, 0, step.k, step.v),  pool.commit(*id, path),
                           pool.commit(*id, 0),                         pool.truncate(*id, 1),
                           (pool.erase)(*id, 0, 1),                       pool.evict_front(*id, 0)};
    for (const kvarn::status s : all)
        if (s != kvarn::status::ok) return s;
    const kvarn::layer_options options;
    std::size_t failed = 0;
    const auto items = kvarn::plan_layer(pool, 0, {&step, 1}, options, memory.first(kvarn::layer_memory_bytes(pool, {&step, 1}, options)), &failed);
    if (!items || items->step_of_store(0) + items->step_of_attend(0) + items->step_of_finish(0) != failed) return items.error;
    kvarn::status done = items->run(scratch);
    if (done == kvarn::status::ok) done = items->store_item(items->store_items() - 1);
    if (done == kvarn::status::ok) done = items->attend_item(items->attend_items() - 1, scratch);
    if (done == kvarn::status::ok) done = items->finish_item(items->finish_items() - 1, scratch);
    if (done == kvarn::status::ok) done = kvarn::dispatched::run(*items, scratch);
    if (done == kvarn::status::ok) done = kvarn::dispatched::store_item(*items, 0);
    if (done == kvarn::status::ok) done = kvarn::dispatched::attend_item(*items, 0, scratch);
    if (done == kvarn::status::ok) done = kvarn::dispatched::finish_item(*items, 0, scratch);
    const auto copy = pool.fork(*id);
    kvarn::kv_segment segments[4];
    const auto history = kvarn::history_of(pool, *id, 0, 0, segments);
    return !copy ? copy.error : !history ? history.error : !pool.is_open(*copy) || pool.tokens(*copy) != pool.drafts(*id) ? done : pool.close(*id);
}

/// The same sequence sealed, at other positions, read, saved and loaded.
kvarn::status saved(kvarn::cache_pool& pool, kvarn::sequence_id id, std::span<float> values, std::span<std::byte> file, std::span<std::byte> scratch)
{
    const auto queued = kvarn::begin_seal(pool, id, kvarn::ready_tiles(pool, id));
    kvarn::status s = queued ? kvarn::begin_seal_all(pool, 7).error : queued.error;
    for (std::size_t i = 0; s == kvarn::status::ok && i < kvarn::seal_items(pool); ++i)
        s = i % 2 != 0 ? kvarn::seal_item(pool, i, scratch) : kvarn::dispatched::seal_item(pool, i, scratch);
    const kvarn::seal_report report = kvarn::finish_seal(pool, kvarn::seal_items(pool));
    if (report.unfinished != 0) return kvarn::cancel_seal(pool, id) != 0 ? kvarn::status::bad_argument : s;
    if (s == kvarn::status::ok) s = report.why == kvarn::status::ok ? kvarn::seal(pool, id, scratch).error : kvarn::dispatched::seal(pool, id, scratch).error;
    const auto shifted = kvarn::shift_positions(
        pool, id, 0, 32, 7, [](std::size_t, std::size_t, kvarn::kv_view<float> keys, std::int64_t) { keys.data[0] += 1; },
        scratch.first(kvarn::shift_scratch_bytes(pool.format_of(0, 0))));
    const std::size_t tokens = kvarn::count_tokens(pool, id, 0, pool.next_position(id));
    const kvarn::output_view k = kvarn::token_major(values.data(), tokens, 1, values.size() / tokens);
    if (s == kvarn::status::ok) s = kvarn::read(pool, id, 0, 0, 0, 32, k, k, scratch.first(kvarn::read_scratch_bytes(pool.format_of(0, 0))));
    if (s == kvarn::status::ok) s = kvarn::dispatched::read(pool, id, 0, 0, 0, 32, k, k, scratch);
    if (s == kvarn::status::ok) s = kvarn::dispatched::store(pool, id, 0, k, k);
    if (s == kvarn::status::ok) s = kvarn::save(pool, id, kvarn::buffer_sink(file), {0, 1});
    if (s == kvarn::status::ok) s = kvarn::save(pool, id, [](std::span<const std::byte> piece) { return !piece.empty(); });
    kvarn::sequence_loader loader(pool);
    if (s == kvarn::status::ok) s = loader.part(kvarn::buffer_source(file), false);
    const char* differs = loader.differs();
    const auto back = loader.layers() == pool.layers() ? loader.finish() : kvarn::load(pool, kvarn::buffer_source(file), &differs);
    if (kvarn::saved_bytes(pool, id) > file.size() || !shifted || !back) return back.error;
    const auto numbers = pool.statistics(*back);
    return numbers && numbers->record_blocks == pool.statistics().records.used ? s : numbers.error;
}

/// The format of a head, from its first tile and its queries.
template <class T>
kvarn::status bases(kvarn::cache_pool& pool, kvarn::kv_view<T> x, std::span<std::uint64_t> moments, std::span<std::byte> scratch)
{
    const auto within = kvarn::format_within(pool.format_of(0, 0), 3.0);
    if (!within) return within.error;
    const kvarn::status s = kvarn::add_query_moments(*within, x, moments);
    const auto chosen = kvarn::choose_format(*within, x, x, moments, scratch.first(kvarn::choose_scratch_bytes(*within)));
    return s != kvarn::status::ok ? s : chosen ? pool.set_format(0, 0, *chosen) : chosen.error;
}
template kvarn::status bases(kvarn::cache_pool&, kvarn::kv_view<const float>, std::span<std::uint64_t>, std::span<std::byte>);
template kvarn::status bases(kvarn::cache_pool&, kvarn::kv_view<const fp16>, std::span<std::uint64_t>, std::span<std::byte>);

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
