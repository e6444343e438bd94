// simd.h's vectors for any CPU: arrays of four, for the compiler to turn into what it has. Included in its namespaces.

constexpr int kLanes = 4;
struct F {
    float v[kLanes];
};
struct I {
    uint32_t v[kLanes];
};

#define UBGEN_EACH(body)                                \
    do {                                                \
        for (int k = 0; k < kLanes; ++k) { body; }      \
    } while (false)

UBGEN_INLINE float from_bits(uint32_t u) {
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
}
UBGEN_INLINE uint32_t to_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, sizeof u);
    return u;
}

UBGEN_INLINE F operator+(F a, F b) {
    UBGEN_EACH(a.v[k] += b.v[k]);
    return a;
}
UBGEN_INLINE F operator-(F a, F b) {
    UBGEN_EACH(a.v[k] -= b.v[k]);
    return a;
}
UBGEN_INLINE F operator*(F a, F b) {
    UBGEN_EACH(a.v[k] *= b.v[k]);
    return a;
}
UBGEN_INLINE F operator/(F a, F b) {
    UBGEN_EACH(a.v[k] /= b.v[k]);
    return a;
}
UBGEN_INLINE F broadcast(float v) { return {{v, v, v, v}}; }
UBGEN_INLINE F minimum(F a, F b) {
    UBGEN_EACH(b.v[k] = a.v[k] < b.v[k] ? a.v[k] : b.v[k]);
    return b;
}
UBGEN_INLINE F maximum(F a, F b) {
    UBGEN_EACH(b.v[k] = a.v[k] > b.v[k] ? a.v[k] : b.v[k]);
    return b;
}
UBGEN_INLINE F fma(F a, F b, F c) { return a * b + c; }
UBGEN_INLINE I bits(F f) {
    I i;
    UBGEN_EACH(i.v[k] = to_bits(f.v[k]));
    return i;
}
UBGEN_INLINE bool any_nan(F f) {
    bool any = false;
    UBGEN_EACH(any |= f.v[k] != f.v[k]);
    return any;
}
UBGEN_INLINE F times_power_of_two(F f, F n) {
    UBGEN_EACH(f.v[k] *= from_bits((to_bits(n.v[k] + kRound) << 23) + 0x3f800000u));
    return f;
}

// Half precision by integer arithmetic, after F. Giesen's public-domain routines.
UBGEN_INLINE float half_to_float(uint32_t h) {
    const uint32_t exponent = 0x7c00u << 13;
    uint32_t u = (h & 0x7fffu) << 13;
    const uint32_t own = u & exponent;
    u += (127u - 15u) << 23;
    if (own == exponent) u += (128u - 16u) << 23;  // infinity, NaN
    if (own == 0) u = to_bits(from_bits(u + (1u << 23)) - from_bits(113u << 23));  // zero, subnormal
    return from_bits(u | (h & 0x8000u) << 16);
}
UBGEN_INLINE uint16_t float_to_half(float f) {
    const uint32_t u = to_bits(f), sign = u & 0x80000000u, size = u ^ sign;
    uint32_t h;
    if (size >= (127u + 16u) << 23)  // too large, infinity, NaN
        h = size > 255u << 23 ? 0x7e00u : 0x7c00u;
    else if (size < 113u << 23)  // subnormal or zero: the adder aligns and rounds
        h = to_bits(from_bits(size) + from_bits((127u - 15u + 23u - 10u + 1u) << 23)) -
            ((127u - 15u + 23u - 10u + 1u) << 23);
    else
        h = (size - ((127u - 15u) << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;
    return static_cast<uint16_t>(h | sign >> 16);
}
UBGEN_INLINE uint16_t float_to_bfloat16(float f) {
    const uint32_t u = to_bits(f);
    return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

UBGEN_INLINE F load(const float *p) {
    F f;
    UBGEN_EACH(f.v[k] = p[k]);
    return f;
}
UBGEN_INLINE F load(const Half *p) {
    F f;
    UBGEN_EACH(f.v[k] = half_to_float(p[k].bits));
    return f;
}
UBGEN_INLINE F load(const BFloat16 *p) {
    F f;
    UBGEN_EACH(f.v[k] = from_bits(static_cast<uint32_t>(p[k].bits) << 16));
    return f;
}
UBGEN_INLINE F load(const uint8_t *p) {
    F f;
    UBGEN_EACH(f.v[k] = p[k]);
    return f;
}
UBGEN_INLINE void store(float *p, F f) { UBGEN_EACH(p[k] = f.v[k]); }
UBGEN_INLINE void store(Half *p, F f) { UBGEN_EACH(p[k].bits = float_to_half(f.v[k])); }
UBGEN_INLINE void store(BFloat16 *p, F f) { UBGEN_EACH(p[k].bits = float_to_bfloat16(f.v[k])); }
UBGEN_INLINE I to_bytes(F f) {  // in the low byte of what kRound makes of it
    return bits(minimum(maximum(f, broadcast(0.0f)), broadcast(1.0f)) * broadcast(255.0f) + broadcast(kRound));
}
UBGEN_INLINE void store_bytes(uint8_t *p, I i) { UBGEN_EACH(p[k] = static_cast<uint8_t>(i.v[k])); }
UBGEN_INLINE void store_rgb(uint8_t *p, I r, I g, I b) {
    UBGEN_EACH(p[3 * k] = static_cast<uint8_t>(r.v[k]); p[3 * k + 1] = static_cast<uint8_t>(g.v[k]);
               p[3 * k + 2] = static_cast<uint8_t>(b.v[k]));
}
UBGEN_INLINE void interleave(F a, F b, F &low, F &high) {
    low = {{a.v[0], b.v[0], a.v[1], b.v[1]}};
    high = {{a.v[2], b.v[2], a.v[3], b.v[3]}};
}

struct Doubles {
    double v[kLanes];
};
UBGEN_INLINE Doubles zero_doubles() { return {}; }
UBGEN_INLINE Doubles widen(F f) { return {{f.v[0], f.v[1], f.v[2], f.v[3]}}; }
UBGEN_INLINE Doubles add(Doubles a, Doubles b) {
    UBGEN_EACH(a.v[k] += b.v[k]);
    return a;
}
UBGEN_INLINE Doubles add_square(Doubles a, Doubles b) {
    UBGEN_EACH(a.v[k] += b.v[k] * b.v[k]);
    return a;
}
UBGEN_INLINE Doubles load(const double *p) { return {{p[0], p[1], p[2], p[3]}}; }
UBGEN_INLINE void store(double *p, Doubles d) { UBGEN_EACH(p[k] = d.v[k]); }

#undef UBGEN_EACH
