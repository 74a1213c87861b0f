// Vectors of LANES floats for the kernels of this folder, by the compiler's own vector types.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef LANES
#define LANES 16
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

namespace {

constexpr float NOTHING = -1e30f;

inline vec splat(float x) { return x - vec{}; }
inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec larger(vec a, vec b) { return a > b ? a : b; }
inline float sum(vec v) { float t = 0; for (int i = 0; i < LANES; i++) t += v[i]; return t; }
inline float top(vec v) { float t = v[0]; for (int i = 1; i < LANES; i++) t = v[i] > t ? v[i] : t; return t; }

// exp for x <= about 80, to 2 ulp: 2^n times Cephes' polynomial on [-ln2/2, ln2/2]. Below -87 it is about 1e-38.
inline vec exponential(vec x) {
    x = larger(x, splat(-87.0f));
    const vec magic = splat(12582912.0f);
    vec n = x * 1.44269504088896341f + magic;
    ivec bits = (ivec)n << 23;
    n -= magic;
    x -= n * 0.693359375f;
    x -= n * -2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1.0f;
    return (vec)((ivec)p + bits);
}

}  // namespace
