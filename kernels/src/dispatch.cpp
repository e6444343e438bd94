// Which of the compiled instruction sets runs.
#include <cstdlib>
#include <cstring>

#include "inner/inner.h"

namespace ubgen {

namespace baseline {
extern const Inner table;
}
#if defined(UBGEN_HAVE_AVX2)
namespace avx2 {
extern const Inner table;
}
#endif
#if defined(UBGEN_HAVE_AVX512)
namespace avx512 {
extern const Inner table;
}
#endif

namespace {

const Inner &choose() {
    const char *named = std::getenv("UBGEN_CPU");
    const auto wanted = [named](const Inner &table) { return !named || !*named || !std::strcmp(named, table.name); };
#if defined(UBGEN_HAVE_AVX2) || defined(UBGEN_HAVE_AVX512)
    __builtin_cpu_init();
#endif
#if defined(UBGEN_HAVE_AVX512)
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512cd");
    if (has_avx512 && wanted(avx512::table)) return avx512::table;
#endif
#if defined(UBGEN_HAVE_AVX2)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    if (has_avx2 && wanted(avx2::table)) return avx2::table;
#endif
    (void)wanted;
    return baseline::table;
}

}  // namespace

const Inner &inner() {
    static const Inner &table = choose();
    return table;
}

}  // namespace ubgen

extern "C" const char *ubgen_cpu(void) { return ubgen::inner().name; }
