// The inner loops of the CPU operations. inner.cpp is compiled once for each instruction set, into one table each; the
// operations themselves (checks, threads, scratch memory) are compiled for the plainest CPU and take the best table.
#ifndef UBGEN_INNER_H
#define UBGEN_INNER_H

#include "ubgen/kernels.h"

namespace ubgen {

struct GuidedStep {
    const void *x, *e_uncond, *e_cond, *noise;
    const void *history[UBGEN_MAX_HISTORY];
    int history_count;
    float weights[1 + UBGEN_MAX_HISTORY];
    float a, b, guidance, s;
    void *x_next, *e;
};

struct Range {
    float minimum, maximum;
    int64_t nonfinite;
};

struct Resize {
    const uint8_t *pixels;
    int64_t height, width;
    ubgen_axis across, down;
    ubgen_framing framing;
    float *out;
};

struct Inner {
    const char *name;
    // elements begin..end
    void (*guided_step)(int dtype, const GuidedStep &step, int64_t begin, int64_t end);
    // pixels begin..end of one image of `area` pixels
    Range (*quantise)(int dtype, int layout, const void *image, int64_t area, int64_t begin, int64_t end,
                      uint8_t *pixels);
    // output rows begin..end of one image, in `scratch` of resize_scratch() bytes, aligned to 64
    void (*resize)(const Resize &resize, int64_t image, int64_t begin, int64_t end, void *scratch);
    int64_t (*resize_scratch)(const Resize &resize, int64_t source_rows);
    // the sum and the sum of squares of `count` values
    void (*sums)(int dtype, const void *x, int64_t count, double *sum, double *square);
    // the same of each column of (rows, channels), added to what is there
    void (*column_sums)(int dtype, const void *x, int64_t rows, int64_t channels, double *sums, double *squares);
    // y = silu(-((x - mean) * scale + shift)), for `count` values or for each column of (rows, channels)
    void (*norm_silu)(int dtype, const void *x, int64_t count, float mean, float scale, float shift, void *y);
    void (*column_norm_silu)(int dtype, const void *x, int64_t rows, int64_t channels, const float *mean,
                             const float *scale, const float *shift, void *y);
};

const Inner &inner();

inline int64_t dtype_bytes(int dtype) { return dtype == UBGEN_F32 ? 4 : 2; }
inline bool is_dtype(int dtype) { return dtype == UBGEN_F32 || dtype == UBGEN_F16 || dtype == UBGEN_BF16; }
inline bool is_layout(int layout) { return layout == UBGEN_NCHW || layout == UBGEN_NHWC; }

}  // namespace ubgen

#endif
