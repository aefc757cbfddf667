// SPDX-License-Identifier: Apache-2.0
// The .npy readers. In: a file. Whatever it holds, each reader returns an array whose sizes are those of its data, or a failure that
// begins with the file's name. What was read comes back from the writer as it is.

#include <cmath>
#include <vector>

#include "examples/common/npy.hpp"
#include "readers.hpp"
#include "tests/support/bytes_output.hpp"

namespace {

using namespace kvarn_cli;
using fuzz::accepts;
using fuzz::require;

void read_floats(bytes file)
{
    tensor a;
    if (!accepts([&] { a = parse_npy(file, "x"); })) return;
    require(a.heads != 0 && a.tokens != 0 && a.channels != 0, "no array is empty");
    require(a.data.size() == a.elements() * element_bytes(a.type) && a.data.size() < file.size(), "the data are those of the file");

    std::vector<float> values(a.elements());
    bool finite = true;
    for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = a.value(i);
        finite = finite && std::isfinite(values[i]);
    }
    require(accepts([&] { require_finite(a, "x"); }) == finite, "a value that is not finite is found");
    if (!finite) return;
    support::bytes_output out;
    write_npy(out, a.type, a.heads, a.tokens, a.channels, values);
    tensor back;
    require(accepts([&] { back = parse_npy(out.content, "x"); }), "what is written can be read");
    require(back.type == a.type && back.heads == a.heads && back.tokens == a.tokens && back.channels == a.channels &&
                back.data == a.data,
            "what is written is read back");
}

void read_integers(bytes file)
{
    integer_table t;
    if (!accepts([&] { t = parse_npy_integers(file, "x"); })) return;
    require(t.rows != 0 && t.columns != 0 && t.values.size() == t.rows * t.columns, "the table has rows times columns values");
    require(t.values.size() * 4 < file.size(), "the values are those of the file");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    const auto file = std::as_bytes(std::span(data, size));
    read_floats(file);
    read_integers(file);
    return 0;
}
