// What encode does with its share of a vector.

// The encoder gives each vector to D / E lanes. Element e of lane p is element p * E + e of the
// vector where M is 1, and p + D / E * e where it is not: either way its first transform needs no
// other lane.

// Four elements side by side.
template <class T> TQ_FN float4 tq_four_of(uint2 words) {
  float4 x;
  x.x = float(as_type<T>(ushort(words.x & 0xffffu)));
  x.y = float(as_type<T>(ushort(words.x >> 16)));
  x.z = float(as_type<T>(ushort(words.y & 0xffffu)));
  x.w = float(as_type<T>(ushort(words.y >> 16)));
  return x;
}
TQ_FN float4 tq_load_four(const device float* p) { return *(const device float4*)p; }
template <class T> TQ_FN float4 tq_load_four(const device T* p) { return tq_four_of<T>(*(const device uint2*)p); }

// Lane p's share of a vector of HEAD_DIM elements; bit e of signs: element e changes its sign.
template <int E, int M, int D, int HEAD_DIM, class T>
TQ_FN void tq_load_share(thread float (&v)[E], const device T* x, int p, uint signs) {
  if (M == 1 && HEAD_DIM == D) {
    TQ_UNROLL
    for (int e = 0; e < E; e += 4) {
      const float4 four = tq_load_four(x + p * E + e);
      v[e] = four.x, v[(e + 1) % E] = four.y, v[(e + 2) % E] = four.z, v[(e + 3) % E] = four.w;
    }
  } else {
    TQ_UNROLL
    for (int e = 0; e < E; ++e) {
      const int d = M == 1 ? p * E + e : p + D / E * e;
      v[e] = d < HEAD_DIM ? float(x[d]) : 0.0f;
    }
  }
  TQ_UNROLL
  for (int e = 0; e < E; ++e) v[e] = as_type<float>(as_type<uint>(v[e]) ^ (signs >> e << 31));
}

// v = H v, not normalised; H as for tq_hadamard, and E is M, or 16 where M is 1.
template <int E, int M, int D> TQ_FN void tq_hadamard_share(thread float (&v)[E], int p) {
  if (M == 1) {
    TQ_UNROLL
    for (int k = 1; k < E; k *= 2) {
      TQ_UNROLL
      for (int e = 0; e < E; ++e) {
        if ((e & k) == 0) {
          const float a = v[e], b = v[(e | k) % E];
          v[e] = a + b;
          v[(e | k) % E] = a - b;
        }
      }
    }
  } else {
    float sum[E];
    TQ_UNROLL
    for (int row = 0; row < E; ++row) {
      sum[row] = 0.0f;
      TQ_UNROLL
      for (int i = 0; i < E; ++i) sum[row] += (tq_hadamard_row(M, row) >> i & 1u) ? -v[i] : v[i];
    }
    TQ_UNROLL
    for (int e = 0; e < E; ++e) v[e] = sum[e];
  }
  TQ_UNROLL
  for (int k = 1; k < D / E; k *= 2) {
    const float sign = (p & k) ? -1.0f : 1.0f;
    TQ_UNROLL
    for (int e = 0; e < E; ++e) v[e] = fma(sign, v[e], simd_shuffle_xor(v[e], ushort(k)));
  }
}

template <int LANES> TQ_FN float tq_sum_over(float x) {
  TQ_UNROLL
  for (int k = 1; k < LANES; k *= 2) x += simd_shuffle_xor(x, ushort(k));
  return x;
}

template <int LANES> TQ_FN float tq_max_over(float x) {
  TQ_UNROLL
  for (int k = 1; k < LANES; k *= 2) x = max(x, simd_shuffle_xor(x, ushort(k)));
  return x;
}

// The middle 0.5, 1.5, ... of the cell that u lies in, of CELLS cells of size 1 from 0 on; given
// is u - 1/2 as a fraction of CELLS - 3/4, which rounding then keeps inside.
template <int CELLS> TQ_FN float tq_cell(float fraction) {
  return tq_round_and_half(saturate(fraction) * (float(CELLS) - 0.75f));
}

// The code of a cell on either side of zero, in the low bits: floats from 2^22 on count halves.
template <int CELLS> TQ_FN uint tq_code(float middle, bool negative) {
  return as_type<uint>((negative ? -middle : middle) + (4194303.5f + float(CELLS))) >> 1;
}

// An odd function of y: y times the polynomial in s of these coefficients.
template <int TERMS> TQ_FN float tq_slope(float s, thread float (&coefficients)[TERMS]) {
  float slope = coefficients[TERMS - 1];
  TQ_UNROLL
  for (int i = TERMS - 2; i >= 0; --i) slope = fma(slope, s, coefficients[i]);
  return slope;
}

TQ_FN half2 tq_twice(float x) { return as_type<half2>(tq_pack(x, x)); }

// Levels divided by b, as tq_value_pair has them, of the middles of two cells of values of BITS
// bits; w is a middle as a fraction of the last cell's end.
template <int BITS> TQ_FN uint tq_value_levels(half2 w, half2 a_by_b, half2 c_by_b) {
  half2 factor = fma(w, w, a_by_b);
  if (BITS > 4) {
    const half2 square = w * w;
    const half2 fourth = square * square;
    const half2 eighth = fourth * fourth;
    factor = fma(eighth * c_by_b, eighth, factor);
  }
  return as_type<uint>(w * factor);
}

// Stores a plane of the codes of elements p * E and on, bits SHIFT to SHIFT + BITS of each.
template <int BITS, int SHIFT, int E> TQ_FN void tq_store_plane(device uchar* plane, thread uint (&codes)[E], int p, bool live) {
  constexpr int SIZE = E * BITS;
  constexpr int WORDS = BITS == 0 ? 1 : (SIZE + 31) / 32;
  uint words[WORDS];
  TQ_UNROLL
  for (int i = 0; i < WORDS; ++i) words[i] = 0;
  TQ_UNROLL
  for (int e = 0; e < E; ++e) words[e * BITS / 32] |= (codes[e] >> SHIFT & ((1u << BITS) - 1)) << (e * BITS % 32);
  if (SIZE % 8 != 0) {
    // Two lanes share a byte: the first one stores for both.
    const uint next = as_type<uint>(simd_shuffle_xor(as_type<float>(words[0]), ushort(1)));
    TQ_UNROLL
    for (int i = 0; i < SIZE / 4; ++i) {
      const uint mine = 8 * i < SIZE ? words[0] >> (8 * i % 32) : 0;
      const uint its = 8 * i >= SIZE ? next >> ((8 * i - SIZE) & 31) : next << ((SIZE - 8 * i) & 31);
      if (live && p % 2 == 0) plane[p * SIZE / 8 + i] = uchar(8 * i + 8 <= SIZE ? mine : mine | its);
    }
  } else if (SIZE % 32 == 0) {
    TQ_UNROLL
    for (int i = 0; i < WORDS; ++i) {
      if (live) ((device uint*)plane)[p * WORDS + i] = words[i];
    }
  } else {
    TQ_UNROLL
    for (int i = 0; i < SIZE / 8; ++i) {
      if (live) plane[p * SIZE / 8 + i] = uchar(words[i / 4] >> (8 * i % 32));
    }
  }
}

// Bits of a scale; NaN where it is infinite, so that what could not be encoded stays visible.
TQ_FN uint tq_scale_bits(float scale) {
  const uint bits = as_type<ushort>(half(scale));
  return (bits & 0x7c00u) == 0x7c00u ? 0x7e00u : bits;
}
