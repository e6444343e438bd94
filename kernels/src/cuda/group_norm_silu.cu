// The CUDA twin of group_norm_silu.cpp. Planar: one block a group, which keeps it in shared memory where it fits, so
// that it is read once. Channels-last: one kernel for the sums, one for the values; the second read comes mostly from
// the L2 cache. Sums are of differences from the group's first value, in float32 within a thread and in double beyond.
#include <algorithm>

#include "device.cuh"

namespace ubgen {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

struct Norm {
    const float *weight, *bias;
    int64_t channels, area, groups;
    float eps;
};

struct Moments {
    float mean, rstd;
};

__device__ __forceinline__ Moments moments(double sum, double square, double shift, int64_t count, float eps) {
    const double offset = sum / static_cast<double>(count);
    double variance = square / static_cast<double>(count) - offset * offset;
    variance = variance < 0.0 ? 0.0 : variance;  // NaN stays
    return {static_cast<float>(shift + offset), rsqrtf(static_cast<float>(variance) + eps)};
}

__device__ __forceinline__ float norm_silu(float x, float mean, float scale, float bias) {
    const float v = fmaf(x - mean, scale, bias);
    return __fdividef(v, 1.0f + __expf(-v));
}

// Sums over a warp, in every lane.
__device__ __forceinline__ void warp_sums(double &sum, double &square) {
    for (int lane = 16; lane > 0; lane /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, lane);
        square += __shfl_xor_sync(0xffffffffu, square, lane);
    }
}

template <class T, int N>
__global__ void planar_kernel(const T *x, const Norm norm, bool staged, T *y) {
    UBGEN_DYNAMIC_SHARED(memory);
    __shared__ double sums[kWarps], squares[kWarps];
    const int64_t members = norm.channels / norm.groups, count = members * norm.area;
    const int64_t base = static_cast<int64_t>(blockIdx.x) * count, step = kThreads * N;
    T *kept = reinterpret_cast<T *>(memory);
    const float shift = to_float(x[base]);
    float s = 0.0f, q = 0.0f;
    for (int64_t i = threadIdx.x * N; i < count; i += step) {
        const Pack<T, N> pack = load<T, N>(x + base + i);
        if (staged) store<T, N>(kept + i, pack);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const float d = to_float(pack.v[k]) - shift;
            s += d;
            q = fmaf(d, d, q);
        }
    }
    double sum = s, square = q;
    warp_sums(sum, square);
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = sum;
        squares[threadIdx.x / 32] = square;
    }
    __syncthreads();
    sum = square = 0.0;
    for (int k = 0; k < kWarps; ++k) {
        sum += sums[k];
        square += squares[k];
    }
    const Moments of = moments(sum, square, shift, count, norm.eps);

    const T *from = staged ? kept : x + base;  // each thread reads what it wrote itself
    const int64_t first = static_cast<int64_t>(blockIdx.x) % norm.groups * members;
    int64_t channel = threadIdx.x * N / norm.area, within = threadIdx.x * N % norm.area;
    const int64_t channel_step = step / norm.area, within_step = step % norm.area;
    for (int64_t i = threadIdx.x * N; i < count; i += step) {
        const Pack<T, N> pack = load<T, N>(from + i);
        const float scale = of.rstd * norm.weight[first + channel], bias = norm.bias[first + channel];
        Pack<T, N> out;
#pragma unroll
        for (int k = 0; k < N; ++k) from_float(norm_silu(to_float(pack.v[k]), of.mean, scale, bias), out.v[k]);
        store<T, N>(y + base + i, out);
        channel += channel_step;
        within += within_step;
        if (within >= norm.area) {
            within -= norm.area;
            ++channel;
        }
    }
}

// How a channels-last image is shared out: `strips` blocks an image, of `rows` rows each.
struct Strips {
    int64_t rows, strips;
};

Strips share_out(int64_t batch, int64_t area) {
    const int64_t wanted = std::clamp<int64_t>(512 / std::max<int64_t>(batch, 1), 1, 128);
    const int64_t rows = std::max<int64_t>((area + wanted - 1) / wanted, 16);
    return {rows, (area + rows - 1) / rows};
}

// Which packs of a row, and which rows, a thread works on: neighbours have neighbouring packs.
struct Lane {
    int across, row, rows;
};

__device__ __forceinline__ Lane lane_of(int packs) {
    const int across = min(packs, kThreads);
    return {across, static_cast<int>(threadIdx.x) / across, kThreads / across};
}

template <class T, int N>
__global__ void sums_kernel(const T *x, const Norm norm, const Strips strips, float2 *partial) {
    __shared__ float sums[kThreads * N], squares[kThreads * N];
    UBGEN_DYNAMIC_SHARED(memory);
    double2 *totals = reinterpret_cast<double2 *>(memory);  // (groups)
    const int64_t image = blockIdx.x / strips.strips, strip = blockIdx.x % strips.strips;
    const int64_t begin = strip * strips.rows, end = min(begin + strips.rows, norm.area);
    const T *from = x + image * norm.area * norm.channels;
    const int packs = static_cast<int>(norm.channels / N), members = static_cast<int>(norm.channels / norm.groups);
    const Lane lane = lane_of(packs);
    for (int g = threadIdx.x; g < norm.groups; g += kThreads) totals[g] = make_double2(0.0, 0.0);
    for (int left = 0; left < packs; left += lane.across) {
        const int pack = left + threadIdx.x % lane.across;
        const bool active = pack < packs && lane.row < lane.rows;
        float s[N] = {}, q[N] = {}, shift[N] = {};
        if (active) {
#pragma unroll
            for (int k = 0; k < N; ++k) shift[k] = to_float(from[(pack * N + k) / members * members]);
            for (int64_t row = begin + lane.row; row < end; row += lane.rows) {
                const Pack<T, N> values = load<T, N>(from + row * norm.channels + pack * N);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const float d = to_float(values.v[k]) - shift[k];
                    s[k] += d;
                    q[k] = fmaf(d, d, q[k]);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < N; ++k) {
            sums[threadIdx.x * N + k] = s[k];
            squares[threadIdx.x * N + k] = q[k];
        }
        __syncthreads();
        // a warp a group: the channels of it that lie here, of every row
        const int here = min(lane.across, packs - left) * N, channel = left * N;
        for (int g = threadIdx.x / 32; g < norm.groups; g += kWarps) {
            const int low = max(g * members, channel) - channel;
            const int high = min((g + 1) * members, channel + here) - channel;
            double sum = 0.0, square = 0.0;
            const int width = max(high - low, 0);
            for (int i = threadIdx.x % 32; i < width * lane.rows; i += 32) {
                const int at = i / width * lane.across * N + low + i % width;
                sum += sums[at];
                square += squares[at];
            }
            warp_sums(sum, square);
            if (threadIdx.x % 32 == 0) totals[g] = make_double2(totals[g].x + sum, totals[g].y + square);
        }
        __syncthreads();
    }
    for (int g = threadIdx.x; g < norm.groups; g += kThreads)
        partial[blockIdx.x * norm.groups + g] =
            make_float2(static_cast<float>(totals[g].x), static_cast<float>(totals[g].y));
}

template <class T, int N>
__global__ void values_kernel(const T *x, const Norm norm, const Strips strips, const float2 *partial, T *y) {
    UBGEN_DYNAMIC_SHARED(memory);
    Moments *of = reinterpret_cast<Moments *>(memory);  // (groups)
    const int64_t image = blockIdx.x / strips.strips, strip = blockIdx.x % strips.strips;
    const int64_t begin = strip * strips.rows, end = min(begin + strips.rows, norm.area);
    const int64_t offset = image * norm.area * norm.channels;
    const int packs = static_cast<int>(norm.channels / N), members = static_cast<int>(norm.channels / norm.groups);
    for (int g = threadIdx.x / 32; g < norm.groups; g += kWarps) {
        double sum = 0.0, square = 0.0;
        for (int64_t k = threadIdx.x % 32; k < strips.strips; k += 32) {
            const float2 part = partial[(image * strips.strips + k) * norm.groups + g];
            sum += part.x;
            square += part.y;
        }
        warp_sums(sum, square);
        const float shift = to_float(x[offset + g * members]);
        if (threadIdx.x % 32 == 0) of[g] = moments(sum, square, shift, norm.area * members, norm.eps);
    }
    __syncthreads();
    const Lane lane = lane_of(packs);
    if (lane.row >= lane.rows) return;
    for (int pack = threadIdx.x % lane.across; pack < packs; pack += lane.across) {
        float mean[N], scale[N], bias[N];  // the same for every row
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const int c = pack * N + k;
            mean[k] = of[c / members].mean;
            scale[k] = of[c / members].rstd * norm.weight[c];
            bias[k] = norm.bias[c];
        }
        for (int64_t row = begin + lane.row; row < end; row += lane.rows) {
            const int64_t at = offset + row * norm.channels + pack * N;
            const Pack<T, N> values = load<T, N>(x + at);
            Pack<T, N> out;
#pragma unroll
            for (int k = 0; k < N; ++k)
                from_float(norm_silu(to_float(values.v[k]), mean[k], scale[k], bias[k]), out.v[k]);
            store<T, N>(y + at, out);
        }
    }
}

template <class T, int N>
int planar(const T *x, int64_t batch, const Norm &norm, T *y, void *stream) {
    if (batch * norm.groups > INT32_MAX) return UBGEN_BAD_ARGUMENT;
    int device = 0, limit = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const int64_t bytes = norm.channels / norm.groups * norm.area * static_cast<int64_t>(sizeof(T));
    const bool staged = bytes + static_cast<int64_t>(2 * kWarps * sizeof(double)) <= limit;
    const auto kernel = planar_kernel<T, N>;
    const int shared = staged ? static_cast<int>(bytes) : 0;
    if (shared > 32 * 1024)
        cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             shared);
    UBGEN_LAUNCH(kernel, static_cast<int>(batch * norm.groups), kThreads, shared, stream, x, norm, staged, y);
    return finish();
}

template <class T, int N>
int channels_last(const T *x, int64_t batch, const Norm &norm, T *y, void *workspace, void *stream) {
    const Strips strips = share_out(batch, norm.area);
    if (batch * strips.strips > INT32_MAX || norm.channels > INT32_MAX || norm.groups > 1024) return UBGEN_BAD_ARGUMENT;
    const int blocks = static_cast<int>(batch * strips.strips), groups = static_cast<int>(norm.groups);
    const auto sums = sums_kernel<T, N>;
    const auto values = values_kernel<T, N>;
    float2 *partial = static_cast<float2 *>(workspace);
    UBGEN_LAUNCH(sums, blocks, kThreads, groups * sizeof(double2), stream, x, norm, strips, partial);
    UBGEN_LAUNCH(values, blocks, kThreads, groups * sizeof(Moments), stream, x, norm, strips, partial, y);
    return finish();
}

}  // namespace
}  // namespace ubgen

extern "C" int64_t ubgen_group_norm_silu_workspace(int layout, int64_t batch, int64_t area, int64_t groups) {
    if (layout != UBGEN_NHWC || batch <= 0 || area <= 0) return 0;
    return batch * ubgen::share_out(batch, area).strips * groups * static_cast<int64_t>(sizeof(float2));
}

extern "C" int ubgen_group_norm_silu_cuda(int dtype, int layout, const void *x, const float *weight, const float *bias,
                                          int64_t batch, int64_t channels, int64_t area, int64_t groups, float eps,
                                          void *y, void *workspace, void *stream) {
    if (!ubgen::is_dtype(dtype) || !ubgen::is_layout(layout) || batch < 0 || channels < 1 || area < 0 || groups < 1 ||
        channels % groups)
        return UBGEN_BAD_ARGUMENT;
    if (batch == 0 || area == 0) return UBGEN_OK;
    const ubgen::Norm norm = {weight, bias, channels, area, groups, eps};
    return ubgen::typed(dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int N = ubgen::kPack<T>;
        const T *from = static_cast<const T *>(x);
        T *to = static_cast<T *>(y);
        const bool dense = ubgen::aligned(x) && ubgen::aligned(y);
        if (layout == UBGEN_NHWC) {
            const auto run = dense && channels % N == 0 ? ubgen::channels_last<T, N> : ubgen::channels_last<T, 1>;
            return run(from, batch, norm, to, workspace, stream);
        }
        const auto run = dense && area % N == 0 ? ubgen::planar<T, N> : ubgen::planar<T, 1>;
        return run(from, batch, norm, to, stream);
    });
}
