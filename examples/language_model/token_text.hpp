// SPDX-License-Identifier: Apache-2.0
#pragma once
// The text of token ids, from the tokenizer.json beside a model: byte-level vocabularies (GPT-2, Llama 3, Qwen) and
// those of SentencePiece with byte fallback (Llama 2, Gemma). In: the file. Out: text in UTF-8, as far as tokens end
// where characters do. Encoding text is not needed here: sequences come as ids.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "../common/text.hpp"
#include "safetensors.hpp"

namespace language_model {

class token_text {
public:
    /// `path` is for messages.
    token_text(const json& file, const std::string& path)
    {
        if (!file.is_object() || !file.contains("model") || !file["model"].is_object() || !file["model"].contains("vocab") ||
            !file["model"]["vocab"].is_object())
            throw failure(path + ": it holds no vocabulary");
        const bool byte_level = file.contains("decoder") && names_byte_level(file["decoder"]);
        for (const auto& [token, id] : file["model"]["vocab"].items())
            place(id, path) = byte_level ? bytes_of(token) : spaces_of(token);
        if (!file.contains("added_tokens")) return;
        if (!file["added_tokens"].is_array()) throw failure(path + ": its added tokens are no list");
        for (const json& added : file["added_tokens"]) {
            if (!added.is_object() || !added.contains("id") || !added.contains("content") || !added["content"].is_string())
                throw failure(path + ": an added token has no id or no content");
            place(added["id"], path) = added["content"].get<std::string>();
        }
    }

    /// Ids that the file does not know appear as numbers. No control characters but line ends and tabs.
    [[nodiscard]] std::string of(std::span<const std::int32_t> ids) const
    {
        std::string out;
        for (const std::int32_t id : ids) {
            const auto at = static_cast<std::size_t>(id);
            if (at < tokens_.size() && !tokens_[at].empty())
                out += tokens_[at];
            else
                out += kvarn_cli::text("<%d>", static_cast<int>(id));
        }
        for (char& c : out)
            if ((static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t') || c == 0x7f) c = ' ';
        return out;
    }

private:
    static constexpr std::size_t most_tokens = std::size_t{1} << 24;

    static bool names_byte_level(const json& decoder)
    {
        if (!decoder.is_object()) return false;
        if (decoder.contains("type") && decoder["type"] == "ByteLevel") return true;
        if (decoder.contains("decoders") && decoder["decoders"].is_array())
            for (const json& one : decoder["decoders"])
                if (one.is_object() && one.contains("type") && one["type"] == "ByteLevel") return true;
        return false;
    }

    std::string& place(const json& id, const std::string& path)
    {
        if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= most_tokens)
            throw failure(path + ": a token's id is no whole number below 2^24");
        const auto at = id.get<std::size_t>();
        if (at >= tokens_.size()) tokens_.resize(at + 1);
        return tokens_[at];
    }

    /// Byte-level tokens write each byte as one character: itself if it is printable, else the next of those from
    /// U+0100 on.
    static std::string bytes_of(std::string_view token)
    {
        static const std::array<std::uint8_t, 0x144> byte_of_character = [] {
            std::array<std::uint8_t, 0x144> table{};
            for (unsigned byte = 0, next = 0x100; byte < 0x100; ++byte) {
                const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad);
                table[printable ? byte : next++] = static_cast<std::uint8_t>(byte);
            }
            return table;
        }();
        std::string out;
        for (std::size_t i = 0; i < token.size();) {
            const auto lead = static_cast<unsigned char>(token[i]);
            if (lead >= 0xc0 && lead < 0xe0 && i + 1 < token.size()) {
                const unsigned character = (lead & 0x1fu) << 6 | (static_cast<unsigned char>(token[i + 1]) & 0x3fu);
                if (character < byte_of_character.size()) {
                    out += static_cast<char>(byte_of_character[character]);
                    i += 2;
                    continue;
                }
            }
            out += token[i++];  // ASCII, or what no byte-level token has
        }
        return out;
    }

    /// SentencePiece writes a blank as U+2581, and a byte that no token has as <0xNN>.
    static std::string spaces_of(std::string_view token)
    {
        const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; };
        if (token.size() == 6 && token.starts_with("<0x") && token[5] == '>' && digit(token[3]) >= 0 && digit(token[4]) >= 0)
            return {static_cast<char>(digit(token[3]) * 16 + digit(token[4]))};
        constexpr std::string_view blank = "\xe2\x96\x81";
        std::string out;
        for (std::size_t i = 0; i < token.size();) {
            const bool is_blank = token.substr(i).starts_with(blank);
            out += is_blank ? ' ' : token[i];
            i += is_blank ? blank.size() : 1;
        }
        return out;
    }

    std::vector<std::string> tokens_;
};

}  // namespace language_model
