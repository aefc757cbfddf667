// SPDX-License-Identifier: Apache-2.0
// What <kvarn/cache/file.hpp> needs is what kvarn::cache_files brings.
#include <cstdio>

#include <kvarn/cache/file.hpp>

int main()
{
    std::byte buffer[256], letters[3]{};
    kvarn::buffer_writer writer{kvarn::buffer_sink(buffer)};
    bool ok = writer.begin(kvarn::file_kind::records) == kvarn::status::ok &&
              writer.chunk(kvarn::chunk_type("abcd"), 1, letters) == kvarn::status::ok && writer.finish() == kvarn::status::ok;
    kvarn::buffer_reader reader{kvarn::buffer_source({buffer, static_cast<std::size_t>(writer.bytes())})};
    ok = ok && reader.begin().ok() && reader.next().ok() && reader.skip() == kvarn::status::ok && reader.next().ok() &&
         reader.at_end() == kvarn::status::ok;
    std::printf("%s: %d bytes\n", ok ? "a file" : "FAILED", static_cast<int>(writer.bytes()));
    return ok ? 0 : 1;
}
