// What several kernels share, after a dialect header: the rotation and the codebooks.

// v = H v, not normalised, where a lane holds the elements lane + 32 e of a vector of D = M * 2^k.
// H is MLX's, the product of the Hadamard matrix of size M and Sylvester's of size D / M; or its
// transpose.
template <int D, int M, bool TRANSPOSED> TQ_FN void tq_hadamard(thread float (&v)[D / 32], int lane) {
  constexpr int P = D / M;
  constexpr int E = D / 32;
  TQ_UNROLL
  for (int k = 1; k < (P < 32 ? P : 32); k *= 2) {
    TQ_UNROLL
    for (int e = 0; e < E; ++e) {
      const float other = simd_shuffle_xor(v[e], ushort(k));
      v[e] = (lane & k) ? other - v[e] : v[e] + other;
    }
  }
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
    for (int e = 0; e < E; ++e) sum[e] = 0.0f;
    TQ_UNROLL
    for (int i = 0; i < M; ++i) {
      const float x = simd_shuffle(v[i * P / 32], ushort(i * P % 32 + lane % P));
      TQ_UNROLL
      for (int e = 0; e < E; ++e) {
        const int row = lane / P + (32 / P) * e;
        const uint sign = TRANSPOSED ? tq_hadamard_row(M, i) >> row : tq_hadamard_row(M, row) >> i;
        sum[e] += (sign & 1u) ? -x : x;
      }
    }
    TQ_UNROLL
    for (int e = 0; e < E; ++e) v[e] = sum[e];
  }
}

// The codes of dimensions d to d + 7 (d a multiple of 8), from a plane of LOW bits and one of HIGH
// bits (0: no such plane). low and high: offsets in the page of the bytes of a plane.
template <int LOW, int HIGH>
TQ_FN void tq_eight_codes(thread uint (&codes)[8], const device uchar* page, const device uint* low, const device uint* high, int d) {
  if (LOW == 8) {
    TQ_UNROLL
    for (int e = 0; e < 8; ++e) codes[e] = page[low[d + e]];
  } else {
    uint a = 0, b = 0;
    TQ_UNROLL
    for (int i = 0; i < LOW; ++i) a |= uint(page[low[d / 8 * LOW + i]]) << (8 * i % 32);
    TQ_UNROLL
    for (int i = 0; i < HIGH; ++i) b |= uint(page[high[d / 8 * HIGH + i]]) << (8 * i);
    TQ_UNROLL
    for (int e = 0; e < 8; ++e) {
      const uint high_bits = b >> (HIGH * e) & ((1u << HIGH) - 1);
      codes[e] = (a >> (LOW * e % 32) & ((1u << LOW) - 1)) | high_bits << LOW;
    }
  }
}

template <class T> TQ_FN uint tq_bits(T x) { return as_type<ushort>(x); }

// Stores elements side by side; p is a multiple of eight elements.
TQ_FN void tq_store8(device float* p, thread float (&x)[8]) {
  TQ_UNROLL
  for (int e = 0; e < 8; e += 4) {
    float4 four;
    four.x = x[e], four.y = x[e + 1], four.z = x[e + 2], four.w = x[e + 3];
    *(device float4*)(p + e) = four;
  }
}
template <class T> TQ_FN void tq_store8(device T* p, thread float (&x)[8]) {
  uint4 words;
  words.x = tq_bits(T(x[0])) | tq_bits(T(x[1])) << 16;
  words.y = tq_bits(T(x[2])) | tq_bits(T(x[3])) << 16;
  words.z = tq_bits(T(x[4])) | tq_bits(T(x[5])) << 16;
  words.w = tq_bits(T(x[6])) | tq_bits(T(x[7])) << 16;
  *(device uint4*)p = words;
}

// Pairs of codes. A word of a plane of b bits holds 16 / b codes in each half; the pair `field`
// of two such codes becomes two half floats without a conversion: placed under the exponent of
// 2^(10 - s), bits s and above of a half count in whole numbers.

// Where the pair `field` of the low plane lies after the shift that tq_pair makes.
template <int LOW, int HIGH> TQ_FN constexpr int tq_position(int field) {
  return field % (HIGH == 0 && LOW <= 2 ? 10 / LOW : 8 / LOW) * LOW;
}

// Two codes c as half floats 2^-SCALE * (2^(10 - s) + c), s = tq_position: `field` in a word of
// the low plane, and, where there is a high plane, its bits from bit `at` of a word of that.
// zero: TQ_UNKNOWN_ZERO.
template <int LOW, int HIGH, int SCALE>
TQ_FN uint tq_pair(uint low, int field, uint high, int at, uint zero) {
  const int s = tq_position<LOW, HIGH>(field);
  const int shift = field * LOW - s;
  const uint mask = ((1u << LOW) - 1u) * 0x00010001u << s;
  uint pair = ((low >> shift) & (mask + zero)) | (uint(25 - SCALE - s) * 0x04000400u);
  if (HIGH > 0) {
    const int up = s + LOW - at;
    const uint high_mask = ((1u << HIGH) - 1u) * 0x00010001u << (s + LOW);
    pair |= (up >= 0 ? high << (up >= 0 ? up : 0) : high >> (up >= 0 ? 0 : -up)) & (high_mask + zero);
  }
  return pair;
}

// What is added to a pair of key codes as tq_pair makes it, for the level of its code: subtracted
// once from the logits, because it is the same for all tokens.
template <int LOW, int HIGH> TQ_FN float tq_key_offset(int field) {
  return float(1 << (10 - tq_position<LOW, HIGH>(field))) + 0.5f * float((1 << (LOW + HIGH)) - 1);
}

// Two value codes as levels divided by b: w * (a/b + w^2 + c/b * w^16), w = (2 * code + 1 - n) / n,
// n = 2^bits; vllm_metal_tq/codebook.py rounds them in the same way.
template <int LOW, int HIGH>
TQ_FN uint tq_value_pair(uint low, int field, uint high, int at, uint zero, half2 a_by_b, half2 c_by_b) {
  constexpr int BITS = LOW + HIGH;
  constexpr int SCALE = BITS - 1;
  const int s = tq_position<LOW, HIGH>(field);
  half2 w = as_type<half2>(tq_pair<LOW, HIGH, SCALE>(low, field, high, at, zero));
  // The middle, n / 2 - 1 / 2, has no half float of the size of 1024 + n / 2.
  if (s == 0) {
    w = w + as_type<half2>((0x8000u | uint(25 - SCALE) << 10 | 1u << (BITS - 1)) * 0x00010001u);
    w = w + as_type<half2>((uint(14 - SCALE) << 10) * 0x00010001u);
  } else {
    const uint middle = ((1u << BITS) - 1u) << (s > 0 ? s - 1 : 0);
    w = w + as_type<half2>((0x8000u | uint(25 - SCALE - s) << 10 | middle) * 0x00010001u);
  }
  half2 factor = fma(w, w, a_by_b);
  if (BITS > 4) {
    const half2 square = w * w;
    const half2 fourth = square * square;
    const half2 eighth = fourth * fourth;
    factor = fma(eighth * c_by_b, eighth, factor);
  }
  return as_type<uint>(w * factor);
}

// A lane's bytes of a page, in words; two bytes become the low bytes of a word's halves.
template <int BYTES> TQ_FN void tq_load(thread uint (&words)[(BYTES + 3) / 4], const device uchar* p) {
  if (BYTES >= 16) {
    const uint4 x = tq_load4(p);
    words[0] = x.x;
    words[BYTES >= 16 ? 1 : 0] = x.y;
    words[BYTES >= 16 ? 2 : 0] = x.z;
    words[BYTES >= 16 ? 3 : 0] = x.w;
  } else if (BYTES >= 8) {
    const uint2 x = tq_load2(p);
    words[0] = x.x;
    words[BYTES >= 8 ? 1 : 0] = x.y;
  } else if (BYTES == 4) {
    words[0] = tq_load1(p);
  } else {
    const uint x = tq_load_half(p);
    words[0] = (x & 0xFFu) | (x & 0xFF00u) << 8;
  }
}

// softcap * tanh(x) for a logit 2 x log2(e), in base 2: softcap is given times log2(e).
TQ_FN float tq_softcap(float x, float softcap) {
  return softcap * (1.0f - 2.0f / (fast::exp2(x) + 1.0f));
}

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

// The encoder gives each vector to D / E lanes. Element e of lane p is element p * E + e of the
// vector where M is 1, and p + D / E * e where it is not: either way its first transform needs no
// other lane.

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
