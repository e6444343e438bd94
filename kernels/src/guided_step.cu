// The CUDA twin of guided_step.cpp: same expression, same rounding (built with --fmad=false).
#include "ubgen/kernels.h"

#include <algorithm>
#include <cstddef>
#include <cuda_runtime_api.h>

namespace {

thread_local const char *last_error = "no error";

struct Step {
    const float *x, *e_uncond, *e_cond;
    const float *history[UBGEN_MAX_HISTORY];
    float weights[1 + UBGEN_MAX_HISTORY];
    float a, b, guidance;
    float *x_next, *e;
};

template <int N>
__device__ __forceinline__ void update(const Step &s, float x, float u, float c, const float (&h)[UBGEN_MAX_HISTORY],
                                       float &x_next, float &e) {
    e = u + s.guidance * (c - u);
    float sum = s.weights[0] * e;
#pragma unroll
    for (int k = 0; k < N; ++k) sum += s.weights[1 + k] * h[k];
    x_next = s.a * x + s.b * sum;
}

// The update reads up to 24 and writes 8 bytes per element and computes almost nothing: 16-byte accesses, and a
// grid-stride loop so that any count works with a grid of one wave or less.
template <int N>
__global__ void guided_step_vector(const Step s, int64_t vectors) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += stride) {
        const float4 x = reinterpret_cast<const float4 *>(s.x)[i];
        const float4 u = reinterpret_cast<const float4 *>(s.e_uncond)[i];
        const float4 c = reinterpret_cast<const float4 *>(s.e_cond)[i];
        float4 h[UBGEN_MAX_HISTORY] = {};
#pragma unroll
        for (int k = 0; k < N; ++k) h[k] = reinterpret_cast<const float4 *>(s.history[k])[i];
        float4 next, e;
        update<N>(s, x.x, u.x, c.x, {h[0].x, h[1].x, h[2].x}, next.x, e.x);
        update<N>(s, x.y, u.y, c.y, {h[0].y, h[1].y, h[2].y}, next.y, e.y);
        update<N>(s, x.z, u.z, c.z, {h[0].z, h[1].z, h[2].z}, next.z, e.z);
        update<N>(s, x.w, u.w, c.w, {h[0].w, h[1].w, h[2].w}, next.w, e.w);
        reinterpret_cast<float4 *>(s.x_next)[i] = next;
        reinterpret_cast<float4 *>(s.e)[i] = e;
    }
}

template <int N>
__global__ void guided_step_scalar(const Step s, int64_t begin, int64_t count) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = begin + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        float h[UBGEN_MAX_HISTORY] = {};
#pragma unroll
        for (int k = 0; k < N; ++k) h[k] = s.history[k][i];
        update<N>(s, s.x[i], s.e_uncond[i], s.e_cond[i], h, s.x_next[i], s.e[i]);
    }
}

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2048;

int blocks_for(int64_t items) { return static_cast<int>(std::min((items + kThreads - 1) / kThreads, kMaxBlocks)); }

bool aligned(const void *pointer) { return reinterpret_cast<std::size_t>(pointer) % sizeof(float4) == 0; }

template <int N>
void launch(const Step &s, int64_t count, cudaStream_t stream) {
    bool vector = aligned(s.x) && aligned(s.e_uncond) && aligned(s.e_cond) && aligned(s.x_next) && aligned(s.e);
    for (int k = 0; k < N; ++k) vector = vector && aligned(s.history[k]);
    const int64_t vectors = vector ? count / 4 : 0;
    if (vectors > 0) guided_step_vector<N><<<blocks_for(vectors), kThreads, 0, stream>>>(s, vectors);
    const int64_t rest = count - 4 * vectors;
    if (rest > 0) guided_step_scalar<N><<<blocks_for(rest), kThreads, 0, stream>>>(s, 4 * vectors, count);
}

}  // namespace

extern "C" const char *ubgen_cuda_error(void) { return last_error; }

extern "C" int ubgen_guided_step_f32_cuda(const float *x, const float *e_uncond, const float *e_cond,
                                          const float *const *history, int history_count, const float *weights, float a,
                                          float b, float guidance, float *x_next, float *e, int64_t count,
                                          void *stream) {
    if (count < 0 || history_count < 0 || history_count > UBGEN_MAX_HISTORY) return UBGEN_BAD_ARGUMENT;
    Step step = {x, e_uncond, e_cond, {}, {}, a, b, guidance, x_next, e};
    for (int k = 0; k < history_count; ++k) step.history[k] = history[k];
    for (int k = 0; k <= history_count; ++k) step.weights[k] = weights[k];
    const auto queue = static_cast<cudaStream_t>(stream);
    switch (history_count) {
        case 0: launch<0>(step, count, queue); break;
        case 1: launch<1>(step, count, queue); break;
        case 2: launch<2>(step, count, queue); break;
        default: launch<3>(step, count, queue); break;
    }
    const cudaError_t status = cudaGetLastError();
    if (status == cudaSuccess) return UBGEN_OK;
    last_error = cudaGetErrorString(status);
    return UBGEN_CUDA_ERROR;
}
