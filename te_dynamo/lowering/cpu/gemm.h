// Products of bf16 operands, accumulated in float32, in the order in which dot products of bf16 read them.
//
//     c [m, n] = a [m, depth] @ b [depth, n]
//
// a is an image: it lies in squares of EDGE x EDGE, each row by row, one row of squares after another: whatever its width, what is read
// together stands together. b lies in panels of EDGE columns, each [depth / 2][EDGE] pairs: two elements that are neighbors along the
// depth. All sizes in memory are multiples of EDGE, filled up with zeros. Each element is summed by one thread, in blocks of DEPTH: the
// result does not depend on how many threads there are.
#include <omp.h>

namespace {

using Pair = uint32_t;  // of halves
constexpr i64 EDGE = 32, SQUARE = EDGE * EDGE, DEPTH = 256;  // as deep as a row of squares and a panel stay in the nearest cache

inline i64 padded(i64 size) { return (size + EDGE - 1) / EDGE * EDGE; }

// Where an element of an image [..][columns] is.
inline i64 spot(i64 row, i64 column, i64 columns) { return (row / EDGE * columns + column / EDGE * EDGE + row % EDGE) * EDGE + column % EDGE; }

// c [EDGE][EDGE] = (more: c +) a row of squares @ a panel
using Kernel = void (*)(const Half* a, const Pair* panel, i64 depth, float* c, bool more);

// ROWS of c at a time, which stay in registers. add(sums, k, b) adds the products of the k-th pairs.
template <i64 ROWS, class Add> inline void by_rows(const Pair* panel, i64 depth, float* c, bool more, Add add) {
  Floats sums[ROWS][2];
#pragma GCC unroll 16
  for (i64 r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (i64 v = 0; v < 2; ++v) sums[r][v] = more ? load_some<Floats>(c + r * EDGE + v * LANES, LANES) : Floats{};
  for (i64 k = 0; k < depth / 2; ++k) {
    const Bits b[2] = {load_some<Bits>(panel + k * EDGE, LANES), load_some<Bits>(panel + k * EDGE + LANES, LANES)};
    add(sums, k, b);
  }
#pragma GCC unroll 16
  for (i64 r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (i64 v = 0; v < 2; ++v) store_some(sums[r][v], c + r * EDGE + v * LANES, LANES);
}

// By float32's arithmetic, for any processor.
template <i64 ROWS> void by_floats(const Half* a, const Pair* panel, i64 depth, float* c, bool more) {
  float rows[ROWS][DEPTH];
  for (i64 row = 0; row < EDGE; row += ROWS) {
    for (i64 r = 0; r < ROWS; ++r)
      for (i64 k = 0; k < depth; k += LANES)
        store_some((Floats)load<BF16>(a, spot(row + r, k, depth), LANES), rows[r] + k, LANES);
    by_rows<ROWS>(panel, depth, c + row * EDGE, more, [&](Floats(&sums)[ROWS][2], i64 k, const Bits(&b)[2]) {
#pragma GCC unroll 2
      for (i64 v = 0; v < 2; ++v) {
        const Floats even = (Floats)(b[v] << 16), odd = (Floats)(b[v] & 0xffff0000);
#pragma GCC unroll 16
        for (i64 r = 0; r < ROWS; ++r) sums[r][v] = sums[r][v] + rows[r][2 * k] * even + rows[r][2 * k + 1] * odd;
      }
    });
  }
}

#ifdef __AVX512BF16__
void by_pairs(const Half* a, const Pair* panel, i64 depth, float* c, bool more) {
  constexpr i64 ROWS = 8;
  for (i64 row = 0; row < EDGE; row += ROWS)
    by_rows<ROWS>(panel, depth, c + row * EDGE, more, [=](Floats(&sums)[ROWS][2], i64 k, const Bits(&b)[2]) {
      const Half* from = a + spot(row, 2 * k, depth);
#pragma GCC unroll 16
      for (i64 r = 0; r < ROWS; ++r) {
        Pair pair;
        memcpy(&pair, from + r * EDGE, sizeof pair);
#pragma GCC unroll 2
        for (i64 v = 0; v < 2; ++v)
          sums[r][v] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][v], (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)b[v]);
      }
    });
}
#endif

#ifdef __AMX_BF16__
void by_tiles(const Half* a, const Pair* panel, i64 depth, float* c, bool more) {
  constexpr i64 ROW = EDGE * 4;  // bytes of a row of c, and of a panel's
  if (more) {
    _tile_loadd(0, c, ROW);
    _tile_loadd(1, c + 16, ROW);
    _tile_loadd(2, c + 16 * EDGE, ROW);
    _tile_loadd(3, c + 16 * EDGE + 16, ROW);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (i64 k = 0; k < depth; k += 32) {
    _tile_loadd(4, a + k * EDGE, 2 * EDGE);
    _tile_loadd(6, panel + k / 2 * EDGE, ROW);
    _tile_loadd(7, panel + k / 2 * EDGE + 16, ROW);
    _tile_loadd(5, a + (k + 16) * EDGE, 2 * EDGE);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ROW);
  _tile_stored(1, c + 16, ROW);
  _tile_stored(2, c + 16 * EDGE, ROW);
  _tile_stored(3, c + 16 * EDGE + 16, ROW);
}

// Eight tiles of 16 rows of 64 bytes, while it exists.
struct Tiles {
  explicit Tiles(bool used) : used(used) {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    if (used) _tile_loadconfig(config);
  }
  ~Tiles() { if (used) _tile_release(); }
  bool used;
};
#else
struct Tiles { explicit Tiles(bool) {} };
#endif

enum { ANY, DOT_PRODUCTS, TILES };
int processor = ANY;  // what it has

inline Kernel kernel() {
#ifdef __AMX_BF16__
  if (processor == TILES) return by_tiles;
#endif
#ifdef __AVX512BF16__
  if (processor >= DOT_PRODUCTS) return by_pairs;
#endif
#ifdef __AVX512F__
  return by_floats<8>;
#else
  return by_floats<2>;  // of 16 registers
#endif
}

// Where a product goes: `scale * product + bias + added`, [m, n] in its dtype. bias: [n], or none; added: [m, n] in float32, or none.
struct Output {
  void* data;
  i64 dtype;
  i64 stride;
  float scale;
  const float* bias;
  const float* added;
};

// `columns` of a row, from `column` on; c: the products
template <class D> inline void write_row(const Output out, const float* c, i64 row, i64 column, i64 columns) {
  const i64 place = row * out.stride + column;
  const float *bias = out.bias ? out.bias + column : nullptr, *added = out.added ? out.added + place : nullptr;
  by_lanes(columns, [=](i64 at, i64 n) {
    Floats v = load_some<Floats>(c + at, n) * out.scale;
    if (bias) v += load_some<Floats>(bias + at, n);
    if (added) v += load_some<Floats>(added + at, n);
    store<D>((Bits)v, out.data, place + at, n);
  });
}

void multiply(const Half* a, const Pair* b, i64 m, i64 n, i64 depth, const Output& out) {
  i64 high = 128, wide = 256;  // of a block of the result, whose operands stay in the cache
  const i64 wanted = 4 * omp_get_max_threads();
  const auto count = [](i64 size, i64 block) { return (size + block - 1) / block; };
  while (count(m, high) * count(n, wide) < wanted && wide > EDGE) (wide > high ? wide : high) /= 2;
  const i64 down = count(m, high), across = count(n, wide);
  const Kernel run = kernel();
#pragma omp parallel if (m * n * depth > 1 << 19)
  {
    Tiles tiles(processor == TILES);
    alignas(64) float c[4 * 8][EDGE * EDGE];
#pragma omp for schedule(dynamic) nowait
    for (i64 block = 0; block < down * across; ++block) {
      const i64 top = block / across * high, left = block % across * wide;
      const i64 bottom = std::min(m, top + high), right = std::min(n, left + wide);
      i64 k = 0;
      do {
        float(*part)[EDGE * EDGE] = c;
        for (i64 i = top; i < bottom; i += EDGE)
          for (i64 j = left; j < right; j += EDGE)
            run(a + spot(i, k, depth), b + j * (depth / 2) + k / 2 * EDGE, std::min(DEPTH, depth - k), *part++, k > 0);
      } while ((k += DEPTH) < depth);
      const float(*part)[EDGE * EDGE] = c;
      for (i64 i = top; i < bottom; i += EDGE)
        for (i64 j = left; j < right; j += EDGE) {
          const i64 rows = std::min(EDGE, m - i), columns = std::min(EDGE, n - j);
          with_dtype(out.dtype, [&](auto d) {
            for (i64 r = 0; r < rows; ++r) write_row<decltype(d)>(out, *part + r * EDGE, i + r, j, columns);
          });
          ++part;
        }
    }
  }
}

// -- how images [rows][columns] become operands

template <int STEP, int... LANE> inline void exchange(Bits& a, Bits& b, std::integer_sequence<int, LANE...>) {
#ifdef __clang__
  const Bits low = __builtin_shufflevector(a, b, (LANE & STEP ? LANES + LANE - STEP : LANE)...);
  b = __builtin_shufflevector(a, b, (LANE & STEP ? LANES + LANE : LANE + STEP)...);
#else
  const Bits low = __builtin_shuffle(a, b, Bits{(LANE & STEP ? LANES + LANE - STEP : LANE)...});
  b = __builtin_shuffle(a, b, Bits{(LANE & STEP ? LANES + LANE : LANE + STEP)...});
#endif
  a = low;
}

template <int STEP> inline void exchange(Bits (&square)[LANES]) {
#pragma GCC unroll 16
  for (i64 i = 0; i < LANES; ++i)
    if (!(i & STEP)) exchange<STEP>(square[i], square[i + STEP], std::make_integer_sequence<int, LANES>());
}

// Transposes a square of LANES x LANES.
inline void turn(Bits (&square)[LANES]) {
  exchange<1>(square);
  exchange<2>(square);
  exchange<4>(square);
  exchange<8>(square);
}

// The columns of the image's transpose: the depth is along its rows.
void panels_of_rows(const Half* image, i64 rows, i64 columns, Pair* out) {
#pragma omp parallel for if (rows * columns > 1 << 15) schedule(static)
  for (i64 row = 0; row < rows; row += LANES)
    for (i64 k = 0; k < columns / 2; k += LANES) {
      Bits square[LANES];
#pragma GCC unroll 16
      for (i64 r = 0; r < LANES; ++r) square[r] = load_some<Bits>(reinterpret_cast<const Pair*>(image + spot(row + r, 2 * k, columns)), LANES);
      turn(square);
      Pair* to = out + row / EDGE * EDGE * (columns / 2) + row % EDGE;
#pragma GCC unroll 16
      for (i64 i = 0; i < LANES; ++i) store_some(square[i], to + (k + i) * EDGE, LANES);
    }
}

// The pairs of two rows of an image, at a lane of the first of them.
inline Bits pairs_at(const Half* row) {
  const auto half = [](const Half* p) { return __builtin_convertvector(load_some<Halves>(p, LANES), Bits); };
  return half(row) | half(row + EDGE) << 16;
}

// The columns of the image: the depth is along its columns.
void panels_of_columns(const Half* image, i64 rows, i64 columns, Pair* out) {
#pragma omp parallel for if (rows * columns > 1 << 15) schedule(static)
  for (i64 row = 0; row < rows; row += 2)
    for (i64 c = 0; c < columns; c += LANES)
      store_some(pairs_at(image + spot(row, c, columns)), out + c / EDGE * EDGE * (rows / 2) + row / 2 * EDGE + c % EDGE, LANES);
}

// The image of the transpose [..][rows], column c of this one in row places[c] of it.
void transpose(const Half* image, i64 rows, i64 columns, Half* out, const std::vector<i64>& places) {
#pragma omp parallel for if (rows * columns > 1 << 15) schedule(static)
  for (i64 row = 0; row < rows; row += EDGE)
    for (i64 c = 0; c < columns; c += LANES) {
      Bits square[LANES];
#pragma GCC unroll 16
      for (i64 r = 0; r < LANES; ++r) square[r] = pairs_at(image + spot(row + 2 * r, c, columns));
      turn(square);
#pragma GCC unroll 16
      for (i64 i = 0; i < LANES; ++i) store_some(square[i], reinterpret_cast<Pair*>(out + spot(places[c + i], row, rows)), LANES);
    }
}

}  // namespace
