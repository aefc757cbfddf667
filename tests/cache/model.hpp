// SPDX-License-Identifier: Apache-2.0
#pragma once
// A naive model of the cache core, run beside it. It keeps of every sequence the list of its tokens, each with its position, exact values and
// block, and of every record block the records that it has made itself of its own exact values; what is used, shared and free is counted anew
// from those lists each time. An operation says of both what became of it, and throws a mismatch where they differ.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <kvarn/cache/load.hpp>
#include <kvarn/kvarn.hpp>

#include "../support/guarded_cache.hpp"
#include "../support/random_source.hpp"

namespace cache_model {

using kvarn::status;

enum class action : std::uint8_t {
    open,      ///< other: where it begins
    close,
    fork,      ///< other: the new one, or the next that is closed
    reserve,   ///< a tokens
    store,     ///< b drafts from draft a on, of a layer and head or all: other
    complete,  ///< stores what is missing
    commit,    ///< a tokens
    path,      ///< commits drafts here and there
    step,      ///< reserve, complete, commit: a tokens; opens the sequence before, ends one that is full
    truncate,  ///< at a
    erase,     ///< b tokens from a on
    evict,     ///< a tokens
    queue,     ///< begin_seal of up to a tiles
    work,      ///< some seal_items, finish_seal of some
    seal,      ///< up to a tiles
    read,      ///< b positions from a on
    attend,    ///< a layer of all sequences
    save,      ///< and load; other: the new one. Sometimes damaged in between
    poison,    ///< what nobody may read
    compare,   ///< all contents
    batch,     ///< reserve for some sequences together
    collect,   ///< begin_seal_all of up to a tiles
    count
};

inline constexpr const char* action_names[] = {"open",  "close", "fork", "reserve", "store", "complete", "commit", "path",   "step",
                                               "truncate", "erase", "evict", "queue", "work", "seal",     "read",   "attend", "save", "poison", "compare", "batch", "collect"};
static_assert(std::size(action_names) == static_cast<std::size_t>(action::count));

struct operation {
    action what{};
    std::uint8_t who = 0, other = 0;
    std::uint16_t a = 0, b = 0;
    std::uint32_t seed = 0;
};

/// A small cache: few blocks and spans, so that they run out often.
inline support::cache_setup setup_of(std::uint64_t seed)
{
    support::random_source random(seed);
    support::cache_setup x;
    kvarn::format_spec spec;
    spec.group = 32;
    spec.head_dim_k = spec.head_dim_v = 32;
    spec.key_bits = spec.value_bits = 2;
    const std::size_t kind = random.below(16);
    if (kind == 0) spec.value_bits = 0;
    if (kind == 1) spec.exact_channels = 4;
    if (kind == 2) spec.head_dim_v = 64;
    if (kind == 3) spec.head_dim_k = 36, spec.key_rotation = kvarn::rotation::none;
    if (kind == 4) spec.group = 64;
    x.base = *kvarn::make_format(spec);
    x.layers = 1 + static_cast<int>(random.below(2));
    x.heads = 1 + static_cast<int>(random.below(2));
    if (random.below(2) != 0) x.rules.push_back({.first_layer = -1, .key_bits = 4, .value_bits = kind == 0 ? kvarn::bit_rule::unchanged : 4});
    if (random.below(4) == 0) x.rules.push_back({.first_head = -1, .key_bits = 8});
    if (random.below(4) == 0) x.rules.push_back({.last_layer = 0, .key_rotation = kvarn::rotation::none});
    if (random.below(4) == 0) x.rules.push_back({.last_layer = 0, .value_rotation = kvarn::rotation::none});
    auto& c = x.config;
    c.exact = random.pick({kvarn::exact_type::f16, kvarn::exact_type::f16, kvarn::exact_type::f32, kvarn::exact_type::bf16});
    if (random.below(8) == 0) c.key_basis = kvarn::basis::rotated;
    if (random.below(8) == 0) c.value_basis = kvarn::basis::rotated;
    c.sink_tokens = random.pick<std::size_t>({0, 0, 32, 20, 64});
    c.recent_tokens = random.pick<std::size_t>({0, 0, 1, 32, 40, 100});
    c.sequences = 1 + random.below(4);
    c.most_tokens = 60 + random.below(400);
    c.record_blocks = 1 + random.below(24);
    c.exact_blocks = 2 + random.below(24);
    c.most_spans = random.below(3) == 0 ? 0 : 3 + random.below(20);
    c.encode.encoder = kvarn::encoder::paper;
    c.encode.iterations = 1;
    if (random.below(16) == 0) c.encode = {};
    return x;
}

/// What came up in a script: a test that never gets there says nothing.
struct coverage {
    std::size_t committed = 0, refused = 0, sealed = 0, linked = 0, kept = 0, dropped = 0, copied = 0, split = 0, attended = 0, attended_parts = 0,
                loaded = 0, batches = 0, batches_refused = 0, collected = 0;

    coverage& operator+=(const coverage& x)
    {
        committed += x.committed, refused += x.refused, sealed += x.sealed, linked += x.linked, kept += x.kept, dropped += x.dropped;
        copied += x.copied, split += x.split, attended += x.attended, attended_parts += x.attended_parts, loaded += x.loaded;
        batches += x.batches, batches_refused += x.batches_refused, collected += x.collected;
        return *this;
    }
};

struct mismatch : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// The place of a tile. Identity is what counts: numbers are never used again.
struct block {
    std::uint64_t number = 0;
    bool sealed = false;
    status kept = status::ok;            // of an exact block: what sealing it has said
    unsigned changes = 0;                // of an exact block: how often its tokens became others
    std::uint64_t made_from = 0;         // of a record block: the exact block's number,
    unsigned made_from_changes = 0;      // and state
    std::vector<std::vector<std::byte>> records{};  // [layer * heads + head]
    std::size_t holders = 0;
};
using block_ref = std::shared_ptr<block>;

/// One token: bytes of the exact type, [layer * heads + head], K then V.
struct token_values {
    std::vector<std::byte> bytes;
    bool finite = true;
};

struct token {
    std::int64_t position = 0;
    std::shared_ptr<token_values> values;
    block_ref where;
    std::size_t place = 0;  // in the block
    bool sink = false;
};

struct sequence {
    bool open = false;
    kvarn::sequence_id id{};
    std::uint64_t number = 0;
    std::int64_t first_position = 0, next_position = 0;
    std::vector<token> tokens;  // drafts included
    std::size_t drafts = 0;
    std::vector<std::size_t> stored;  // [layer * heads + head]

    [[nodiscard]] std::size_t committed() const { return tokens.size() - drafts; }
};

/// Neighbours in a sequence and in a block.
struct run {
    std::size_t at = 0;  // of the first token in the sequence
    std::size_t count = 0;
};

struct job {
    block_ref exact, record;
    std::vector<std::shared_ptr<token_values>> tile;
    std::uint64_t sequence = 0;
    kvarn::sequence_id id{};
    std::int64_t position = 0;
    std::vector<bool> done;  // [layer * heads + head]
};

class machine {
public:
    explicit machine(std::uint64_t setup)
        : cache_(setup_of(setup), setup % 64), config_(cache_.config()), layers_(cache_.pool().layers()), heads_(cache_.pool().heads()),
          group_(cache_.group()), key_bytes_(static_cast<std::size_t>(base().key_channels()) * kvarn::element_bytes(config_.exact)),
          value_bytes_(static_cast<std::size_t>(base().head_dim_v()) * kvarn::element_bytes(config_.exact)), sequences_(config_.sequences + 1)
    {
        scratch_.resize(kvarn::cache_scratch_bytes(config_, 64));
    }

    void execute(const operation& o)
    {
        sequence& q = o.who % 32 == 31 ? sequences_[o.who / 32 % sequences_.size()] : open_from(o.who);
        switch (o.what) {
        case action::open: open(closed_from(o.who), o); break;
        case action::close: close(q); break;
        case action::fork: fork(q, closed_from(o.other)); break;
        case action::reserve: reserve(q, o.a % 5 == 0 ? o.a % 300u : o.a % 24u); break;
        case action::store: store(q, o); break;
        case action::complete: complete(q, o.seed); break;
        case action::commit: commit(q, o.a % (q.drafts + 2)); break;
        case action::path: commit_path(q, o); break;
        case action::step:
            if (!q.open && o.b % 8 != 0) open(q, o);
            if (reserve(q, o.a % 4 == 0 ? 1u : o.a % 50u) == status::ok) {
                complete(q, o.seed);
                commit(q, q.drafts);
            } else if (q.open && o.b % 4 == 0) {
                close(q);  // full: make room
            }
            break;
        case action::truncate: truncate(q, o); break;
        case action::erase: erase(q, o); break;
        case action::evict: evict(q, o.a % 4 == 0 ? o.a % (q.tokens.size() + 2) : o.a % 40u); break;
        case action::queue: queue(q, o.a % 3 == 0 ? SIZE_MAX : o.a % 4u); break;
        case action::work: work(o); break;
        case action::seal: seal(q, o.a % 2 == 0 ? SIZE_MAX : o.a % 4u); break;
        case action::read: read(q, o); break;
        case action::attend: attend(o); break;
        case action::save: save(q, closed_from(o.other), o); break;
        case action::poison: cache_.poison(); break;
        case action::compare: compare_contents(); break;
        case action::batch: reserve_batch(o); break;
        case action::collect: collect(o.a % 2 == 0 ? SIZE_MAX : o.a % 6u); break;
        case action::count: break;
        }
        compare_numbers();
    }

    /// Everything is compared once more, closed, and gone.
    void finish()
    {
        cache_.poison();
        compare_contents();
        for (std::size_t layer = 0; layer < layers_; ++layer) attend({action::attend, 0, 0, static_cast<std::uint16_t>(layer), 0, 1});
        for (sequence& q : sequences_)
            if (q.open) close(q);
        // What is queued has no sequence any more.
        work({action::work, 0, 0, 65535, 65535, 0});
        compare_numbers();
        const auto n = cache_.pool().statistics();
        expect(n.records.used == 0 && n.exact.used == 0 && n.records.shared == 0 && n.exact.shared == 0 && n.sequences == 0,
               "everything is free after all is closed");
        expect(cache_.intact(), "nothing is written outside of the pool's memory and scratch");
    }

    [[nodiscard]] const coverage& seen() const { return seen_; }

private:
    [[nodiscard]] const kvarn::format& base() const { return cache_base_; }
    [[nodiscard]] std::size_t places() const { return layers_ * heads_; }
    [[nodiscard]] const kvarn::format& format_of(std::size_t place) { return cache_.pool().format_of(place / heads_, place % heads_); }

    static void expect(bool holds, const std::string& what)
    {
        if (!holds) throw mismatch(what);
    }
    template <class T>
    static void expect_equal(const T& got, const T& wanted, const char* what)
    {
        if (got == wanted) return;
        throw mismatch(std::string(what) + ": " + std::to_string(got) + ", not " + std::to_string(wanted));
    }
    status expect_status(status got, status wanted, const char* what)
    {
        if (got != wanted) throw mismatch(std::string(what) + " says \"" + kvarn::message(got) + "\", not \"" + kvarn::message(wanted) + "\"");
        seen_.refused += wanted == status::no_room || wanted == status::sequence_full;
        return got;
    }

    // --- counting, from nothing each time

    [[nodiscard]] std::vector<run> runs_of(const sequence& q) const
    {
        std::vector<run> runs;
        for (std::size_t i = 0; i < q.tokens.size(); ++i) {
            const token& t = q.tokens[i];
            if (i != 0) {
                const token& before = q.tokens[i - 1];
                if (before.where == t.where && before.place + 1 == t.place && before.position + 1 == t.position) {
                    ++runs.back().count;
                    continue;
                }
            }
            runs.push_back({i, 1});
        }
        return runs;
    }

    struct usage {
        std::size_t records = 0, shared_records = 0, exact = 0, shared_exact = 0;
    };
    /// Sets `holders` of all blocks.
    usage recount()
    {
        for (const sequence& q : sequences_)
            for (const token& t : q.tokens) t.where->holders = 0;
        for (const job& j : jobs_) j.exact->holders = j.record->holders = 0;
        usage n;
        const auto hold = [&](block& b) {
            std::size_t& used = b.sealed ? n.records : n.exact;
            std::size_t& shared = b.sealed ? n.shared_records : n.shared_exact;
            ++b.holders;
            used += b.holders == 1;
            shared += b.holders == 2;
        };
        for (const sequence& q : sequences_)
            for (const run& r : runs_of(q)) hold(*q.tokens[r.at].where);
        for (const job& j : jobs_) {
            hold(*j.exact);
            hold(*j.record);
        }
        return n;
    }
    [[nodiscard]] std::size_t free_records() { return config_.record_blocks - recount().records; }
    [[nodiscard]] std::size_t free_exact() { return config_.exact_blocks - recount().exact; }

    [[nodiscard]] block_ref new_block(bool sealed)
    {
        auto b = std::make_shared<block>();
        b->number = ++block_number_;
        b->sealed = sealed;
        return b;
    }
    [[nodiscard]] std::size_t open_sequences() const
    {
        return static_cast<std::size_t>(std::count_if(sequences_.begin(), sequences_.end(), [](const sequence& q) { return q.open; }));
    }

    // --- operations

    /// There is always one: there are more names than the pool has sequences.
    [[nodiscard]] sequence& closed_from(std::size_t i)
    {
        while (sequences_[i % sequences_.size()].open) ++i;
        return sequences_[i % sequences_.size()];
    }
    /// Any, where none is open.
    [[nodiscard]] sequence& open_from(std::size_t i)
    {
        for (std::size_t n = 0; n < sequences_.size() && !sequences_[i % sequences_.size()].open; ++n) ++i;
        return sequences_[i % sequences_.size()];
    }
    void open(sequence& q, const operation& o)
    {
        static constexpr std::int64_t firsts[] = {0, 0, 0, 7, 32, 1000, std::int64_t{1} << 60, -1};
        const std::int64_t first = firsts[o.other % std::size(firsts)];
        const auto got = cache_.pool().open(first);
        const status wanted = first < 0 ? status::bad_argument : open_sequences() == config_.sequences ? status::no_room : status::ok;
        if (expect_status(got.error, wanted, "open") != status::ok) return;
        begin(q, *got, first);
    }
    void begin(sequence& q, kvarn::sequence_id id, std::int64_t first)
    {
        for (const sequence& other : sequences_) expect(!(other.id == id), "a handle is given once");
        q = {};
        q.open = true;
        q.id = id;
        q.number = ++sequence_number_;
        q.first_position = q.next_position = first;
        q.stored.assign(places(), 0);
    }
    void close(sequence& q)
    {
        if (expect_status(cache_.pool().close(q.id), q.open ? status::ok : status::stale_handle, "close") != status::ok) return;
        const auto id = q.id;
        q = {};
        q.id = id;  // stale from now on
    }
    void fork(sequence& q, sequence& to)
    {
        if (&q == &to) return;  // closed
        const auto got = cache_.pool().fork(q.id);
        const status wanted = !q.open                                    ? status::stale_handle
                              : q.drafts != 0                            ? status::bad_argument
                              : open_sequences() == config_.sequences ? status::no_room
                                                                         : status::ok;
        if (expect_status(got.error, wanted, "fork") != status::ok) return;
        begin(to, *got, q.first_position);
        to.next_position = q.next_position;
        to.tokens = q.tokens;
    }

    [[nodiscard]] bool is_full(const sequence& q, std::size_t n) const
    {
        if (n == 0) return false;
        if (q.tokens.size() + n > config_.most_tokens || q.next_position > std::int64_t{1} << 60) return true;
        const std::size_t left = room_behind(q), more = n > left ? (n - left + group_ - 1) / group_ : 0;
        return runs_of(q).size() + more > config_.most_spans;
    }
    status reserve(sequence& q, std::size_t n)
    {
        const status wanted = !q.open ? status::stale_handle : is_full(q, n) ? status::sequence_full : take_room(q, n);
        return expect_status(cache_.pool().reserve(q.id, n), wanted, "reserve");
    }
    /// Only of the model: the drafts of an open sequence that is not full.
    status take_room(sequence& q, std::size_t n)
    {
        if (n == 0) return status::ok;
        const std::size_t unused = free_exact();  // and counts holders
        const std::size_t room = room_behind(q), more = n > room ? (n - room + group_ - 1) / group_ : 0;
        if (more + (room != 0 && q.tokens.back().where->holders > 1) > unused) return status::no_room;
        const std::size_t left = room_behind(q);
        if (left != 0) {
            static_cast<void>(recount());
            const block_ref last = q.tokens.back().where;
            if (last->holders > 1) {
                const block_ref copy = new_block(false);
                ++seen_.copied;
                for (std::size_t i = runs_of(q).back().at; i < q.tokens.size(); ++i) q.tokens[i].where = copy;
            } else {
                ++last->changes;
                last->kept = status::ok;
            }
        }
        const std::int64_t sink_end = q.first_position + static_cast<std::int64_t>(config_.sink_tokens);
        for (std::size_t i = 0; i < n; ++i) {
            token t;
            t.position = q.next_position++;
            t.values = std::make_shared<token_values>();
            if (i < left) {
                t.where = q.tokens.back().where;
                t.place = q.tokens.back().place + 1;
                t.sink = q.tokens.back().sink;
            } else {
                t.place = (i - left) % group_;
                t.where = t.place == 0 ? new_block(false) : q.tokens.back().where;
                t.sink = t.place == 0 ? t.position < sink_end : q.tokens.back().sink;
            }
            q.tokens.push_back(t);
        }
        q.drafts += n;
        return status::ok;
    }
    /// Some sequences, in any order: what they take together is what they take one after the other, on a copy.
    void reserve_batch(const operation& o)
    {
        support::random_source random(o.seed);
        std::vector<sequence*> names;
        for (sequence& q : sequences_)
            if (q.open ? random.below(4) != 0 : random.below(16) == 0) names.push_back(&q);
        for (std::size_t i = names.size(); i > 1; --i) std::swap(names[i - 1], names[random.below(i)]);
        if (!names.empty() && random.below(16) == 0) names.push_back(names[random.below(names.size())]);
        std::vector<kvarn::sequence_room> batch;
        for (const sequence* const q : names) batch.push_back({q->id, random.below(4) == 0 ? o.a % 300u : random.below(20)});

        std::vector<sequence> before(sequences_);
        std::vector<std::pair<block_ref, block>> blocks;  // a block that grows is another one
        for (const sequence& q : sequences_)
            if (!q.tokens.empty()) blocks.emplace_back(q.tokens.back().where, *q.tokens.back().where);
        const std::size_t copied = seen_.copied;
        status wanted = status::ok;
        std::size_t at = 0;
        const auto first_error = [&](auto&& says) {
            for (at = 0; at < names.size() && wanted == status::ok; ++at) wanted = says(*names[at], batch[at].tokens, at);
        };
        first_error([&](const sequence& q, std::size_t n, std::size_t i) {
            if (!q.open) return status::stale_handle;
            if (std::find(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(i), &q) != names.begin() + static_cast<std::ptrdiff_t>(i))
                return status::bad_argument;
            return is_full(q, n) ? status::sequence_full : status::ok;
        });
        if (wanted == status::ok) first_error([&](sequence& q, std::size_t n, std::size_t) { return take_room(q, n); });
        if (wanted != status::ok) {
            sequences_ = before;
            for (auto& [where, was] : blocks) *where = was;
            seen_.copied = copied;
        }
        std::size_t failed = SIZE_MAX;
        if (expect_status(cache_.pool().reserve(batch, &failed), wanted, "reserve for a batch") != status::ok)
            expect_equal(failed, at - 1, "the one that has no room");
        seen_.batches += wanted == status::ok && batch.size() > 1;
        seen_.batches_refused += wanted == status::no_room && at > 1;
    }
    /// Places behind the last token in its block, where the next one goes on.
    [[nodiscard]] std::size_t room_behind(const sequence& q) const
    {
        if (q.tokens.empty()) return 0;
        const token& last = q.tokens.back();
        return last.where->sealed || last.position + 1 != q.next_position ? 0 : group_ - 1 - last.place;
    }

    /// Values of a draft in one layer and head, as floats: K then V.
    void make_values(std::vector<float>& x, std::uint32_t seed, std::size_t draft, std::size_t place) const
    {
        x.resize((key_bytes_ + value_bytes_) / kvarn::element_bytes(config_.exact));
        support::fill_values(x, (std::uint64_t{seed} << 24) + draft * 64 + place);
        const std::uint32_t kind = seed % 32;
        if (kind == 0 && draft % 16 == 3) x[seed / 32 % x.size()] = std::bit_cast<float>(seed / 32 % 2 == 0 ? 0x7fc00000u : 0xff800000u);
        if (kind == 1 && draft % 8 == 1) std::fill(x.begin(), x.end(), 65504.0f);
        if (kind == 2) std::fill(x.begin(), x.end(), static_cast<float>(seed / 32 % 3) - 1.0f);
        if (kind == 3)
            for (float& each : x) each *= 300.0f;
    }
    [[nodiscard]] static float rounded(kvarn::exact_type type, float x, std::byte* to)
    {
        if (type == kvarn::exact_type::f32) {
            std::memcpy(to, &x, 4);
            return x;
        }
        if (type == kvarn::exact_type::f16) {
            const auto h = kvarn::saturate_to<kvarn::half>(x);
            std::memcpy(to, &h, 2);
            return kvarn::to_float(h);
        }
        const auto b = kvarn::to_bfloat16(x);
        std::memcpy(to, &b, 2);
        return kvarn::to_float(b);
    }

    /// Drafts [first, first + count) of one layer and heads [head, head + heads).
    status store_range(sequence& q, std::size_t layer, std::size_t head, std::size_t heads, std::size_t first, std::size_t count, std::uint32_t seed)
    {
        const std::size_t dk = static_cast<std::size_t>(base().key_channels()), dv = static_cast<std::size_t>(base().head_dim_v());
        std::vector<float> k(count * heads * dk), v(count * heads * dv), one;
        for (std::size_t t = 0; t < count; ++t)
            for (std::size_t h = 0; h < heads; ++h) {
                make_values(one, seed, first + t, layer * heads_ + head + h);
                std::copy_n(one.begin(), dk, k.begin() + static_cast<std::ptrdiff_t>((t * heads + h) * dk));
                std::copy_n(one.begin() + static_cast<std::ptrdiff_t>(dk), dv, v.begin() + static_cast<std::ptrdiff_t>((t * heads + h) * dv));
            }
        const kvarn::input_view keys = kvarn::token_major<const float>(k.data(), count, heads, dk),
                                vals = dv != 0 ? kvarn::input_view(kvarn::token_major<const float>(v.data(), count, heads, dv)) : kvarn::input_view{};
        status wanted = status::ok;
        if (!q.open) wanted = status::stale_handle;
        else if (first + count > q.drafts) wanted = status::bad_argument;
        else if (count != 0)
            for (std::size_t h = 0; h < heads; ++h)
                if (q.stored[layer * heads_ + head + h] < first) wanted = status::bad_argument;
        if (expect_status(kvarn::store(cache_.pool(), q.id, layer, keys, vals, first, head), wanted, "store") != status::ok || count == 0) return wanted;
        const std::size_t each = key_bytes_ + value_bytes_, element = kvarn::element_bytes(config_.exact);
        for (std::size_t h = 0; h < heads; ++h) {
            const std::size_t place = layer * heads_ + head + h;
            for (std::size_t t = 0; t < count; ++t) {
                token_values& to = *q.tokens[q.committed() + first + t].values;
                to.bytes.resize(each * places());
                make_values(one, seed, first + t, place);
                bool finite = true;
                for (std::size_t c = 0; c < one.size(); ++c)
                    finite = std::isfinite(rounded(config_.exact, one[c], to.bytes.data() + place * each + c * element)) && finite;
                if (!finite) to.finite = false;  // for good: values that are stored again are rare enough
            }
            q.stored[place] = std::max(q.stored[place], first + count);
        }
        return wanted;
    }
    void store(sequence& q, const operation& o)
    {
        const std::size_t first = o.a % (q.drafts + 2), rest = q.drafts > first ? q.drafts - first : 0;
        const std::size_t count = o.b % 8 == 0 ? o.b % 40u : o.b % (rest + 1);
        const std::size_t choice = o.other % (places() + layers_);
        if (choice < places()) static_cast<void>(store_range(q, choice / heads_, choice % heads_, 1, first, count, o.seed));
        else static_cast<void>(store_range(q, choice - places(), 0, heads_, first, count, o.seed));
    }
    void complete(sequence& q, std::uint32_t seed)
    {
        if (!q.open) return;
        for (std::size_t layer = 0; layer < layers_; ++layer) {
            const std::size_t* const stored = &q.stored[layer * heads_];
            if (std::all_of(stored, stored + heads_, [&](std::size_t n) { return n == stored[0]; })) {
                static_cast<void>(store_range(q, layer, 0, heads_, stored[0], q.drafts - stored[0], seed));
                continue;
            }
            for (std::size_t h = 0; h < heads_; ++h) static_cast<void>(store_range(q, layer, h, 1, stored[h], q.drafts - stored[h], seed));
        }
    }
    void drop_drafts(sequence& q, std::size_t from)
    {
        q.next_position -= static_cast<std::int64_t>(q.drafts - from);
        q.tokens.resize(q.tokens.size() - (q.drafts - from));
        q.drafts = 0;
        q.stored.assign(places(), 0);
    }
    void commit(sequence& q, std::size_t n)
    {
        status wanted = !q.open ? status::stale_handle : n > q.drafts ? status::bad_argument : status::ok;
        if (wanted == status::ok)
            for (const std::size_t stored : q.stored)
                if (stored < n) wanted = status::bad_argument;
        if (expect_status(cache_.pool().commit(q.id, n), wanted, "commit") != status::ok) return;
        seen_.committed += n;
        drop_drafts(q, n);
    }
    void commit_path(sequence& q, const operation& o)
    {
        support::random_source random(o.seed);
        std::vector<std::size_t> path;
        const std::size_t skip = 1 + random.below(3);
        for (std::size_t draft = random.below(skip); draft < q.drafts + (o.b % 16 == 0); draft += 1 + random.below(skip)) path.push_back(draft);
        if (o.b % 16 == 1 && path.size() > 1) std::swap(path[0], path[1]);
        status wanted = q.open ? status::ok : status::stale_handle;
        for (std::size_t i = 0; q.open && i < path.size(); ++i)
            if (path[i] >= q.drafts || (i != 0 && path[i] <= path[i - 1]) ||
                std::any_of(q.stored.begin(), q.stored.end(), [&](std::size_t stored) { return stored <= path[i]; }))
                wanted = status::bad_argument;
        if (expect_status(cache_.pool().commit(q.id, std::span<const std::size_t>(path)), wanted, "commit of a path") != status::ok) return;
        for (std::size_t i = 0; i < path.size(); ++i) q.tokens[q.committed() + i].values = q.tokens[q.committed() + path[i]].values;
        seen_.committed += path.size();
        drop_drafts(q, path.size());
    }
    void truncate(sequence& q, const operation& o)
    {
        const auto extent = static_cast<std::uint64_t>(q.next_position - q.first_position);
        std::int64_t at = q.first_position - 1 + static_cast<std::int64_t>(o.a % (extent + 3));
        const std::size_t close_by = o.b % 8 == 0 ? extent : o.b % 8 < 3 ? 100 : 12;  // mostly what a rejected draft takes back
        if (extent > close_by) at = q.next_position - static_cast<std::int64_t>(o.a % close_by);
        const status wanted = !q.open ? status::stale_handle : at < q.first_position ? status::bad_argument : status::ok;
        if (expect_status(cache_.pool().truncate(q.id, at), wanted, "truncate") != status::ok) return;
        drop_drafts(q, 0);
        while (!q.tokens.empty() && q.tokens.back().position >= at) q.tokens.pop_back();
        q.next_position = std::min(q.next_position, at);
    }
    /// Says sequence_full without changing anything where a span would become two and there is no place for it.
    status remove(sequence& q, std::int64_t begin, std::int64_t end)
    {
        sequence after = q;
        std::erase_if(after.tokens, [&](const token& t) { return t.position >= begin && t.position < end; });
        if (runs_of(after).size() > config_.most_spans) return status::sequence_full;
        seen_.split += runs_of(after).size() > runs_of(q).size();
        q.tokens = after.tokens;
        return status::ok;
    }
    void erase(sequence& q, const operation& o)
    {
        const auto extent = static_cast<std::uint64_t>(q.next_position - q.first_position);
        const std::int64_t begin = q.first_position - 2 + static_cast<std::int64_t>(o.a % (extent + 4)), end = begin + o.b % 50 - (o.b % 16 == 0 ? 20 : 0);
        const auto got = cache_.pool().erase(q.id, begin, end);
        const status wanted = !q.open ? status::stale_handle : end < begin || q.drafts != 0 ? status::bad_argument : remove(q, begin, end);
        static_cast<void>(expect_status(got, wanted, "erase"));
    }
    void evict(sequence& q, std::size_t n)
    {
        const std::int64_t sink_end = q.first_position + static_cast<std::int64_t>(config_.sink_tokens);
        const auto got = cache_.pool().evict_front(q.id, n);
        status wanted = !q.open ? status::stale_handle : q.drafts != 0 ? status::bad_argument : status::ok;
        if (wanted == status::ok && n != 0) {
            wanted = status::bad_argument;
            std::size_t found = 0;
            for (const token& t : q.tokens)
                if (t.position >= sink_end && ++found == n) {
                    wanted = remove(q, sink_end, t.position + 1);
                    break;
                }
        }
        static_cast<void>(expect_status(got, wanted, "evict_front"));
    }

    // --- sealing

    /// The record block that was made from the tokens that an exact block has now, if it is alive.
    [[nodiscard]] block_ref record_of(const block& exact) const
    {
        for (const sequence& q : sequences_)
            for (const token& t : q.tokens)
                if (t.where->sealed && t.where->made_from == exact.number && t.where->made_from_changes == exact.changes) return t.where;
        return nullptr;
    }
    [[nodiscard]] bool is_queued(const block_ref& exact) const
    {
        return std::any_of(jobs_.begin(), jobs_.end(), [&](const job& j) { return j.exact == exact; });
    }
    /// First tokens of the tiles that are ready.
    [[nodiscard]] std::vector<std::size_t> ready(const sequence& q) const
    {
        std::vector<std::size_t> tiles;
        for (const run& r : runs_of(q)) {
            if (r.at + r.count + config_.recent_tokens > q.committed()) break;
            const token& t = q.tokens[r.at];
            if (!t.where->sealed && !t.sink && r.count == group_ && t.where->kept == status::ok && !is_queued(t.where)) tiles.push_back(r.at);
        }
        return tiles;
    }
    void put(sequence& q, std::size_t at, const block_ref& record)
    {
        for (std::size_t i = at; i < at + group_; ++i) q.tokens[i].where = record;
    }
    [[nodiscard]] std::vector<std::shared_ptr<token_values>> tile_of(const sequence& q, std::size_t at) const
    {
        std::vector<std::shared_ptr<token_values>> tile;
        for (std::size_t i = at; i < at + group_; ++i) tile.push_back(q.tokens[i].values);
        return tile;
    }

    template <class T>
    status encode(std::size_t place, const std::vector<std::shared_ptr<token_values>>& tile, std::vector<std::byte>& record)
    {
        const kvarn::format& f = format_of(place);
        const std::size_t dk = key_bytes_ / sizeof(T), dv = value_bytes_ / sizeof(T), each = key_bytes_ + value_bytes_;
        std::vector<T> k(group_ * dk), v(group_ * dv);
        for (std::size_t t = 0; t < group_; ++t) {
            std::memcpy(k.data() + t * dk, tile[t]->bytes.data() + place * each, key_bytes_);
            if (dv != 0) std::memcpy(v.data() + t * dv, tile[t]->bytes.data() + place * each + key_bytes_, value_bytes_);
        }
        record.assign(kvarn::record_bytes(f), std::byte{0xee});
        const kvarn::record_grid<std::byte> grid{record.data(), record.size(), 1, 1, record.size(), record.size(), record.size()};
        kvarn::encode_options options = config_.encode;
        options.key_basis = config_.key_basis;
        options.value_basis = config_.value_basis;
        const auto values = dv != 0 ? kvarn::token_major<const T>(v.data(), group_, 1, dv) : kvarn::kv_view<const T>{};
        return kvarn::quantize_kv(f, kvarn::token_major<const T>(k.data(), group_, 1, dk), values, grid, std::span(scratch_), options);
    }
    struct encoded {
        status said = status::ok;
        std::size_t place = 0;
        std::vector<std::vector<std::byte>> records;
    };
    [[nodiscard]] encoded encode_tile(const std::vector<std::shared_ptr<token_values>>& tile)
    {
        encoded made;
        made.records.resize(places());
        for (; made.place < places(); ++made.place) {
            auto& record = made.records[made.place];
            made.said = config_.exact == kvarn::exact_type::f32   ? encode<float>(made.place, tile, record)
                        : config_.exact == kvarn::exact_type::f16 ? encode<kvarn::half>(made.place, tile, record)
                                                                  : encode<kvarn::bfloat16>(made.place, tile, record);
            if (made.said != status::ok) return made;
        }
        return made;
    }

    /// Takes tiles as the queue does. Each taken one is given to `body`. The status: no_room where there is none for the first.
    template <class F>
    std::pair<std::size_t, status> take_tiles(sequence& q, std::size_t most, F&& body)
    {
        std::size_t taken = 0, linked = 0;
        for (const std::size_t at : ready(q)) {
            if (taken == most) break;
            const block_ref exact = q.tokens[at].where;
            if (const block_ref made = record_of(*exact)) {
                put(q, at, made);
                ++linked;
                ++seen_.linked;
                continue;
            }
            if (free_records() == 0) return {taken, taken + linked == 0 ? status::no_room : status::ok};
            body(at);
            ++taken;
        }
        return {taken, status::ok};
    }
    void settle(const job& j, kvarn::seal_report& report)
    {
        const encoded made = encode_tile(j.tile);
        sequence* holder = nullptr;
        std::size_t at = 0;
        for (sequence& q : sequences_)
            if (q.open && q.number == j.sequence)
                for (const run& r : runs_of(q))
                    if (r.count == group_ && q.tokens[r.at].where == j.exact && q.tokens[r.at].position == j.position) holder = &q, at = r.at;
        if (made.said != status::ok) {
            j.exact->kept = made.said;
            (made.said == status::not_finite ? not_finite_ : overflowed_) += 1;
            ++seen_.kept;
            if (report.kept_exact++ == 0) {
                report.sequence = j.id;
                report.position = j.position;
                report.layer = made.place / heads_;
                report.head = made.place % heads_;
                report.why = made.said;
            }
        } else if (holder != nullptr) {
            j.record->records = made.records;
            j.record->made_from = j.exact->number;
            j.record->made_from_changes = j.exact->changes;
            put(*holder, at, j.record);
            ++sealed_;
            ++seen_.sealed;
            ++report.sealed;
        } else {
            ++report.dropped;
            ++seen_.dropped;
        }
    }
    static void compare_reports(const kvarn::seal_report& got, const kvarn::seal_report& wanted)
    {
        expect_equal(got.sealed, wanted.sealed, "tiles sealed");
        expect_equal(got.kept_exact, wanted.kept_exact, "tiles kept");
        expect_equal(got.dropped, wanted.dropped, "tiles dropped");
        expect(got.sequence == wanted.sequence && got.position == wanted.position && got.layer == wanted.layer && got.head == wanted.head &&
                   got.why == wanted.why,
               "the tile that a report names");
    }
    [[nodiscard]] job job_of(const sequence& q, std::size_t at)
    {
        return {q.tokens[at].where, new_block(true), tile_of(q, at), q.number, q.id, q.tokens[at].position, std::vector<bool>(places(), false)};
    }
    void queue(sequence& q, std::size_t most)
    {
        if (q.open) expect_equal(kvarn::ready_tiles(cache_.pool(), q.id), ready(q).size(), "ready tiles");
        const auto got = kvarn::begin_seal(cache_.pool(), q.id, most);
        if (!q.open) {
            static_cast<void>(expect_status(got.error, status::stale_handle, "begin_seal"));
            return;
        }
        const auto [queued, said] = take_tiles(q, most, [&](std::size_t at) { jobs_.push_back(job_of(q, at)); });
        if (expect_status(got.error, said, "begin_seal") == status::ok) expect_equal(*got, queued, "tiles queued");
    }
    void collect(std::size_t most)
    {
        std::vector<sequence*> all;
        for (sequence& q : sequences_)
            if (q.open) all.push_back(&q);
        std::sort(all.begin(), all.end(), [](const sequence* a, const sequence* b) { return a->id.slot < b->id.slot; });
        const auto got = kvarn::begin_seal_all(cache_.pool(), most);
        const std::size_t linked = seen_.linked;
        std::size_t queued = 0;
        bool refused = false;
        for (std::size_t before = SIZE_MAX; before != queued && queued < most;) {
            before = queued;
            for (std::size_t i = 0; i < all.size() && queued < most; ++i) {
                const auto [taken, said] = take_tiles(*all[i], 1, [&, q = all[i]](std::size_t at) { jobs_.push_back(job_of(*q, at)); });
                queued += taken;
                refused = refused || said != status::ok;
            }
        }
        const status wanted = refused && queued == 0 && seen_.linked == linked ? status::no_room : status::ok;
        if (expect_status(got.error, wanted, "begin_seal_all") == status::ok) expect_equal(*got, queued, "tiles collected");
        seen_.collected += queued > 1;
    }
    void seal(sequence& q, std::size_t most)
    {
        const auto got = kvarn::seal(cache_.pool(), q.id, std::span(scratch_), most);
        if (!q.open) {
            static_cast<void>(expect_status(got.error, status::stale_handle, "seal"));
            return;
        }
        kvarn::seal_report wanted;
        const auto [sealed, said] = take_tiles(q, most, [&](std::size_t at) { settle(job_of(q, at), wanted); });
        if (expect_status(got.error, said, "seal") == status::ok) compare_reports(*got, wanted);
    }
    void work(const operation& o)
    {
        const std::size_t open = jobs_.size() * places() - finished_;
        expect_equal(kvarn::seal_items(cache_.pool()), open, "items in the queue");
        const std::size_t finish = o.a == 65535 ? open : o.a % (open + 1);
        // What is to be finished, and some of the rest, in any order.
        std::vector<std::size_t> order;
        support::random_source random(o.seed);
        for (std::size_t i = 0; i < open; ++i) {
            const std::size_t number = finished_ + i;
            const bool done = jobs_[number / places()].done[number % places()];
            if (i < finish ? !done || random.below(8) == 0 : random.below(3) == 0) order.push_back(i);
        }
        for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
        for (const std::size_t i : order) {
            static_cast<void>(expect_status(kvarn::seal_item(cache_.pool(), i, std::span(scratch_)), status::ok, "seal_item"));
            const std::size_t number = finished_ + i;
            jobs_[number / places()].done[number % places()] = true;
        }
        static_cast<void>(expect_status(kvarn::seal_item(cache_.pool(), open, std::span(scratch_)), status::bad_argument, "seal_item behind the last"));
        const kvarn::seal_report got = kvarn::finish_seal(cache_.pool(), o.a == 65535 ? SIZE_MAX : finish);
        kvarn::seal_report wanted;
        const std::size_t done = finished_ + finish;
        for (std::size_t i = 0; i < done / places(); ++i) {
            const job j = jobs_.front();
            jobs_.erase(jobs_.begin());
            settle(j, wanted);
        }
        finished_ = done % places();
        compare_reports(got, wanted);
    }

    // --- files

    void save(sequence& q, sequence& to, const operation& o)
    {
        if (&q == &to) return;
        std::vector<std::byte> file;
        const auto write = [&](std::span<const std::byte> piece) {
            file.insert(file.end(), piece.begin(), piece.end());
            return true;
        };
        const status saved = expect_status(kvarn::save(cache_.pool(), q.id, write), !q.open ? status::stale_handle : q.drafts != 0 ? status::bad_argument : status::ok,
                                           "save");
        expect_equal<std::uint64_t>(kvarn::saved_bytes(cache_.pool(), q.id), saved == status::ok ? file.size() : 0, "saved_bytes");
        if (saved != status::ok) return;
        support::random_source random(o.seed);
        const bool damaged = random.below(4) == 0;
        if (damaged) {
            if (random.below(2) == 0) file.resize(random.below(file.size()));
            else file[random.below(file.size())] ^= static_cast<std::byte>(1u << random.below(8));
        }
        std::size_t at = 0;
        const auto read = [&](std::span<std::byte> piece) {
            const std::size_t n = std::min(piece.size(), file.size() - at);
            if (n != 0) std::memcpy(piece.data(), file.data() + at, n);
            at += n;
            return n;
        };
        const auto got = kvarn::load(cache_.pool(), read);
        if (damaged) {
            expect(got.error != status::ok, "a damaged file is refused");
            return;
        }
        const auto used = recount();
        std::set<std::uint64_t> records, exact;
        for (const token& t : q.tokens) (t.where->sealed ? records : exact).insert(t.where->number);
        const bool room = open_sequences() < config_.sequences && records.size() <= config_.record_blocks - used.records &&
                          exact.size() <= config_.exact_blocks - used.exact;
        if (expect_status(got.error, room ? status::ok : status::no_room, "load") != status::ok) return;
        begin(to, *got, q.first_position);
        to.next_position = q.next_position;
        to.tokens = q.tokens;
        ++seen_.loaded;
        // Blocks of its own, that know nothing of each other.
        block_ref from, copy;
        for (token& t : to.tokens) {
            if (t.where != from) {
                from = t.where;
                copy = new_block(from->sealed);
                copy->kept = from->kept;
                copy->records = from->records;
            }
            t.where = copy;
        }
    }

    // --- comparing

    void compare_numbers()
    {
        const usage n = recount();
        const auto got = cache_.pool().statistics();
        expect_equal(got.records.used, n.records, "record blocks used");
        expect_equal(got.records.free, config_.record_blocks - n.records, "record blocks free");
        expect_equal(got.records.shared, n.shared_records, "record blocks shared");
        expect_equal(got.exact.used, n.exact, "exact blocks used");
        expect_equal(got.exact.free, config_.exact_blocks - n.exact, "exact blocks free");
        expect_equal(got.exact.shared, n.shared_exact, "exact blocks shared");
        const kvarn::cache_plan& plan = cache_.pool().plan();
        expect_equal(got.bytes_used, n.records * plan.record_block_bytes + n.exact * plan.exact_block_bytes, "bytes used");
        expect_equal(got.tiles_sealed, sealed_, "tiles sealed in all");
        expect_equal(got.tiles_kept_not_finite, not_finite_, "tiles that are not finite");
        expect_equal(got.tiles_kept_overflowed, overflowed_, "tiles that overflow");
        expect_equal(got.sequences, open_sequences(), "open sequences");
        for (const sequence& q : sequences_) compare_numbers(q);
    }
    void compare_numbers(const sequence& q)
    {
        const auto& pool = cache_.pool();
        const auto got = pool.statistics(q.id);
        expect(pool.is_open(q.id) == q.open, "is_open");
        if (!q.open) {
            expect(got.error == status::stale_handle, "statistics of a closed sequence");
            expect(pool.tokens(q.id) == 0 && pool.drafts(q.id) == 0 && pool.next_position(q.id) == -1, "numbers of a closed sequence");
            return;
        }
        expect(got.error == status::ok, "statistics of a sequence");
        std::set<std::uint64_t> records, exact, kept;
        std::size_t sealed = 0;
        const auto runs = runs_of(q);
        for (const run& r : runs) {
            const block& b = *q.tokens[r.at].where;
            (b.sealed ? records : exact).insert(b.number);
            if (b.sealed) sealed += r.count;
            else if (b.kept != status::ok) kept.insert(b.number);
        }
        expect_equal(got->tokens, q.committed(), "tokens");
        expect_equal(pool.tokens(q.id), q.committed(), "tokens()");
        expect_equal(got->drafts, q.drafts, "drafts");
        expect_equal(pool.drafts(q.id), q.drafts, "drafts()");
        expect_equal(got->next_position, q.next_position, "next position");
        expect_equal(pool.next_position(q.id), q.next_position, "next_position()");
        expect_equal(got->spans, runs.size(), "spans");
        expect_equal(got->sealed_tokens, sealed, "sealed tokens");
        expect_equal(got->record_blocks, records.size(), "record blocks of a sequence");
        expect_equal(got->exact_blocks, exact.size(), "exact blocks of a sequence");
        expect_equal(got->dead_tokens, records.size() * group_ - sealed, "dead tokens");
        expect_equal(got->kept_tiles, kept.size(), "kept tiles");
    }

    /// What the cache must give for tokens [from, to) of one layer and head: K, then V.
    void wanted_values(const sequence& q, std::size_t place, std::size_t from, std::size_t to, std::vector<float>& k, std::vector<float>& v)
    {
        const kvarn::format& f = format_of(place);
        const auto dk = static_cast<std::size_t>(f.key_channels()), dv = static_cast<std::size_t>(f.head_dim_v());
        k.assign((to - from) * dk, 0.0f);
        v.assign((to - from) * dv, 0.0f);
        std::vector<float> tile_k(group_ * dk), tile_v(group_ * dv);
        const block* decoded = nullptr;
        for (std::size_t i = from; i < to; ++i) {
            const token& t = q.tokens[i];
            float* const key = k.data() + (i - from) * dk;
            float* const value = v.data() + (i - from) * dv;
            if (!t.where->sealed) {
                const std::size_t element = kvarn::element_bytes(config_.exact);
                const std::byte* const at = t.values->bytes.data() + place * (key_bytes_ + value_bytes_);
                for (std::size_t c = 0; c < dk + dv; ++c) (c < dk ? key[c] : value[c - dk]) = exact_value(at + c * element);
                continue;
            }
            if (decoded != t.where.get()) {
                decoded = t.where.get();
                auto& record = t.where->records[place];
                const kvarn::record_grid<const std::byte> grid{record.data(), record.size(), 1, 1, record.size(), record.size(), record.size()};
                const auto tile = [&](std::vector<float>& x, std::size_t channels) {
                    return channels != 0 ? kvarn::token_major(x.data(), group_, 1, channels) : kvarn::kv_view<float>{};
                };
                support::expect_ok(kvarn::dequantize_kv(f, grid, tile(tile_k, dk), {}, config_.key_basis, std::span(scratch_)));
                if (dv != 0) support::expect_ok(kvarn::dequantize_kv(f, grid, {}, tile(tile_v, dv), config_.value_basis, std::span(scratch_)));
            }
            std::copy_n(tile_k.begin() + static_cast<std::ptrdiff_t>(t.place * dk), dk, key);
            std::copy_n(tile_v.begin() + static_cast<std::ptrdiff_t>(t.place * dv), dv, value);
        }
    }
    [[nodiscard]] float exact_value(const std::byte* at) const
    {
        if (config_.exact == kvarn::exact_type::f32) {
            float x;
            std::memcpy(&x, at, 4);
            return x;
        }
        std::uint16_t bits;
        std::memcpy(&bits, at, 2);
        return config_.exact == kvarn::exact_type::f16 ? kvarn::to_float(kvarn::half{bits}) : kvarn::to_float(kvarn::bfloat16{bits});
    }

    void compare_range(const sequence& q, std::size_t place, std::int64_t begin, std::int64_t end)
    {
        const auto behind = [&](std::int64_t position) {
            return static_cast<std::size_t>(std::lower_bound(q.tokens.begin(), q.tokens.end(), position,
                                                             [](const token& t, std::int64_t p) { return t.position < p; }) -
                                            q.tokens.begin());
        };
        const std::size_t from = behind(begin), to = std::max(from, behind(end));
        expect_equal(kvarn::count_tokens(cache_.pool(), q.id, begin, end), to - from, "tokens in a range");
        const std::size_t dk = static_cast<std::size_t>(base().key_channels()), dv = static_cast<std::size_t>(base().head_dim_v());
        std::vector<float> k((to - from) * dk, -77.0f), v((to - from) * dv, -77.0f), wanted_k, wanted_v;
        const kvarn::output_view keys = kvarn::token_major(k.data(), to - from, 1, dk);
        const kvarn::output_view vals = dv != 0 ? kvarn::output_view(kvarn::token_major(v.data(), to - from, 1, dv)) : kvarn::output_view{};
        const auto got = kvarn::read(cache_.pool(), q.id, place / heads_, place % heads_, begin, end, keys, vals, cache_.scratch());
        const bool stored = from == to || to <= q.committed() + q.stored[place];
        if (expect_status(got, stored ? status::ok : status::bad_argument, "read") != status::ok) return;
        wanted_values(q, place, from, to, wanted_k, wanted_v);
        expect(support::bits_of(k) == support::bits_of(wanted_k), "K that is read");
        expect(support::bits_of(v) == support::bits_of(wanted_v), "V that is read");
    }
    void read(sequence& q, const operation& o)
    {
        const std::size_t place = o.seed % places();
        if (!q.open) {
            const auto got = kvarn::read(cache_.pool(), q.id, 0, 0, 0, 10, kvarn::output_view{}, kvarn::output_view{}, cache_.scratch());
            static_cast<void>(expect_status(got, status::stale_handle, "read"));
            return;
        }
        const auto extent = static_cast<std::uint64_t>(q.next_position - q.first_position);
        const std::int64_t begin = q.first_position - 2 + static_cast<std::int64_t>(o.a % (extent + 4));
        compare_range(q, place, begin, begin + o.b % 100 - (o.b % 16 == 0 ? 20 : 0));
    }
    void compare_contents()
    {
        for (const sequence& q : sequences_)
            if (q.open)
                for (std::size_t place = 0; place < places(); ++place) compare_range(q, place, 0, INT64_MAX);
    }

    /// The history as the rules make it: a segment for each run of exact tokens; records that follow each other, with nothing left out between
    /// them, are one.
    struct history {
        std::vector<std::vector<float>> exact;
        std::vector<std::vector<std::byte>> exact_bytes;
        std::vector<std::vector<const std::byte*>> lists;
        std::vector<kvarn::kv_segment> segments;
    };
    void make_history(const sequence& q, std::size_t place, history& h)
    {
        const kvarn::format& f = format_of(place);
        const auto runs = runs_of(q);
        h.exact_bytes.resize(runs.size());
        h.lists.resize(runs.size());
        for (std::size_t i = 0; i < runs.size();) {
            const token& first = q.tokens[runs[i].at];
            if (!first.where->sealed) {
                auto& bytes = h.exact_bytes[i];
                bytes.resize(runs[i].count * (key_bytes_ + value_bytes_));
                std::byte* const keys = bytes.data();
                std::byte* const vals = keys + runs[i].count * key_bytes_;
                for (std::size_t t = 0; t < runs[i].count; ++t) {
                    const std::byte* const at = q.tokens[runs[i].at + t].values->bytes.data() + place * (key_bytes_ + value_bytes_);
                    std::memcpy(keys + t * key_bytes_, at, key_bytes_);
                    if (value_bytes_ != 0) std::memcpy(vals + t * value_bytes_, at + key_bytes_, value_bytes_);
                }
                const auto view = [&](const std::byte* data, std::size_t row) {
                    kvarn::input_view x;
                    if (row == 0) return x;
                    using type = kvarn::input_view::element_type;
                    x.type = config_.exact == kvarn::exact_type::f32 ? type::f32 : config_.exact == kvarn::exact_type::f16 ? type::f16 : type::bf16;
                    x.data = data;
                    x.tokens = runs[i].count;
                    x.heads = 1;
                    x.channels = row / kvarn::element_bytes(config_.exact);
                    x.token_stride = x.head_stride = static_cast<std::ptrdiff_t>(x.channels);
                    return x;
                };
                h.segments.push_back(kvarn::at_position(
                    kvarn::exact_tokens(view(keys, key_bytes_), view(vals, value_bytes_), 0, config_.key_basis, config_.value_basis), first.position));
                ++i;
                continue;
            }
            auto& list = h.lists[i];
            std::size_t end = i, tokens = 0;
            while (true) {
                const token& last = q.tokens[runs[end].at + runs[end].count - 1];
                list.push_back(last.where->records[place].data());
                tokens += runs[end].count;
                if (++end == runs.size() || last.place != group_ - 1) break;
                const token& next = q.tokens[runs[end].at];
                if (!next.where->sealed || next.place != 0 || next.position != last.position + 1) break;
            }
            h.segments.push_back(kvarn::at_position(kvarn::token_range(f, kvarn::listed_tiles(f, list), first.place, tokens), first.position));
            i = end;
        }
    }
    void attend(const operation& o)
    {
        const std::size_t layer = o.a % layers_, dk = static_cast<std::size_t>(base().key_channels()),
                          dv = static_cast<std::size_t>(base().has_values() ? base().head_dim_v() : base().head_dim_k());
        support::random_source random(o.seed);
        kvarn::layer_options options;
        options.threads = random.pick<std::size_t>({1, 4, 64});
        options.rows_per_task = random.pick<std::size_t>({1, 3, 8, 32});
        options.chunks_per_item = 1 + random.below(2);
        options.attention.precision = random.pick({kvarn::precision::fine, kvarn::precision::fine, kvarn::precision::exact, kvarn::precision::fast});
        if (random.below(4) == 0) options.attention.window = 1 + static_cast<std::int64_t>(random.below(100));
        if (random.below(8) == 0) options.attention.causal = false;
        struct question {
            const sequence* q;
            std::size_t m, group_heads;
            std::vector<float> queries, out, log_sum_exp;
            std::vector<float> sink_logits, slopes;
            std::vector<std::uint64_t> mask;
            std::size_t mask_stride = 0, mask_tokens = 0;
        };
        std::vector<question> questions;
        questions.reserve(sequences_.size());
        std::vector<kvarn::sequence_step> steps;
        for (const sequence& q : sequences_) {
            if (!q.open || q.tokens.empty() || random.below(4) == 0) continue;
            if (std::any_of(q.tokens.begin(), q.tokens.end(), [](const token& t) { return !t.values->finite; })) continue;
            bool stored = true;
            for (std::size_t h = 0; h < heads_; ++h) stored = stored && q.stored[layer * heads_ + h] == q.drafts;
            if (!stored) continue;
            question& x = questions.emplace_back(question{&q, 1 + random.below(std::min<std::size_t>(q.tokens.size(), random.below(4) == 0 ? 40 : 3)),
                                                          1 + random.below(3), {}, {}, {}, {}, {}, {}, 0, 0});
            const std::size_t rows = x.m * heads_ * x.group_heads;
            x.queries.resize(rows * dk);
            support::fill_values(x.queries, random.bits());
            x.out.assign(rows * dv, -77.0f);
            x.log_sum_exp.assign(rows, -77.0f);
            kvarn::sequence_step step;
            step.sequence = q.id;
            step.q = kvarn::token_major<const float>(x.queries.data(), x.m, heads_ * x.group_heads, dk);
            step.out = kvarn::token_major(x.out.data(), x.m, heads_ * x.group_heads, dv);
            step.log_sum_exp = x.log_sum_exp.data();
            if (random.below(4) == 0) {
                x.sink_logits.resize(heads_ * x.group_heads);
                support::fill_values(x.sink_logits, random.bits());
                step.sink_logits = x.sink_logits.data();
            }
            if (random.below(4) == 0) {
                x.slopes.resize(heads_ * x.group_heads);
                for (float& slope : x.slopes) slope = static_cast<float>(random.below(64)) / 64.0f;
                step.alibi_slopes = x.slopes.data();
            }
            if (random.below(4) == 0) {
                x.mask_tokens = 1 + random.below(100);
                x.mask_stride = (x.mask_tokens + 63) / 64 + random.below(2);
                x.mask.resize(x.m * x.mask_stride);
                for (std::uint64_t& word : x.mask) word = random.bits() | random.bits();
                step.mask = x.mask.data();
                step.mask_stride = x.mask_stride;
                step.mask_tokens = x.mask_tokens;
            }
            steps.push_back(step);
            expect(kvarn::layer_memory_bytes(cache_.pool(), {&step, 1}, options) <=
                       kvarn::layer_memory_bound(config_, 1, x.m * x.group_heads, x.group_heads, options),
                   "the bound of a layer's memory");
        }
        support::guarded_bytes memory(kvarn::layer_memory_bytes(cache_.pool(), steps, options), o.seed % 64);
        const auto items = kvarn::plan_layer(cache_.pool(), layer, steps, options, memory.span());
        static_cast<void>(expect_status(items.error, status::ok, "plan_layer"));
        static_cast<void>(expect_status(items->run(cache_.scratch()), status::ok, "attention"));
        expect(memory.intact(), "nothing is written outside of a layer's memory");
        for (const question& x : questions)
            for (std::size_t head = 0; head < heads_; ++head) compare_attention(*x.q, layer * heads_ + head, x, options.attention, dk, dv);
    }
    template <class Question>
    void compare_attention(const sequence& q, std::size_t place, const Question& x, const kvarn::attention_options& options, std::size_t dk,
                           std::size_t dv)
    {
        history h;
        make_history(q, place, h);
        ++seen_.attended;
        for (const kvarn::kv_segment& part : h.segments)
            seen_.attended_parts += part.sealed() && (part.skip != 0 || (part.skip + part.tokens) % group_ != 0);
        const std::size_t head = place % heads_, each = x.group_heads, rows = x.m * each, stride = heads_ * each;
        std::vector<float> out(rows * dv, -77.0f), log_sum_exp(rows, -77.0f);
        kvarn::attention_task task;
        task.history = h.segments;
        task.q = kvarn::kv_view<const float>{x.queries.data() + head * each * dk, x.m, each, dk, static_cast<std::ptrdiff_t>(stride * dk),
                                             static_cast<std::ptrdiff_t>(dk)};
        task.out = kvarn::token_major(out.data(), x.m, each, dv);
        task.log_sum_exp = log_sum_exp.data();
        if (!x.sink_logits.empty()) task.sink_logits = x.sink_logits.data() + head * each;
        if (!x.slopes.empty()) task.alibi_slopes = x.slopes.data() + head * each;
        if (!x.mask.empty()) task.mask = x.mask.data();
        task.mask_stride = x.mask_stride;
        task.mask_tokens = x.mask_tokens;
        task.first_position = q.next_position - static_cast<std::int64_t>(x.m);
        std::vector<std::byte> scratch(kvarn::attention_scratch_bytes(format_of(place), rows));
        support::expect_ok(kvarn::attend(format_of(place), task, options, std::span(scratch)));
        for (std::size_t t = 0; t < x.m; ++t)
            for (std::size_t r = 0; r < each; ++r) {
                const auto got = std::span<const float>(x.out).subspan((t * stride + head * each + r) * dv, dv),
                           wanted = std::span<const float>(out).subspan((t * each + r) * dv, dv);
                expect(support::bits_of(got) == support::bits_of(wanted), "attention");
            }
        expect(support::bits_of(std::span(x.log_sum_exp).subspan(head * rows, rows)) == support::bits_of(log_sum_exp), "log-sum-exp");
    }

    support::guarded_cache cache_;
    kvarn::cache_config config_;
    kvarn::format cache_base_ = config_.policy.base();
    std::size_t layers_, heads_, group_, key_bytes_, value_bytes_;
    std::vector<sequence> sequences_;
    std::vector<job> jobs_;
    std::size_t finished_ = 0;  // items of the first job
    std::vector<std::byte> scratch_;
    std::uint64_t block_number_ = 0, sequence_number_ = 0;
    std::size_t sealed_ = 0, not_finite_ = 0, overflowed_ = 0;
    coverage seen_{};
};

}  // namespace cache_model
