// SPDX-License-Identifier: Apache-2.0
// The reader of the container that `kvarn quantize` writes. In: a file, read as it is and once more with its checksums made right, so
// that only the checks of the fields are left. Accepted files are what the writer would have written, byte for byte.

#include <cstring>
#include <vector>

#include "examples/kvarn/container.hpp"
#include "readers.hpp"
#include "tests/support/bytes_output.hpp"
#include "tests/support/repair_file.hpp"

namespace {

using namespace kvarn_cli;
using fuzz::require;

void read(bytes file)
{
    container c;
    if (!fuzz::accepts([&] { c = parse_container(file, "x"); })) return;
    std::size_t records = 0;
    for (std::size_t head = 0; head < c.heads; ++head) {
        require(kvarn::make_format(c.format_of(head).spec()).ok() && same_shape(c.format_of(head), c.shape()), "the formats are valid and fit each other");
        records += c.tiles() * c.record_bytes(head);
    }
    require(c.records.size() == records, "the records are as many as the file says");
    require(c.k_tail.size() == c.heads * c.k_tail_bytes(), "the tail of K has its size");
    require(c.v_tail.size() == c.heads * c.v_tail_bytes(), "the tail of V has its size");
    support::bytes_output out;
    write_container(out, c);
    require(out.content.size() == file.size() && std::memcmp(out.content.data(), file.data(), file.size()) == 0,
            "an accepted container is written back byte for byte");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    const auto file = std::as_bytes(std::span(data, size));
    read(file);
    std::vector<std::byte> repaired(file.begin(), file.end());
    support::repair_file(repaired);
    read(repaired);
    return 0;
}
