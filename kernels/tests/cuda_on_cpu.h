// Enough of CUDA to run the kernels' own source on a CPU, for tests on machines without a GPU. It shows wrong indices,
// wrong arithmetic and missing barriers, but nothing about speed or about what nvcc makes of it.
//
// Every thread of a block is a fiber. A fiber runs until a barrier or its end, then the next one does, in the order
// that `reverse` says: a kernel without a barrier that it needs gives a wrong result in one of the two.
#ifndef UBGEN_CUDA_ON_CPU_H
#define UBGEN_CUDA_ON_CPU_H

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <cuda_runtime_api.h>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>
#include <vector_functions.h>

#undef __global__
#undef __device__
#undef __shared__
#undef __forceinline__
#define __global__
#define __device__
#define __shared__ static  // one block runs at a time
#define __forceinline__ inline

#define UBGEN_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
    ((void)(stream), cuda_on_cpu::run(blocks, threads, shared, [=] { kernel(__VA_ARGS__); }))
#define UBGEN_DYNAMIC_SHARED(name) unsigned char *const name = cuda_on_cpu::shared_memory()

namespace cuda_on_cpu {

constexpr std::size_t kStack = 64 * 1024;
constexpr int kWarp = 32;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done = false;
    long exchanges = 0;
    double exchanged[2] = {};  // of the last exchange and the one before: no lane is further ahead of another
};

struct Barrier {
    int running = 0, waiting = 0;
    long opened = 0;
    void open_if_all_wait() {
        if (running == 0 || waiting < running) return;
        waiting = 0;
        ++opened;
    }
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps;
    Barrier all;
    ucontext_t scheduler;
    std::function<void()> kernel;
    std::vector<double> shared;  // double: aligned for everything
    int current = 0;
    uint3 thread{}, index{}, size{}, count{};
    Barrier &warp() { return warps[current / kWarp]; }
};

inline Block *block = nullptr;
inline bool reverse = false;
inline int shared_limit = 48 * 1024;  // what cudaDeviceGetAttribute answers

inline unsigned char *shared_memory() { return reinterpret_cast<unsigned char *>(block->shared.data()); }

inline void enter() {
    block->kernel();
    block->fibers[block->current].done = true;
    for (Barrier *barrier : {&block->all, &block->warp()}) {
        --barrier->running;
        barrier->open_if_all_wait();
    }
}

inline void wait(Barrier &barrier) {
    const long before = barrier.opened;
    ++barrier.waiting;
    barrier.open_if_all_wait();
    while (barrier.opened == before) swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

template <class T>
T exchange(T value, int lane_mask) {
    Fiber &self = block->fibers[block->current];
    const long slot = self.exchanges++ % 2;
    self.exchanged[slot] = static_cast<double>(value);
    wait(block->warp());
    return static_cast<T>(block->fibers[block->current ^ lane_mask].exchanged[slot]);
}

inline void run(int64_t blocks, int threads, std::size_t shared, std::function<void()> kernel) {
    Block here;
    here.fibers = std::vector<Fiber>(threads);
    here.kernel = std::move(kernel);
    here.shared.resize(shared / sizeof(double) + 2);
    std::memset(here.shared.data(), 0xff, here.shared.size() * sizeof(double));  // NaN: what is not written is noticed
    here.size.x = threads;
    here.count.x = static_cast<unsigned int>(blocks);
    block = &here;
    for (here.index.x = 0; here.index.x < blocks; ++here.index.x) {
        here.all = {threads, 0, 0};
        here.warps.assign(threads / kWarp, {kWarp, 0, 0});
        for (Fiber &fiber : here.fibers) {
            fiber.done = false;
            fiber.exchanges = 0;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStack;
            fiber.context.uc_link = &here.scheduler;
            makecontext(&fiber.context, enter, 0);
        }
        for (bool busy = true; busy;) {
            busy = false;
            for (int i = 0; i < threads; ++i) {
                here.current = reverse ? threads - 1 - i : i;
                if (here.fibers[here.current].done) continue;
                here.thread.x = here.current;
                swapcontext(&here.scheduler, &here.fibers[here.current].context);
                busy = busy || !here.fibers[here.current].done;
            }
        }
    }
    block = nullptr;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::block->thread)
#define blockIdx (cuda_on_cpu::block->index)
#define blockDim (cuda_on_cpu::block->size)
#define gridDim (cuda_on_cpu::block->count)

using std::max;
using std::min;

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block->all); }
template <class T>
T __shfl_xor_sync(unsigned int, T value, int lane_mask) {
    return cuda_on_cpu::exchange(value, lane_mask);
}

template <class T>
T atomicMin(T *to, T v) {
    const T old = *to;
    *to = std::min(old, v);
    return old;
}
template <class T>
T atomicMax(T *to, T v) {
    const T old = *to;
    *to = std::max(old, v);
    return old;
}
template <class T>
T atomicAdd(T *to, T v) {
    const T old = *to;
    *to += v;
    return old;
}

inline int __float_as_int(float v) {
    int bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}
inline float __int_as_float(int bits) {
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
inline unsigned int __funnelshift_r(unsigned int low, unsigned int high, unsigned int shift) {
    return static_cast<unsigned int>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __fdividef(float a, float b) { return a / b; }

// The library's few calls: nothing links against CUDA.
extern "C" {
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
    *value = cuda_on_cpu::shared_limit;
    return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
}

#endif
