#include <algorithm>
#include <limits>
#include <memory>
#include <new>

#include "inner/inner.h"

namespace {

constexpr int64_t kStrip = 1 << 14;  // pixels per task: a multiple of every vector and of the runs inside

}  // namespace

extern "C" int ubgen_quantise(int dtype, int layout, const void *images, int64_t batch, int64_t height, int64_t width,
                              uint8_t *pixels, float *minimum, float *maximum, int64_t *nonfinite, int threads) {
    if (!ubgen::is_dtype(dtype) || !ubgen::is_layout(layout) || batch < 0 || height < 0 || width < 0)
        return UBGEN_BAD_ARGUMENT;
    const int64_t area = height * width, strips = (area + kStrip - 1) / kStrip, tasks = batch * strips;
    const std::unique_ptr<ubgen::Range[]> ranges(new (std::nothrow) ubgen::Range[tasks]);
    if (!ranges) return UBGEN_NO_MEMORY;
    const ubgen::Inner &inner = ubgen::inner();
    const char *bytes = static_cast<const char *>(images);
    const int team = static_cast<int>(std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(tasks, 1)));
    (void)team;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t image = task / strips, begin = task % strips * kStrip, offset = 3 * area * image;
        ranges[task] = inner.quantise(dtype, layout, bytes + offset * ubgen::dtype_bytes(dtype), area, begin,
                                      std::min(area, begin + kStrip), pixels + offset);
    }
    for (int64_t image = 0; image < batch; ++image) {
        ubgen::Range whole = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), 0};
        for (int64_t strip = 0; strip < strips; ++strip) {
            const ubgen::Range &part = ranges[image * strips + strip];
            whole.minimum = std::min(whole.minimum, part.minimum);
            whole.maximum = std::max(whole.maximum, part.maximum);
            whole.nonfinite += part.nonfinite;
        }
        minimum[image] = whole.minimum;
        maximum[image] = whole.maximum;
        nonfinite[image] = whole.nonfinite;
    }
    return UBGEN_OK;
}
