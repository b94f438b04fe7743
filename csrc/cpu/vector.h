// Vectors of WIDTH floats by the compiler's vector extension: one source, compiled once for each
// instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastalign {
namespace FASTALIGN_ISA {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Float __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Int __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Bits __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t Half __attribute__((vector_size(WIDTH * 2)));

inline Float splat(float value) { return Float{} + value; }
inline Bits splat_bits(uint32_t value) { return Bits{} + value; }

template <typename To, typename From>
inline To reinterpret(From value) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

inline float sum(Float value) {
    float total = 0;
    for (int i = 0; i < WIDTH; ++i) total += value[i];
    return total;
}

// e^x to about one unit in the last place (Cephes' expf); 0 below -87.3; a NaN stays one.
inline Float exp(Float x) {
    const Float bounded = x < -87.3f ? splat(-87.3f) : (x > 88.3f ? splat(88.3f) : x);
    const Float magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Float n = (bounded * 1.44269504088896341f + magic) - magic;
    Float r = bounded - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Float p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Float exponent = n == n ? n : splat(0.0f);
    const Bits power = reinterpret<Bits>(__builtin_convertvector(exponent, Int) + 127) << 23;
    const Float result = p * reinterpret<Float>(power);
    return x < -87.3f ? splat(0.0f) : result;
}

// tanh to about one unit in the last place (Cephes' tanhf).
inline Float tanh(Float x) {
    const Float magnitude = x < 0.0f ? -x : x;
    const Float e = exp(-2.0f * magnitude);
    const Float large = (1.0f - e) / (1.0f + e);
    const Float square = x * x;
    Float p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const Float small = x + x * square * p;
    return magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
}

struct Float32 {
    typedef float Element;
    static Float load(const float* from) {
        Float value;
        memcpy(&value, from, sizeof(value));
        return value;
    }
    static void store(float* to, Float value) { memcpy(to, &value, sizeof(value)); }
};

struct BFloat16 {
    typedef uint16_t Element;
    static Float load(const uint16_t* from) {
        Half half;
        memcpy(&half, from, sizeof(half));
        return reinterpret<Float>(__builtin_convertvector(half, Bits) << 16);
    }
    // Round to nearest, ties to even; a NaN stays one.
    static void store(uint16_t* to, Float value) {
        const Bits bits = reinterpret<Bits>(value);
        const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const Bits kept = value == value ? rounded : splat_bits(0x7fc0u);
        const Half half = __builtin_convertvector(kept, Half);
        memcpy(to, &half, sizeof(half));
    }
};

struct Float16 {
    typedef uint16_t Element;
    static Float load(const uint16_t* from) {
        Half half;
        memcpy(&half, from, sizeof(half));
        const Bits bits = __builtin_convertvector(half, Bits);
        const Bits sign = (bits & 0x8000u) << 16;
        const Bits magnitude = (bits & 0x7fffu) << 13;
        // The exponent's bias is 112 less; multiplying also normalises subnormal numbers.
        const Bits finite =
            reinterpret<Bits>(reinterpret<Float>(magnitude) * 5.192296858534828e33f);
        const Bits special = magnitude | 0x7f800000u;
        return reinterpret<Float>(((bits & 0x7c00u) == 0x7c00u ? special : finite) | sign);
    }
    // Round to nearest, ties to even, through the float unit's own rounding.
    static void store(uint16_t* to, Float value) {
        const Bits bits = reinterpret<Bits>(value);
        const Bits sign = (bits >> 16) & 0x8000u;
        const Bits magnitude = bits & 0x7fffffffu;
        const Float size = reinterpret<Float>(magnitude);
        // Normal: re-bias the exponent and round; subnormal: adding 0.5 aligns the last place of a
        // half.
        const Bits normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
        const Bits subnormal = reinterpret<Bits>(size + 0.5f) - 0x3f000000u;
        Bits half_bits = size < 6.103515625e-5f ? subnormal : normal;
        half_bits = magnitude >= 0x477ff000u ? splat_bits(0x7c00u) : half_bits;
        half_bits = magnitude > 0x7f800000u ? splat_bits(0x7e00u) : half_bits;
        const Half half = __builtin_convertvector(half_bits | sign, Half);
        memcpy(to, &half, sizeof(half));
    }
};

// Partial sums are kept in float for this many columns, then added in double.
constexpr int64_t BLOCK = 4096;
constexpr float LOWEST = -1e30f;  // stands for -inf where 0 * -inf would be NaN

// The last columns, padded to a whole vector.
template <typename Type>
Float load_tail(const typename Type::Element* from, int64_t count, float padding) {
    typename Type::Element buffer[WIDTH] = {};
    memcpy(buffer, from, count * sizeof(*from));
    Float value = Type::load(buffer);
    for (int64_t i = count; i < WIDTH; ++i) value[i] = padding;
    return value;
}

template <typename Type>
inline float row_maximum(const typename Type::Element* row, int64_t num_columns) {
    // Four at a time: each comparison waits for the one before it.
    Float maxima[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    int64_t column = 0;
    for (; column + 4 * WIDTH <= num_columns; column += 4 * WIDTH) {
        for (int i = 0; i < 4; ++i) {
            const Float x = Type::load(row + column + i * WIDTH);
            maxima[i] = x > maxima[i] ? x : maxima[i];
        }
    }
    for (int i = 1; i < 4; ++i) maxima[0] = maxima[i] > maxima[0] ? maxima[i] : maxima[0];
    Float maximum = maxima[0];
    for (; column + WIDTH <= num_columns; column += WIDTH) {
        const Float x = Type::load(row + column);
        maximum = x > maximum ? x : maximum;
    }
    if (column < num_columns) {
        const Float x = load_tail<Type>(row + column, num_columns - column, -INFINITY);
        maximum = x > maximum ? x : maximum;
    }
    float result = maximum[0];
    for (int i = 1; i < WIDTH; ++i) result = maximum[i] > result ? maximum[i] : result;
    return result;
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
