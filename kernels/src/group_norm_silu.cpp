#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <new>

#include "inner/inner.h"

namespace {

constexpr int64_t kRows = 64;  // rows of a channels-last image per task

struct Shape {
    int64_t batch, channels, area, groups;
    int64_t group_channels() const { return channels / groups; }
};

struct Moments {
    float mean, rstd;
};

Moments moments(double sum, double square, int64_t count, float eps) {
    const double mean = sum / static_cast<double>(count);
    const double variance = square / static_cast<double>(count) - mean * mean;
    // written so that NaN stays NaN
    return {static_cast<float>(mean), static_cast<float>(1 / std::sqrt((variance < 0 ? 0 : variance) + eps))};
}

// One task a group: its channels lie side by side, and it is read the second time from the cache.
void planar(int dtype, const char *x, const float *weight, const float *bias, const Shape &shape, float eps, char *y,
            int threads) {
    const ubgen::Inner &inner = ubgen::inner();
    const int64_t tasks = shape.batch * shape.groups, count = shape.group_channels() * shape.area;
    const int64_t plane = shape.area * ubgen::dtype_bytes(dtype);
    const int team = static_cast<int>(std::min<int64_t>(threads, tasks));
    (void)team;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t first = task * shape.group_channels();
        double sum, square;
        inner.sums(dtype, x + first * plane, count, &sum, &square);
        const Moments of = moments(sum, square, count, eps);
        for (int64_t k = first; k < first + shape.group_channels(); ++k) {
            const int64_t c = k % shape.channels;
            inner.norm_silu(dtype, x + k * plane, shape.area, of.mean, -of.rstd * weight[c], -bias[c], y + k * plane);
        }
    }
}

// Sums of each column of each strip of rows, then of each group, then the values: three loops with a barrier between.
int channels_last(int dtype, const char *x, const float *weight, const float *bias, const Shape &shape, float eps,
                  char *y, int threads) {
    const ubgen::Inner &inner = ubgen::inner();
    const int64_t strips = (shape.area + kRows - 1) / kRows, tasks = shape.batch * strips, channels = shape.channels;
    const int64_t row = channels * ubgen::dtype_bytes(dtype);
    const std::unique_ptr<double[]> sums(new (std::nothrow) double[tasks * 2 * channels]());
    const std::unique_ptr<float[]> mean(new (std::nothrow) float[shape.batch * channels]);
    const std::unique_ptr<float[]> scale(new (std::nothrow) float[shape.batch * channels]);
    const std::unique_ptr<float[]> shift(new (std::nothrow) float[channels]);
    if (!sums || !mean || !scale || !shift) return UBGEN_NO_MEMORY;
    std::transform(bias, bias + channels, shift.get(), std::negate<float>());
    const int team = static_cast<int>(std::min<int64_t>(threads, tasks));
    (void)team;
#pragma omp parallel num_threads(team) if (team > 1)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t begin = task % strips * kRows, rows = std::min(kRows, shape.area - begin);
            double *to = sums.get() + task * 2 * channels;
            inner.column_sums(dtype, x + (task / strips * shape.area + begin) * row, rows, channels, to, to + channels);
        }
#pragma omp for schedule(static)
        for (int64_t group = 0; group < shape.batch * shape.groups; ++group) {
            const int64_t image = group / shape.groups, first = group % shape.groups * shape.group_channels();
            double sum = 0, square = 0;
            for (int64_t strip = 0; strip < strips; ++strip) {
                const double *from = sums.get() + (image * strips + strip) * 2 * channels;
                for (int64_t c = first; c < first + shape.group_channels(); ++c) {
                    sum += from[c];
                    square += from[channels + c];
                }
            }
            const Moments of = moments(sum, square, shape.group_channels() * shape.area, eps);
            for (int64_t c = first; c < first + shape.group_channels(); ++c) {
                mean[image * channels + c] = of.mean;
                scale[image * channels + c] = -of.rstd * weight[c];
            }
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t image = task / strips, begin = task % strips * kRows;
            const int64_t offset = (image * shape.area + begin) * row, rows = std::min(kRows, shape.area - begin);
            inner.column_norm_silu(dtype, x + offset, rows, channels, mean.get() + image * channels,
                                   scale.get() + image * channels, shift.get(), y + offset);
        }
    }
    return UBGEN_OK;
}

}  // namespace

extern "C" int ubgen_group_norm_silu(int dtype, int layout, const void *x, const float *weight, const float *bias,
                                     int64_t batch, int64_t channels, int64_t area, int64_t groups, float eps, void *y,
                                     int threads) {
    if (!ubgen::is_dtype(dtype) || !ubgen::is_layout(layout) || batch < 0 || channels < 1 || area < 0 || groups < 1 ||
        channels % groups)
        return UBGEN_BAD_ARGUMENT;
    if (batch == 0 || area == 0) return UBGEN_OK;
    const Shape shape = {batch, channels, area, groups};
    const char *from = static_cast<const char *>(x);
    char *to = static_cast<char *>(y);
    threads = std::max(threads, 1);
    if (layout == UBGEN_NHWC) return channels_last(dtype, from, weight, bias, shape, eps, to, threads);
    planar(dtype, from, weight, bias, shape, eps, to, threads);
    return UBGEN_OK;
}
