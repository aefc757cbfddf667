// SPDX-License-Identifier: Apache-2.0
// The reader of the container that `kvarn quantize` writes. In: a file, read as it is and once more with its checksum made right, so
// that only the checks of the fields are left. Accepted files are what the writer would have written, byte for byte.

#include <cstring>
#include <vector>

#include "examples/kvarn/container.hpp"
#include "readers.hpp"
#include "tests/support/bytes_output.hpp"

namespace {

using namespace kvarn_cli;
using fuzz::require;

void read(bytes file)
{
    container c;
    if (!fuzz::accepts([&] { c = parse_container(file, "x"); })) return;
    require(kvarn::make_format(c.format.spec()).ok(), "the format is valid");
    require(c.records.size() == c.tiles() * c.heads * c.record_bytes(), "the records are as many as the header says");
    const std::size_t rows = c.tail_tokens() * c.heads * element_bytes(c.type);
    require(c.k_tail.size() == rows * static_cast<std::size_t>(c.format.key_channels()), "the tail of K has its size");
    require(c.v_tail.size() == rows * static_cast<std::size_t>(c.format.head_dim_v()), "the tail of V has its size");
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
    if (size < container_checksum_bytes) return 0;
    std::vector<std::byte> repaired(file.begin(), file.end());
    fnv1a checksum;
    checksum.update(bytes(repaired).first(size - container_checksum_bytes));
    const std::uint64_t value = checksum.value();
    std::memcpy(repaired.data() + size - container_checksum_bytes, &value, sizeof value);
    read(repaired);
    return 0;
}
