// The CUDA twin of resize_normalise.cpp. A block makes one tile of outputs: source rows are staged as bytes, narrowed
// into shared memory, and combined from there, so device memory sees each input about once and each output once.
#include <algorithm>

#include "device.cuh"

namespace ubgen {
namespace {

constexpr int kThreads = 256;
constexpr int kStaged = 16;  // source rows staged at a time
constexpr int64_t kSharedLimit = 48 * 1024;

struct Resize {
    const unsigned char *pixels;
    int64_t height, width;
    ubgen_axis across, down;
    ubgen_framing framing;
    float *out;
    int tile_x, tile_y, tiles_x, tiles_y;
    int pitch;    // bytes of a staged row, a multiple of 4
    bool aligned;  // rows start at multiples of 4 bytes and nothing surrounds them left and right
};

__device__ __forceinline__ float clamp_if(bool bounded, float v) {
    return bounded ? fminf(fmaxf(v, 0.0f), 255.0f) : v;
}

// Canvas rows first .. first + rows, columns from..until, to `staged`; returns where in a row the first byte lies.
__device__ int stage(const Resize &r, int64_t image, int64_t first, int rows, int64_t from, int64_t until,
                     unsigned char *staged) {
    const int64_t top = r.framing.top, left = r.framing.left;
    const int skew = r.aligned ? static_cast<int>(3 * from % 4) : 0, bytes = static_cast<int>(3 * (until - from));
    const unsigned char *base = r.pixels + image * r.height * r.width * 3;
    const int words = (skew + bytes + 3) / 4;
    for (int row = threadIdx.x / 32; row < rows; row += kThreads / 32) {
        const int64_t y = first + row - top;
        const bool inside = y >= 0 && y < r.height;
        unsigned char *to = staged + row * r.pitch;
        if (r.aligned && inside) {
            const unsigned char *line = base + y * r.width * 3 + 3 * from - skew;
            for (int k = threadIdx.x % 32; k < words; k += 32)
                reinterpret_cast<unsigned int *>(to)[k] = reinterpret_cast<const unsigned int *>(line)[k];
        } else {
            for (int k = threadIdx.x % 32; k < bytes; k += 32) {
                const int64_t x = from + k / 3 - left;
                to[skew + k] = inside && x >= 0 && x < r.width ? base[(y * r.width + x) * 3 + k % 3]
                                                               : r.framing.border[k % 3];
            }
        }
    }
    return skew;
}

// The three channels of one narrowed pixel. Four taps are twelve bytes: three words, cut out of four. Bytes past the
// last tap are whatever lies there; their weight is 0.
__device__ __forceinline__ void narrow(const unsigned char *row, int byte, const float *weights, int taps,
                                       float (&sum)[3]) {
    const unsigned int *words = reinterpret_cast<const unsigned int *>(row) + byte / 4;
    const int shift = byte % 4 * 8;
    unsigned int word = words[0];
    for (int t = 0; t < taps; t += 4) {
        unsigned int cut[3];
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            const unsigned int next = words[t / 4 * 3 + k + 1];
            cut[k] = __funnelshift_r(word, next, shift);
            word = next;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float weight = t + k < taps ? weights[t + k] : 0.0f;
#pragma unroll
            for (int c = 0; c < 3; ++c) {
                const int at = 3 * k + c;
                sum[c] = fmaf(weight, static_cast<float>(cut[at / 4] >> at % 4 * 8 & 255u), sum[c]);
            }
        }
    }
}

__global__ void resize_kernel(const Resize r) {
    UBGEN_DYNAMIC_SHARED(memory);
    const int64_t tile = blockIdx.x % (r.tiles_x * r.tiles_y), image = blockIdx.x / (r.tiles_x * r.tiles_y);
    const int64_t x0 = tile % r.tiles_x * r.tile_x, y0 = tile / r.tiles_x * r.tile_y;
    const int wide = static_cast<int>(min(static_cast<int64_t>(r.tile_x), r.across.target - x0));
    const int high = static_cast<int>(min(static_cast<int64_t>(r.tile_y), r.down.target - y0));
    const int across = static_cast<int>(r.across.taps), down = static_cast<int>(r.down.taps);
    const int64_t left = r.across.first[x0], right = r.across.first[x0 + wide - 1] + across;
    const int64_t top = r.down.first[y0];
    const int rows = static_cast<int>(r.down.first[y0 + high - 1] + down - top), plane = r.tile_x;
    unsigned char *staged = memory;                                             // (kStaged, pitch)
    float *narrowed = reinterpret_cast<float *>(memory + kStaged * r.pitch);  // (rows, 3, tile_x)

    for (int first = 0; first < rows; first += kStaged) {
        const int count = min(kStaged, rows - first);
        const int skew = stage(r, image, top + first, count, left, right, staged);
        __syncthreads();
        for (int i = threadIdx.x; i < count * plane; i += kThreads) {
            const int x = i % plane, row = i / plane;
            if (x >= wide) continue;
            const int byte = skew + 3 * static_cast<int>(r.across.first[x0 + x] - left);
            float sum[3] = {0.0f, 0.0f, 0.0f};
            narrow(staged + row * r.pitch, byte, r.across.weights + (x0 + x) * across, across, sum);
#pragma unroll
            for (int c = 0; c < 3; ++c)
                narrowed[((first + row) * 3 + c) * plane + x] = clamp_if(r.framing.bounded, sum[c]);
        }
        __syncthreads();
    }

    for (int i = threadIdx.x; i < high * 3 * plane; i += kThreads) {
        const int x = i % plane, c = i / plane % 3, y = i / (3 * plane);
        if (x >= wide) continue;
        const float *weights = r.down.weights + (y0 + y) * down;
        const float *from = narrowed + ((r.down.first[y0 + y] - top) * 3 + c) * plane + x;
        float sum = 0.0f;
        for (int t = 0; t < down; ++t) sum = fmaf(weights[t], from[t * 3 * plane], sum);
        const int64_t at = ((image * 3 + c) * r.down.target + y0 + y) * r.across.target + x0 + x;
        r.out[at] = fmaf(clamp_if(r.framing.bounded, sum), r.framing.scale[c], r.framing.shift[c]);
    }
}

// The most source pixels that `outputs` neighbouring outputs use.
int64_t span(const ubgen_axis &axis, int64_t outputs) {
    return std::min(axis.source, (outputs - 1) * axis.source / axis.target + 2 + axis.taps);
}

// The largest tile whose rows fit into shared memory; 0 where none does.
int64_t choose_tile(Resize &r) {
    constexpr int kTiles[][2] = {{32, 16}, {32, 8}, {32, 4}, {16, 4}, {16, 2}, {8, 2}, {8, 1}};
    for (const auto &tile : kTiles) {
        r.tile_x = tile[0];
        r.tile_y = tile[1];
        r.pitch = static_cast<int>((3 * span(r.across, tile[0]) + 3 + 16 + 3) / 4 * 4);
        const int64_t bytes = kStaged * r.pitch + span(r.down, tile[1]) * 3 * tile[0] * sizeof(float);
        if (bytes <= kSharedLimit) return bytes;
    }
    return 0;
}

bool fits(int64_t length, int64_t start, const ubgen_axis &axis) {
    return axis.target >= 1 && axis.taps >= 1 && axis.taps <= axis.source && length >= 1 && start >= 0 &&
           start + length <= axis.source;
}

}  // namespace
}  // namespace ubgen

extern "C" int ubgen_resize_normalise_cuda(const uint8_t *pixels, int64_t batch, int64_t height, int64_t width,
                                           const ubgen_axis *across, const ubgen_axis *down,
                                           const ubgen_framing *framing, float *out, void *stream) {
    if (batch < 0 || !ubgen::fits(width, framing->left, *across) || !ubgen::fits(height, framing->top, *down))
        return UBGEN_BAD_ARGUMENT;
    if (batch == 0) return UBGEN_OK;
    ubgen::Resize resize = {pixels, height, width, *across, *down, *framing, out, 0, 0, 0, 0, 0, false};
    resize.aligned = width == across->source && width % 4 == 0 && ubgen::aligned(pixels);
    const int64_t shared = ubgen::choose_tile(resize);
    resize.tiles_x = static_cast<int>((across->target + resize.tile_x - 1) / resize.tile_x);
    resize.tiles_y = static_cast<int>((down->target + resize.tile_y - 1) / resize.tile_y);
    const int64_t blocks = batch * resize.tiles_x * resize.tiles_y;
    if (shared == 0 || blocks > INT32_MAX) return UBGEN_BAD_ARGUMENT;
    UBGEN_LAUNCH(ubgen::resize_kernel, static_cast<int>(blocks), ubgen::kThreads, shared, stream, resize);
    return ubgen::finish();
}
