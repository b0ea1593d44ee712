// FP8 by lanes: amax, cast and cast up, as te_dynamo/lowering/fp8.py defines them. Values are the bits of float32.
//
// Vectors are GCC's and Clang's extension, so this is for any processor. Comparisons are of integers: they order magnitudes, infinity
// above every number and NaN above it, whatever a compiler is told of floats.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using i64 = int64_t;
#if defined(__AVX512F__)
constexpr i64 LANES = 16;
#elif defined(__AVX2__)
constexpr i64 LANES = 8;
#else
constexpr i64 LANES = 4;
#endif
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

constexpr uint32_t SIGN = 0x80000000, INFINITE = 0x7f800000, NOT_A_NUMBER = 0x7fc00000, LARGEST = 0x7f7fffff;

inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
inline uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

// -- the formats in memory: load gives the float32 of `n` elements, the other lanes 0; store rounds to nearest even

struct F32 { using Element = float; };
struct BF16 { using Element = uint16_t; };
struct F16 { using Element = uint16_t; };

template <class Vector, class T> inline Vector load_some(const T* p, i64 n) {
  Vector v{};
  if (n == LANES) memcpy(&v, p, sizeof v);
  else memcpy(&v, p, n * sizeof(T));
  return v;
}

template <class Vector, class T> inline void store_some(Vector v, T* p, i64 n) {
  if (n == LANES) memcpy(p, &v, sizeof v);
  else memcpy(p, &v, n * sizeof(T));
}

template <class D> inline Bits load(const void* base, i64 at, i64 n) {
  const auto* p = static_cast<const typename D::Element*>(base) + at;
  if constexpr (std::is_same_v<D, F32>) return load_some<Bits>(p, n);
  else {
    const Bits half = __builtin_convertvector(load_some<Halves>(p, n), Bits);
    if constexpr (std::is_same_v<D, BF16>) return half << 16;
    const Bits magnitude = (half & 0x7fff) << 13, small = (Bits)((Floats)(magnitude + (113u << 23)) - as_float(113u << 23));
    const Bits moved = magnitude < (31u << 23) ? Bits{} + (112u << 23) : Bits{} + (224u << 23);  // of infinity and NaN
    const Bits number = magnitude < (1u << 23) ? small : magnitude + moved;
    return number | (half & 0x8000) << 16;
  }
}

template <class D> inline void store(Bits v, void* base, i64 at, i64 n) {
  auto* p = static_cast<typename D::Element*>(base) + at;
  if constexpr (std::is_same_v<D, F32>) store_some(v, p, n);
  else if constexpr (std::is_same_v<D, BF16>) {
    const Bits rounded = (v & ~SIGN) > INFINITE ? Bits{} + NOT_A_NUMBER : v + 0x7fff + (v >> 16 & 1);
    store_some(__builtin_convertvector(rounded >> 16, Halves), p, n);
  } else {
    const Bits magnitude = v & ~SIGN, small = (Bits)((Floats)magnitude + 0.5f) - as_bits(0.5f);
    const Bits number = magnitude < (113u << 23) ? small : (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    const Bits special = magnitude > INFINITE ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
    store_some(__builtin_convertvector((magnitude < (143u << 23) ? number : special) | (v >> 16 & 0x8000), Halves), p, n);
  }
}

enum { FLOAT32, BFLOAT16, FLOAT16 };

// run(F32{}), run(BF16{}) or run(F16{})
template <class Run> auto with_dtype(i64 dtype, Run&& run) {
  return dtype == FLOAT32 ? run(F32{}) : dtype == BFLOAT16 ? run(BF16{}) : run(F16{});
}

// -- FP8

struct Rounded {
  Bits number, code;  // of a value: as float32, and in FP8
};

template <int MANTISSA, uint32_t BIAS> struct Format {
  static constexpr uint32_t cut = 23 - MANTISSA, moved = 127 - BIAS;  // bits of float32's mantissa that go; of exponents, the difference
  static constexpr uint32_t least = (moved + 1) << 23;                // the least normal number
  static constexpr uint32_t largest = ((moved + (MANTISSA == 2 ? 30 : 15)) << 23) + 0x600000;  // 1.75 times a power of two

  // What is nearest to x * scale, saturating. NaN stays NaN, and so do magnitudes above `finite`.
  static inline Rounded rounded(Bits x, float scale, uint32_t finite) {
    const Bits magnitude = x & ~SIGN, sign = x & SIGN, scaled = (Bits)((Floats)magnitude * scale);
    const Bits v = scaled > largest ? Bits{} + largest : scaled;
    // Beside a power of two that is 2**cut times as large, or as the least normal number, the bits that go are out of reach.
    const Bits power = v & INFINITE, exponent = power < least ? Bits{} + least : power, beside = exponent + (cut << 23);
    const Bits sum = (Bits)((Floats)v + (Floats)beside), code = sum - beside + ((exponent - least) >> cut);
    const auto unlike = magnitude > finite;
    return {(unlike ? Bits{} + NOT_A_NUMBER : (Bits)((Floats)sum - (Floats)beside)) | sign, (unlike ? Bits{} + 0x7f : code) | sign >> 24};
  }
};

using E4M3 = Format<3, 7>;
using E5M2 = Format<2, 15>;

// run(E4M3{}) or run(E5M2{})
template <class Run> auto with_format(bool e5m2, Run&& run) { return e5m2 ? run(E5M2{}) : run(E4M3{}); }

// E4M3 in float32, but for what SCALED says, and for NaN, which is a number here.
#ifdef __AVX512BW__
constexpr float SCALED = 256;  // a float16 but for the exponent's bias
inline Floats scaled_values(Bytes code) {
  const __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16((__m128i)code), 7);
  return (Floats)_mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16((short)0xbfff)));
}
#elif defined(__AVX2__) && defined(__F16C__)
constexpr float SCALED = 256;
inline Floats scaled_values(Bytes code) {
  const __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_cvtsi64_si128((long long)code)), 7);
  return (Floats)_mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16((short)0xbfff)));
}
#else
constexpr float SCALED = 1;
inline Floats scaled_values(Bytes code) {
  const Bits wide = __builtin_convertvector(code, Bits), magnitude = wide & 0x7f, placed = magnitude << E4M3::cut;
  const Bits small = (Bits)((Floats)(placed + E4M3::least) - as_float(E4M3::least));
  return (Floats)((magnitude < 8 ? small : placed + (E4M3::moved << 23)) | (wide & 0x80) << 24);
}
#endif

inline Bits values(Bytes code) {
  return __builtin_convertvector(code & 0x7f, Bits) == 0x7f ? Bits{} + NOT_A_NUMBER : (Bits)(scaled_values(code) * SCALED);
}

// -- rows of a matrix

using Half = uint16_t;  // a bf16

inline Halves halves(Bits v) { return __builtin_convertvector(v >> 16, Halves); }

// step(at, n) for all of 0 .. columns, n lanes at a time
template <class Step> inline void by_lanes(i64 columns, Step step) {
  i64 at = 0;
  for (; at + LANES <= columns; at += LANES) step(at, LANES);
  if (at < columns) step(at, columns - at);
}

// The bits of the largest magnitude of a row and `peaks`; NaN does not count.
inline Bits larger(Bits peaks, Bits x) {
  const Bits magnitude = x & ~SIGN, counted = magnitude > INFINITE ? Bits{} : magnitude;
  return peaks > counted ? peaks : counted;
}

inline uint32_t largest_lane(Bits peaks) {
  uint32_t found = 0;
  for (i64 i = 0; i < LANES; ++i) found = std::max(found, uint32_t{peaks[i]});
  return found;
}

template <class D> inline uint32_t amax_of_row(const void* row, i64 at, i64 columns) {
  Bits peaks{};
  by_lanes(columns, [&](i64 c, i64 n) { peaks = larger(peaks, load<D>(row, at + c, n)); });
  return largest_lane(peaks);
}

// Casts a row; gives the bits of its amax. put(c, halves): takes its values, all lanes of them; bytes: in FP8, or none.
template <class D, class F, class Put>
inline uint32_t cast_row(const void* row, i64 at, i64 columns, float scale, uint32_t finite, Put put, uint8_t* bytes) {
  Bits peaks{};
  by_lanes(columns, [=, &peaks](i64 c, i64 n) {
    const Bits x = load<D>(row, at + c, n);
    const Rounded found = F::rounded(x, scale, finite);
    peaks = larger(peaks, x);
    put(c, halves(found.number));
    if (bytes) store_some(__builtin_convertvector(found.code, Bytes), bytes + c, n);
  });
  return largest_lane(peaks);
}

}  // namespace
