// Sums in double precision: no cancellation to speak of, and still faster than memory.
#include "inner.h"
#include "simd.h"

namespace ubgen {
namespace UBGEN_ISA {

constexpr int kRows = 8;  // rows of a channels-last image whose columns are summed before the sums are touched

UBGEN_INLINE double total(Doubles d) {
    double lanes[kLanes], sum = 0;
    store(lanes, d);
    for (double lane : lanes) sum += lane;
    return sum;
}

UBGEN_INLINE F norm_silu_of(F x, F mean, F scale, F shift) {
    const F minus_v = fma(x - mean, scale, shift);  // the sign saves one operation
    return minus_v / (broadcast(-1.0f) - exp(minus_v));
}

template <class T>
void sums_typed(const T *x, int64_t count, double *sum, double *square) {
    Doubles s[2] = {zero_doubles(), zero_doubles()}, q[2] = {zero_doubles(), zero_doubles()};
    int64_t i = 0;
    const auto take = [&](int k, F v) {
        const Doubles d = widen(v);
        s[k] = add(s[k], d);
        q[k] = add_square(q[k], d);
    };
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        take(0, load(x + i));
        take(1, load(x + i + kLanes));
    }
    for (; i < count; i += kLanes) take(0, load_some(x + i, count - i < kLanes ? count - i : kLanes));
    *sum = total(add(s[0], s[1]));
    *square = total(add(q[0], q[1]));
}

template <class T>
void column_sums_typed(const T *x, int64_t rows, int64_t channels, double *sums, double *squares) {
    for (int64_t row = 0; row < rows; row += kRows) {
        const int64_t count = rows - row < kRows ? rows - row : kRows;
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) {
            Doubles s = load(sums + c), q = load(squares + c);
            for (int64_t k = 0; k < count; ++k) {
                const Doubles d = widen(load(x + (row + k) * channels + c));
                s = add(s, d);
                q = add_square(q, d);
            }
            store(sums + c, s);
            store(squares + c, q);
        }
        if (c == channels) continue;
        for (int64_t k = 0; k < count; ++k) {
            double values[kLanes];
            store(values, widen(load_some(x + (row + k) * channels + c, channels - c)));
            for (int64_t j = c; j < channels; ++j) {
                sums[j] += values[j - c];
                squares[j] += values[j - c] * values[j - c];
            }
        }
    }
}

template <class T>
void norm_silu_typed(const T *x, int64_t count, float mean, float scale, float shift, void *to) {
    T *y = static_cast<T *>(to);
    const F m = broadcast(mean), s = broadcast(scale), t = broadcast(shift);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(y + i, norm_silu_of(load(x + i), m, s, t));
    if (i < count) store_some(y + i, norm_silu_of(load_some(x + i, count - i), m, s, t), count - i);
}

template <class T>
void column_norm_silu_typed(const T *x, int64_t rows, int64_t channels, const float *mean, const float *scale,
                            const float *shift, void *to) {
    T *y = static_cast<T *>(to);
    for (int64_t row = 0; row < rows; ++row, x += channels, y += channels) {
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes)
            store(y + c, norm_silu_of(load(x + c), load(mean + c), load(scale + c), load(shift + c)));
        if (c == channels) continue;
        const int64_t rest = channels - c;
        store_some(y + c,
                   norm_silu_of(load_some(x + c, rest), load_some(mean + c, rest), load_some(scale + c, rest),
                                load_some(shift + c, rest)),
                   rest);
    }
}

void sums(int dtype, const void *x, int64_t count, double *sum, double *square) {
    typed(dtype, x, [&](const auto *p) { sums_typed(p, count, sum, square); });
}
void column_sums(int dtype, const void *x, int64_t rows, int64_t channels, double *sums, double *squares) {
    typed(dtype, x, [&](const auto *p) { column_sums_typed(p, rows, channels, sums, squares); });
}
void norm_silu(int dtype, const void *x, int64_t count, float mean, float scale, float shift, void *y) {
    typed(dtype, x, [&](const auto *p) { norm_silu_typed(p, count, mean, scale, shift, y); });
}
void column_norm_silu(int dtype, const void *x, int64_t rows, int64_t channels, const float *mean, const float *scale,
                      const float *shift, void *y) {
    typed(dtype, x, [&](const auto *p) { column_norm_silu_typed(p, rows, channels, mean, scale, shift, y); });
}

}  // namespace UBGEN_ISA
}  // namespace ubgen
