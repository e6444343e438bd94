// The CUDA twin of quantise.cpp: same bytes, same statistics.
#include <algorithm>

#include "device.cuh"

namespace ubgen {
namespace {

constexpr int kThreads = 256;
constexpr int kRounds = 4;  // packs per thread: fewer blocks, so fewer of them meet at an image's statistics

struct Statistics {
    float low, high;
    int nonfinite;
};

__device__ __forceinline__ unsigned char take(Statistics &s, float v) {
    if (v - v == 0.0f) {
        s.low = fminf(s.low, v);
        s.high = fmaxf(s.high, v);
    } else {
        ++s.nonfinite;
    }
    // fmaxf returns the other operand for NaN
    return static_cast<unsigned char>(rintf(fminf(fmaxf(v, 0.0f), 1.0f) * 255.0f));
}

// Floats of one sign compare as integers do; of the negative ones the larger integer is the smaller number.
__device__ __forceinline__ void atomic_low(float *to, float v) {
    if (__float_as_int(v) >= 0)
        atomicMin(reinterpret_cast<int *>(to), __float_as_int(v));
    else
        atomicMax(reinterpret_cast<unsigned int *>(to), static_cast<unsigned int>(__float_as_int(v)));
}
__device__ __forceinline__ void atomic_high(float *to, float v) {
    if (__float_as_int(v) >= 0)
        atomicMax(reinterpret_cast<int *>(to), __float_as_int(v));
    else
        atomicMin(reinterpret_cast<unsigned int *>(to), static_cast<unsigned int>(__float_as_int(v)));
}

__device__ void publish(Statistics s, float *minimum, float *maximum, int64_t *nonfinite) {
    for (int lane = 16; lane > 0; lane /= 2) {
        s.low = fminf(s.low, __shfl_xor_sync(0xffffffffu, s.low, lane));
        s.high = fmaxf(s.high, __shfl_xor_sync(0xffffffffu, s.high, lane));
        s.nonfinite += __shfl_xor_sync(0xffffffffu, s.nonfinite, lane);
    }
    if (threadIdx.x % 32 != 0) return;
    if (s.low <= s.high) {  // false where no value was finite
        atomic_low(minimum, s.low);
        atomic_high(maximum, s.high);
    }
    if (s.nonfinite > 0)
        atomicAdd(reinterpret_cast<unsigned long long *>(nonfinite), static_cast<unsigned long long>(s.nonfinite));
}

__global__ void clear(int64_t batch, float *minimum, float *maximum, int64_t *nonfinite) {
    const int64_t image = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (image >= batch) return;
    minimum[image] = __int_as_float(0x7f800000);
    maximum[image] = __int_as_float(static_cast<int>(0xff800000u));
    nonfinite[image] = 0;
}

// One strip of one image of three planes. Bytes meet in shared memory, so that they leave 16 at a time.
template <class T, int N>
__global__ void planar_kernel(const T *images, int64_t area, int strips, unsigned char *pixels, float *minimum,
                              float *maximum, int64_t *nonfinite) {
    constexpr int kRun = kThreads * N;  // pixels
    alignas(16) __shared__ unsigned char bytes[3 * kRun];
    const int64_t image = blockIdx.x / strips, strip = blockIdx.x % strips;
    const T *from = images + image * 3 * area;
    unsigned char *to = pixels + image * 3 * area;
    Statistics s = {__int_as_float(0x7f800000), __int_as_float(static_cast<int>(0xff800000u)), 0};
    for (int round = 0; round < kRounds; ++round) {
        const int64_t first = (strip * kRounds + round) * kRun, mine = first + threadIdx.x * N;
        if (mine < area) {
            Pack<T, N> planes[3];
#pragma unroll
            for (int c = 0; c < 3; ++c) planes[c] = load<T, N>(from + c * area + mine);
            unsigned int words[(3 * N + 3) / 4] = {};
#pragma unroll
            for (int i = 0; i < 3 * N; ++i)
                words[i / 4] |= static_cast<unsigned int>(take(s, to_float(planes[i % 3].v[i / 3]))) << i % 4 * 8;
            unsigned char *here = bytes + threadIdx.x * 3 * N;
            if (N == 1) {
                for (int c = 0; c < 3; ++c) here[c] = static_cast<unsigned char>(words[0] >> 8 * c);
            } else {
#pragma unroll
                for (int i = 0; i < 3 * N / 4; ++i) reinterpret_cast<unsigned int *>(here)[i] = words[i];
            }
        }
        __syncthreads();
        const int64_t left = 3 * (area - first);
        const int count = static_cast<int>(left < 3 * kRun ? (left < 0 ? 0 : left) : 3 * kRun);
        if (N > 1) {  // then area is a multiple of 16
            for (int i = threadIdx.x * 16; i < count; i += kThreads * 16)
                *reinterpret_cast<uint4 *>(to + 3 * first + i) = *reinterpret_cast<const uint4 *>(bytes + i);
        } else {
            for (int i = threadIdx.x; i < count; i += kThreads) to[3 * first + i] = bytes[i];
        }
        __syncthreads();
    }
    publish(s, minimum + image, maximum + image, nonfinite + image);
}

// The same where values lie as the bytes do.
template <class T, int N>
__global__ void flat_kernel(const T *images, int64_t values, int strips, unsigned char *pixels, float *minimum,
                            float *maximum, int64_t *nonfinite) {
    const int64_t image = blockIdx.x / strips, strip = blockIdx.x % strips;
    Statistics s = {__int_as_float(0x7f800000), __int_as_float(static_cast<int>(0xff800000u)), 0};
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const int64_t i = ((strip * kRounds + round) * kThreads + threadIdx.x) * N;
        if (i < values) {
            const Pack<T, N> pack = load<T, N>(images + image * values + i);
            Pack<unsigned char, N> bytes;
#pragma unroll
            for (int k = 0; k < N; ++k) bytes.v[k] = take(s, to_float(pack.v[k]));
            store<unsigned char, N>(pixels + image * values + i, bytes);
        }
    }
    publish(s, minimum + image, maximum + image, nonfinite + image);
}

template <class T, int N>
int launch(int layout, const T *images, int64_t batch, int64_t area, uint8_t *pixels, float *minimum, float *maximum,
           int64_t *nonfinite, void *stream) {
    const int64_t items = layout == UBGEN_NHWC ? 3 * area : area, strip = int64_t(kThreads) * kRounds * N;
    const int64_t strips = (items + strip - 1) / strip;
    if (batch * strips > INT32_MAX) return UBGEN_BAD_ARGUMENT;
    const auto kernel = layout == UBGEN_NHWC ? flat_kernel<T, N> : planar_kernel<T, N>;
    UBGEN_LAUNCH(kernel, static_cast<int>(batch * strips), kThreads, 0, stream, images, items,
                 static_cast<int>(strips), pixels, minimum, maximum, nonfinite);
    return finish();
}

}  // namespace
}  // namespace ubgen

extern "C" int ubgen_quantise_cuda(int dtype, int layout, const void *images, int64_t batch, int64_t height,
                                   int64_t width, uint8_t *pixels, float *minimum, float *maximum, int64_t *nonfinite,
                                   void *stream) {
    if (!ubgen::is_dtype(dtype) || !ubgen::is_layout(layout) || batch < 0 || height < 0 || width < 0)
        return UBGEN_BAD_ARGUMENT;
    if (batch == 0) return UBGEN_OK;
    const int clear_blocks = static_cast<int>((batch + ubgen::kThreads - 1) / ubgen::kThreads);
    UBGEN_LAUNCH(ubgen::clear, clear_blocks, ubgen::kThreads, 0, stream, batch, minimum, maximum, nonfinite);
    const int64_t area = height * width;
    if (area == 0) return ubgen::finish();
    const bool vector = area % 16 == 0 && ubgen::aligned(images) && ubgen::aligned(pixels);
    return ubgen::typed(dtype, [&](auto element) {
        using T = decltype(element);
        const auto launch = vector ? ubgen::launch<T, ubgen::kPack<T>> : ubgen::launch<T, 1>;
        return launch(layout, static_cast<const T *>(images), batch, area, pixels, minimum, maximum, nonfinite, stream);
    });
}
