// One pass over memory instead of one per arithmetic operation. Multiplications and additions stay apart (built with
// -ffp-contract=off): a fused one would round once where the reference rounds twice.
#include "ubgen/kernels.h"

namespace {

constexpr int64_t kParallel = 1 << 15;  // fewer elements than this are done before a second thread has woken up

struct Step {
    const float *x, *e_uncond, *e_cond;
    const float *const *history;
    const float *weights;
    float a, b, guidance;
    float *x_next, *e;
};

// The number of histories is fixed at compile time, so that the loop becomes vector instructions.
template <int History>
void update(const Step &step, int64_t count, int threads) {
    const float *__restrict x = step.x, *__restrict u = step.e_uncond, *__restrict c = step.e_cond;
    const float *h[UBGEN_MAX_HISTORY] = {};
    float w[1 + UBGEN_MAX_HISTORY] = {step.weights[0]};
    for (int k = 0; k < History; ++k) h[k] = step.history[k], w[1 + k] = step.weights[1 + k];
    const float *__restrict h0 = h[0], *__restrict h1 = h[1], *__restrict h2 = h[2];
    const float a = step.a, b = step.b, guidance = step.guidance, w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    float *__restrict x_next = step.x_next, *__restrict e_out = step.e;
    (void)threads;  // unused without OpenMP
#pragma omp parallel for simd schedule(static) num_threads(threads) if (parallel : threads > 1 && count >= kParallel)
    for (int64_t i = 0; i < count; ++i) {
        const float e = u[i] + guidance * (c[i] - u[i]);
        float sum = w0 * e;
        if (History > 0) sum = sum + w1 * h0[i];
        if (History > 1) sum = sum + w2 * h1[i];
        if (History > 2) sum = sum + w3 * h2[i];
        e_out[i] = e;
        x_next[i] = a * x[i] + b * sum;
    }
}

}  // namespace

extern "C" int ubgen_guided_step_f32(const float *x, const float *e_uncond, const float *e_cond,
                                     const float *const *history, int history_count, const float *weights, float a,
                                     float b, float guidance, float *x_next, float *e, int64_t count, int threads) {
    if (count < 0) return UBGEN_BAD_ARGUMENT;
    const Step step = {x, e_uncond, e_cond, history, weights, a, b, guidance, x_next, e};
    switch (history_count) {
        case 0: update<0>(step, count, threads); break;
        case 1: update<1>(step, count, threads); break;
        case 2: update<2>(step, count, threads); break;
        case 3: update<3>(step, count, threads); break;
        default: return UBGEN_BAD_ARGUMENT;
    }
    return UBGEN_OK;
}
