// The CUDA twin of guided_step.cpp: same expression, same rounding (built with --fmad=false).
#include <algorithm>
#include <cstdint>
#include <cuda_runtime_api.h>

#include "ubgen/kernels.h"

#if defined(__CUDACC__)
#define UBGEN_LAUNCH(kernel, blocks, threads, stream, ...) \
    kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "cuda_on_cpu.h"  // the tests run the kernel on a CPU
#endif

namespace {

constexpr int kPack = 4;  // 16 bytes
constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2048;
thread_local const char *last_error = "no error";

struct Step {
    const float *x, *u, *c, *h[UBGEN_MAX_HISTORY];
    int history_count;
    float weights[1 + UBGEN_MAX_HISTORY];
    float a, b, guidance;
    float *x_next, *e;
};

template <int N>
struct alignas(N * sizeof(float)) Pack {
    float v[N];
};

template <int N>
__device__ __forceinline__ Pack<N> load(const float *p) {
    return *reinterpret_cast<const Pack<N> *>(p);
}

// The update reads up to 24 and writes 8 bytes per element and computes almost nothing, so all loads come first. The
// number of histories is the same for every thread: its branches cost nothing.
template <int N>
__device__ __forceinline__ void update(const Step &s, int64_t i) {
    const Pack<N> x = load<N>(s.x + i), u = load<N>(s.u + i), c = load<N>(s.c + i);
    Pack<N> h[UBGEN_MAX_HISTORY] = {u, u, u}, x_next, e;
#pragma unroll
    for (int k = 0; k < UBGEN_MAX_HISTORY; ++k)
        if (k < s.history_count) h[k] = load<N>(s.h[k] + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
        e.v[j] = u.v[j] + s.guidance * (c.v[j] - u.v[j]);
        float sum = s.weights[0] * e.v[j];
#pragma unroll
        for (int k = 0; k < UBGEN_MAX_HISTORY; ++k)
            if (k < s.history_count) sum = sum + s.weights[1 + k] * h[k].v[j];
        x_next.v[j] = s.a * x.v[j] + s.b * sum;
    }
    *reinterpret_cast<Pack<N> *>(s.x_next + i) = x_next;
    *reinterpret_cast<Pack<N> *>(s.e + i) = e;
}

// `packs` packs, then what is left, one element a thread.
__global__ void guided_step_kernel(const Step s, int64_t packs, int64_t count) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = first; i < packs; i += stride) update<kPack>(s, i * kPack);
    for (int64_t i = packs * kPack + first; i < count; i += stride) update<1>(s, i);
}

bool aligned(const void *pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % sizeof(Pack<kPack>) == 0; }

}  // namespace

extern "C" const char *ubgen_cuda_error(void) { return last_error; }

extern "C" int ubgen_guided_step_f32_cuda(const float *x, const float *e_uncond, const float *e_cond,
                                          const float *const *history, int history_count, const float *weights, float a,
                                          float b, float guidance, float *x_next, float *e, int64_t count,
                                          void *stream) {
    if (count < 0 || history_count < 0 || history_count > UBGEN_MAX_HISTORY) return UBGEN_BAD_ARGUMENT;
    Step step = {x, e_uncond, e_cond, {}, history_count, {}, a, b, guidance, x_next, e};
    std::copy_n(history, history_count, step.h);
    std::copy_n(weights, 1 + history_count, step.weights);
    bool vector = aligned(x) && aligned(e_uncond) && aligned(e_cond) && aligned(x_next) && aligned(e);
    for (int k = 0; k < history_count; ++k) vector = vector && aligned(history[k]);
    const int64_t packs = vector ? count / kPack : 0;
    const int64_t items = std::max(packs, count - packs * kPack);
    if (items == 0) return UBGEN_OK;
    const int blocks = static_cast<int>(std::min((items + kThreads - 1) / kThreads, kMaxBlocks));
    UBGEN_LAUNCH(guided_step_kernel, blocks, kThreads, stream, step, packs, count);
    const cudaError_t status = cudaGetLastError();
    if (status == cudaSuccess) return UBGEN_OK;
    last_error = cudaGetErrorString(status);
    return UBGEN_CUDA_ERROR;
}
