// Bytes and statistics against double precision: every rounding tie, every kind of value that is not finite.
#include "check.h"

namespace {

// kPositive and kNegative: not a single value of the other sign. kLarge: finite, far beyond what an image has.
// kRare: one value in about 5,000 is large or not finite. kBroken: one in 11 is not finite.
enum Values { kImage, kPositive, kNegative, kLarge, kRare, kBroken, kKinds };

struct Case {
    int dtype, layout;
    int64_t batch, height, width;
    int threads, values;
    std::string name() const {
        return text("dtype %d, layout %d, %lldx%lldx%lld, threads %d, values %d", dtype, layout,
                    static_cast<long long>(batch), static_cast<long long>(height), static_cast<long long>(width),
                    threads, values);
    }
};

Array make(const Case &c) {
    const int64_t area = c.height * c.width;
    Array images = noise(c.dtype, c.batch * 3 * area, 1, 0.5, 0.4);
    for (int64_t i = 0; i < images.count(); i += 7) images.set(i, (i / 7 % 255 + 0.5) / 255);  // near the ties
    const double rare[] = {kNaN, kInfinity, -kInfinity, 300, -300};
    const double large[] = {127.9, -127.9, 128, -128, 129, -129, 1000, -1000, 65504, -65504};
    for (int64_t i = 0; i < images.count(); ++i) {
        const double v = images.at(i);
        if (c.values == kPositive) images.set(i, std::fabs(v) + 0.01);
        if (c.values == kNegative) images.set(i, -std::fabs(v) - 0.01);
        if (c.values == kLarge && i % 5 == 0) images.set(i, large[i / 5 % 10]);
        if (c.values == kRare && i % 4999 == 60) images.set(i, rare[i % 5]);
        if (c.values == kBroken && i % 11 == 0) images.set(i, i % 3 ? kNaN : i % 2 ? kInfinity : -kInfinity);
        if (c.values == kBroken && c.batch > 1 && i < 3 * area) images.set(i, kNaN);  // nothing finite in the first
    }
    return images;
}

int wanted_byte(double v) {
    if (std::isnan(v)) return 0;
    const float unit = static_cast<float>(std::fmin(std::fmax(v, 0.0), 1.0));
    return static_cast<int>(std::nearbyint(unit * 255.0f));  // the product is a float32, as in the reference
}

void check(const Case &c, Report &report) {
    const int64_t area = c.height * c.width;
    Array images = make(c);
    std::vector<uint8_t> pixels(c.batch * 3 * area + kGuard, kUntouched);
    std::vector<float> minimum(c.batch + 1, -7), maximum(c.batch + 1, -7);
    std::vector<int64_t> nonfinite(c.batch + 1, -7);
    const int status = UBGEN_CALL(quantise, c.threads, c.dtype, c.layout, images.data(), c.batch, c.height, c.width,
                                  pixels.data(), minimum.data(), maximum.data(), nonfinite.data());
    bool good = status == UBGEN_OK && minimum[c.batch] == -7 && maximum[c.batch] == -7 && nonfinite[c.batch] == -7;
    for (int k = 0; k < kGuard; ++k) good = good && pixels[c.batch * 3 * area + k] == kUntouched;
    for (int64_t image = 0; image < c.batch; ++image) {
        double low = kInfinity, high = -kInfinity;
        int64_t bad = 0;
        for (int64_t i = 0; i < 3 * area; ++i) {
            const bool last = c.layout == UBGEN_NHWC;
            const int64_t pixel = last ? i / 3 : i % area, channel = last ? i % 3 : i / area;
            const double v = images.at(image * 3 * area + i);
            good = good && pixels[(image * area + pixel) * 3 + channel] == wanted_byte(v);
            if (std::isfinite(v)) low = std::fmin(low, v), high = std::fmax(high, v);
            bad += !std::isfinite(v);
        }
        good = good && minimum[image] == low && maximum[image] == high && nonfinite[image] == bad;
    }
    report.expect(good, c.name());
}

void check_refusals(Report &report) {
    float value[3] = {}, low, high;
    uint8_t pixel[3];
    int64_t bad;
    const auto call = [&](int dtype, int layout, int64_t batch, int64_t height, int64_t width) {
        return UBGEN_CALL(quantise, 1, dtype, layout, value, batch, height, width, pixel, &low, &high, &bad);
    };
    report.expect(call(9, 0, 1, 1, 1) == UBGEN_BAD_ARGUMENT, "dtype 9");
    report.expect(call(0, 2, 1, 1, 1) == UBGEN_BAD_ARGUMENT, "layout 2");
    report.expect(call(0, 0, -1, 1, 1) == UBGEN_BAD_ARGUMENT, "batch -1");
    report.expect(call(0, 0, 1, -1, 1) == UBGEN_BAD_ARGUMENT, "height -1");
}

void checks(Report &report) {
    check_refusals(report);
    for (int dtype : {UBGEN_F32, UBGEN_F16, UBGEN_BF16})
        for (int layout : {UBGEN_NCHW, UBGEN_NHWC})
            for (int values = 0; values < kKinds; ++values) {
                for (int64_t width : {0, 1, 3, 15, 16, 17, 33})
                    for (int64_t height : {1, 5, 16}) check({dtype, layout, 2, height, width, 1, values}, report);
                check({dtype, layout, 0, 4, 4, 1, values}, report);
                check({dtype, layout, 1, 64, 80, 2, values}, report);  // several runs, several strips on CUDA
                if (!kOnCuda)
                    for (int threads : {1, 2, 5}) check({dtype, layout, 3, 129, 131, threads, values}, report);
            }
}

}  // namespace

int main() { return run(checks); }
