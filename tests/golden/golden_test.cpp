// SPDX-License-Identifier: Apache-2.0
// The records that the authors' own PyTorch code made, against the library's.

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../support/compare.hpp"
#include "../support/npy.hpp"

namespace {

struct golden_case {
    std::string name;
    kvarn::format format;
    int iterations = 0;
    std::size_t record_bytes = 0, reference_stride = 0;
    std::vector<kvarn::half> k, v;
    support::bytes record;
};

int number_after(const std::string& object, const std::string& key)
{
    const std::size_t at = object.find("\"" + key + "\":");
    if (at == std::string::npos) throw std::runtime_error("manifest: no " + key);
    return std::atoi(object.c_str() + at + key.size() + 3);
}

std::string string_after(const std::string& object, const std::string& key)
{
    const std::size_t at = object.find("\"" + key + "\":");
    if (at == std::string::npos) throw std::runtime_error("manifest: no " + key);
    const std::size_t open = object.find('"', at + key.size() + 3);
    return object.substr(open + 1, object.find('"', open + 1) - open - 1);
}

std::vector<kvarn::half> halves(const std::string& path, std::size_t tokens, std::size_t channels)
{
    const support::npy_array array = support::read_npy(path);
    if (array.shape != std::vector<std::size_t>{tokens, channels}) throw std::runtime_error("unexpected shape: " + path);
    std::vector<kvarn::half> out;
    for (const std::uint16_t bits : array.half_bits()) out.push_back({bits});
    return out;
}

std::vector<golden_case> load_cases()
{
    const std::string folder = KVARN_GOLDEN_DIR;
    const std::string text = support::read_file(folder + "/manifest.json");
    std::vector<golden_case> cases;
    for (std::size_t at = text.find("\"cases\""); (at = text.find('{', at)) != std::string::npos; ++at) {
        const std::string object = text.substr(at, text.find('}', at) - at);
        golden_case c;
        c.name = string_after(object, "case");
        reference::shape s;
        s.head_dim_k = s.head_dim_v = number_after(object, "head_dim");
        s.group = number_after(object, "group");
        s.key_bits = number_after(object, "key_bits");
        s.value_bits = number_after(object, "value_bits");
        c.format = support::make(s);
        c.iterations = number_after(object, "iterations");
        c.record_bytes = static_cast<std::size_t>(number_after(object, "record_bytes"));
        c.reference_stride = static_cast<std::size_t>(number_after(object, "reference_stride"));
        const auto tokens = static_cast<std::size_t>(s.group), channels = static_cast<std::size_t>(s.head_dim_k);
        c.k = halves(folder + "/" + c.name + "_k.npy", tokens, channels);
        c.v = halves(folder + "/" + c.name + "_v.npy", tokens, channels);
        c.record = support::read_npy(folder + "/" + c.name + "_record.npy").bytes;
        cases.push_back(std::move(c));
    }
    return cases;
}

const std::vector<golden_case>& golden_cases()
{
    static const std::vector<golden_case> cases = load_cases();
    return cases;
}

template <class Arch>
support::bytes encoded(const golden_case& c)
{
    const kvarn::format& f = c.format;
    std::vector<kvarn::half> k = c.k, v = c.v;
    support::bytes record(c.reference_stride, 0xa5);
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    support::expect_ok(kvarn::quantize_kv<Arch>(
        f, support::dense_keys(f, k.data(), 1, 1), support::dense_values(f, v.data(), 1, 1),
        kvarn::tile_major_records(f, support::as_bytes(record.data()), record.size(), 1, 1, kvarn::record_stride::reference),
        std::span<std::byte>(scratch), support::paper(c.iterations)));
    return record;
}

reference::matrix matrix_of(const std::vector<kvarn::half>& values, int tokens)
{
    const int channels = static_cast<int>(values.size()) / tokens;
    reference::matrix m(tokens, channels);
    for (int t = 0; t < tokens; ++t)
        for (int c = 0; c < channels; ++c) m(t, c) = reference::half_value(values[static_cast<std::size_t>(t * channels + c)].bits);
    return m;
}

reference::matrix matrix_of(const std::vector<float>& values, int tokens)
{
    return support::tile_matrix(values, 0, 0, 1, tokens, static_cast<int>(values.size()) / tokens, 0,
                                static_cast<int>(values.size()) / tokens);
}

}  // namespace

TEST_CASE("golden: the manifest's sizes are the library's", "[golden]")
{
    REQUIRE(golden_cases().size() == 9);
    for (const golden_case& c : golden_cases()) {
        INFO("case " << c.name);
        CHECK(kvarn::record_bytes(c.format, kvarn::record_stride::packed) == c.record_bytes);
        CHECK(kvarn::record_bytes(c.format, kvarn::record_stride::reference) == c.reference_stride);
        CHECK(c.record.size() == c.reference_stride);
    }
}

TEST_CASE("golden: the double-precision reference agrees with the authors' records", "[golden]")
{
    support::agreement all;
    for (const golden_case& c : golden_cases()) {
        INFO("case " << c.name);
        const reference::shape s = support::shape_of(c.format);
        support::reference_tile wanted;
        wanted.keys = reference::normalized_keys(s, matrix_of(c.k, s.group), c.iterations);
        wanted.values = reference::normalized_values(s, matrix_of(c.v, s.group), c.iterations);
        const support::agreement seen = support::compare_record(c.format, c.record.data(), wanted);
        CAPTURE(seen.code_bytes, seen.different_code_bytes, seen.worst_difference);
        CHECK(seen.worst_difference <= 4e-3);
        all.add(seen);
    }
    CAPTURE(all.code_bytes, all.different_code_bytes, all.mean_difference());
    CHECK(all.codes_agree());
    CHECK(all.mean_difference() <= 1.5e-3);
}

TEST_CASE("golden: the paper encoder reproduces the authors' codes and reconstruction", "[golden]")
{
    support::for_each_arch([](auto arch) {
        using arch_type = decltype(arch);
        INFO(kvarn::simd::arch_traits<arch_type>::name);
        support::agreement all;
        for (const golden_case& c : golden_cases()) {
            INFO("case " << c.name);
            const reference::shape s = support::shape_of(c.format);
            const reference::field_offsets at = reference::offsets(s);
            const support::bytes record = encoded<arch_type>(c);
            support::agreement seen;
            seen.add_codes(&record[at.k_codes], &c.record[at.k_codes], at.k_channel_scale - at.k_codes);
            seen.add_codes(&record[at.v_codes], &c.record[at.v_codes], at.v_channel_scale - at.v_codes);
            const double keys = reference::relative_difference(reference::decoded_keys(s, record.data()),
                                                               reference::decoded_keys(s, c.record.data()));
            const double values = reference::relative_difference(reference::decoded_values(s, record.data()),
                                                                 reference::decoded_values(s, c.record.data()));
            CAPTURE(seen.code_bytes, seen.different_code_bytes, keys, values);
            CHECK(seen.different_code_bytes * 5000 <= seen.code_bytes + 5000);  // one byte more where there are few
            CHECK(keys <= 4e-3);
            CHECK(values <= 4e-3);
            seen.add_difference(keys);
            seen.add_difference(values);
            all.add(seen);

            std::size_t padding_not_zero = 0;
            for (std::size_t i = at.end; i < record.size(); ++i) padding_not_zero += record[i] != 0;
            CHECK(padding_not_zero == 0);
        }
        CAPTURE(all.code_bytes, all.different_code_bytes, all.mean_difference());
        CHECK(all.codes_agree());
        CHECK(all.mean_difference() <= 1.5e-3);
    });
}

TEST_CASE("golden: decoding the authors' records is exact to float rounding", "[golden]")
{
    support::for_each_arch([](auto arch) {
        using arch_type = decltype(arch);
        INFO(kvarn::simd::arch_traits<arch_type>::name);
        for (const golden_case& c : golden_cases()) {
            INFO("case " << c.name);
            const reference::shape s = support::shape_of(c.format);
            const reference::matrix keys = reference::decoded_keys(s, c.record.data());
            const reference::matrix values = reference::decoded_values(s, c.record.data());

            const auto rotated = support::decode<arch_type>(c.format, c.record, 1, 1, kvarn::basis::rotated,
                                                            kvarn::record_stride::reference);
            CHECK(support::relative_maximum_difference(matrix_of(rotated.k, s.group), keys) <= 1e-6);
            CHECK(support::relative_maximum_difference(matrix_of(rotated.v, s.group), values) <= 1e-6);

            const auto original = support::decode<arch_type>(c.format, c.record, 1, 1, kvarn::basis::original,
                                                             kvarn::record_stride::reference);
            CHECK(support::relative_maximum_difference(matrix_of(original.k, s.group), reference::unrotated(keys)) <= 2e-6);
            CHECK(support::relative_maximum_difference(matrix_of(original.v, s.group), reference::unrotated(values)) <= 2e-6);
        }
    });
}

TEST_CASE("golden: a decoded record is close to the input it was made of", "[golden]")
{
    for (const golden_case& c : golden_cases()) {
        INFO("case " << c.name);
        const reference::shape s = support::shape_of(c.format);
        const auto original = support::decode(c.format, c.record, 1, 1, kvarn::basis::original, kvarn::record_stride::reference);
        // Rounding to b bits costs about 0.1 (4 bits) or 0.5 (2 bits) of a Gaussian's deviation.
        const double keys = reference::relative_difference(matrix_of(original.k, s.group), matrix_of(c.k, s.group));
        const double values = reference::relative_difference(matrix_of(original.v, s.group), matrix_of(c.v, s.group));
        CAPTURE(keys, values);
        CHECK(keys <= (s.key_bits == 4 ? 0.16 : 0.7));
        CHECK(values <= (s.value_bits == 4 ? 0.16 : 0.7));
        CHECK(keys > 0.001);
    }
}
