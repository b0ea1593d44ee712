// FP8 linears of one input on a CPU: forward, dgrad and wgrad, with one scale a tensor. What is computed is what
// te_dynamo/lowering/per_tensor.py defines; FP8 values are multiplied as bf16, which holds all of them.

namespace {

// Memory that a thread keeps from call to call.
struct Scratch {
  enum { IMAGE, OTHER, PANELS, INPUT, SUM, BIAS, COUNT };
  static constexpr size_t KEPT = 16 << 20;  // larger ones are given back

  template <class T> T* get(int which, i64 count) {
    const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > sizes[which]) {
      free(memory[which]);
      memory[which] = aligned_alloc(4096, bytes);
      sizes[which] = bytes;
    }
    return static_cast<T*>(memory[which]);
  }
  void trim(size_t kept = KEPT) {
    for (int i = 0; i < COUNT; ++i)
      if (sizes[i] > kept) free(memory[i]), memory[i] = nullptr, sizes[i] = 0;
  }
  ~Scratch() { trim(0); }

  void* memory[COUNT] = {};
  size_t sizes[COUNT] = {};
};
thread_local Scratch scratch;

constexpr bool FORWARD_IS_E5M2 = false;  // in no recipe

}  // namespace

extern "C" {

// A call, as numbers: see `Call` and `Casting`. sizes, weight_dtypes, bias_dtypes: of each linear. tops: the amax that scale 1 would be
// for, of inputs, weights and gradients. agrees: a first scale is that of several ranks.
struct Linears {
  i64 count, in_features, interleave, merged;
  i64 x_dtype, out_dtype, gradient_is_e5m2, saturates_infinite, power_of_2, agrees;
  float epsilon, top_input, top_weight, top_gradient;
  const i64 *sizes, *weight_dtypes, *bias_dtypes;
};

}  // extern "C"

namespace {

struct Scale {
  float value, inverse;
  explicit Scale(float value) : value(value), inverse(1 / value) {}
};

Scale scale_of(const Linears& how, float amax, float top) {
  amax = std::max(amax, how.epsilon);
  if (!(amax > 0) || as_bits(amax) >= INFINITE) return Scale(1);
  const float scale = std::min(top / amax, as_float(LARGEST));
  return Scale(how.power_of_2 ? as_float(as_bits(scale) & INFINITE) : scale);
}

// The scale of a tensor: that of its slot, or where it has none, or an unset one, that of its amax.
template <class Amax> Scale scale_of(const Linears& how, const float* slot, float top, Amax amax) {
  return slot && *slot > 0 ? Scale(*slot) : scale_of(how, as_float(amax()), top);
}

bool unset(const float& slot) { return as_bits(slot) == 0; }

// A GEMM: the linears [first, last) and where their rows stand.
struct Gemm {
  const Linears& how;
  i64 first, last, rows = 0;

  Gemm(const Linears& how, i64 number) : how(how), first(how.merged ? 0 : number), last(how.merged ? how.count : number + 1) {
    for (i64 i = first; i < last; ++i) rows += how.sizes[i];
  }
  bool interleaved() const { return how.interleave && last - first > 1; }
  // Of a row of a member, its place in the GEMM.
  auto place(i64 member) const {
    const i64 d = how.interleave, members = last - first, at = member - first;
    const bool mixed = interleaved();
    i64 start = 0;
    for (i64 i = first; i < member; ++i) start += how.sizes[i];
    return [=](i64 row) { return mixed ? row / d * members * d + at * d + row % d : start + row; };
  }
  // Were members apart, each in squares of its own: where one begins, and for each place in the GEMM, padded, the row that it has there.
  i64 start_apart(i64 member) const {
    i64 start = 0;
    for (i64 i = first; i < member; ++i) start += padded(how.sizes[i]);
    return start;
  }
  std::vector<i64> apart() const {
    std::vector<i64> rows_apart(padded(rows));
    for (i64 i = first; i < last; ++i)
      for (i64 row = 0; row < how.sizes[i]; ++row) rows_apart[place(i)(row)] = start_apart(i) + row;
    for (i64 row = rows; row < padded(rows); ++row) rows_apart[row] = start_apart(last) + row - rows;  // zeros
    return rows_apart;
  }
  Matrix weight(const void* const* weights, i64 i) const {
    return {weights[i], how.sizes[i], how.in_features, how.in_features, how.weight_dtypes[i]};
  }
};

i64 gemms(const Linears& how) { return how.merged ? 1 : how.count; }

// The weights of a GEMM as an image [rows][in_features], or in FP8; gives the bits of their amax.
uint32_t cast_weights(const Gemm& gemm, const void* const* weights, float scale, Half* image, uint8_t* bytes = nullptr) {
  uint32_t peak = 0;
  for (i64 i = gemm.first; i < gemm.last; ++i)
    peak = std::max(peak, cast(gemm.weight(weights, i), FORWARD_IS_E5M2, scale, INFINITE, image, gemm.place(i), bytes));
  if (image) clear_rows(image, gemm.rows, gemm.how.in_features);
  return peak;
}

Scale scale_of_weights(const Gemm& gemm, const void* const* weights, const float* slot) {
  return scale_of(gemm.how, slot, gemm.how.top_weight, [&] {
    uint32_t peak = 0;
    for (i64 i = gemm.first; i < gemm.last; ++i) peak = std::max(peak, amax_of(gemm.weight(weights, i)));
    return peak;
  });
}

// The bias of a GEMM in float32, rounded to the dtype of the output; none where no linear has one.
const float* join_biases(const Gemm& gemm, const void* const* biases) {
  const Linears& how = gemm.how;
  if (std::all_of(biases + gemm.first, biases + gemm.last, [](const void* b) { return b == nullptr; })) return nullptr;
  float* joined = scratch.get<float>(Scratch::BIAS, gemm.rows);
  for (i64 i = gemm.first; i < gemm.last; ++i) {
    const auto place = gemm.place(i);
    for (i64 c = 0; c < how.sizes[i]; c += LANES) {
      const i64 n = std::min(LANES, how.sizes[i] - c);
      Bits value{};
      if (biases[i]) {
        value = with_dtype(how.bias_dtypes[i], [&](auto d) { return load<decltype(d)>(biases[i], c, n); });
        with_dtype(how.out_dtype, [&](auto d) {
          Bits rounded;
          store<decltype(d)>(value, &rounded, 0, LANES);
          value = load<decltype(d)>(&rounded, 0, LANES);
        });
      }
      for (i64 j = 0; j < n; ++j) joined[place(c + j)] = as_float(value[j]);
    }
  }
  return joined;
}

// The gradients of a GEMM's biases: sums over the tokens in float32, of blocks of rows first. Each column is summed by one thread.
void sum_rows(const Gemm& gemm, const Matrix m, void* const* sums) {
  if (std::none_of(sums + gemm.first, sums + gemm.last, [](void* sum) { return sum != nullptr; })) return;
  constexpr i64 BLOCK = 64;
  float* whole = scratch.get<float>(Scratch::BIAS, padded(m.columns));
#pragma omp parallel for if (m.rows * m.columns > ALONE) schedule(static)
  for (i64 c = 0; c < m.columns; c += LANES)
    with_dtype(m.dtype, [=](auto d) {
      const i64 n = std::min(LANES, m.columns - c);
      Floats sum{};
      for (i64 top = 0; top < m.rows; top += BLOCK) {
        Floats part{};
        for (i64 row = top; row < std::min(m.rows, top + BLOCK); ++row) part += (Floats)load<decltype(d)>(m.data, row * m.stride + c, n);
        sum += part;
      }
      store_some(sum, whole + c, LANES);
    });
  for (i64 i = gemm.first; i < gemm.last; ++i)
    for (i64 row = 0; row < gemm.how.sizes[i] && sums[i]; ++row) {
      Bits value{};
      value[0] = as_bits(whole[gemm.place(i)(row)]);
      with_dtype(gemm.how.bias_dtypes[i], [=](auto d) { store<decltype(d)>(value, sums[i], row, 1); });
    }
}

}  // namespace

extern "C" {

// Which instructions multiply: the best of this processor up to `wanted` (0: any processor's, 1: dot products of bf16, 2: tiles).
// Gives those that do.
i64 te_use_instructions(i64 wanted) {
  i64 best = ANY;
#ifdef __AVX512BF16__
  best = DOT_PRODUCTS;
#endif
#ifdef __AMX_BF16__
  best = TILES;
#endif
  return processor = std::min(wanted, best);
}

// The weights of a GEMM in FP8 [rows][in_features], scaled by their own amax, and the inverse of their scale.
void te_quantize(const Linears& how, i64 number, const void* const* weights, uint8_t* bytes, float* inverse) {
  const Gemm gemm(how, number);
  const Scale scale = scale_of_weights(gemm, weights, nullptr);
  cast_weights(gemm, weights, scale.value, nullptr, bytes);
  *inverse = scale.inverse;
}

// x: [tokens][in_features], rows `stride` apart; weights, biases: of each linear. slots: of each linear, of input and weight, or none.
// cached: where weights are FP8 [rows][in_features] of each GEMM, the inverses of their scales.
// outputs: [tokens][rows] of each GEMM; x8: [tokens][in_features] in FP8, or none; kept: the inverse of the input's scale, then the scale
// and its inverse of each GEMM's weights; amaxes: as slots, or none. Gives 1, having done nothing, where ranks must agree on a scale.
i64 te_forward(const Linears& how, i64 tokens, const void* x, i64 stride, const void* const* weights, const void* const* biases,
               const float* slots, const float* const* cached, void* const* outputs, uint8_t* x8, float* kept, float* amaxes) {
  const i64 depth = padded(how.in_features);
  if (how.agrees && slots) {
    bool any = unset(slots[0]);
    for (i64 number = 0; number < gemms(how) && !cached; ++number) any |= unset(slots[2 * Gemm(how, number).first + 1]);
    if (any) return 1;
  }
  const uint32_t finite = how.saturates_infinite ? INFINITE : LARGEST;
  const Matrix input{x, tokens, how.in_features, stride, how.x_dtype};
  const Scale scale = scale_of(how, slots, how.top_input, [&] { return amax_of(input); });
  Half* image = scratch.get<Half>(Scratch::INPUT, padded(tokens) * depth);
  const uint32_t peak = cast(input, FORWARD_IS_E5M2, scale.value, finite, image, [](i64 row) { return row; }, x8);
  clear_rows(image, tokens, how.in_features);
  if (kept) kept[0] = scale.inverse;
  for (i64 number = 0; number < gemms(how); ++number) {
    const Gemm gemm(how, number);
    Output out{outputs[number], how.out_dtype, gemm.rows, scale.inverse, join_biases(gemm, biases), nullptr};
    if (cached && tokens <= FEW) {
      out.scale *= *cached[number];
      multiply_few(image, static_cast<const uint8_t*>(weights[number]), tokens, gemm.rows, how.in_features, out);
      continue;
    }
    Half* w = scratch.get<Half>(Scratch::IMAGE, padded(gemm.rows) * depth);
    if (cached) {
      cast_up(static_cast<const uint8_t*>(weights[number]), gemm.rows, how.in_features, w);
      clear_rows(w, gemm.rows, how.in_features);
      out.scale *= *cached[number];
    } else {
      const Scale of_weight = scale_of_weights(gemm, weights, slots ? slots + 2 * gemm.first + 1 : nullptr);
      const uint32_t largest = cast_weights(gemm, weights, of_weight.value, w);
      out.scale *= of_weight.inverse;
      if (kept) kept[1 + 2 * number] = of_weight.value, kept[2 + 2 * number] = of_weight.inverse;
      for (i64 i = gemm.first; i < gemm.last && amaxes; ++i) amaxes[2 * i] = as_float(peak), amaxes[2 * i + 1] = as_float(largest);
    }
    Pair* panels = scratch.get<Pair>(Scratch::PANELS, padded(gemm.rows) * depth / 2);
    panels_of_rows(w, padded(gemm.rows), depth, panels);
    multiply(image, panels, tokens, gemm.rows, depth, out);
  }
  scratch.trim();
  return 0;
}

// grads: [tokens][rows] of each GEMM, rows `strides` apart; weights, x8 and kept: as in forward; slots: of each linear's gradient.
// dx: [tokens][in_features], or none; dws, dbs: of each linear, or none; amaxes: as slots, or none.
i64 te_backward(const Linears& how, i64 tokens, const void* const* grads, const i64* strides, const void* const* weights, const uint8_t* x8,
                const float* kept, const float* slots, void* dx, void* const* dws, void* const* dbs, float* amaxes) {
  const i64 depth = padded(how.in_features), height = padded(tokens);
  for (i64 number = 0; number < gemms(how) && how.agrees && slots; ++number)
    if (unset(slots[Gemm(how, number).first])) return 1;
  const uint32_t finite = how.saturates_infinite ? INFINITE : LARGEST;
  Pair* inputs = nullptr;
  float* sum = dx && gemms(how) > 1 ? scratch.get<float>(Scratch::SUM, tokens * how.in_features) : nullptr;
  for (i64 number = 0; number < gemms(how); ++number) {
    const Gemm gemm(how, number);
    const i64 width = padded(gemm.rows);
    const Matrix grad{grads[number], tokens, gemm.rows, strides[number], how.out_dtype};
    const Scale scale = scale_of(how, slots ? slots + gemm.first : nullptr, how.top_gradient, [&] { return amax_of(grad); });
    Half* g = scratch.get<Half>(Scratch::INPUT, height * width);
    const uint32_t peak = cast(grad, how.gradient_is_e5m2, scale.value, finite, g, [](i64 row) { return row; }, nullptr);
    clear_rows(g, tokens, gemm.rows);
    for (i64 i = gemm.first; i < gemm.last && amaxes; ++i) amaxes[i] = as_float(peak);
    if (dx) {
      Half* w = scratch.get<Half>(Scratch::IMAGE, width * depth);
      cast_weights(gemm, weights, kept[1 + 2 * number], w);
      Pair* panels = scratch.get<Pair>(Scratch::PANELS, width * depth / 2);
      panels_of_columns(w, width, depth, panels);
      const bool last = number + 1 == gemms(how);
      Output out{dx, how.x_dtype, how.in_features, scale.inverse * kept[2 + 2 * number], nullptr, number ? sum : nullptr};
      if (!last) out.data = sum, out.dtype = FLOAT32;
      multiply(g, panels, tokens, how.in_features, width, out);
    }
    sum_rows(gemm, grad, dbs);
    if (std::none_of(dws + gemm.first, dws + gemm.last, [](void* dw) { return dw != nullptr; })) continue;
    if (!inputs) {
      Half* image = scratch.get<Half>(Scratch::IMAGE, height * depth);
      cast_up(x8, tokens, how.in_features, image);
      clear_rows(image, tokens, how.in_features);
      inputs = scratch.get<Pair>(Scratch::OTHER, height * depth / 2);
      panels_of_columns(image, height, depth, inputs);
    }
    Half* across = scratch.get<Half>(Scratch::IMAGE, (gemm.start_apart(gemm.last) + EDGE) * height);
    transpose(g, height, width, across, gemm.apart());
    for (i64 i = gemm.first; i < gemm.last; ++i)
      if (dws[i])
        multiply(across + gemm.start_apart(i) * height, inputs, how.sizes[i], how.in_features, height,
                 {dws[i], how.weight_dtypes[i], how.in_features, scale.inverse * kept[0], nullptr, nullptr});
  }
  scratch.trim();
  return 0;
}

}  // extern "C"
