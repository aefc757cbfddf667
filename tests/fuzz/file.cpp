// SPDX-License-Identifier: Apache-2.0
// The reader of files (kvarn/cache/file.hpp). In: a file, read as it is and once more with its checksums made right, so that only the checks
// of the fields are left. Through a function that gives few bytes at a time, and in a buffer; by pieces, skipping, and in place: all say the
// same. Accepted files are what the writer writes, byte for byte; nothing outside of the file, or of where a payload goes, is touched.

#include <algorithm>
#include <cstring>
#include <vector>

#include <kvarn/cache/file.hpp>

#include "fuzz.hpp"
#include "tests/support/repair_file.hpp"

namespace {

using fuzz::require;
using kvarn::status;

struct chunk {
    kvarn::chunk_head head;
    std::vector<std::byte> payload;
};

struct outcome {
    status end = status::ok;
    kvarn::file_kind kind{};
    std::vector<chunk> chunks{};
};

/// One way of reading: `step` bytes of payloads at a time, 0: as they lie.
template <class Reader>
outcome read(Reader reader, std::size_t size, std::size_t step, bool skip)
{
    outcome out;
    const auto kind = reader.begin();
    out.kind = kind.value;
    status s = kind.error;
    while (s == status::ok) {
        const auto head = reader.next();
        s = head.error;
        if (!head) break;
        if (head->is_end()) {
            s = reader.at_end();
            require(reader.next().error == (s == status::ok ? status::bad_argument : s), "nothing comes after the end");
            break;
        }
        out.chunks.push_back({*head, {}});
        std::vector<std::byte>& payload = out.chunks.back().payload;
        if (skip) {
            s = reader.skip();
        } else if constexpr (requires { reader.payload(); }) {
            require(head->bytes <= size, "a buffer's chunk lies in the buffer");
            const auto all = reader.payload();
            s = all.error;
            if (all) payload.assign(all->begin(), all->end());
        } else {
            while (s == status::ok && reader.left() != 0) {
                const auto piece = static_cast<std::size_t>(std::min<std::uint64_t>(reader.left(), step));
                fuzz::memory to(piece, piece % 3, 0xa5);
                s = reader.read(to.span());
                to.require_intact();
                payload.insert(payload.end(), to.span().begin(), to.span().end());
                if (payload.size() > size) break;
            }
            if (s == status::ok) s = reader.end_chunk();
        }
        require(s != status::bad_argument, "a call in order is no bad argument");
    }
    require(s == status::ok || s == status::truncated || s == status::corrupt || s == status::unsupported_version, "the status is one of a reader");
    out.end = s;
    return out;
}

/// Gives at most `most` bytes at a time.
auto source(std::span<const std::byte> file, std::size_t most)
{
    return [rest = file, most](std::span<std::byte> to) mutable noexcept {
        const std::size_t n = std::min({to.size(), most, rest.size()});
        if (n != 0) std::memcpy(to.data(), rest.data(), n);
        rest = rest.subspan(n);
        return n;
    };
}

void read_in_every_way(const std::vector<std::byte>& file, std::size_t step)
{
    fuzz::memory all(file.size(), 1, 0);
    if (!file.empty()) std::memcpy(all.data(), file.data(), file.size());
    const outcome pieces = read(kvarn::file_reader(source(all.span(), step)), file.size(), step, false);
    const outcome in_place = read(kvarn::buffer_reader{kvarn::buffer_source(all.span())}, file.size(), 0, false);
    const outcome skipped = read(kvarn::file_reader(source(all.span(), 4096)), file.size(), 0, true);
    require(pieces.end == in_place.end && pieces.end == skipped.end, "every way of reading says the same");
    if (pieces.end != status::ok) return;

    require(pieces.chunks.size() == in_place.chunks.size(), "every way of reading sees the same chunks");
    kvarn::counting_writer counting;
    std::vector<std::byte> again(file.size());
    kvarn::buffer_writer writer{kvarn::buffer_sink(again)};
    require(writer.begin(pieces.kind) == status::ok && counting.begin(pieces.kind) == status::ok, "a file begins");
    for (std::size_t i = 0; i < pieces.chunks.size(); ++i) {
        const chunk& c = pieces.chunks[i];
        require(c.payload == in_place.chunks[i].payload && c.payload.size() == c.head.bytes, "payloads are the same");
        require(writer.chunk(c.head.type, c.head.number, c.payload) == status::ok, "an accepted chunk can be written");
        require(counting.chunk(c.head.type, c.head.number, c.payload) == status::ok, "and counted");
    }
    require(writer.finish() == status::ok && counting.finish() == status::ok && counting.bytes() == file.size() && again == file,
            "an accepted file is written back byte for byte");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    const auto raw = std::as_bytes(std::span(data, size));
    std::vector<std::byte> file(raw.begin(), raw.end());
    const std::size_t step = size % 7 + 1;
    read_in_every_way(file, step);
    support::repair_file(file);
    read_in_every_way(file, step);
    return 0;
}
