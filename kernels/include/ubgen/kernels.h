/* The C API of ubgen's native operations. No torch, no Python: raw pointers to dense arrays and explicit sizes.
 *
 * Every operation exists twice. `ubgen_NAME` takes host pointers and runs on at most `threads` threads.
 * `ubgen_NAME_cuda` takes device pointers of the current device and returns after queueing on `stream` (a
 * cudaStream_t); these are defined in the separate library ubgen_kernels_cuda, which is only built where nvcc is found.
 * Arrays of size 0 may be null.
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
    UBGEN_BAD_ARGUMENT = 1, /* a size or a count outside of what the function takes */
    UBGEN_CUDA_ERROR = 2    /* the launch failed; ubgen_cuda_error() has the reason */
};

/* Classifier-free guidance and one sampler update in one pass over `count` float32 elements:
 *
 *   e      = e_uncond + guidance * (e_cond - e_uncond)
 *   E      = weights[0] * e + weights[1] * history[0] + ... + weights[history_count] * history[history_count - 1]
 *   x_next = a * x + b * E
 *
 * Each product and sum is rounded on its own and in this order, so that the result equals the same expression evaluated
 * one operation at a time, bit for bit. `weights` has 1 + history_count values and lies in host memory, as does the array
 * `history` of pointers, newest first (null if history_count is 0). Outputs must not overlap inputs or each other.
 */
int ubgen_guided_step_f32(const float *x, const float *e_uncond, const float *e_cond, const float *const *history,
                          int history_count, const float *weights, float a, float b, float guidance, float *x_next,
                          float *e, int64_t count, int threads);
int ubgen_guided_step_f32_cuda(const float *x, const float *e_uncond, const float *e_cond, const float *const *history,
                               int history_count, const float *weights, float a, float b, float guidance, float *x_next,
                               float *e, int64_t count, void *stream);

/* The reason of this thread's last UBGEN_CUDA_ERROR; never null. */
const char *ubgen_cuda_error(void);

#ifdef __cplusplus
}
#endif

#endif
