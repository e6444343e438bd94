// The update against the same formula in double precision, over sizes around every block and vector boundary.
#include "check.h"

namespace {

constexpr float kA = 1.12f, kB = -0.123f, kGuidance = 2.0f, kS = 0.37f;
constexpr float kWeights[] = {55.0f / 24, -59.0f / 24, 37.0f / 24, -9.0f / 24};

struct Case {
    int dtype;
    int64_t count;
    int history_count;
    bool guided, noisy;
    int threads;
    std::string name() const {
        return text("dtype %d, count %lld, history %d, guided %d, noise %d, threads %d", dtype,
                    static_cast<long long>(count), history_count, guided, noisy, threads);
    }
};

void check(const Case &c, Report &report) {
    Array x = noise(c.dtype, c.count, 1), u = noise(c.dtype, c.count, 2), g = noise(c.dtype, c.count, 3);
    Array h[] = {noise(c.dtype, c.count, 4), noise(c.dtype, c.count, 5), noise(c.dtype, c.count, 6)};
    Array z = noise(c.dtype, c.count, 7), x_next(c.dtype, c.count), e(c.dtype, c.count);
    if (c.count > 9) {
        u.set(3, kNaN);
        h[0].set(9, -kInfinity);
    }
    const void *history[] = {h[0].data(), h[1].data(), h[2].data()};
    const int status = UBGEN_CALL(guided_step, c.threads, c.dtype, x.data(), u.data(), c.guided ? g.data() : nullptr,
                                  history, c.history_count, c.noisy ? z.data() : nullptr, kWeights, kA, kB, kGuidance,
                                  kS, x_next.data(), c.guided ? e.data() : nullptr, c.count);
    bool good = status == UBGEN_OK && x_next.intact() && e.intact();
    for (int64_t i = 0; i < c.count && good; ++i) {
        const double guided = c.guided ? u.at(i) + double(kGuidance) * (g.at(i) - u.at(i)) : u.at(i);
        double sum = kWeights[0] * guided;
        for (int k = 0; k < c.history_count; ++k) sum += double(kWeights[1 + k]) * h[k].at(i);
        double wanted = double(kA) * x.at(i) + double(kB) * sum;
        if (c.noisy) wanted += double(kS) * z.at(i);
        const double allowed = 1e-6 * (10 + std::fabs(guided));
        good = near(x_next.at(i), wanted, allowed + x_next.rounding() * std::fabs(wanted));
        if (c.guided) good = good && near(e.at(i), guided, allowed + e.rounding() * std::fabs(guided));
    }
    report.expect(good, c.name());
}

void check_refusals(Report &report) {
    float value = 0, out[2];
    const void *history[] = {&value, &value, &value};
    const auto call = [&](int dtype, int history_count, int64_t count) {
        return UBGEN_CALL(guided_step, 1, dtype, &value, &value, &value, history, history_count, nullptr, kWeights, kA,
                          kB, kGuidance, kS, out, out + 1, count);
    };
    report.expect(call(UBGEN_F32, 4, 1) == UBGEN_BAD_ARGUMENT, "four histories");
    report.expect(call(UBGEN_F32, -1, 1) == UBGEN_BAD_ARGUMENT, "history -1");
    report.expect(call(UBGEN_F32, 0, -1) == UBGEN_BAD_ARGUMENT, "count -1");
    report.expect(call(3, 0, 1) == UBGEN_BAD_ARGUMENT, "dtype 3");
}

void checks(Report &report) {
    check_refusals(report);
    for (int dtype : {UBGEN_F32, UBGEN_F16, UBGEN_BF16})
        for (bool guided : {true, false})
            for (bool noisy : {true, false})
                for (int history_count = 0; history_count <= UBGEN_MAX_HISTORY; ++history_count) {
                    for (int64_t count : {0, 1, 3, 7, 8, 15, 16, 17, 63, 1000})
                        check({dtype, count, history_count, guided, noisy, 1}, report);
                    if (!kOnCuda && history_count == 3)
                        for (int threads : {1, 2, 5})
                            for (int64_t count : {16383, 16384, 16385, 50003})
                                check({dtype, count, history_count, guided, noisy, threads}, report);
                }
}

}  // namespace

int main() { return run(checks); }
