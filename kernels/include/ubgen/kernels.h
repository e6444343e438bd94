/* The C API of ubgen's native operations. No torch, no Python: raw pointers to dense float32 arrays. */
#ifndef UBGEN_KERNELS_H
#define UBGEN_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define UBGEN_MAX_HISTORY 3

enum ubgen_status {
    UBGEN_OK = 0,
    UBGEN_BAD_ARGUMENT = 1, /* negative count, or history_count outside 0..UBGEN_MAX_HISTORY */
    UBGEN_CUDA_ERROR = 2    /* the launch failed; ubgen_cuda_error() has the reason */
};

/* Classifier-free guidance and one linear-multistep (PNDM) update in one pass over `count` elements:
 *
 *   e      = e_uncond + guidance * (e_cond - e_uncond)
 *   E      = weights[0] * e + weights[1] * history[0] + ... + weights[history_count] * history[history_count - 1]
 *   x_next = a * x + b * E
 *
 * Each product and sum is rounded to float32 on its own and in this order, so that the result equals the same
 * expression evaluated one operation at a time, bit for bit. `weights` has 1 + history_count values and lies in host
 * memory, as does the array `history` of pointers, newest first. Outputs must not overlap inputs or each other.
 */

/* CPU: host pointers, at most `threads` threads. */
int ubgen_guided_step_f32(const float *x, const float *e_uncond, const float *e_cond, const float *const *history,
                          int history_count, const float *weights, float a, float b, float guidance, float *x_next,
                          float *e, int64_t count, int threads);

/* CUDA: device pointers of the current device; returns after queueing on `stream` (a cudaStream_t). Defined in the
 * separate library ubgen_kernels_cuda, which is only built where nvcc is found. */
int ubgen_guided_step_f32_cuda(const float *x, const float *e_uncond, const float *e_cond, const float *const *history,
                               int history_count, const float *weights, float a, float b, float guidance,
                               float *x_next, float *e, int64_t count, void *stream);

/* The reason of this thread's last UBGEN_CUDA_ERROR; never null. */
const char *ubgen_cuda_error(void);

#ifdef __cplusplus
}
#endif

#endif
