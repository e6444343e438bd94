// What the CUDA kernels share: element types, 16-byte accesses, launches, errors.
#ifndef UBGEN_DEVICE_CUH
#define UBGEN_DEVICE_CUH

#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "ubgen/kernels.h"

#if defined(__CUDACC__)
#define UBGEN_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
    kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define UBGEN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "cuda_on_cpu.h"  // the tests run the kernels on a CPU
#endif

namespace ubgen {

inline thread_local const char *last_error = "no error";

// The status of the launches so far.
inline int finish() {
    const cudaError_t status = cudaGetLastError();
    if (status == cudaSuccess) return UBGEN_OK;
    last_error = cudaGetErrorString(status);
    return UBGEN_CUDA_ERROR;
}

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
    T v[N];
};

template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load(const T *p) {
    return *reinterpret_cast<const Pack<T, N> *>(p);
}
template <class T, int N>
__device__ __forceinline__ void store(T *p, const Pack<T, N> &pack) {
    *reinterpret_cast<Pack<T, N> *>(p) = pack;
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void from_float(float v, float &to) { to = v; }
__device__ __forceinline__ void from_float(float v, __half &to) { to = __float2half_rn(v); }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16 &to) { to = __float2bfloat16_rn(v); }

inline bool aligned(const void *pointer) { return reinterpret_cast<std::size_t>(pointer) % 16 == 0; }
inline bool is_dtype(int dtype) { return dtype == UBGEN_F32 || dtype == UBGEN_F16 || dtype == UBGEN_BF16; }
inline bool is_layout(int layout) { return layout == UBGEN_NCHW || layout == UBGEN_NHWC; }

// body(a value of the element type), for its type alone.
template <class Body>
int typed(int dtype, Body body) {
    switch (dtype) {
        case UBGEN_F32: return body(float());
        case UBGEN_F16: return body(__half());
        case UBGEN_BF16: return body(__nv_bfloat16());
        default: return UBGEN_BAD_ARGUMENT;
    }
}

}  // namespace ubgen

#endif
