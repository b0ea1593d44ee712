
// -- what backward reads of an activation's inputs: E4M3 with a scale for each block of a row (see `packed.py`)

extern "C" {

// v: [rows][columns] of a dtype, rows `stride` apart -> data: [rows][columns], inverse: [rows][columns / block]. An amax up to `least`
// has scale 1.
void te_pack(i64 dtype, i64 rows, i64 columns, i64 block, const void* v, i64 stride, float least, uint8_t* data, float* inverse) {
  const i64 blocks = columns / block;
  with_dtype(dtype, [=](auto d) {
    using D = decltype(d);
#pragma omp parallel for if (rows * columns > 1 << 14)
    for (i64 i = 0; i < rows * blocks; ++i) {
      const i64 at = i / blocks * stride + i % blocks * block;
      const float amax = as_float(amax_of_row<D>(v, at, block)), top = as_float(E4M3::largest);
      const float scale = amax > least ? top / amax : 1;
      by_lanes(block, [=](i64 c, i64 n) {
        store_some(__builtin_convertvector(E4M3::rounded(load<D>(v, at + c, n), scale, LARGEST).code, Bytes), data + i * block + c, n);
      });
      inverse[i] = amax / top;
    }
    return 0;
  });
}

// What was packed, in a dtype: [blocks][block].
void te_unpack(i64 dtype, i64 blocks, i64 block, const uint8_t* data, const float* inverse, void* v) {
  with_dtype(dtype, [=](auto d) {
    using D = decltype(d);
#pragma omp parallel for if (blocks * block > 1 << 14)
    for (i64 i = 0; i < blocks; ++i)
      by_lanes(block, [=](i64 c, i64 n) {
        const Floats found = (Floats)values(load_some<Bytes>(data + i * block + c, n)) * inverse[i];
        store<D>((Bits)found, v, i * block + c, n);
      });
    return 0;
  });
}

}  // extern "C"
