// The CUDA twin of guided_step.cpp: same expression, same rounding (built with --fmad=false).
#include <algorithm>

#include "device.cuh"

namespace ubgen {
namespace {

template <class T>
struct Step {
    const T *x, *u, *c, *z, *h[UBGEN_MAX_HISTORY];
    int history_count;
    float weights[1 + UBGEN_MAX_HISTORY];
    float a, b, guidance, s;
    T *x_next, *e;
};

// The update reads up to 28 and writes 8 bytes per float32 element and computes almost nothing, so all loads come
// first. What is absent is the same for every thread: those branches cost nothing.
template <class T, int N>
__device__ __forceinline__ void update(const Step<T> &s, int64_t i) {
    const Pack<T, N> x = load<T, N>(s.x + i), u = load<T, N>(s.u + i);
    Pack<T, N> c = u, z = u, h[UBGEN_MAX_HISTORY] = {u, u, u};
    if (s.c) c = load<T, N>(s.c + i);
#pragma unroll
    for (int k = 0; k < UBGEN_MAX_HISTORY; ++k)
        if (k < s.history_count) h[k] = load<T, N>(s.h[k] + i);
    if (s.z) z = load<T, N>(s.z + i);
    Pack<T, N> x_next, guided;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        float e = to_float(u.v[j]);
        if (s.c) e = e + s.guidance * (to_float(c.v[j]) - e);
        float sum = s.weights[0] * e;
#pragma unroll
        for (int k = 0; k < UBGEN_MAX_HISTORY; ++k)
            if (k < s.history_count) sum = sum + s.weights[1 + k] * to_float(h[k].v[j]);
        float next = s.a * to_float(x.v[j]) + s.b * sum;
        if (s.z) next = next + s.s * to_float(z.v[j]);
        from_float(next, x_next.v[j]);
        from_float(e, guided.v[j]);
    }
    store<T, N>(s.x_next + i, x_next);
    if (s.c) store<T, N>(s.e + i, guided);
}

// `packs` packs of N, then what is left, one element a thread.
template <class T, int N>
__global__ void guided_step_kernel(const Step<T> s, int64_t packs, int64_t count) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = first; i < packs; i += stride) update<T, N>(s, i * N);
    for (int64_t i = packs * N + first; i < count; i += stride) update<T, 1>(s, i);
}

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2048;

template <class T>
int launch(const Step<T> &s, int64_t count, void *stream) {
    bool vector = aligned(s.x) && aligned(s.u) && aligned(s.c) && aligned(s.z) && aligned(s.x_next) && aligned(s.e);
    for (int k = 0; k < s.history_count; ++k) vector = vector && aligned(s.h[k]);
    const int64_t packs = vector ? count / kPack<T> : 0;
    const int64_t items = std::max(packs, count - packs * kPack<T>);
    if (items == 0) return UBGEN_OK;
    const int blocks = static_cast<int>(std::min((items + kThreads - 1) / kThreads, kMaxBlocks));
    const auto kernel = guided_step_kernel<T, kPack<T>>;
    UBGEN_LAUNCH(kernel, blocks, kThreads, 0, stream, s, packs, count);
    return finish();
}

}  // namespace
}  // namespace ubgen

extern "C" const char *ubgen_cuda_error(void) { return ubgen::last_error; }

extern "C" int ubgen_guided_step_cuda(int dtype, const void *x, const void *e_uncond, const void *e_cond,
                                      const void *const *history, int history_count, const void *noise,
                                      const float *weights, float a, float b, float guidance, float s, void *x_next,
                                      void *e, int64_t count, void *stream) {
    if (count < 0 || history_count < 0 || history_count > UBGEN_MAX_HISTORY) return UBGEN_BAD_ARGUMENT;
    return ubgen::typed(dtype, [&](auto element) {
        using T = decltype(element);
        ubgen::Step<T> step = {};
        step.x = static_cast<const T *>(x);
        step.u = static_cast<const T *>(e_uncond);
        step.c = static_cast<const T *>(e_cond);
        step.z = static_cast<const T *>(noise);
        for (int k = 0; k < history_count; ++k) step.h[k] = static_cast<const T *>(history[k]);
        step.history_count = history_count;
        for (int k = 0; k <= history_count; ++k) step.weights[k] = weights[k];
        step.a = a;
        step.b = b;
        step.guidance = guidance;
        step.s = s;
        step.x_next = static_cast<T *>(x_next);
        step.e = static_cast<T *>(e);
        return ubgen::launch(step, count, stream);
    });
}
