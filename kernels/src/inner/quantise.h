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
void merge_slowly(Range &range, const T *values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        float v[kLanes];
        store(v, load_some(values + i, 1));
        const bool finite = v[0] - v[0] == 0.0f;
        range.nonfinite += !finite;
        if (finite && v[0] < range.minimum) range.minimum = v[0];
        if (finite && v[0] > range.maximum) range.maximum = v[0];
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
Range quantise_typed(int layout, const T *image, int64_t area, int64_t begin, int64_t end, uint8_t *pixels) {
    Range range = {__builtin_inff(), -__builtin_inff(), 0};
    for (int64_t i = begin; i < end; i += kRun) {
        const int64_t count = i + kRun < end ? kRun : end - i;
        if (layout == UBGEN_NHWC) {
            flat_run(image + 3 * i, 3 * count, pixels + 3 * i, range);
        } else {
            planar_run(image + i, image + area + i, image + 2 * area + i, count, pixels + 3 * i, range);
        }
    }
    return range;
}

Range quantise(int dtype, int layout, const void *image, int64_t area, int64_t begin, int64_t end, uint8_t *pixels) {
    return typed(dtype, image,
                 [&](const auto *p) { return quantise_typed(layout, p, area, begin, end, pixels); });
}

}  // namespace UBGEN_ISA
}  // namespace ubgen
