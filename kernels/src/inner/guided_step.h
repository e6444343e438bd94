// One pass over memory instead of one per arithmetic operation. Multiplications and additions stay apart: a fused one
// would round once where the reference rounds twice.
#include "inner.h"
#include "simd.h"

namespace ubgen {
namespace UBGEN_ISA {

template <class T>
struct Streams {
    const T *x, *u, *c, *z, *h[UBGEN_MAX_HISTORY];
    T *x_next, *e;
};

// kLanes elements at i, or `count` of them at the end of the arrays.
template <class T, bool Guided, bool Whole>
UBGEN_INLINE void step_at(const GuidedStep &s, const Streams<T> &p, int64_t i, int64_t count) {
    const auto get = [&](const T *from) { return Whole ? load(from + i) : load_some(from + i, count); };
    const auto put = [&](T *to, F v) { Whole ? store(to + i, v) : store_some(to + i, v, count); };
    F e = get(p.u);
    if (Guided) {
        e = e + broadcast(s.guidance) * (get(p.c) - e);
        put(p.e, e);
    }
    F sum = broadcast(s.weights[0]) * e;
    for (int k = 0; k < s.history_count; ++k) sum = sum + broadcast(s.weights[1 + k]) * get(p.h[k]);
    F next = broadcast(s.a) * get(p.x) + broadcast(s.b) * sum;
    if (p.z) next = next + broadcast(s.s) * get(p.z);
    put(p.x_next, next);
}

template <bool Guided, class T>
void step_range(const GuidedStep &s, const T *x, int64_t begin, int64_t end) {
    Streams<T> p = {x, (const T *)s.e_uncond, (const T *)s.e_cond, (const T *)s.noise, {},
                    (T *)s.x_next, (T *)s.e};
    for (int k = 0; k < s.history_count; ++k) p.h[k] = (const T *)s.history[k];
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) step_at<T, Guided, true>(s, p, i, kLanes);
    if (i < end) step_at<T, Guided, false>(s, p, i, end - i);
}

void guided_step(int dtype, const GuidedStep &s, int64_t begin, int64_t end) {
    typed(dtype, s.x, [&](const auto *x) {
        s.e_cond ? step_range<true>(s, x, begin, end) : step_range<false>(s, x, begin, end);
    });
}

}  // namespace UBGEN_ISA
}  // namespace ubgen
