// SPDX-License-Identifier: Apache-2.0
// The reader of saved sequences (kvarn/cache/load.hpp). In: a setup, and either a file, which is read as it is and once more with its checksums
// made right, or what spans a file is made of, right ones and wrong ones, which are then damaged. Read in a buffer, in pieces, and by layers: all
// say the same. A refused file leaves the pool as it was. An accepted one is saved to the same bytes, and its sequence can be read, attended to, cut,
// forked, sealed, turned and closed, after which all blocks are free. Nothing outside of the pool's memory and of the buffers is touched.

#include <algorithm>
#include <cstring>
#include <vector>

#include <kvarn/cache/load.hpp>
#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/shift.hpp>
#include <kvarn/cache/tasks.hpp>

#include "kernels.hpp"
#include "saved_files.hpp"
#include "tests/support/repair_file.hpp"

namespace {

using fuzz::require;
using kvarn::sequence_id;
using kvarn::status;
using file_bytes = std::vector<std::byte>;

bool same_counts(const kvarn::pool_statistics& a, const kvarn::pool_statistics& b)
{
    const auto same = [](const kvarn::block_usage& x, const kvarn::block_usage& y) { return x.used == y.used && x.free == y.free && x.shared == y.shared; };
    return same(a.records, b.records) && same(a.exact, b.exact) && a.bytes_used == b.bytes_used && a.sequences == b.sequences;
}

/// Counts of holders, stacks of unused blocks and links agree with each other.
void require_consistent(const kvarn::cache_pool& pool)
{
    const auto& s = pool.state();
    for (const auto* list : {&s.blocks.records, &s.blocks.exact}) {
        std::uint32_t used = 0, shared = 0;
        for (std::uint32_t i = 0; i < list->total; ++i) {
            used += list->holders[i] != 0;
            shared += list->holders[i] > 1;
            require(list->holders[i] != 0 || list->link[i] == kvarn::detail::no_block, "a free block has no link");
        }
        require(list->free == list->total - used && list->shared == shared, "blocks are counted right");
        std::vector<bool> seen(list->total);
        for (std::uint32_t i = 0; i < list->free; ++i) {
            const std::int32_t block = list->unused[i];
            require(block >= 0 && block < static_cast<std::int32_t>(list->total) && !seen[static_cast<std::size_t>(block)] && list->holders[block] == 0,
                    "each unused block is there once");
            seen[static_cast<std::size_t>(block)] = true;
        }
    }
}

file_bytes saved(const kvarn::cache_pool& pool, sequence_id id, kvarn::layer_range layers = {})
{
    file_bytes file;
    const status said = kvarn::save(pool, id, [&](std::span<const std::byte> piece) {
        file.insert(file.end(), piece.begin(), piece.end());
        return true;
    }, layers);
    require(said == status::ok && file.size() == kvarn::saved_bytes(pool, id, layers), "a loaded sequence can be saved");
    return file;
}

/// Gives pieces of sizes that `seed` chooses.
struct piece_source {
    std::span<const std::byte> rest;
    fuzz::random_source random;
    std::size_t most;

    piece_source(std::span<const std::byte> file, unsigned seed) : rest(file), random(seed), most(std::size_t{1} << seed % 13) {}
    std::size_t operator()(std::span<std::byte> to)
    {
        const std::size_t n = std::min({to.size(), 1 + static_cast<std::size_t>(random.bits()) % most, rest.size()});
        if (n != 0) std::memcpy(to.data(), rest.data(), n);
        rest = rest.subspan(n);
        return n;
    }
};

class case_of_file {
public:
    case_of_file(unsigned setup, unsigned pieces, bool tame)
        : config_(saved_files::config_of(setup)), pieces_(pieces), tame_(tame), memory_(kvarn::plan_cache(config_)->bytes(), pieces % 64, 0xff),
          scratch_(std::max(kvarn::cache_scratch_bytes(config_), kvarn::shift_scratch_bytes(config_.policy.base())), 3, 0xff)
    {
        const auto made = kvarn::make_pool(config_, memory_.span());
        require(made.ok(), "the pool is made");
        pool_ = *made;
        const auto other = pool_.open();
        require(other.ok() && pool_.reserve(*other, 3) == status::ok, "another sequence has its place");
        before_ = pool_.statistics();
    }

    [[nodiscard]] const kvarn::cache_pool& pool() const { return pool_; }

    /// What reading says, and all that must be so. `in`: what is then done with the sequence.
    status read(const file_bytes& content, fuzz::source in)
    {
        fuzz::memory file(content.size(), 1, 0);
        if (!content.empty()) std::memcpy(file.data(), content.data(), content.size());
        const char* differs = nullptr;
        const auto whole = kvarn::load(pool_, kvarn::buffer_source(file.span()), &differs);
        require((whole.error == status::other_configuration) == (differs != nullptr), "what differs is said where it is that");
        if (whole) {
            require(saved(pool_, *whole) == content, "an accepted file is saved byte for byte");
            use(*whole, in);
        }
        finish(whole.error);

        const auto streamed = kvarn::load(pool_, piece_source(file.span(), pieces_));
        require(streamed.error == whole.error, "a file in pieces is what it is in one");
        if (streamed) {
            require(saved(pool_, *streamed) == content, "and saved byte for byte too");
            require(pool_.close(*streamed) == status::ok, "a loaded sequence is closed");
        }
        finish(streamed.error);

        const status by_layers = read_by_layers(content, file.span());
        require(!whole || by_layers == status::ok, "a whole file is one part");
        finish(by_layers);
        return by_layers;
    }

private:
    /// Two files, one behind the other, or one.
    status read_by_layers(const file_bytes& content, std::span<const std::byte> file)
    {
        piece_source source(file, pieces_ + 1);
        kvarn::sequence_loader loader(pool_);
        std::size_t first = 0;
        for (int i = 0; i < 2 && loader.layers() != pool_.layers(); ++i) {
            const status said = loader.part(source, false);
            if (said != status::ok) return said;
            if (i == 0) first = loader.layers();
        }
        if (!source.rest.empty()) return status::corrupt;
        const auto id = loader.finish();
        if (!id) return id.error;
        file_bytes again = saved(pool_, *id, {0, first});
        if (first != pool_.layers()) {
            const file_bytes rest = saved(pool_, *id, {first});
            again.insert(again.end(), rest.begin(), rest.end());
        }
        require(again == content, "parts are saved byte for byte");
        require(pool_.close(*id) == status::ok, "a sequence of parts is closed");
        return status::ok;
    }

    void finish(status said)
    {
        switch (said) {
        case status::ok:
        case status::bad_argument:
        case status::corrupt:
        case status::truncated:
        case status::unsupported_version:
        case status::other_configuration:
        case status::no_room:
        case status::sequence_full: break;
        default: require(false, "the status is one of load()");
        }
        require(same_counts(pool_.statistics(), before_), "all blocks are free again");
        require_consistent(pool_);
        memory_.require_intact();
        scratch_.require_intact();
    }

    /// Values that are finite can be read and sealed; of others there must be a status.
    void require_done(status said, const char* property) const { require(said == status::ok || (!tame_ && said == status::not_finite), property); }

    void read_all(sequence_id id)
    {
        for (std::size_t layer = 0; layer < pool_.layers(); ++layer)
            for (std::size_t head = 0; head < pool_.heads(); ++head) {
                const kvarn::format& f = pool_.format_of(layer, head);
                const auto dk = static_cast<std::size_t>(f.key_channels()), dv = static_cast<std::size_t>(f.head_dim_v());
                const std::size_t n = kvarn::count_tokens(pool_, id, 0, INT64_MAX);
                require(n == pool_.tokens(id), "all committed tokens have a position");
                fuzz::memory out((dk + dv) * n * sizeof(float), 0, 0);
                float* const at = reinterpret_cast<float*>(out.bytes());
                const auto k = kvarn::token_major(at, n, 1, dk), v = dv != 0 ? kvarn::token_major(at + dk * n, n, 1, dv) : kvarn::kv_view<float>{};
                require_done(kvarn::read(pool_, id, layer, head, 0, INT64_MAX, k, v, scratch_.span()), "a loaded sequence can be read");
                out.require_intact();
            }
    }

    void attend(sequence_id id, fuzz::source& in)
    {
        constexpr std::size_t group_heads = 2;
        const std::size_t m = std::min<std::size_t>(pool_.tokens(id), 1 + in.below(3));
        if (m == 0) return;
        const std::size_t heads = pool_.heads() * group_heads, dim = 32;
        const float slopes[4] = {1, 0.5f, 0.25f, 0.125f};
        std::vector<float> q(m * heads * dim);
        fuzz::random_source random(in.take<std::uint16_t>());
        for (float& x : q) x = random.normal();
        fuzz::memory out(m * heads * dim * sizeof(float), 0, 0);
        kvarn::sequence_step step;
        step.sequence = id;
        step.q = kvarn::token_major<const float>(q.data(), m, heads, dim);
        step.out = kvarn::token_major(reinterpret_cast<float*>(out.bytes()), m, heads, dim);
        if (in.flag()) step.alibi_slopes = slopes;
        kvarn::layer_options options;
        options.attention.window = in.pick<std::int64_t>({0, 1, 40, INT64_MAX});
        options.threads = in.pick<std::size_t>({1, 8});
        options.rows_per_task = in.pick<std::size_t>({32, 2});
        const std::size_t bytes = kvarn::layer_memory_bytes(pool_, {&step, 1}, options);
        require(bytes <= kvarn::layer_memory_bound(config_, 1, m * group_heads, group_heads, options), "a step takes no more than its bound");
        fuzz::memory work(bytes, 5, 0xff);
        const auto items = kvarn::plan_layer(pool_, in.below(2), {&step, 1}, options, work.span());
        require(items.ok(), "a step over a loaded sequence can be planned");
        require_done(items->run(scratch_.span()), "a loaded sequence can be attended to");
        work.require_intact();
        out.require_intact();
    }

    void append(sequence_id id, std::size_t tokens)
    {
        const status said = pool_.reserve(id, tokens);
        require(said == status::ok || said == status::no_room || said == status::sequence_full, "a loaded sequence goes on where there is room");
        if (said != status::ok) return;
        const std::size_t heads = pool_.heads();
        std::vector<float> x(tokens * heads * 32, 0.25f);
        const auto view = kvarn::token_major<const float>(x.data(), tokens, heads, 32);
        for (std::size_t layer = 0; layer < pool_.layers(); ++layer)
            require(kvarn::store(pool_, id, layer, view, pool_.format_of(0, 0).has_values() ? kvarn::input_view(view) : kvarn::input_view{}) == status::ok,
                    "drafts are stored");
        require(pool_.commit(id, tokens) == status::ok, "drafts are committed");
    }

    void seal(sequence_id id)
    {
        const auto report = kvarn::seal(pool_, id, scratch_.span());
        require(report.ok() || report.error == status::no_room, "a loaded sequence can be sealed");
        if (report.ok()) require(!tame_ || report->kept_exact == 0 || report->why == status::scale_overflow, "finite tiles are sealed");
    }

    /// Everything that can be done with a sequence is done with a fork of it; the sequence itself stays.
    void use(sequence_id id, fuzz::source& in)
    {
        const file_bytes file = saved(pool_, id);
        read_all(id);
        attend(id, in);
        const std::size_t kept_before = pool_.statistics().tiles_kept_not_finite + pool_.statistics().tiles_kept_overflowed;
        const auto made = pool_.fork(id);
        require(made.ok(), "a loaded sequence can be forked");
        const sequence_id fork = *made;
        for (std::size_t i = 0, n = in.below(5); i < n; ++i) {
            const std::int64_t end = pool_.next_position(fork);
            const std::int64_t at = end - static_cast<std::int64_t>(in.below(200)), to = at + static_cast<std::int64_t>(in.below(100));
            status said = status::ok;
            switch (in.take() % 8) {
            case 0: said = pool_.truncate(fork, at); break;
            case 1: said = pool_.erase(fork, at, to); break;
            case 2: said = pool_.evict_front(fork, in.below(60)); break;
            case 3: append(fork, 1 + in.below(50)); break;
            case 4: seal(fork); break;
            case 5: {
                const auto turned = kvarn::shift_positions(pool_, fork, at, to, static_cast<std::int64_t>(in.below(64)) - 32,
                                                           [](std::size_t, std::size_t, kvarn::kv_view<float> keys, std::int64_t) {
                    for (std::size_t t = 0; t < keys.tokens; ++t)
                        for (std::size_t c = 0; c < keys.channels; c += 2) std::swap(keys.at(t, 0)[c], keys.at(t, 0)[c + 1]);
                }, scratch_.span());
                said = turned.error;
                if (said == status::scale_overflow || (!tame_ && said == status::not_finite)) said = status::ok;
                break;
            }
            case 6: attend(fork, in); break;
            default: {
                const auto back = kvarn::load(pool_, kvarn::buffer_source(saved(pool_, fork)));
                said = back.error;
                if (back) require(saved(pool_, *back) == saved(pool_, fork) && pool_.close(*back) == status::ok, "a fork is saved and loaded");
            }
            }
            require(said == status::ok || said == status::bad_argument || said == status::no_room || said == status::sequence_full,
                    "an operation on a loaded sequence says what it may");
        }
        require_consistent(pool_);
        read_all(fork);
        // That a shared tile cannot be sealed is known to all who hold it.
        const auto now = pool_.statistics();
        const bool kept = now.tiles_kept_not_finite + now.tiles_kept_overflowed != kept_before;
        require(pool_.close(fork) == status::ok && (kept || saved(pool_, id) == file), "forks do not change a loaded sequence");
        seal(id);
        require(pool_.close(id) == status::ok && !pool_.is_open(id), "a loaded sequence is closed");
    }

    kvarn::cache_config config_;
    unsigned pieces_;
    bool tame_;
    fuzz::memory memory_, scratch_;
    kvarn::cache_pool pool_;
    kvarn::pool_statistics before_{};
};

/// The second of two files that follow each other is made right too.
void repair(file_bytes& file)
{
    support::repair_file(file);
    std::size_t end = kvarn::file_header_bytes;
    while (file.size() >= end + kvarn::detail::head_bytes + 8) {
        const bool last = kvarn::get_u32(file.data() + end) == kvarn::end_chunk_type;
        const std::uint64_t bytes = kvarn::get_u64(file.data() + end + 16);
        if (bytes > file.size() - end - kvarn::detail::head_bytes - 8) return;
        end += kvarn::detail::head_bytes + static_cast<std::size_t>(bytes) + 8;
        if (!last) continue;
        file_bytes second(file.begin() + static_cast<std::ptrdiff_t>(end), file.end());
        support::repair_file(second);
        std::copy(second.begin(), second.end(), file.begin() + static_cast<std::ptrdiff_t>(end));
        return;
    }
}

/// Another value: near to this one, a small one, or anything.
template <class Integer>
Integer another(fuzz::source& in, Integer value)
{
    const unsigned how = in.take();
    switch (how % 8) {
    case 0: return in.take<Integer>();
    case 1: return static_cast<Integer>(value + 1);
    case 2: return static_cast<Integer>(value - 1);
    case 3: return static_cast<Integer>(how >> 3 & 3);
    default: return static_cast<Integer>(value ^ Integer{1} << in.take() % (8 * sizeof value));
    }
}

/// Spans as a sequence may have them; one field in sixteen is another. Says whether none is.
bool draw(fuzz::source& in, saved_files::contents& x)
{
    bool right = true;
    const auto field = [&](auto& value) {
        if (!in.one_in(16)) return;
        const auto before = value;
        value = another(in, value);
        right = right && value == before;
    };
    x.seed = in.take<std::uint16_t>();
    x.tame = in.take() % 4 != 0;
    const std::uint64_t largest = static_cast<std::uint64_t>(kvarn::detail::largest_position);
    x.first_position = in.pick<std::uint64_t>({0, 0, 17, 1000, largest - 90, largest});
    std::uint64_t position = x.first_position;
    const std::size_t spans = in.below(11);
    for (std::size_t i = 0; i < spans; ++i) {
        saved_files::file_span s;
        const unsigned how = in.take();
        const saved_files::file_span* const last = i != 0 ? &x.spans.back() : nullptr;
        const bool again = (how & 3) == 0 && last != nullptr && last->first + last->count < 32;
        s.flags = static_cast<std::uint16_t>(how >> 2 & 1);
        if (s.flags == 0) s.flags = static_cast<std::uint16_t>(how >> 2 & saved_files::sink_flag);
        if (s.flags == 0 && (how & 0x70) == 0x70) s.kept = how >> 7 != 0 ? kvarn::detail::kept_not_finite : kvarn::detail::kept_overflowed;
        if (again) {
            s.flags = static_cast<std::uint16_t>((last->flags & saved_files::sealed_flag) | (s.flags & ~saved_files::sealed_flag) | saved_files::same_block_flag);
            if ((s.flags & saved_files::sealed_flag) != 0) s.flags &= static_cast<std::uint16_t>(~saved_files::sink_flag);
            s.kept = last->kept;
        }
        const auto from = again ? static_cast<std::size_t>(last->first + last->count) : 0;
        s.first = static_cast<std::uint16_t>(from + in.below(32 - from) * ((how & 8) != 0));
        s.count = static_cast<std::uint16_t>((how & 0x80) != 0 ? 32 - s.first : 1 + in.below(static_cast<std::size_t>(32 - s.first)));
        s.position = position += (how & 16) != 0 ? in.take() : 0u;
        x.committed += s.count;
        position += s.count;
        field(s.position);
        field(s.first);
        field(s.count);
        field(s.flags);
        field(s.kept);
        x.spans.push_back(s);
    }
    x.count = spans;
    x.next_position = position + in.below(2) * in.take();
    for (std::uint64_t* value : {&x.first_position, &x.next_position, &x.committed, &x.count, &x.first_layer, &x.layers}) field(*value);
    return right;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    fuzz::source in(data, size);
    const unsigned setup = in.take(), pieces = in.take();
    if ((setup & 0x80) == 0) {
        const auto rest = std::as_bytes(in.rest());
        file_bytes file(rest.begin(), rest.end());
        const fuzz::source operations(data, size / 2);
        case_of_file(setup, pieces, false).read(file, operations);
        repair(file);
        case_of_file(setup, pieces, false).read(file, operations);
        return 0;
    }
    saved_files::contents x;
    bool right = draw(in, x);
    const std::size_t damages = in.one_in(4) ? in.below(4) : 0;
    case_of_file test(setup, pieces, x.tame && damages == 0);
    file_bytes file;
    if ((setup & 0x40) == 0) {
        file = saved_files::make(test.pool(), x);
    } else {
        if (x.layers == 2) x.layers = 1;
        file = saved_files::make(test.pool(), x);
        x.first_layer += x.layers;
        if (!x.spans.empty() && in.one_in(8)) {  // other spans than in the first file
            saved_files::file_span& span = x.spans[in.below(x.spans.size())];
            const saved_files::file_span before = span;
            switch (in.take() % 5) {
            case 0: span.position = another(in, span.position); break;
            case 1: span.first = another(in, span.first); break;
            case 2: span.count = another(in, span.count); break;
            case 3: span.flags = another(in, span.flags); break;
            default: span.kept = another(in, span.kept);
            }
            right = right && span == before;
        }
        const file_bytes second = saved_files::make(test.pool(), x);
        file.insert(file.end(), second.begin(), second.end());
    }
    for (std::size_t i = 0; i < damages; ++i) {
        file[in.below(file.size())] = static_cast<std::byte>(in.take());
        right = false;
    }
    repair(file);
    const status said = test.read(file, in);
    require(!right || said == status::ok || said == status::no_room || said == status::sequence_full, "a right file is accepted");
    return 0;
}
