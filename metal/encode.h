// What encode does with its share of a vector.
#include "turn.h"

// A vector belongs to D / E lanes. Where M is 1, element e of lane p is element
// 8 * (p + D / E * (e / 8)) + e % 8 of the vector, so that lanes load and store side by side; where
// it is not, p + D / E * e, so that the transform by Hadamard's matrix of size M needs no other lane.

TQ_FN uint4 tq_exclusive_or(uint4 a, uint4 b) {
  a.x ^= b.x, a.y ^= b.y, a.z ^= b.z, a.w ^= b.w;
  return a;
}

template <class T> TQ_FN void tq_unpack8(thread float (&v)[8], uint4 words) {
  v[0] = tq_first<T>(words.x), v[1] = tq_second<T>(words.x);
  v[2] = tq_first<T>(words.y), v[3] = tq_second<T>(words.y);
  v[4] = tq_first<T>(words.z), v[5] = tq_second<T>(words.z);
  v[6] = tq_first<T>(words.w), v[7] = tq_second<T>(words.w);
}

// Eight elements side by side.
template <class T> TQ_FN void tq_load8(thread float (&v)[8], const device T* x) { tq_unpack8<T>(v, *(const device uint4*)x); }
TQ_FN void tq_load8(thread float (&v)[8], const device float* x) {
  TQ_UNROLL
  for (int e = 0; e < 8; ++e) v[e] = x[e];
}

// The same; bits 15 and 31 of the words of signs change the signs of two each.
template <class T> TQ_FN void tq_load8(thread float (&v)[8], const device T* x, const device uint* signs) {
  tq_unpack8<T>(v, tq_exclusive_or(*(const device uint4*)x, *(const device uint4*)signs));
}
TQ_FN float tq_with_sign(float x, const device uint* signs, int d) {
  return as_type<float>(as_type<uint>(x) ^ (signs[d / 2] << (16 - 16 * (d % 2)) & 0x80000000u));
}
TQ_FN void tq_load8(thread float (&v)[8], const device float* x, const device uint* signs) {
  TQ_UNROLL
  for (int e = 0; e < 8; ++e) v[e] = tq_with_sign(x[e], signs, e);
}

// Lane p's share of a vector of HEAD_DIM elements, with changed signs where there are signs.
template <int E, int M, int D, int HEAD_DIM, bool SIGNS, class T>
TQ_FN void tq_load_share(thread float (&v)[E], const device T* x, const device uint* signs, int p) {
  if (M == 1 && HEAD_DIM == D) {
    TQ_UNROLL
    for (int i = 0; i < E / 8; ++i) {
      const int d = 8 * (p + D / E * i);
      float eight[8];
      if (SIGNS) tq_load8(eight, x + d, signs + d / 2);
      else tq_load8(eight, x + d);
      TQ_UNROLL
      for (int e = 0; e < 8; ++e) v[(8 * i + e) % E] = eight[e];
    }
  } else {
    TQ_UNROLL
    for (int e = 0; e < E; ++e) {
      const int d = M == 1 ? 8 * (p + D / E * (e / 8)) + e % 8 : p + D / E * e;
      v[e] = d < HEAD_DIM ? float(x[d]) : 0.0f;
      if (SIGNS) v[e] = tq_with_sign(v[e], signs, d);
    }
  }
}

TQ_FN float4 tq_load_numbers(const device float* x) { return *(const device float4*)x; }
TQ_FN uint4 tq_load_numbers(const device uint* x) { return *(const device uint4*)x; }

// Lane p's share of a table of D numbers.
template <int E, int M, int D, class X> TQ_FN void tq_load_table(thread X (&v)[E], const device X* x, int p) {
  TQ_UNROLL
  for (int e = 0; e < E; e += M == 1 ? 4 : 1) {
    if (M == 1) {
      const auto four = tq_load_numbers(x + 8 * (p + D / E * (e / 8)) + e % 8);
      v[e] = four.x, v[(e + 1) % E] = four.y, v[(e + 2) % E] = four.z, v[(e + 3) % E] = four.w;
    } else {
      v[e] = x[p + D / E * e];
    }
  }
}

// One step of Sylvester's transform, of elements that a lane holds.
template <int K, int E> TQ_FN void tq_butterfly(thread float (&v)[E]) {
  TQ_UNROLL
  for (int e = 0; e < E; ++e) {
    if ((e & K) == 0) {
      const float a = v[e], b = v[(e | K) % E];
      v[e] = a + b;
      v[(e | K) % E] = a - b;
    }
  }
}

// v = H v, not normalised; H as for tq_hadamard, and E is M where M is not 1. The order of the steps
// does not depend on E, so neither does what is rounded.
template <int E, int M, int D> TQ_FN void tq_hadamard_share(thread float (&v)[E], int p) {
  if (M == 1) {
    tq_butterfly<1>(v);
    tq_butterfly<2>(v);
    tq_butterfly<4>(v);
    if (E > 16) tq_butterfly<16>(v);
    if (E > 8) tq_butterfly<8>(v);
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
  for (int k = D / E / 2; k > 0; k /= 2) {
    const float sign = (p & k) ? -1.0f : 1.0f;
    TQ_UNROLL
    for (int e = 0; e < E; ++e) v[e] = fma(sign, v[e], simd_shuffle_xor(v[e], ushort(k)));
  }
}

// Sums in an order that does not depend on E: of each eight elements, of up to four such sums, and
// of what lanes have.
template <class X, int N> TQ_FN X tq_sum(thread X (&x)[N]) {
  const X even = N > 2 ? x[0] + x[2 % N] : x[0];
  if (N == 1) return even;
  return even + (N > 3 ? x[1 % N] + x[3 % N] : x[1 % N]);
}
template <int LANES, class X> TQ_FN X tq_sum_over(X x) {
  TQ_UNROLL
  for (int k = LANES / 2; k > 0; k /= 2) x = x + as_type<X>(simd_shuffle_xor(as_type<float>(x), ushort(k)));
  return x;
}

// The largest element of a vector, without its sign.
template <int LANES, int E> TQ_FN float tq_peak(thread float (&v)[E]) {
  float peak = 0.0f;
  TQ_UNROLL
  for (int e = 0; e < E; ++e) peak = max(peak, fabs(v[e]));
  TQ_UNROLL
  for (int k = 1; k < LANES; k *= 2) peak = max(peak, simd_shuffle_xor(peak, ushort(k)));
  return peak;
}

// The mean of a key at a position, turned by the rotary embedding: a cos phi + b sin phi. Elements that are ALIKE apart turn by the same phase (0: none do).
template <int E, int M, int D, int ALIKE>
TQ_FN void tq_turned_mean(thread float (&mean)[E], const device float* a_table, const device float* b_table, const device uint* step_table, uint position, int p) {
  float a[E], b[E];
  uint steps[E];
  tq_load_table<E, M, D>(a, a_table, p);
  tq_load_table<E, M, D>(b, b_table, p);
  tq_load_table<E, M, D>(steps, step_table, p);
  TQ_UNROLL
  for (int e = 0; e < E; ++e) {
    if (ALIKE == 0 || e / (ALIKE + !ALIKE) % 2 == 0) {
      const float2 turn = tq_turn(steps[e] * position);
      mean[e] = fma(a[e], turn.x, b[e] * turn.y);
      if (ALIKE != 0 && e + ALIKE < E) mean[(e + ALIKE) % E] = fma(a[(e + ALIKE) % E], turn.x, b[(e + ALIKE) % E] * turn.y);
    }
  }
}

// Takes a mean, of a given square, out of a vector where that makes it shorter.
template <int LANES, int E>
TQ_FN bool tq_leave_out(thread float (&v)[E], thread float (&mean)[E], float square, bool allowed) {
  float dots[(E + 7) / 8];
  TQ_UNROLL
  for (int e = 0; e < E; ++e) dots[e / 8] = e % 8 == 0 ? v[e] * mean[e] : fma(v[e], mean[e], dots[e / 8]);
  const bool shorter = 2.0f * tq_sum_over<LANES>(tq_sum(dots)) > square && allowed;
  const float factor = shorter ? -1.0f : 0.0f;
  TQ_UNROLL
  for (int e = 0; e < E; ++e) v[e] = fma(factor, mean[e], v[e]);
  return shorter;
}

TQ_FN half2 tq_twice(float x) { return as_type<half2>(tq_pack(x, x)); }

// The best of STEPS steps: that with the least square error. Given are a lane's square errors in
// units of each step, in two halves of a number for each eight elements. HALF2: half2, which before a
// bracket is a constructor to vllm_metal_tq/msl.
template <int LANES, class HALF2, int STEPS, int EIGHTS>
TQ_FN int tq_best(thread HALF2 (&errors)[STEPS][EIGHTS], const device float* squares) {
  float best = 0.0f;
  int chosen = 0;
  TQ_UNROLL
  for (int i = 0; i < STEPS; ++i) {
    const uint sum = as_type<uint>(tq_sum_over<LANES>(tq_sum(errors[i])));
    const float error = (float(tq_low(sum)) + float(tq_high(sum))) * squares[i];
    if (i == 0 || error < best) best = error, chosen = i;
  }
  return chosen;
}

// An odd function of y: y times the polynomial in s of these coefficients.
template <int TERMS> TQ_FN float tq_slope(float s, thread float (&coefficients)[TERMS]) {
  float slope = coefficients[TERMS - 1];
  TQ_UNROLL
  for (int i = TERMS - 2; i >= 0; --i) slope = fma(slope, s, coefficients[i]);
  return slope;
}

// Levels divided by b, as tq_value_pair has them, of the middles of two cells of values of BITS
// bits; w is a middle as a fraction of the last cell's end.
template <int BITS> TQ_FN half2 tq_value_level(half2 w, half2 a_by_b, half2 c_by_b) {
  half2 factor = fma(w, w, a_by_b);
  if (BITS > 4) {
    const half2 square = w * w;
    const half2 fourth = square * square;
    const half2 eighth = fourth * fourth;
    factor = fma(eighth * c_by_b, eighth, factor);
  }
  return w * factor;
}

// Stores a plane of eight codes side by side: of each, BITS bits from bit SHIFT on, of TOTAL.
template <int BITS, int SHIFT, int TOTAL> TQ_FN void tq_store_eight(device uchar* plane, thread uint (&codes)[8]) {
  uint words[2] = {0, 0};
  TQ_UNROLL
  for (int e = 0; e < 8; ++e) {
    const uint field = SHIFT + BITS == TOTAL ? codes[e] >> SHIFT : codes[e] >> SHIFT & ((1u << BITS) - 1u);
    words[e * BITS / 32] += field << (e * BITS % 32);
  }
  if (BITS == 1) *plane = uchar(words[0]);
  if (BITS == 2) *(device ushort*)plane = ushort(words[0]);
  if (BITS >= 4) *(device uint*)plane = words[0];
  if (BITS == 8) *(device uint*)(plane + 4) = words[1];
}

// Stores lane p's codes, in one or two planes; exchange: D bytes of threadgroup memory for vectors
// that D / E lanes hold in another order than that of the codes.
template <int LOW, int HIGH, int E, int M, int D>
TQ_FN void tq_store_codes(device uchar* low, device uchar* high, thread uint (&codes)[E], threadgroup uchar* exchange, int p, bool live) {
  constexpr int LANES = D / E;
  if (M != 1) {
    TQ_UNROLL
    for (int e = 0; e < E; ++e) exchange[p + LANES * e] = uchar(codes[e]);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  TQ_UNROLL
  for (int i = 0; i < (E + 7) / 8; ++i) {
    const int number = p + LANES * i;
    if (8 * number < D && live) {
      uint eight[8];
      TQ_UNROLL
      for (int e = 0; e < 8; ++e) eight[e] = M == 1 ? codes[(8 * i + e) % E] : exchange[8 * number + e];
      tq_store_eight<LOW, 0, LOW + HIGH>(low + LOW * number, eight);
      if (HIGH != 0) tq_store_eight<HIGH, LOW, LOW + HIGH>(high + HIGH * number, eight);
    }
  }
  if (M != 1) simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Bits of a scale; NaN where it is infinite, or where a given element is NaN, so that what could not
// be encoded stays visible. The sign is a flag.
TQ_FN uint tq_scale_bits(float scale, float element, bool flag) {
  const uint bits = as_type<ushort>(half(scale));
  const bool wrong = (bits & 0x7c00u) == 0x7c00u || (as_type<uint>(element) & 0x7fffffffu) > 0x7f800000u;
  return wrong ? 0x7e00u : bits | uint(flag) << 15;
}

// Copies COPIED words of rings of TAIL tokens, WORDS words each, of each KV head of each sequence,
// with the new tokens that go there: token i lies in slot i % TAIL. starts: of each sequence a
// position, and the index of its first new token; first: the first word, THREADS apart from the
// next. TAIL is a power of two.
template <int TAIL, int WORDS, int COPIED, int THREADS, class WORD, class STARTS>
TQ_FN void tq_push(device WORD* next, const device WORD* ring, const device WORD* fresh, STARTS starts, int heads, int tokens, int first, int words) {
  TQ_UNROLL
  for (int k = 0; k < COPIED; ++k) {
    const int i = first + k * THREADS;
    if (i < words) {
      const int slot = i / WORDS % TAIL, head = i / (TAIL * WORDS);
      const int first_token = starts[head / heads * 2 + 1];
      // The last of the new tokens that go there.
      const int token = tokens - 1 - ((first_token + tokens - 1 - slot) & (TAIL - 1));
      const size_t at = (size_t(head) * tokens + max(token, 0)) * WORDS + i % WORDS;
      next[i] = token < 0 ? ring[i] : fresh[at];
    }
  }
}
