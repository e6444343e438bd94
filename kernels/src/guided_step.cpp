#include <algorithm>

#include "inner/inner.h"

namespace {

constexpr int64_t kBlock = 1 << 14;  // elements per task: 64 KiB per array, large against the cost of a task

}  // namespace

extern "C" int ubgen_guided_step(int dtype, const void *x, const void *e_uncond, const void *e_cond,
                                 const void *const *history, int history_count, const void *noise,
                                 const float *weights, float a, float b, float guidance, float s, void *x_next, void *e,
                                 int64_t count, int threads) {
    if (!ubgen::is_dtype(dtype) || count < 0 || history_count < 0 || history_count > UBGEN_MAX_HISTORY)
        return UBGEN_BAD_ARGUMENT;
    ubgen::GuidedStep step = {x, e_uncond, e_cond, noise, {}, history_count, {}, a, b, guidance, s, x_next, e};
    std::copy_n(history, history_count, step.history);
    std::copy_n(weights, 1 + history_count, step.weights);
    const ubgen::Inner &inner = ubgen::inner();
    const int64_t blocks = (count + kBlock - 1) / kBlock;
    const int team = static_cast<int>(std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(blocks, 1)));
    (void)team;  // unused without OpenMP
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t block = 0; block < blocks; ++block)
        inner.guided_step(dtype, step, block * kBlock, std::min(count, (block + 1) * kBlock));
    return UBGEN_OK;
}
