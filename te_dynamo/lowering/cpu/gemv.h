// Products of few rows with E4M3 weights as they lie in memory: what takes the time is to read these.

namespace {

constexpr i64 FEW = 4;

constexpr i64 STEP = 4 * LANES;
typedef uint8_t Codes __attribute__((vector_size(STEP)));

inline float total(Floats v) {
  float sum = 0;
  for (i64 i = 0; i < LANES; ++i) sum += v[i];
  return sum;
}

// x [TOKENS][padded(columns)] float32; w: `rows` rows of a matrix; sums [TOKENS][rows]
template <i64 TOKENS, i64 ROWS> void few_rows(const float* x, const uint8_t* w, i64 columns, float* sums) {
  const i64 width = padded(columns), whole = columns / STEP * STEP;
  Floats sum[ROWS][TOKENS] = {}, rest[ROWS][TOKENS] = {};
  Codes peaks{};  // the largest magnitude, which is NaN's if it is there
  const auto add = [&](i64 row, i64 c, Floats v, Floats(&to)[ROWS][TOKENS]) {
    for (i64 t = 0; t < TOKENS; ++t) to[row][t] += v * load_some<Floats>(x + t * width + c, LANES);
  };
  for (i64 c = 0; c < whole; c += STEP)
#pragma GCC unroll 4
    for (i64 row = 0; row < ROWS; ++row) {
      const uint8_t* code = w + row * columns + c;
      __builtin_prefetch(code + ROWS * columns);  // the next rows: hardware does not look past a page
      const Codes magnitude = load_some<Codes>(code, LANES) & 0x7f;
      peaks = peaks > magnitude ? peaks : magnitude;
#pragma GCC unroll 4
      for (i64 i = 0; i < STEP; i += LANES) add(row, c + i, scaled_values(load_some<Bytes>(code + i, LANES)), sum);
    }
  bool nan = false;
  for (i64 i = 0; i < STEP; ++i) nan |= peaks[i] == 0x7f;
  for (i64 c = nan ? 0 : whole; c < columns; c += LANES)
    for (i64 row = 0; row < ROWS; ++row)
      add(row, c, (Floats)values(load_some<Bytes>(w + row * columns + c, std::min(LANES, columns - c))), rest);
  for (i64 row = 0; row < ROWS; ++row)
    for (i64 t = 0; t < TOKENS; ++t) sums[t * ROWS + row] = (nan ? 0 : total(sum[row][t]) * SCALED) + total(rest[row][t]);
}

// x: an image [tokens][padded(columns)] of FP8 values, tokens <= FEW; w: E4M3 [rows][columns]
void multiply_few(const Half* image, const uint8_t* w, i64 tokens, i64 rows, i64 columns, const Output& out) {
  constexpr i64 ROWS = 4;
  const i64 width = padded(columns);
  std::vector<float> x(tokens * width);
  for (i64 t = 0; t < tokens; ++t)
    for (i64 c = 0; c < columns; ++c) x[t * width + c] = as_float(uint32_t{image[spot(t, c, width)]} << 16);
  const auto run = [&](auto count) {
#pragma omp parallel for if (rows * columns > 1 << 16) schedule(static)
    for (i64 row = 0; row < rows; row += ROWS) {
      float sums[FEW * ROWS] = {};
      const i64 n = std::min(ROWS, rows - row);
      if (n == ROWS) few_rows<count, ROWS>(x.data(), w + row * columns, columns, sums);
      else
        for (i64 r = 0; r < n; ++r) {
          float one[FEW];
          few_rows<count, 1>(x.data(), w + (row + r) * columns, columns, one);
          for (i64 t = 0; t < count; ++t) sums[t * ROWS + r] = one[t];
        }
      for (i64 t = 0; t < count; ++t)
        with_dtype(out.dtype, [&](auto d) { write_row<decltype(d)>(out, sums + t * ROWS, t, row, n); });
    }
  };
  switch (tokens) {
    case 1: return run(std::integral_constant<i64, 1>{});
    case 2: return run(std::integral_constant<i64, 2>{});
    case 3: return run(std::integral_constant<i64, 3>{});
    case 4: return run(std::integral_constant<i64, 4>{});
  }
}

}  // namespace
