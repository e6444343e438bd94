// One pass over memory instead of one per arithmetic operation. Built with -ffp-contract=off: a fused multiply-add
// would round once where the reference rounds twice.
#include "ubgen/kernels.h"

#include <algorithm>

// One copy of the loop per instruction set, chosen when the library is loaded: the build machine's CPU does not matter.
#if defined(UBGEN_HAVE_TARGET_CLONES)
#define UBGEN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define UBGEN_CLONES
#endif

namespace {

constexpr int64_t kBlock = 1 << 14;  // elements per task: 64 KiB per array, large against the cost of a task

struct Step {
    const float *x, *e_uncond, *e_cond;
    const float *history[UBGEN_MAX_HISTORY];
    float weights[1 + UBGEN_MAX_HISTORY];
    float a, b, guidance;
    float *x_next, *e;
};

template <int N>
__attribute__((always_inline)) inline void run_block(const Step &s, int64_t begin, int64_t end) {
    const float *__restrict x = s.x, *__restrict u = s.e_uncond, *__restrict c = s.e_cond;
    const float *__restrict h0 = s.history[0], *__restrict h1 = s.history[1], *__restrict h2 = s.history[2];
    const float w0 = s.weights[0], w1 = s.weights[1], w2 = s.weights[2], w3 = s.weights[3];
    const float a = s.a, b = s.b, guidance = s.guidance;
    float *__restrict x_next = s.x_next, *__restrict e_out = s.e;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
        const float e = u[i] + guidance * (c[i] - u[i]);
        float sum = w0 * e;
        if (N > 0) sum += w1 * h0[i];
        if (N > 1) sum += w2 * h1[i];
        if (N > 2) sum += w3 * h2[i];
        e_out[i] = e;
        x_next[i] = a * x[i] + b * sum;
    }
}

UBGEN_CLONES void run_block_with(const Step &s, int history_count, int64_t begin, int64_t end) {
    switch (history_count) {
        case 0: return run_block<0>(s, begin, end);
        case 1: return run_block<1>(s, begin, end);
        case 2: return run_block<2>(s, begin, end);
        default: return run_block<3>(s, begin, end);
    }
}

}  // namespace

extern "C" int ubgen_guided_step_f32(const float *x, const float *e_uncond, const float *e_cond,
                                     const float *const *history, int history_count, const float *weights, float a,
                                     float b, float guidance, float *x_next, float *e, int64_t count, int threads) {
    if (count < 0 || history_count < 0 || history_count > UBGEN_MAX_HISTORY) return UBGEN_BAD_ARGUMENT;
    Step step = {x, e_uncond, e_cond, {}, {}, a, b, guidance, x_next, e};
    std::copy_n(history, history_count, step.history);
    std::copy_n(weights, 1 + history_count, step.weights);
    const int64_t blocks = (count + kBlock - 1) / kBlock;
    const int team = static_cast<int>(std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(blocks, 1)));
    (void)team;  // unused without OpenMP
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t block = 0; block < blocks; ++block)
        run_block_with(step, history_count, block * kBlock, std::min(count, (block + 1) * kBlock));
    return UBGEN_OK;
}
