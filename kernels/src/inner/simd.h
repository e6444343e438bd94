// Vectors of the instruction set that this file is compiled for: kLanes floats, the same few functions for each set.
// Everything lives in the namespace of the set: two sets must not share an inline function in the linked library.
#ifndef UBGEN_SIMD_H
#define UBGEN_SIMD_H

#include <cstdint>
#include <cstring>

#include "ubgen/kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define UBGEN_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define UBGEN_AVX2 1
#include <immintrin.h>
#endif

#define UBGEN_INLINE __attribute__((always_inline)) inline

namespace ubgen {
namespace UBGEN_ISA {

struct Half {
    uint16_t bits;
};
// Stores need no care for NaN: one that comes of bfloat16 values, or of arithmetic, has a zero low half.
struct BFloat16 {
    uint16_t bits;
};

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold

#if UBGEN_AVX512

constexpr int kLanes = 16;
using F = __m512;
using I = __m512i;

UBGEN_INLINE F broadcast(float v) { return _mm512_set1_ps(v); }
UBGEN_INLINE F minimum(F a, F b) { return _mm512_min_ps(a, b); }  // b where either is NaN
UBGEN_INLINE F maximum(F a, F b) { return _mm512_max_ps(a, b); }
UBGEN_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
UBGEN_INLINE I bits(F v) { return _mm512_castps_si512(v); }
UBGEN_INLINE bool any_nan(F v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
UBGEN_INLINE F times_power_of_two(F v, F n) { return _mm512_scalef_ps(v, n); }  // for integers n of -126 to 127

UBGEN_INLINE F load(const float *p) { return _mm512_loadu_ps(p); }
UBGEN_INLINE F load(const Half *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
UBGEN_INLINE F load(const BFloat16 *p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
UBGEN_INLINE F load(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
UBGEN_INLINE I round_up_half(I v) {  // so that the high half is the nearest bfloat16, even at a tie
    const I odd = _mm512_and_si512(_mm512_srli_epi32(v, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(v, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
UBGEN_INLINE void store(float *p, F v) { _mm512_storeu_ps(p, v); }
UBGEN_INLINE void store(Half *p, F v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
UBGEN_INLINE void store(BFloat16 *p, F v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_up_half(bits(v)), 16)));
}
// v * 255 to the nearest integer, even at a tie; NaN and what lies below 0 become negative, what lies above 1 is 255.
UBGEN_INLINE I to_bytes(F v) { return _mm512_cvtps_epi32(minimum(broadcast(1.0f), v) * broadcast(255.0f)); }
UBGEN_INLINE void store_bytes(uint8_t *p, I v) {  // negative ones as 0
    _mm_storeu_si128((__m128i *)p, _mm512_cvtusepi32_epi8(_mm512_max_epi32(v, _mm512_setzero_si512())));
}
UBGEN_INLINE void store_rgb(uint8_t *p, I r, I g, I b) {  // the same, interleaved; packing clamps
    const I planes = _mm512_packus_epi16(_mm512_packs_epi32(r, g), _mm512_packs_epi32(b, b));
    const I pixels = _mm512_shuffle_epi8(
        planes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11, -1, -1, -1, -1)));
    const I order = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
    const I dense = _mm512_permutexvar_epi32(order, pixels);
    _mm256_storeu_si256((__m256i *)p, _mm512_castsi512_si256(dense));
    _mm_storeu_si128((__m128i *)(p + 32), _mm512_extracti32x4_epi32(dense, 2));
}

// Vectors of 16-bit values, "packed": twice kLanes. The even ones of bfloat16 are floats once shifted up, the odd ones
// once what lies below is cleared, which is cheaper than to widen two halves.
UBGEN_INLINE I load_packed(const BFloat16 *p) { return _mm512_loadu_si512(p); }
UBGEN_INLINE void store_packed(BFloat16 *p, I v) { _mm512_storeu_si512(p, v); }
UBGEN_INLINE F even_floats(I v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
UBGEN_INLINE F odd_floats(I v) { return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(~0xffff))); }
UBGEN_INLINE I high_halves(I even, I odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
}
UBGEN_INLINE I packed(int v) { return _mm512_set1_epi16(static_cast<short>(v)); }
UBGEN_INLINE I max_signed(I a, I b) { return _mm512_max_epi16(a, b); }
UBGEN_INLINE I max_unsigned(I a, I b) { return _mm512_max_epu16(a, b); }
UBGEN_INLINE I min_unsigned(I a, I b) { return _mm512_min_epu16(a, b); }
UBGEN_INLINE bool any_signed_above(I a, I b) { return _mm512_cmpgt_epi16_mask(a, b) != 0; }
// The even and the odd pixels' values, signed in the low halves, which are clamped; the high halves are passed over.
UBGEN_INLINE void store_rgb(uint8_t *p, const I (&even)[3], const I (&odd)[3]) {
    const I r = _mm512_packus_epi16(even[0], odd[0]), g = _mm512_packus_epi16(even[1], odd[1]);
    const I b = _mm512_packus_epi16(even[2], odd[2]);  // of each lane's 8 pixels: 0 - 2 - 4 - 6 - 1 - 3 - 5 - 7 -
    const I head = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 8, 8, 8, 2, 2, 2, 10, 10, 10, 4, 4, 4, 12));
    const I tail = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 12, 6, 6, 6, 14, 14, 14, -1, -1, -1, -1, -1, -1, -1, -1));
    I first = _mm512_shuffle_epi8(r, head), second = _mm512_shuffle_epi8(r, tail);
    first = _mm512_mask_shuffle_epi8(first, 0x2492249224922492, g, head);
    first = _mm512_mask_shuffle_epi8(first, 0x4924492449244924, b, head);
    second = _mm512_mask_shuffle_epi8(second, 0x0049004900490049, g, tail);
    second = _mm512_mask_shuffle_epi8(second, 0x0092009200920092, b, tail);
    const I begin = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 4, 5, 6, 7, 20, 21, 8, 9, 10, 11);
    const I end = _mm512_setr_epi32(24, 25, 12, 13, 14, 15, 28, 29, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi32(first, begin, second));
    _mm256_storeu_si256((__m256i *)(p + 64), _mm512_castsi512_si256(_mm512_permutex2var_epi32(first, end, second)));
}

UBGEN_INLINE void interleave(F a, F b, F &low, F &high) {
    const I low_order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const I high_order = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    low = _mm512_permutex2var_ps(a, low_order, b);
    high = _mm512_permutex2var_ps(a, high_order, b);
}

struct Doubles {  // kLanes of them
    __m512d low, high;
};
UBGEN_INLINE Doubles zero_doubles() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
UBGEN_INLINE Doubles widen(F v) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
}
UBGEN_INLINE Doubles add(Doubles a, Doubles b) { return {a.low + b.low, a.high + b.high}; }
UBGEN_INLINE Doubles add_square(Doubles a, Doubles b) {
    return {_mm512_fmadd_pd(b.low, b.low, a.low), _mm512_fmadd_pd(b.high, b.high, a.high)};
}
UBGEN_INLINE Doubles load(const double *p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
UBGEN_INLINE void store(double *p, Doubles v) {
    _mm512_storeu_pd(p, v.low);
    _mm512_storeu_pd(p + 8, v.high);
}

#elif UBGEN_AVX2

constexpr int kLanes = 8;
using F = __m256;
using I = __m256i;

UBGEN_INLINE F broadcast(float v) { return _mm256_set1_ps(v); }
UBGEN_INLINE F minimum(F a, F b) { return _mm256_min_ps(a, b); }
UBGEN_INLINE F maximum(F a, F b) { return _mm256_max_ps(a, b); }
UBGEN_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
UBGEN_INLINE I bits(F v) { return _mm256_castps_si256(v); }
UBGEN_INLINE bool any_nan(F v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }
UBGEN_INLINE F times_power_of_two(F v, F n) {
    const I power = _mm256_add_epi32(_mm256_slli_epi32(bits(n + broadcast(kRound)), 23), _mm256_set1_epi32(0x3f800000));
    return v * _mm256_castsi256_ps(power);
}

UBGEN_INLINE F load(const float *p) { return _mm256_loadu_ps(p); }
UBGEN_INLINE F load(const Half *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
UBGEN_INLINE F load(const BFloat16 *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
UBGEN_INLINE F load(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
UBGEN_INLINE I round_up_half(I v) {
    const I odd = _mm256_and_si256(_mm256_srli_epi32(v, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(v, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
UBGEN_INLINE void store(float *p, F v) { _mm256_storeu_ps(p, v); }
UBGEN_INLINE void store(Half *p, F v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
UBGEN_INLINE void store(BFloat16 *p, F v) {
    const I up = _mm256_srli_epi32(round_up_half(bits(v)), 16);  // values below 65536
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0x08)));
}
UBGEN_INLINE I to_bytes(F v) { return _mm256_cvtps_epi32(minimum(broadcast(1.0f), v) * broadcast(255.0f)); }
UBGEN_INLINE void store_bytes(uint8_t *p, I v) {
    const I bytes = _mm256_packus_epi16(_mm256_packs_epi32(v, v), _mm256_setzero_si256());
    const I both = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    _mm_storel_epi64((__m128i *)p, _mm256_castsi256_si128(both));
}
UBGEN_INLINE void store_rgb(uint8_t *p, I r, I g, I b) {
    const I planes = _mm256_packus_epi16(_mm256_packs_epi32(r, g), _mm256_packs_epi32(b, b));
    const I pixels = _mm256_shuffle_epi8(
        planes, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11, -1, -1, -1, -1)));
    const I packed = _mm256_permutevar8x32_epi32(pixels, _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 7, 7));
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
    _mm_storel_epi64((__m128i *)(p + 16), _mm256_extracti128_si256(packed, 1));
}

UBGEN_INLINE I load_packed(const BFloat16 *p) { return _mm256_loadu_si256((const __m256i *)p); }
UBGEN_INLINE void store_packed(BFloat16 *p, I v) { _mm256_storeu_si256((__m256i *)p, v); }
UBGEN_INLINE F even_floats(I v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
UBGEN_INLINE F odd_floats(I v) { return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(~0xffff))); }
UBGEN_INLINE I high_halves(I even, I odd) { return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa); }
UBGEN_INLINE I packed(int v) { return _mm256_set1_epi16(static_cast<short>(v)); }
UBGEN_INLINE I max_signed(I a, I b) { return _mm256_max_epi16(a, b); }
UBGEN_INLINE I max_unsigned(I a, I b) { return _mm256_max_epu16(a, b); }
UBGEN_INLINE I min_unsigned(I a, I b) { return _mm256_min_epu16(a, b); }
UBGEN_INLINE bool any_signed_above(I a, I b) { return _mm256_movemask_epi8(_mm256_cmpgt_epi16(a, b)) != 0; }
UBGEN_INLINE void store_rgb(uint8_t *p, const I (&even)[3], const I (&odd)[3]) {
    I v[3];
    for (int k = 0; k < 3; ++k) v[k] = _mm256_blend_epi16(even[k], _mm256_slli_epi32(odd[k], 16), 0xaa);
    const I r = v[0], g = v[1], b = v[2];
    const F rg = _mm256_castsi256_ps(_mm256_packus_epi16(r, g)), bb = _mm256_castsi256_ps(_mm256_packus_epi16(b, b));
    const I mix = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11, -1, -1, -1, -1));
    const I first = _mm256_shuffle_epi8(_mm256_castps_si256(_mm256_shuffle_ps(rg, bb, 0x08)), mix);
    const I second = _mm256_shuffle_epi8(_mm256_castps_si256(_mm256_shuffle_ps(rg, bb, 0x5d)), mix);
    const __m128i last = _mm256_extracti128_si256(second, 1);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(first));  // 12 bytes each; the next one overwrites the rest
    _mm_storeu_si128((__m128i *)(p + 12), _mm256_castsi256_si128(second));
    _mm_storeu_si128((__m128i *)(p + 24), _mm256_extracti128_si256(first, 1));
    _mm_storel_epi64((__m128i *)(p + 36), last);
    const int end = _mm_extract_epi32(last, 2);
    std::memcpy(p + 44, &end, sizeof end);
}

UBGEN_INLINE void interleave(F a, F b, F &low, F &high) {
    const F even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
    low = _mm256_permute2f128_ps(even, odd, 0x20);
    high = _mm256_permute2f128_ps(even, odd, 0x31);
}

struct Doubles {
    __m256d low, high;
};
UBGEN_INLINE Doubles zero_doubles() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
UBGEN_INLINE Doubles widen(F v) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
}
UBGEN_INLINE Doubles add(Doubles a, Doubles b) { return {a.low + b.low, a.high + b.high}; }
UBGEN_INLINE Doubles add_square(Doubles a, Doubles b) {
    return {_mm256_fmadd_pd(b.low, b.low, a.low), _mm256_fmadd_pd(b.high, b.high, a.high)};
}
UBGEN_INLINE Doubles load(const double *p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
UBGEN_INLINE void store(double *p, Doubles v) {
    _mm256_storeu_pd(p, v.low);
    _mm256_storeu_pd(p + 4, v.high);
}

#else
#include "plain_lanes.h"
#endif

#if UBGEN_AVX512 || UBGEN_AVX2
#define UBGEN_PACKED 1
#endif

// Twice kLanes elements, in the order in which they are cheapest to load and store: the same for both.
struct Two {
    F a, b;
};
UBGEN_INLINE Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
UBGEN_INLINE Two operator-(Two x, Two y) { return {x.a - y.a, x.b - y.b}; }
UBGEN_INLINE Two operator*(F x, Two y) { return {x * y.a, x * y.b}; }
template <class T>
UBGEN_INLINE Two load_two(const T *p) {
    return {load(p), load(p + kLanes)};
}
template <class T>
UBGEN_INLINE void store_two(T *p, Two v) {
    store(p, v.a);
    store(p + kLanes, v.b);
}
#if UBGEN_PACKED
UBGEN_INLINE Two load_two(const BFloat16 *p) {
    const I v = load_packed(p);
    return {even_floats(v), odd_floats(v)};
}
UBGEN_INLINE void store_two(BFloat16 *p, Two v) {
    store_packed(p, high_halves(round_up_half(bits(v.a)), round_up_half(bits(v.b))));
}
#endif

// Fewer than kLanes elements at the end of an array.
template <class T>
UBGEN_INLINE F load_some(const T *p, int64_t count) {
    T whole[kLanes] = {};
    std::memcpy(whole, p, count * sizeof(T));
    return load(whole);
}
template <class T>
UBGEN_INLINE void store_some(T *p, F v, int64_t count) {
    T whole[kLanes];
    store(whole, v);
    std::memcpy(p, whole, count * sizeof(T));
}

// body(x) with x as a pointer to its element type.
template <class Body>
UBGEN_INLINE auto typed(int dtype, const void *x, Body body) {
    switch (dtype) {
        case UBGEN_F32: return body(static_cast<const float *>(x));
        case UBGEN_F16: return body(static_cast<const Half *>(x));
        default: return body(static_cast<const BFloat16 *>(x));
    }
}

// Rows become columns: log2(kLanes) rounds of a perfect shuffle.
UBGEN_INLINE void transpose(F (&rows)[kLanes]) {
    for (int round = 1; round < kLanes; round *= 2) {
        F next[kLanes];
        for (int i = 0; i < kLanes / 2; ++i) interleave(rows[i], rows[i + kLanes / 2], next[2 * i], next[2 * i + 1]);
        for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
    }
}

// exp(v) within 2 units in the last place; v beyond +-87 counts as +-87; NaN stays.
UBGEN_INLINE F exp(F v) {
    v = minimum(broadcast(87.0f), maximum(broadcast(-87.0f), v));
    const F n = fma(v, broadcast(1.44269504f), broadcast(kRound)) - broadcast(kRound);
    F r = fma(n, broadcast(-0.693359375f), v);
    r = fma(n, broadcast(2.12194440e-4f), r);
    F p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    return times_power_of_two(fma(p, r * r, r + broadcast(1.0f)), n);
}

}  // namespace UBGEN_ISA
}  // namespace ubgen

#endif
