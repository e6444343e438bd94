// Bytes and statistics in one pass. That a value is infinite or NaN is rare, so the loop only notices it (0 * v is not
// 0 then), and the statistics of that short run are taken again, one value at a time.
#include "inner.h"
#include "simd.h"

namespace ubgen {
namespace UBGEN_ISA {

constexpr int64_t kRun = 1024;  // values, or pixels: a run is in the first-level cache when it is read again

struct Statistics {
    F low, high, poison;
};

UBGEN_INLINE Statistics fresh() {
    return {broadcast(__builtin_inff()), broadcast(-__builtin_inff()), broadcast(0.0f)};
}

UBGEN_INLINE void notice(Statistics &s, F v) {
    s.low = minimum(v, s.low);
    s.high = maximum(v, s.high);
    s.poison = fma(v, broadcast(0.0f), s.poison);
}

UBGEN_INLINE I to_bytes(F v) {  // in the low byte of each lane; NaN fails the first comparison, so it gives 0
    const F unit = minimum(maximum(v, broadcast(0.0f)), broadcast(1.0f));
    return bits(unit * broadcast(255.0f) + broadcast(kRound));
}

UBGEN_INLINE void merge(Range &range, const Statistics &s) {
    float low[kLanes], high[kLanes];
    store(low, s.low);
    store(high, s.high);
    for (int k = 0; k < kLanes; ++k) {
        range.minimum = low[k] < range.minimum ? low[k] : range.minimum;
        range.maximum = high[k] > range.maximum ? high[k] : range.maximum;
    }
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

// A run of `count` values, interleaved as the bytes are.
template <class T>
void flat_run(const T *values, int64_t count, uint8_t *bytes, Range &range) {
    Statistics s = fresh();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const F v = load(values + i);
        notice(s, v);
        store_low_bytes(bytes + i, to_bytes(v));
    }
    if (i < count) {
        T last[kLanes];  // filled up with the first value of the rest, which changes no minimum or maximum
        for (int k = 0; k < kLanes; ++k) last[k] = values[i + (k < count - i ? k : 0)];
        const F v = load(last);
        notice(s, v);
        uint8_t rest[kLanes];
        store_low_bytes(rest, to_bytes(v));
        std::memcpy(bytes + i, rest, count - i);
    }
    any_nan(s.poison) ? merge_slowly(range, values, count) : merge(range, s);
}

// A run of `count` pixels of three planes.
template <class T>
void planar_run(const T *const (&planes)[3], int64_t count, uint8_t *bytes, Range &range) {
    Statistics s = fresh();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const F r = load(planes[0] + i), g = load(planes[1] + i), b = load(planes[2] + i);
        notice(s, r);
        notice(s, g);
        notice(s, b);
        store_rgb(bytes + 3 * i, to_bytes(r), to_bytes(g), to_bytes(b));
    }
    if (i < count) {
        F v[3];
        for (int c = 0; c < 3; ++c) {
            T last[kLanes];
            for (int k = 0; k < kLanes; ++k) last[k] = planes[c][i + (k < count - i ? k : 0)];
            v[c] = load(last);
            notice(s, v[c]);
        }
        uint8_t pixels[3 * kLanes];
        store_rgb(pixels, to_bytes(v[0]), to_bytes(v[1]), to_bytes(v[2]));
        std::memcpy(bytes + 3 * i, pixels, 3 * (count - i));
    }
    if (!any_nan(s.poison)) return merge(range, s);
    for (const T *plane : planes) merge_slowly(range, plane, count);
}

template <class T>
Range quantise_typed(int layout, const T *image, int64_t area, int64_t begin, int64_t end, uint8_t *pixels) {
    Range range = {__builtin_inff(), -__builtin_inff(), 0};
    for (int64_t i = begin; i < end; i += kRun) {
        const int64_t count = i + kRun < end ? kRun : end - i;
        if (layout == UBGEN_NHWC) {
            flat_run(image + 3 * i, 3 * count, pixels + 3 * i, range);
        } else {
            const T *const planes[3] = {image + i, image + area + i, image + 2 * area + i};
            planar_run(planes, count, pixels + 3 * i, range);
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
