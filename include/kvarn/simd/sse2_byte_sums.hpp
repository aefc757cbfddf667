// SPDX-License-Identifier: Apache-2.0
#pragma once
// Sums of rounded weights of 8 bits on x86, for every instruction set from SSE2 on.

#include <emmintrin.h>

#include <type_traits>

#include <kvarn/simd/portable.hpp>

namespace kvarn::simd {

struct sse2_byte_sums {
    /// Of n, a multiple of 16. Signed ones as unsigned ones, 128 larger each.
    template <class Byte>
    KVARN_INLINE static std::int32_t sum_bytes(const Byte* p, int n) noexcept
    {
        constexpr bool negative = std::is_signed_v<Byte>;
        __m128i sum = _mm_setzero_si128();
        for (int i = 0; i < n; i += 16) {
            const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
            sum = _mm_add_epi32(sum, _mm_sad_epu8(negative ? _mm_xor_si128(x, _mm_set1_epi8(-128)) : x, _mm_setzero_si128()));
        }
        return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum))) - (negative ? 128 * n : 0);
    }
};

}  // namespace kvarn::simd
