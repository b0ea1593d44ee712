// Matrices of FP8 values as operands of bf16 products, in the order in which dot products of bf16 read them.
//
// An image lies in squares of EDGE x EDGE, each row by row, one row of squares after another: whatever its width, what is read together
// stands together. Its sizes are multiples of EDGE, filled up with zeros.
#include <omp.h>

namespace {

using Pair = uint32_t;  // of halves
inline const Pair* as_pairs(const Half* p) { return reinterpret_cast<const Pair*>(p); }
inline Pair* as_pairs(Half* p) { return reinterpret_cast<Pair*>(p); }

constexpr i64 EDGE = 32;
constexpr i64 ALONE = 1 << 15;  // elements that one thread is enough for

inline i64 padded(i64 size) { return (size + EDGE - 1) / EDGE * EDGE; }

// Where an element of an image [..][columns] is.
inline i64 spot(i64 row, i64 column, i64 columns) {
  return (row / EDGE * columns + column / EDGE * EDGE + row % EDGE) * EDGE + column % EDGE;
}

struct Matrix {
  const void* data;
  i64 rows, columns, stride, dtype;
};

uint32_t amax_of(const Matrix m) {
  return with_dtype(m.dtype, [=](auto d) {
    uint32_t peak = 0;
#pragma omp parallel for if (m.rows * m.columns > ALONE) schedule(static) reduction(max : peak)
    for (i64 row = 0; row < m.rows; ++row) peak = std::max(peak, amax_of_row<decltype(d)>(m.data, row * m.stride, m.columns));
    return peak;
  });
}

// A row of an image [..][columns], or of none: put(c, halves) fills it from c on.
inline auto row_of(Half* image, i64 row, i64 columns) {
  Half* start = image ? image + spot(row, 0, padded(columns)) : nullptr;
  return [=](i64 c, Halves v) {
    if (start) store_some(v, start + spot(0, c, 0), LANES);
  };
}

// Fills a row up, from the lanes after `columns` on.
template <class Put> inline void pad(Put put, i64 columns) {
  for (i64 c = (columns + LANES - 1) / LANES * LANES; c < padded(columns); c += LANES) put(c, Halves{});
}

// Casts a matrix; gives the bits of its amax. image: its values, [rows][padded(columns)], or none; bytes: FP8 [rows][columns], or none;
// in both row r is at place(r).
template <class Place>
uint32_t cast(const Matrix m, bool e5m2, float scale, uint32_t finite, Half* image, Place place, uint8_t* bytes) {
  return with_dtype(m.dtype, [=](auto d) {
    return with_format(e5m2, [=](auto f) {
      uint32_t peak = 0;
#pragma omp parallel for if (m.rows * m.columns > ALONE) schedule(static) reduction(max : peak)
      for (i64 row = 0; row < m.rows; ++row) {
        const auto put = row_of(image, place(row), m.columns);
        uint8_t* code = bytes ? bytes + place(row) * m.columns : nullptr;
        peak = std::max(peak, cast_row<decltype(d), decltype(f)>(m.data, row * m.stride, m.columns, scale, finite, put, code));
        pad(put, m.columns);
      }
      return peak;
    });
  });
}

// The values of E4M3 [rows][columns] as an image.
void cast_up(const uint8_t* bytes, i64 rows, i64 columns, Half* image) {
#pragma omp parallel for if (rows * columns > ALONE) schedule(static)
  for (i64 row = 0; row < rows; ++row) {
    const auto put = row_of(image, row, columns);
    const uint8_t* code = bytes + row * columns;
    by_lanes(columns, [=](i64 c, i64 n) { put(c, halves(values(load_some<Bytes>(code + c, n)))); });
    pad(put, columns);
  }
}

// Fills up an image from row `rows` on.
void clear_rows(Half* image, i64 rows, i64 columns) {
  for (i64 row = rows; row < padded(rows); ++row)
    for (i64 c = 0; c < padded(columns); c += LANES) row_of(image, row, columns)(c, Halves{});
}

// -- how images become the other operand of a product

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
  if constexpr (LANES > 4) exchange<4>(square);
  if constexpr (LANES > 8) exchange<8>(square);
}

// The columns of the image's transpose: the depth is along its rows.
void panels_of_rows(const Half* image, i64 rows, i64 columns, Pair* out) {
#pragma omp parallel for if (rows * columns > ALONE) schedule(static)
  for (i64 row = 0; row < rows; row += LANES)
    for (i64 k = 0; k < columns / 2; k += LANES) {
      Bits square[LANES];
#pragma GCC unroll 16
      for (i64 r = 0; r < LANES; ++r) square[r] = load_some<Bits>(as_pairs(image + spot(row + r, 2 * k, columns)), LANES);
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
#pragma omp parallel for if (rows * columns > ALONE) schedule(static)
  for (i64 row = 0; row < rows; row += 2)
    for (i64 c = 0; c < columns; c += LANES)
      store_some(pairs_at(image + spot(row, c, columns)), out + c / EDGE * EDGE * (rows / 2) + row / 2 * EDGE + c % EDGE, LANES);
}

// The image of the transpose [..][rows], column c of this one in row places[c] of it.
void transpose(const Half* image, i64 rows, i64 columns, Half* out, const std::vector<i64>& places) {
#pragma omp parallel for if (rows * columns > ALONE) schedule(static)
  for (i64 row = 0; row < rows; row += 2 * LANES)
    for (i64 c = 0; c < columns; c += LANES) {
      Bits square[LANES];
#pragma GCC unroll 16
      for (i64 r = 0; r < LANES; ++r) square[r] = pairs_at(image + spot(row + 2 * r, c, columns));
      turn(square);
#pragma GCC unroll 16
      for (i64 i = 0; i < LANES; ++i) store_some(square[i], as_pairs(out + spot(places[c + i], row, rows)), LANES);
    }
}

}  // namespace
