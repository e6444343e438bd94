// The resize against a dense weighted sum in double precision, with weights that this file computes on its own.
#include "check.h"

namespace {

constexpr uint8_t kBorder[3] = {122, 116, 104};
constexpr double kMean[3] = {0.48145466, 0.4578275, 0.40821073}, kStd[3] = {0.26862954, 0.26130258, 0.27577711};

struct Axis {
    int64_t source, target, taps;
    std::vector<int32_t> first;
    std::vector<float> weights;
    ubgen_axis view() const { return {source, target, taps, first.data(), weights.data()}; }
};

double cubic(double x) {  // Keys 1981, a = -0.5
    x = std::fabs(x);
    if (x < 1) return 1.5 * x * x * x - 2.5 * x * x + 1;
    return x < 2 ? -0.5 * x * x * x + 2.5 * x * x - 4 * x + 2 : 0;
}

Axis bicubic(int64_t source, int64_t target) {
    const double scale = double(source) / target, width = std::fmax(scale, 1);
    Axis axis = {source, target, std::min<int64_t>(source, int64_t(std::ceil(4 * width)) + 1), {}, {}};
    for (int64_t i = 0; i < target; ++i) {
        const double centre = (i + 0.5) * scale;
        int64_t first = std::max<int64_t>(0, int64_t(std::floor(centre - 2 * width + 0.5)));
        first = std::min(first, source - axis.taps);
        axis.first.push_back(int32_t(first));
        double total = 0;
        for (int64_t k = 0; k < axis.taps; ++k) total += cubic((first + k + 0.5 - centre) / width);
        for (int64_t k = 0; k < axis.taps; ++k)
            axis.weights.push_back(float(cubic((first + k + 0.5 - centre) / width) / total));
    }
    return axis;
}

struct Case {
    int64_t batch, height, width, size;
    bool pad;
    int threads;
    std::string name() const {
        return text("%lldx%lldx%lld to %lld, pad %d, threads %d", static_cast<long long>(batch),
                    static_cast<long long>(height), static_cast<long long>(width), static_cast<long long>(size), pad,
                    threads);
    }
};

double clamped(bool bounded, double v) { return bounded ? std::fmin(std::fmax(v, 0.0), 255.0) : v; }

void check(const Case &c, Report &report) {
    const int64_t side = std::max(c.height, c.width);
    const Axis across = bicubic(c.pad ? side : c.width, c.size), down = bicubic(c.pad ? side : c.height, c.size);
    ubgen_framing framing = {};
    framing.top = (down.source - c.height) / 2;
    framing.left = (across.source - c.width) / 2;
    framing.bounded = c.pad;
    for (int k = 0; k < 3; ++k) {
        framing.border[k] = kBorder[k];
        framing.scale[k] = float(1 / (255 * kStd[k]));
        framing.shift[k] = float(-kMean[k] / kStd[k]);
    }
    std::mt19937 engine(5);
    std::vector<uint8_t> pixels(c.batch * c.height * c.width * 3);
    for (uint8_t &pixel : pixels) pixel = engine() % 4 ? engine() % 256 : engine() % 2 * 255;  // overshoots happen
    const int64_t count = c.batch * 3 * c.size * c.size;
    std::vector<float> out(count + 1, 12345.0f);
    const ubgen_axis wide = across.view(), high = down.view();
    const int status = UBGEN_CALL(resize_normalise, c.threads, pixels.data(), c.batch, c.height, c.width, &wide, &high,
                                  &framing, out.data());
    bool good = status == UBGEN_OK && out[count] == 12345.0f;
    const auto canvas = [&](int64_t image, int64_t y, int64_t x, int k) -> double {
        y -= framing.top, x -= framing.left;
        const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
        return inside ? pixels[((image * c.height + y) * c.width + x) * 3 + k] : kBorder[k];
    };
    std::vector<double> narrowed(down.source * c.size);
    for (int64_t plane = 0; plane < c.batch * 3 && good; ++plane) {
        const int k = int(plane % 3);
        for (int64_t y = 0; y < down.source; ++y)
            for (int64_t x = 0; x < c.size; ++x) {
                double sum = 0;
                for (int64_t t = 0; t < across.taps; ++t)
                    sum += double(across.weights[x * across.taps + t]) * canvas(plane / 3, y, across.first[x] + t, k);
                narrowed[y * c.size + x] = clamped(c.pad, sum);
            }
        for (int64_t y = 0; y < c.size; ++y)
            for (int64_t x = 0; x < c.size; ++x) {
                double sum = 0;
                for (int64_t t = 0; t < down.taps; ++t)
                    sum += double(down.weights[y * down.taps + t]) * narrowed[(down.first[y] + t) * c.size + x];
                const double wanted = (clamped(c.pad, sum) / 255 - kMean[k]) / kStd[k];
                good = good && near(out[(plane * c.size + y) * c.size + x], wanted, 1e-5);
            }
    }
    report.expect(good, c.name());
}

void check_refusals(Report &report) {
    const Axis axis = bicubic(8, 4);
    const uint8_t pixels[8 * 8 * 3] = {};
    float out[3 * 4 * 4];
    const auto call = [&](ubgen_axis across, int64_t width, int64_t left, int64_t batch) {
        ubgen_framing framing = {};
        framing.left = left;
        const ubgen_axis down = axis.view();
        return UBGEN_CALL(resize_normalise, 1, pixels, batch, 8, width, &across, &down, &framing, out);
    };
    report.expect(call(axis.view(), 8, 0, -1) == UBGEN_BAD_ARGUMENT, "batch -1");
    report.expect(call(axis.view(), 8, 1, 1) == UBGEN_BAD_ARGUMENT, "an image that leaves the canvas");
    report.expect(call(axis.view(), 0, 0, 1) == UBGEN_BAD_ARGUMENT, "an image without pixels");
    ubgen_axis wrong = axis.view();
    wrong.taps = 9;
    report.expect(call(wrong, 8, 0, 1) == UBGEN_BAD_ARGUMENT, "more taps than pixels");
    if (kOnCuda) return;  // there the weights lie in device memory, where the function cannot look
    std::vector<int32_t> first = axis.first;
    first.back() = 8;
    wrong = axis.view();
    wrong.first = first.data();
    report.expect(call(wrong, 8, 0, 1) == UBGEN_BAD_ARGUMENT, "taps past the end");
}

void checks(Report &report) {
    check_refusals(report);
    for (bool pad : {false, true}) {
        for (int64_t size : {1, 7, 16, 33})
            for (int64_t height : {1, 5, 16, 40})
                for (int64_t width : {1, 4, 17, 64}) check({2, height, width, size, pad, 1}, report);
        check({0, 8, 8, 4, pad, 1}, report);
        check({1, 300, 260, 9, pad, 1}, report);   // many taps
        check({1, 24, 40, 90, pad, 1}, report);    // larger than it was
        check({1, 150, 200, 64, pad, 1}, report);  // several tiles
        if (kOnCuda) check({1, 400, 8, 2, false, 1}, report);  // so many that only a small tile fits
        if (!kOnCuda)
            for (int threads : {1, 2, 5}) check({3, 130, 120, 70, pad, threads}, report);
    }
}

}  // namespace

int main() { return run(checks); }
