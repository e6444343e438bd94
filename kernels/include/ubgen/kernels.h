/* The C API of ubgen's native operations. No torch, no Python: raw pointers to dense arrays and explicit sizes.
 *
 * Every operation exists twice. `ubgen_NAME` takes host pointers and runs on at most `threads` threads.
 * `ubgen_NAME_cuda` takes device pointers of the current device and returns after queueing on `stream` (a
 * cudaStream_t); these are defined in the separate library ubgen_kernels_cuda, which is only built where nvcc is found.
 * Whatever the element type, the arithmetic is float32 and each output is rounded once, to nearest even. Arrays of size
 * 0 may be null.
 */
#ifndef UBGEN_KERNELS_H
#define UBGEN_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define UBGEN_MAX_HISTORY 3

enum ubgen_status {
    UBGEN_OK = 0,
    UBGEN_BAD_ARGUMENT = 1, /* a size, a count or an enum outside of what the function takes */
    UBGEN_CUDA_ERROR = 2,   /* the launch failed; ubgen_cuda_error() has the reason */
    UBGEN_NO_MEMORY = 3     /* no host memory for scratch space */
};

enum ubgen_dtype { UBGEN_F32 = 0, UBGEN_F16 = 1, UBGEN_BF16 = 2 };

/* Of images with `batch`, channels, height and width: (B,C,H,W), or (B,H,W,C) which torch calls channels-last. */
enum ubgen_layout { UBGEN_NCHW = 0, UBGEN_NHWC = 1 };

/* (a) Classifier-free guidance and one sampler update in one pass over `count` elements of type `dtype`:
 *
 *   e      = e_uncond + guidance * (e_cond - e_uncond)     or, where e_cond is null, e_uncond
 *   E      = weights[0] * e + weights[1] * history[0] + ... + weights[history_count] * history[history_count - 1]
 *   x_next = a * x + b * E                                 and, where noise is not null, + s * noise
 *
 * Each product and sum is rounded to float32 on its own and in this order, so that the result equals the same
 * expression evaluated one operation at a time, bit for bit. `weights` has 1 + history_count values and lies in host
 * memory, as does the array `history` of pointers, newest first (null where there is none). `e` receives e; it is not
 * written (and may be null) where e_cond is null. Outputs must not overlap inputs or each other.
 */
int ubgen_guided_step(int dtype, const void *x, const void *e_uncond, const void *e_cond, const void *const *history,
                      int history_count, const void *noise, const float *weights, float a, float b, float guidance,
                      float s, void *x_next, void *e, int64_t count, int threads);
int ubgen_guided_step_cuda(int dtype, const void *x, const void *e_uncond, const void *e_cond,
                           const void *const *history, int history_count, const void *noise, const float *weights,
                           float a, float b, float guidance, float s, void *x_next, void *e, int64_t count,
                           void *stream);

/* (b) RGB images on the [0, 1] scale, of `dtype` and `layout`, to bytes (B,H,W,3): clamp to [0, 1], times 255, round
 * half to even; NaN gives 0. For each image also the smallest and largest finite value before the clamp (+inf and -inf
 * where there is none) and how many values are infinite or NaN: three arrays of `batch` values.
 */
int ubgen_quantise(int dtype, int layout, const void *images, int64_t batch, int64_t height, int64_t width,
                   uint8_t *pixels, float *minimum, float *maximum, int64_t *nonfinite, int threads);
int ubgen_quantise_cuda(int dtype, int layout, const void *images, int64_t batch, int64_t height, int64_t width,
                        uint8_t *pixels, float *minimum, float *maximum, int64_t *nonfinite, void *stream);

/* One axis of a resize. Output i is the sum over k < taps of weights[i * taps + k] * input[first[i] + k], and
 * 0 <= first[i] <= source - taps: where fewer pixels count, the rest of the weights are 0. */
typedef struct {
    int64_t source, target;
    int64_t taps;
    const int32_t *first; /* (target) */
    const float *weights; /* (target, taps) */
} ubgen_axis;

/* What surrounds the image. It lies with its corner at (top, left) in a canvas of down->source by across->source pixels
 * of the colour `border`; the canvas is resized along the width, then along the height, and with `bounded` clamped to
 * [0, 255] after each. A value v of channel c becomes scale[c] * v + shift[c]. */
typedef struct {
    int64_t top, left;
    uint8_t border[3];
    int32_t bounded;
    float scale[3], shift[3];
} ubgen_framing;

/* (c) Resize and normalise: bytes (B,height,width,3) to float32 (B,3,down->target,across->target). For CUDA, `first` and
 * `weights` of both axes lie in device memory, the two structs themselves in host memory, and an axis that shrinks by
 * more than about 100 is a bad argument: its rows would not fit into shared memory.
 */
int ubgen_resize_normalise(const uint8_t *pixels, int64_t batch, int64_t height, int64_t width,
                           const ubgen_axis *across, const ubgen_axis *down, const ubgen_framing *framing, float *out,
                           int threads);
int ubgen_resize_normalise_cuda(const uint8_t *pixels, int64_t batch, int64_t height, int64_t width,
                                const ubgen_axis *across, const ubgen_axis *down, const ubgen_framing *framing,
                                float *out, void *stream);

/* (d) GroupNorm, then SiLU, of (batch, channels, area) or, by `layout`, (batch, area, channels); area is height * width:
 *
 *   v = weight[c] * (x - mean) / sqrt(variance + eps) + bias[c],    y = v / (1 + exp(-v))
 *
 * with mean and variance over the channels / groups channels of a group and its whole area. `weight` and `bias` are
 * float32 (channels). CUDA needs `workspace`, device memory of ubgen_group_norm_silu_workspace(...) bytes (0: null).
 */
int ubgen_group_norm_silu(int dtype, int layout, const void *x, const float *weight, const float *bias, int64_t batch,
                          int64_t channels, int64_t area, int64_t groups, float eps, void *y, int threads);
int ubgen_group_norm_silu_cuda(int dtype, int layout, const void *x, const float *weight, const float *bias,
                               int64_t batch, int64_t channels, int64_t area, int64_t groups, float eps, void *y,
                               void *workspace, void *stream);
int64_t ubgen_group_norm_silu_workspace(int layout, int64_t batch, int64_t area, int64_t groups);

/* The instruction set that the CPU functions use: "avx512", "avx2" or "baseline". The environment variable UBGEN_CPU,
 * read once, names a lower one than the best. */
const char *ubgen_cpu(void);

/* The reason of this thread's last UBGEN_CUDA_ERROR; never null. */
const char *ubgen_cuda_error(void);

#ifdef __cplusplus
}
#endif

#endif
