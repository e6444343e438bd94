// Compares the float32 operation with the same formula in double precision, over sizes around every block boundary.
#include "ubgen/kernels.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

constexpr float kA = 1.12f, kB = -0.123f, kGuidance = 2.0f;
constexpr float kWeights[] = {55.0f / 24, -59.0f / 24, 37.0f / 24, -9.0f / 24};
constexpr float kUntouched = 12345.0f;

std::vector<float> noise(int64_t count, unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float &value : values) value = normal(engine);
    return values;
}

bool near(float got, double wanted, double scale) { return std::fabs(got - wanted) <= 1e-6 * scale; }

// One more element than `count` on the outputs shows a write past the end.
int check(int64_t count, int history_count, int threads) {
    const std::vector<float> x = noise(count, 1), u = noise(count, 2), c = noise(count, 3);
    const std::vector<float> h[] = {noise(count, 4), noise(count, 5), noise(count, 6)};
    const float *history[] = {h[0].data(), h[1].data(), h[2].data()};
    std::vector<float> x_next(count + 1, kUntouched), e(count + 1, kUntouched);
    const int status = ubgen_guided_step_f32(x.data(), u.data(), c.data(), history, history_count, kWeights, kA, kB,
                                             kGuidance, x_next.data(), e.data(), count, threads);
    bool good = status == UBGEN_OK && x_next[count] == kUntouched && e[count] == kUntouched;
    for (int64_t i = 0; i < count && good; ++i) {
        const double guided = u[i] + double(kGuidance) * (double(c[i]) - u[i]);
        double sum = kWeights[0] * guided, scale = 10.0 + std::fabs(guided);
        for (int k = 0; k < history_count; ++k) sum += double(kWeights[1 + k]) * h[k][i];
        good = near(e[i], guided, scale) && near(x_next[i], double(kA) * x[i] + double(kB) * sum, scale);
    }
    if (!good) std::printf("FAILED: count %lld, history %d, threads %d\n", (long long)count, history_count, threads);
    return good ? 0 : 1;
}

int check_refusals() {
    const float value = 0;
    const float *history[] = {&value, &value, &value};
    float out[2];
    const auto call = [&](int history_count, int64_t count) {
        return ubgen_guided_step_f32(&value, &value, &value, history, history_count, kWeights, kA, kB, kGuidance, out,
                                     out + 1, count, 1);
    };
    const bool good = call(4, 1) == UBGEN_BAD_ARGUMENT && call(-1, 1) == UBGEN_BAD_ARGUMENT &&
                      call(0, -1) == UBGEN_BAD_ARGUMENT;
    if (!good) std::printf("FAILED: a bad argument was accepted\n");
    return good ? 0 : 1;
}

}  // namespace

int main() {
    int failures = check_refusals();
    for (int64_t count : {0, 1, 3, 7, 8, 15, 16, 17, 63, 1000, 16383, 16384, 16385, 32768, 100003})
        for (int history_count = 0; history_count <= UBGEN_MAX_HISTORY; ++history_count)
            for (int threads : {1, 2, 5}) failures += check(count, history_count, threads);
    std::printf("%s\n", failures ? "some checks failed" : "all checks passed");
    return failures ? 1 : 0;
}
