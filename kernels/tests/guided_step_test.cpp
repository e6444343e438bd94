// The update against the same formula in double precision, over sizes around every vector boundary. Built for the CPU
// function and, where CUDA's headers are, once more for the CUDA source run by cuda_on_cpu.h.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#if defined(UBGEN_CUDA_SOURCE)
#include UBGEN_CUDA_SOURCE
#define UBGEN_CALL(threads, ...) ubgen_guided_step_f32_cuda(__VA_ARGS__, static_cast<void *>(nullptr))
#else
#include "ubgen/kernels.h"
#define UBGEN_CALL(threads, ...) ubgen_guided_step_f32(__VA_ARGS__, threads)
#endif

namespace {

constexpr float kA = 1.12f, kB = -0.123f, kGuidance = 2.0f;
constexpr float kWeights[] = {55.0f / 24, -59.0f / 24, 37.0f / 24, -9.0f / 24};
constexpr float kUntouched = 12345.0f;  // behind each output. The address sanitizer sees whoever reads too far.
int failures = 0;

void expect(bool good, const char *what, long long count, int history_count, int threads) {
    if (good || ++failures > 20) return;
    std::printf("FAILED: %s, count %lld, history %d, threads %d\n", what, count, history_count, threads);
}

std::vector<float> noise(int64_t count, unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float &value : values) value = normal(engine);
    return values;
}

bool near(float got, double wanted, double allowed) {
    if (std::isnan(wanted)) return std::isnan(got);
    return got == wanted || std::fabs(got - wanted) <= allowed;
}

// `offset` elements after an aligned address.
void check(int64_t count, int history_count, int threads, int offset) {
    std::vector<float> inputs[6];
    for (unsigned k = 0; k < 6; ++k) inputs[k] = noise(count + offset, k + 1);
    if (count > 9) {
        inputs[1][offset + 3] = std::numeric_limits<float>::quiet_NaN();
        inputs[3][offset + 9] = -std::numeric_limits<float>::infinity();
    }
    const float *x = inputs[0].data() + offset, *u = inputs[1].data() + offset, *c = inputs[2].data() + offset;
    const float *h[] = {inputs[3].data() + offset, inputs[4].data() + offset, inputs[5].data() + offset};
    std::vector<float> x_next(count + offset + 1, kUntouched), e(count + offset + 1, kUntouched);
    const int status = UBGEN_CALL(threads, x, u, c, h, history_count, kWeights, kA, kB, kGuidance,
                                  x_next.data() + offset, e.data() + offset, count);
    bool good = status == UBGEN_OK && x_next.back() == kUntouched && e.back() == kUntouched;
    for (int64_t i = 0; i < count && good; ++i) {
        const double guided = u[i] + double(kGuidance) * (double(c[i]) - u[i]);
        double sum = kWeights[0] * guided;
        for (int k = 0; k < history_count; ++k) sum += double(kWeights[1 + k]) * h[k][i];
        const double allowed = 1e-6 * (10 + std::fabs(guided));
        good = near(e[offset + i], guided, allowed) && near(x_next[offset + i], double(kA) * x[i] + kB * sum, allowed);
    }
    expect(good, offset ? "not aligned" : "aligned", count, history_count, threads);
}

void check_refusals() {
    float value = 0, out[2];
    const float *history[] = {&value, &value, &value};
    const auto call = [&](int history_count, int64_t count) {
        return UBGEN_CALL(1, &value, &value, &value, history, history_count, kWeights, kA, kB, kGuidance, out, out + 1,
                          count);
    };
    for (int history_count : {4, -1})
        expect(call(history_count, 1) == UBGEN_BAD_ARGUMENT, "not refused", 1, history_count, 1);
    expect(call(0, -1) == UBGEN_BAD_ARGUMENT, "not refused", -1, 0, 1);
}

}  // namespace

int main() {
    check_refusals();
    for (int history_count = 0; history_count <= UBGEN_MAX_HISTORY; ++history_count)
        for (int offset : {0, 1}) {
            for (int64_t count : {0, 1, 3, 4, 7, 8, 15, 16, 17, 63, 1000}) check(count, history_count, 1, offset);
            for (int threads : {1, 2, 5})
                for (int64_t count : {(1 << 15) - 1, 1 << 15, 50003}) check(count, history_count, threads, offset);
        }
    std::printf("%s\n", failures ? "some checks failed" : "all checks passed");
    return failures ? 1 : 0;
}
