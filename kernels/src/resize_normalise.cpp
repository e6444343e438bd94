#include <algorithm>
#include <cstdlib>
#include <memory>

#include "inner/inner.h"

namespace {

constexpr int64_t kStrip = 32;  // output rows per task: their source rows, narrowed, fit the second-level cache
constexpr int64_t kAlign = 64;

bool is_axis(const ubgen_axis &axis) {
    if (axis.source < 1 || axis.target < 1 || axis.taps < 1 || axis.taps > axis.source) return false;
    return std::all_of(axis.first, axis.first + axis.target,
                       [&](int32_t first) { return first >= 0 && first <= axis.source - axis.taps; });
}

bool fits(int64_t length, int64_t start, const ubgen_axis &axis) {
    return length >= 1 && start >= 0 && start + length <= axis.source;
}

// The most source rows that a strip needs.
int64_t source_rows(const ubgen_axis &down) {
    int64_t most = 0;
    for (int64_t y = 0; y < down.target; y += kStrip) {
        const auto ends = std::minmax_element(down.first + y, down.first + std::min(y + kStrip, down.target));
        most = std::max<int64_t>(most, *ends.second + down.taps - *ends.first);
    }
    return most;
}

}  // namespace

extern "C" int ubgen_resize_normalise(const uint8_t *pixels, int64_t batch, int64_t height, int64_t width,
                                      const ubgen_axis *across, const ubgen_axis *down, const ubgen_framing *framing,
                                      float *out, int threads) {
    if (batch < 0 || !is_axis(*across) || !is_axis(*down) || !fits(width, framing->left, *across) ||
        !fits(height, framing->top, *down))
        return UBGEN_BAD_ARGUMENT;
    const ubgen::Inner &inner = ubgen::inner();
    const ubgen::Resize resize = {pixels, height, width, *across, *down, *framing, out};
    const int64_t strips = (down->target + kStrip - 1) / kStrip, tasks = batch * strips;
    const int team = static_cast<int>(std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(tasks, 1)));
    const int64_t scratch = (inner.resize_scratch(resize, source_rows(*down)) + kAlign - 1) / kAlign * kAlign;
    const std::unique_ptr<char, void (*)(void *)> memory(
        static_cast<char *>(std::aligned_alloc(kAlign, scratch * team)), std::free);
    if (!memory) return UBGEN_NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t worker = 0; worker < team; ++worker)
        for (int64_t task = tasks * worker / team; task < tasks * (worker + 1) / team; ++task) {
            const int64_t begin = task % strips * kStrip;
            inner.resize(resize, task / strips, begin, std::min(begin + kStrip, down->target),
                         memory.get() + scratch * worker);
        }
    return UBGEN_OK;
}
