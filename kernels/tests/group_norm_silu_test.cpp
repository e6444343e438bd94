// GroupNorm and SiLU against two passes in double precision.
#include "check.h"

namespace {

struct Case {
    int dtype, layout;
    int64_t batch, channels, area, groups;
    double mean;
    int threads;
    std::string name() const {
        return text("dtype %d, layout %d, %lldx%lldx%lld, %lld groups, mean %g, threads %d", dtype, layout,
                    static_cast<long long>(batch), static_cast<long long>(channels), static_cast<long long>(area),
                    static_cast<long long>(groups), mean, threads);
    }
};

constexpr float kEps = 1e-5f;

int run(const Case &c, Array &x, std::vector<float> &weight, std::vector<float> &bias, Array &y) {
#if defined(UBGEN_CUDA_SOURCE)
    const int64_t bytes = ubgen_group_norm_silu_workspace(c.layout, c.batch, c.area, c.groups);
    std::vector<double> workspace(bytes / sizeof(double) + 1, kNaN);
    return ubgen_group_norm_silu_cuda(c.dtype, c.layout, x.data(), weight.data(), bias.data(), c.batch, c.channels,
                                      c.area, c.groups, kEps, y.data(), workspace.data(), nullptr);
#else
    return ubgen_group_norm_silu(c.dtype, c.layout, x.data(), weight.data(), bias.data(), c.batch, c.channels, c.area,
                                 c.groups, kEps, y.data(), c.threads);
#endif
}

void check(const Case &c, Report &report, bool broken = false) {
    Array x = noise(c.dtype, c.batch * c.channels * c.area, 1, c.mean, 2), y(c.dtype, x.count());
    std::mt19937 engine(2);
    std::normal_distribution<float> normal;
    std::vector<float> weight(c.channels), bias(c.channels);
    for (float &v : weight) v = 1 + normal(engine);
    for (float &v : bias) v = normal(engine);
    if (broken) x.set(0, kNaN);
    bool good = run(c, x, weight, bias, y) == UBGEN_OK && y.intact();
    const int64_t members = c.channels / c.groups;
    const auto place = [&](int64_t image, int64_t channel, int64_t p) {
        return c.layout == UBGEN_NHWC ? (image * c.area + p) * c.channels + channel
                                      : (image * c.channels + channel) * c.area + p;
    };
    for (int64_t group = 0; group < c.batch * c.groups && good; ++group) {
        const int64_t image = group / c.groups, first = group % c.groups * members;
        double sum = 0, square = 0, largest = 0;
        const auto each = [&](auto body) {
            for (int64_t channel = first; channel < first + members; ++channel)
                for (int64_t p = 0; p < c.area; ++p) body(channel, place(image, channel, p));
        };
        each([&](int64_t, int64_t i) { sum += x.at(i); });
        const double mean = sum / double(members * c.area);
        each([&](int64_t, int64_t i) {
            square += (x.at(i) - mean) * (x.at(i) - mean);
            largest = std::fmax(largest, std::fabs(x.at(i)));
        });
        const double scale = 1 / std::sqrt(square / double(members * c.area) + kEps);
        // float32 knows the mean to a relative 1e-7, whatever the deviation
        const double blur = 2e-6 + 2e-7 * std::fabs(mean) * scale;
        each([&](int64_t channel, int64_t i) {
            const double v = weight[channel] * (x.at(i) - mean) * scale + bias[channel];
            const double wanted = v / (1 + std::exp(-v));
            const double allowed = blur * (2 + std::fabs(weight[channel])) * (1 + largest * scale);
            good = good && near(y.at(i), wanted, allowed + y.rounding() * std::fabs(wanted));
        });
    }
    report.expect(good, c.name());
}

void check_refusals(Report &report) {
    Array x(UBGEN_F32, 4), y(UBGEN_F32, 4);
    std::vector<float> ones(4, 1);
    const auto call = [&](int dtype, int layout, int64_t channels, int64_t groups) {
        return run({dtype, layout, 1, channels, 1, groups, 0, 1}, x, ones, ones, y);
    };
    report.expect(call(9, 0, 4, 2) == UBGEN_BAD_ARGUMENT, "dtype 9");
    report.expect(call(0, 5, 4, 2) == UBGEN_BAD_ARGUMENT, "layout 5");
    report.expect(call(0, 0, 4, 3) == UBGEN_BAD_ARGUMENT, "3 groups of 4 channels");
    report.expect(call(0, 0, 4, 0) == UBGEN_BAD_ARGUMENT, "no groups");
}

void checks(Report &report) {
    check_refusals(report);
    for (int dtype : {UBGEN_F32, UBGEN_F16, UBGEN_BF16})
        for (int layout : {UBGEN_NCHW, UBGEN_NHWC}) {
            check({dtype, layout, 2, 32, 48, 4, 0, 1}, report, true);
            if (kOnCuda && dtype == UBGEN_F16) continue;  // the same code as bfloat16, and emulation is slow
            for (int64_t area : {1, 16, 105})
                for (int64_t channels : {2, 30, 48}) check({dtype, layout, 2, channels, area, 2, 0.5, 1}, report);
            check({dtype, layout, 0, 8, 4, 2, 0, 1}, report);
            check({dtype, layout, 2, 8, 0, 2, 0, 1}, report);
            check({dtype, layout, 1, 6, 20, 6, 0, 1}, report);
            check({dtype, layout, 1, 6, 20, 1, 0, 1}, report);
            check({dtype, layout, 1, 32, 64, 4, 100, 1}, report);  // far from 0
            check({dtype, layout, 1, 4128, 4, 16, 0, 1}, report);  // wider than a block of threads
            if (layout == UBGEN_NCHW)  // more than the emulated shared memory
                check({dtype, layout, 1, 8, 3208, 1, 0, 1}, report);
            if (!kOnCuda)
                for (int threads : {1, 2, 5}) check({dtype, layout, 3, 320, 233, 32, 0, threads}, report);
        }
}

}  // namespace

int main() { return run(checks); }
