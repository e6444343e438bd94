// Enough of CUDA to run the kernel's own source on a CPU, for tests on machines without a GPU: every thread of every
// block in turn. It shows wrong indices and wrong arithmetic, but nothing about speed or about what nvcc makes of it.
#ifndef UBGEN_CUDA_ON_CPU_H
#define UBGEN_CUDA_ON_CPU_H

#include <cuda_runtime_api.h>
#include <vector_types.h>

#undef __global__
#undef __device__
#undef __forceinline__
#define __global__
#define __device__
#define __forceinline__ inline

inline uint3 threadIdx, blockIdx, blockDim, gridDim;

#define UBGEN_LAUNCH(kernel, blocks, threads, stream, ...)                              \
    do {                                                                                \
        (void)(stream);                                                                 \
        gridDim.x = static_cast<unsigned int>(blocks), blockDim.x = threads;            \
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)                      \
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(__VA_ARGS__); \
    } while (false)

// The library's two calls: nothing links against CUDA.
extern "C" {
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "none"; }
}

#endif
