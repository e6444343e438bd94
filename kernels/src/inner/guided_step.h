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

// The elements that get() loads from an array and put() stores.
template <bool Guided, class T, class Get, class Put>
UBGEN_INLINE void step_at(const GuidedStep &s, const Streams<T> &p, Get get, Put put) {
    auto e = get(p.u);
    if (Guided) {
        e = e + broadcast(s.guidance) * (get(p.c) - e);
        put(p.e, e);
    }
    auto sum = broadcast(s.weights[0]) * e;
    for (int k = 0; k < s.history_count; ++k) sum = sum + broadcast(s.weights[1 + k]) * get(p.h[k]);
    auto next = broadcast(s.a) * get(p.x) + broadcast(s.b) * sum;
    if (p.z) next = next + broadcast(s.s) * get(p.z);
    put(p.x_next, next);
}

template <bool Guided, class T>
void step_range(const GuidedStep &s, const T *x, int64_t begin, int64_t end) {
    Streams<T> p = {x, (const T *)s.e_uncond, (const T *)s.e_cond, (const T *)s.noise, {},
                    (T *)s.x_next, (T *)s.e};
    for (int k = 0; k < s.history_count; ++k) p.h[k] = (const T *)s.history[k];
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes)
        step_at<Guided>(
            s, p, [i](const T *from) { return load_two(from + i); }, [i](T *to, Two v) { store_two(to + i, v); });
    for (; i < end; i += kLanes) {
        const int64_t count = end - i < kLanes ? end - i : kLanes;
        step_at<Guided>(
            s, p, [i, count](const T *from) { return load_some(from + i, count); },
            [i, count](T *to, F v) { store_some(to + i, v, count); });
    }
}

void guided_step(int dtype, const GuidedStep &s, int64_t begin, int64_t end) {
    typed(dtype, s.x, [&](const auto *x) {
        s.e_cond ? step_range<true>(s, x, begin, end) : step_range<false>(s, x, begin, end);
    });
}

}  // namespace UBGEN_ISA
}  // namespace ubgen
