// Products of bf16 operands, accumulated in float32.
//
//     c [m, n] = a [m, depth] @ b [depth, n]
//
// a is an image, b lies in panels of EDGE columns, each [depth / 2][EDGE] pairs. Each element is summed by one thread, in blocks of
// DEPTH: the result does not depend on how many threads there are.

namespace {

constexpr i64 DEPTH = 256;  // as deep as a row of squares and a panel stay in the nearest cache

// c [EDGE][EDGE] = (more: c +) a row of squares @ a panel
using Kernel = void (*)(const Half* a, const Pair* panel, i64 depth, float* c, bool more);

// A part of c at a time, ROWS x COLUMNS vectors, which stay in registers: add(sums, row, k, b) adds the products of the k-th pairs.
template <i64 ROWS, i64 COLUMNS, class Add> inline void by_parts(const Pair* panel, i64 depth, float* c, bool more, Add add) {
  for (i64 row = 0; row < EDGE; row += ROWS)
    for (i64 column = 0; column < EDGE; column += COLUMNS * LANES) {
      float* part = c + row * EDGE + column;
      Floats sums[ROWS][COLUMNS];
#pragma GCC unroll 16
      for (i64 r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (i64 v = 0; v < COLUMNS; ++v) sums[r][v] = more ? load_some<Floats>(part + r * EDGE + v * LANES, LANES) : Floats{};
      for (i64 k = 0; k < depth / 2; ++k) {
        Bits b[COLUMNS];
#pragma GCC unroll 2
        for (i64 v = 0; v < COLUMNS; ++v) b[v] = load_some<Bits>(panel + k * EDGE + column + v * LANES, LANES);
        add(sums, row, k, b);
      }
#pragma GCC unroll 16
      for (i64 r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (i64 v = 0; v < COLUMNS; ++v) store_some(sums[r][v], part + r * EDGE + v * LANES, LANES);
    }
}

// By float32's arithmetic, for any processor.
void by_floats(const Half* a, const Pair* panel, i64 depth, float* c, bool more) {
  constexpr i64 ROWS = LANES == 16 ? 8 : 16, COLUMNS = LANES == 16 ? 2 : 1;  // as many as there are registers for
  float rows[EDGE][DEPTH];
  for (i64 row = 0; row < EDGE; ++row)
    for (i64 k = 0; k < depth; k += LANES) store_some((Floats)load<BF16>(a, spot(row, k, depth), LANES), rows[row] + k, LANES);
  by_parts<ROWS, COLUMNS>(panel, depth, c, more, [&](Floats(&sums)[ROWS][COLUMNS], i64 row, i64 k, const Bits(&b)[COLUMNS]) {
#pragma GCC unroll 2
    for (i64 v = 0; v < COLUMNS; ++v) {
      const Floats even = (Floats)(b[v] << 16), odd = (Floats)(b[v] & 0xffff0000);
#pragma GCC unroll 16
      for (i64 r = 0; r < ROWS; ++r) sums[r][v] = sums[r][v] + rows[row + r][2 * k] * even + rows[row + r][2 * k + 1] * odd;
    }
  });
}

#ifdef __AVX512BF16__
void by_pairs(const Half* a, const Pair* panel, i64 depth, float* c, bool more) {
  constexpr i64 ROWS = 8, COLUMNS = 2;
  by_parts<ROWS, COLUMNS>(panel, depth, c, more, [=](Floats(&sums)[ROWS][COLUMNS], i64 row, i64 k, const Bits(&b)[COLUMNS]) {
    const Half* from = a + spot(row, 2 * k, depth);
#pragma GCC unroll 16
    for (i64 r = 0; r < ROWS; ++r) {
      Pair pair;
      memcpy(&pair, from + r * EDGE, sizeof pair);
#pragma GCC unroll 2
      for (i64 v = 0; v < COLUMNS; ++v)
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
  return by_floats;
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

}  // namespace
