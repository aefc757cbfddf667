// SPDX-License-Identifier: Apache-2.0

#include <cstring>
#include <set>
#include <string>

#include <kvarn/base/status.hpp>

#include "../catch.hpp"

TEST_CASE("base/status: every status has its own sentence", "[unit]")
{
    using kvarn::status;
    const status all[] = {status::ok,          status::bad_format_name,      status::unsupported_head_dim, status::unsupported_bits,
                          status::unsupported_group, status::unsupported_channels, status::bad_argument, status::null_pointer,
                          status::shape_mismatch, status::token_count_mismatch, status::buffer_too_small,  status::not_finite,           status::scale_overflow,
                          status::out_of_memory,  status::truncated,         status::corrupt, status::io_error, status::unsupported_version,
                          status::no_room, status::sequence_full, status::stale_handle, status::other_configuration};
    std::set<std::string> sentences;
    for (const status s : all) {
        REQUIRE(kvarn::message(s) != nullptr);
        const std::string text = kvarn::message(s);
        CHECK(!text.empty());
        CHECK(text != "unknown status");
        sentences.insert(text);
    }
    CHECK(sentences.size() == std::size(all));
    REQUIRE(kvarn::message(static_cast<status>(250)) != nullptr);
    CHECK(std::string(kvarn::message(static_cast<status>(250))) == "unknown status");
}

TEST_CASE("base/status: a result holds a value or a reason", "[unit]")
{
    const kvarn::result<int> good = 7;
    CHECK(good.ok());
    CHECK(static_cast<bool>(good));
    CHECK(*good == 7);
    const kvarn::result<int> bad = kvarn::status::truncated;
    CHECK(!bad.ok());
    CHECK(!static_cast<bool>(bad));
    CHECK(bad.error == kvarn::status::truncated);
}
