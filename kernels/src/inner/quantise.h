// Bytes and statistics in one pass. That a value is infinite or NaN is rare, so the loop only notices it (0 * v is not
// 0 then), and the statistics of that short run are taken again, one value at a time.
#include <initializer_list>

#include "inner.h"
#include "simd.h"

namespace ubgen {
namespace UBGEN_ISA {

constexpr int64_t kRun = 1024;  // values, or pixels: a run is in the first-level cache when it is read again

struct Statistics {
    F low = broadcast(__builtin_inff()), high = broadcast(-__builtin_inff()), poison = broadcast(0.0f);
};

constexpr int kChains = 4;  // of statistics at a time: in a single one each vector would wait for the one before

UBGEN_INLINE void notice(Statistics &s, F v) {
    s.low = minimum(v, s.low);
    s.high = maximum(v, s.high);
    s.poison = fma(v, broadcast(0.0f), s.poison);
}

// False, and nothing done, where a value was not finite.
template <int Chains>
UBGEN_INLINE bool merge(Range &range, const Statistics (&chains)[Chains]) {
    Statistics s = chains[0];
    for (int k = 1; k < Chains; ++k) {
        s.low = minimum(s.low, chains[k].low);
        s.high = maximum(s.high, chains[k].high);
        s.poison = s.poison + chains[k].poison;
    }
    if (any_nan(s.poison)) return false;
    float low[kLanes], high[kLanes];
    store(low, s.low);
    store(high, s.high);
    for (int k = 0; k < kLanes; ++k) {
        range.minimum = low[k] < range.minimum ? low[k] : range.minimum;
        range.maximum = high[k] > range.maximum ? high[k] : range.maximum;
    }
    return true;
}

template <class T>
UBGEN_INLINE float one_float(T value) {
    float v[kLanes];
    store(v, load_some(&value, 1));
    return v[0];
}

template <class T>
void merge_slowly(Range &range, const T *values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float v = one_float(values[i]);
        const bool finite = v - v == 0.0f;
        range.nonfinite += !finite;
        if (finite && v < range.minimum) range.minimum = v;
        if (finite && v > range.maximum) range.maximum = v;
    }
}

// The last `count` values, filled up with the first of them: that changes no minimum or maximum.
template <class T>
UBGEN_INLINE F load_last(const T *values, int64_t count) {
    T last[kLanes];
    for (int k = 0; k < kLanes; ++k) last[k] = values[k < count ? k : 0];
    return load(last);
}

// A run of `count` values, interleaved as the bytes are.
template <class T>
void flat_run(const T *values, int64_t count, uint8_t *bytes, Range &range) {
    Statistics chains[kChains];
    int64_t i = 0;
    for (; i + kChains * kLanes <= count; i += kChains * kLanes)
        for (int k = 0; k < kChains; ++k) {
            const F v = load(values + i + k * kLanes);
            notice(chains[k], v);
            store_bytes(bytes + i + k * kLanes, to_bytes(v));
        }
    for (; i < count; i += kLanes) {
        const int64_t rest = count - i < kLanes ? count - i : kLanes;
        const F v = load_last(values + i, rest);
        notice(chains[0], v);
        uint8_t last[kLanes];
        store_bytes(last, to_bytes(v));
        std::memcpy(bytes + i, last, rest);
    }
    if (!merge(range, chains)) merge_slowly(range, values, count);
}

// A run of `count` pixels of three planes.
template <class T>
void planar_run(const T *red, const T *green, const T *blue, int64_t count, uint8_t *bytes, Range &range) {
    Statistics chains[3];
    const auto notice_all = [&](F r, F g, F b) {
        notice(chains[0], r);
        notice(chains[1], g);
        notice(chains[2], b);
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const F r = load(red + i), g = load(green + i), b = load(blue + i);
        notice_all(r, g, b);
        store_rgb(bytes + 3 * i, to_bytes(r), to_bytes(g), to_bytes(b));
    }
    if (i < count) {
        const int64_t rest = count - i;
        const F r = load_last(red + i, rest), g = load_last(green + i, rest), b = load_last(blue + i, rest);
        notice_all(r, g, b);
        uint8_t last[3 * kLanes];
        store_rgb(last, to_bytes(r), to_bytes(g), to_bytes(b));
        std::memcpy(bytes + 3 * i, last, 3 * rest);
    }
    if (merge(range, chains)) return;
    for (const T *plane : {red, green, blue}) merge_slowly(range, plane, count);
}

template <class T>
void planar_strip(const T *red, const T *green, const T *blue, int64_t count, uint8_t *bytes, Range &range) {
    for (int64_t i = 0; i < count; i += kRun)
        planar_run(red + i, green + i, blue + i, kRun < count - i ? kRun : count - i, bytes + 3 * i, range);
}

#if UBGEN_PACKED
// Of bfloat16 as they lie in memory: as integers the positive ones are in order, the negative ones in reverse. Half as
// many vectors as of floats.
struct Extremes {
    I signed_max = packed(-0x8000), unsigned_max = packed(0), unsigned_min = packed(0xffff);

    UBGEN_INLINE void add(I v) { add({v, v, v}); }
    UBGEN_INLINE void add(const Extremes &other) {
        signed_max = max_signed(other.signed_max, signed_max);
        unsigned_max = max_unsigned(other.unsigned_max, unsigned_max);
        unsigned_min = min_unsigned(other.unsigned_min, unsigned_min);
    }
    // Everything lies between -128 and 128: nothing is infinite or NaN, and 255 times it fits into 16 bits.
    UBGEN_INLINE bool below_128() const {
        const I limit = packed(0x42ff), sign = packed(0x8000);  // the last bfloat16 below 128
        return !any_signed_above(signed_max, limit) && !any_signed_above(unsigned_max ^ sign, limit);
    }
    void into(Range &range) const {  // of no values at all both are NaN, which is neither below nor above
        BFloat16 a[2 * kLanes], b[2 * kLanes], c[2 * kLanes];
        store_packed(a, signed_max);
        store_packed(b, unsigned_max);
        store_packed(c, unsigned_min);
        for (int k = 0; k < 2 * kLanes; ++k) {
            const bool all_negative = a[k].bits & 0x8000, some_negative = b[k].bits & 0x8000;
            const float high = one_float(all_negative ? c[k] : a[k]), low = one_float(some_negative ? b[k] : c[k]);
            range.minimum = low < range.minimum ? low : range.minimum;
            range.maximum = high > range.maximum ? high : range.maximum;
        }
    }
};

// 255 times each, rounded: a product of two 8-bit numbers is exact, so that to add kRound rounds it only once, and the
// integer is in the low half.
UBGEN_INLINE I to_integers(F v) { return bits(fma(v, broadcast(255.0f), broadcast(kRound))); }

// Whole vectors as if every value lay between -128 and 128; a run where that was not so is done again, as any other.
UBGEN_INLINE void planar_strip(const BFloat16 *red, const BFloat16 *green, const BFloat16 *blue, int64_t count,
                               uint8_t *bytes, Range &range) {
    Extremes all;
    const int64_t whole = count - count % (2 * kLanes);
    for (int64_t begin = 0; begin < whole; begin += kRun) {
        const int64_t end = kRun < whole - begin ? begin + kRun : whole;
        Extremes chains[3];
        for (int64_t i = begin; i < end; i += 2 * kLanes) {
            const I r = load_packed(red + i), g = load_packed(green + i), b = load_packed(blue + i);
            chains[0].add(r);
            chains[1].add(g);
            chains[2].add(b);
            const I even[] = {to_integers(even_floats(r)), to_integers(even_floats(g)), to_integers(even_floats(b))};
            const I odd[] = {to_integers(odd_floats(r)), to_integers(odd_floats(g)), to_integers(odd_floats(b))};
            store_rgb(bytes + 3 * i, even, odd);
        }
        chains[0].add(chains[1]);
        chains[0].add(chains[2]);
        if (chains[0].below_128())
            all.add(chains[0]);
        else
            planar_run(red + begin, green + begin, blue + begin, end - begin, bytes + 3 * begin, range);
    }
    all.into(range);
    planar_run(red + whole, green + whole, blue + whole, count - whole, bytes + 3 * whole, range);
}
#endif

template <class T>
Range quantise_typed(int layout, const T *image, int64_t area, int64_t begin, int64_t end, uint8_t *pixels) {
    Range range = {__builtin_inff(), -__builtin_inff(), 0};
    if (layout == UBGEN_NHWC) {
        for (int64_t i = begin; i < end; i += kRun)
            flat_run(image + 3 * i, 3 * (kRun < end - i ? kRun : end - i), pixels + 3 * i, range);
    } else {
        const T *red = image + begin;
        planar_strip(red, red + area, red + 2 * area, end - begin, pixels + 3 * begin, range);
    }
    return range;
}

Range quantise(int dtype, int layout, const void *image, int64_t area, int64_t begin, int64_t end, uint8_t *pixels) {
    return typed(dtype, image,
                 [&](const auto *p) { return quantise_typed(layout, p, area, begin, end, pixels); });
}

}  // namespace UBGEN_ISA
}  // namespace ubgen
