// Both passes of the resize for a strip of output rows. The first one wants kLanes rows side by side (one weight serves
// them all), so rows are turned into columns of kLanes before it and back after it; the second one runs along rows.
#include "inner.h"
#include "simd.h"

namespace ubgen {
namespace UBGEN_ISA {

UBGEN_INLINE int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct Strip {  // scratch memory, every part a multiple of 64 bytes long
    float *columns;   // (source width * 3, kLanes)
    float *narrowed;  // (source rows, 3, target width), widths rounded up
    uint8_t *rows;    // (kLanes, source width * 3)
};

UBGEN_INLINE int64_t row_bytes(const Resize &r) { return (3 * r.across.source + 63) / 64 * 64; }
UBGEN_INLINE int64_t out_width(const Resize &r) { return (r.across.target + 15) / 16 * 16; }

int64_t resize_scratch(const Resize &r, int64_t source_rows) {
    const int64_t floats = row_bytes(r) * kLanes + round_up(source_rows) * 3 * out_width(r);
    return floats * 4 + row_bytes(r) * kLanes;
}

void fill_border(uint8_t *to, const uint8_t *colour, int64_t pixels) {
    for (int64_t x = 0; x < 3 * pixels; ++x) to[x] = colour[x % 3];
}

// Rows first .. first + kLanes of the canvas.
void gather_rows(const Resize &r, int64_t image, int64_t first, uint8_t *rows) {
    const int64_t right = r.across.source - r.framing.left - r.width;
    for (int lane = 0; lane < kLanes; ++lane) {
        uint8_t *to = rows + lane * row_bytes(r);
        const int64_t y = first + lane - r.framing.top;
        if (y < 0 || y >= r.height) {
            fill_border(to, r.framing.border, r.across.source);
        } else {
            fill_border(to, r.framing.border, r.framing.left);
            std::memcpy(to + 3 * r.framing.left, r.pixels + (image * r.height + y) * r.width * 3, r.width * 3);
            fill_border(to + 3 * (r.framing.left + r.width), r.framing.border, right);
        }
        std::memset(to + 3 * r.across.source, 0, row_bytes(r) - 3 * r.across.source);
    }
}

void to_columns(const Resize &r, const uint8_t *rows, float *columns) {
    for (int64_t x = 0; x < 3 * r.across.source; x += kLanes) {
        F block[kLanes];
        for (int k = 0; k < kLanes; ++k) block[k] = load(rows + k * row_bytes(r) + x);
        transpose(block);
        for (int k = 0; k < kLanes; ++k) store(columns + (x + k) * kLanes, block[k]);
    }
}

UBGEN_INLINE F clamp_if(bool bounded, F v) {
    return bounded ? minimum(maximum(v, broadcast(0.0f)), broadcast(255.0f)) : v;
}

// kLanes rows, (x, c, row) -> (row, c, x).
void along_width(const Resize &r, const float *columns, float *narrowed) {
    const int64_t width = out_width(r);
    for (int64_t x = 0; x < r.across.target; x += kLanes)
        for (int c = 0; c < 3; ++c) {
            F block[kLanes];
            for (int k = 0; k < kLanes; ++k) {
                F sum = broadcast(0.0f);
                if (x + k < r.across.target) {
                    const float *weights = r.across.weights + (x + k) * r.across.taps;
                    const float *from = columns + (int64_t(r.across.first[x + k]) * 3 + c) * kLanes;
                    for (int64_t t = 0; t < r.across.taps; ++t)
                        sum = fma(broadcast(weights[t]), load(from + 3 * t * kLanes), sum);
                }
                block[k] = clamp_if(r.framing.bounded, sum);
            }
            transpose(block);
            for (int k = 0; k < kLanes; ++k) store(narrowed + (k * 3 + c) * width + x, block[k]);
        }
}

// One output row of one channel, `Vectors` vectors wide from x on.
template <int Vectors>
UBGEN_INLINE void along_height(const Resize &r, const float *from, const float *weights, float *to, int64_t room,
                               int c) {
    const int64_t stride = 3 * out_width(r);
    F sums[Vectors];
    for (F &sum : sums) sum = broadcast(0.0f);
    for (int64_t t = 0; t < r.down.taps; ++t)
        for (int v = 0; v < Vectors; ++v)
            sums[v] = fma(broadcast(weights[t]), load(from + t * stride + v * kLanes), sums[v]);
    const F scale = broadcast(r.framing.scale[c]), shift = broadcast(r.framing.shift[c]);
    for (int v = 0; v < Vectors; ++v) {
        const F value = fma(clamp_if(r.framing.bounded, sums[v]), scale, shift);
        if (room >= (v + 1) * kLanes)
            store(to + v * kLanes, value);
        else
            store_some(to + v * kLanes, value, room - v * kLanes);
    }
}

constexpr int kWide = 4;  // vectors of one output row at a time: a block of columns stays in the first-level cache

void resize(const Resize &r, int64_t image, int64_t begin, int64_t end, void *scratch) {
    int64_t first = r.down.source, last = 0;
    for (int64_t y = begin; y < end; ++y) {
        first = r.down.first[y] < first ? r.down.first[y] : first;
        last = r.down.first[y] + r.down.taps > last ? r.down.first[y] + r.down.taps : last;
    }
    const int64_t width = out_width(r), rows = round_up(last - first);
    Strip strip;
    strip.columns = static_cast<float *>(scratch);
    strip.narrowed = strip.columns + row_bytes(r) * kLanes;
    strip.rows = reinterpret_cast<uint8_t *>(strip.narrowed + rows * 3 * width);
    for (int64_t y = 0; y < rows; y += kLanes) {
        gather_rows(r, image, first + y, strip.rows);
        to_columns(r, strip.rows, strip.columns);
        along_width(r, strip.columns, strip.narrowed + y * 3 * width);
    }
    for (int c = 0; c < 3; ++c)
        for (int64_t x = 0; x < r.across.target; x += kWide * kLanes)
            for (int64_t y = begin; y < end; ++y) {
                const float *from = strip.narrowed + ((r.down.first[y] - first) * 3 + c) * width + x;
                const float *weights = r.down.weights + y * r.down.taps;
                float *to = r.out + ((image * 3 + c) * r.down.target + y) * r.across.target + x;
                const int64_t room = r.across.target - x;
                if (room >= kWide * kLanes)
                    along_height<kWide>(r, from, weights, to, room, c);
                else
                    for (int64_t v = 0; v < room; v += kLanes)
                        along_height<1>(r, from + v, weights, to + v, room - v, c);
            }
}

}  // namespace UBGEN_ISA
}  // namespace ubgen
