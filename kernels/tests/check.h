// What the tests share. Each is built for the CPU function and, where CUDA's headers are, once more for the CUDA source
// run by cuda_on_cpu.h; UBGEN_CUDA_SOURCE names it then.
#ifndef UBGEN_CHECK_H
#define UBGEN_CHECK_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#if defined(UBGEN_CUDA_SOURCE)
#include UBGEN_CUDA_SOURCE
#define UBGEN_CALL(name, threads, ...) ubgen_##name##_cuda(__VA_ARGS__, static_cast<void *>(nullptr))
constexpr bool kOnCuda = true;
#else
#include "ubgen/kernels.h"
#define UBGEN_CALL(name, threads, ...) ubgen_##name(__VA_ARGS__, threads)
constexpr bool kOnCuda = false;
#endif

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr unsigned char kUntouched = 0xa5;

// Bytes behind each array, which must stay untouched. None under the address sanitizer: it then sees whoever passes the
// end, also to read.
#if defined(UBGEN_SANITIZE)
constexpr int kGuard = 0;
#else
constexpr int kGuard = 16;
#endif

// An array of a kernel's element type, of which only doubles are seen.
class Array {
   public:
    Array(int dtype, int64_t count) : dtype_(dtype), count_(count), bytes_(count * size() + kGuard, kUntouched) {}

    void *data() { return bytes_.data(); }
    int64_t count() const { return count_; }
    bool intact() const {
        bool same = true;
        for (int k = 0; k < kGuard; ++k) same = same && bytes_[count_ * size() + k] == kUntouched;
        return same;
    }

    double at(int64_t i) const {
        if (dtype_ == UBGEN_F32) return get<float>(i);
        const int mantissa = dtype_ == UBGEN_F16 ? 10 : 7, bias = dtype_ == UBGEN_F16 ? 15 : 127;
        const int bits = get<uint16_t>(i), fraction = bits & ((1 << mantissa) - 1);
        const int exponent = (bits & 0x7fff) >> mantissa, largest = 2 * bias + 1;
        const double sign = bits & 0x8000 ? -1 : 1;
        if (exponent == largest) return fraction ? kNaN : sign * kInfinity;
        const double value = exponent ? std::ldexp((1 << mantissa) + fraction, exponent - bias - mantissa)
                                      : std::ldexp(fraction, 1 - bias - mantissa);
        return sign * value;
    }

    // The nearest value below in size: tests need values of the type, not rounding.
    void set(int64_t i, double value) {
        if (dtype_ == UBGEN_F32) return put<float>(i, static_cast<float>(value));
        const int mantissa = dtype_ == UBGEN_F16 ? 10 : 7, bias = dtype_ == UBGEN_F16 ? 15 : 127;
        const int sign = std::signbit(value) ? 0x8000 : 0, largest = (2 * bias + 1) << mantissa;
        if (std::isnan(value)) return put<uint16_t>(i, static_cast<uint16_t>(largest | 1 << (mantissa - 1)));
        if (std::isinf(value)) return put<uint16_t>(i, static_cast<uint16_t>(sign | largest));
        int exponent = 0;
        std::frexp(value, &exponent);
        exponent = std::max(exponent - 1, 1 - bias);
        const int units = static_cast<int>(std::fabs(value) / std::ldexp(1, exponent - mantissa));
        put<uint16_t>(i, static_cast<uint16_t>(sign | (((exponent + bias - 1) << mantissa) + units)));
    }

    // Half the distance between neighbouring values, relative; float32 has its own allowance.
    double rounding() const { return dtype_ == UBGEN_F32 ? 0 : std::ldexp(1, dtype_ == UBGEN_F16 ? -11 : -8); }

   private:
    int size() const { return dtype_ == UBGEN_F32 ? 4 : 2; }
    template <class T>
    T get(int64_t i) const {
        T value;
        std::memcpy(&value, bytes_.data() + i * sizeof(T), sizeof(T));
        return value;
    }
    template <class T>
    void put(int64_t i, T value) {
        std::memcpy(bytes_.data() + i * sizeof(T), &value, sizeof(T));
    }
    int dtype_;
    int64_t count_;
    std::vector<unsigned char> bytes_;
};

inline Array noise(int dtype, int64_t count, unsigned seed, double mean = 0, double deviation = 1) {
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal(mean, deviation);
    Array values(dtype, count);
    for (int64_t i = 0; i < count; ++i) values.set(i, normal(engine));
    return values;
}

inline bool near(double got, double wanted, double allowed) {
    if (std::isnan(wanted)) return std::isnan(got);
    return got == wanted || std::fabs(got - wanted) <= allowed;
}

// Counts failures and says where the first of each kind were.
struct Report {
    int failures = 0;
    void expect(bool good, const std::string &what) {
        if (good) return;
        if (++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
    }
};

// The whole test, for CUDA once with the threads of a block in order and once in the opposite order.
inline int run(void (*checks)(Report &)) {
    Report report;
    checks(report);
#if defined(UBGEN_CUDA_SOURCE)
    cuda_on_cpu::reverse = true;
    checks(report);
#endif
    std::printf("%s\n", report.failures ? "some checks failed" : "all checks passed");
    return report.failures ? 1 : 0;
}

template <class... Values>
std::string text(const char *format, Values... values) {
    char line[256];
    std::snprintf(line, sizeof line, format, values...);
    return line;
}

#endif
