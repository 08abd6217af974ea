// What encode does with its share of a vector.
#include "turn.h"

// A vector belongs to D / E lanes. Where M is 1, element e of lane p is element
// 8 * (p + D / E * (e / 8)) + e % 8 of the vector, so that lanes load and store side by side; where
// it is not, p + D / E * e, so that the transform by Hadamard's matrix of size M needs no other lane.

template <int E, int M, int D> TQ_FN int tq_element(int e, int p) {
  return M == 1 ? 8 * (p + D / E * (e / 8)) + e % 8 : p + D / E * e;
}

TQ_FN uint4 tq_exclusive_or(uint4 a, uint4 b) {
  a.x ^= b.x, a.y ^= b.y, a.z ^= b.z, a.w ^= b.w;
  return a;
}

// Eight elements side by side; bits 15 and 31 of the words of signs change the signs of two each.
template <class T> TQ_FN void tq_load8(thread float (&v)[8], const device T* x, const device uint* signs) {
  const uint4 words = tq_exclusive_or(*(const device uint4*)x, *(const device uint4*)signs);
  v[0] = tq_first<T>(words.x), v[1] = tq_second<T>(words.x);
  v[2] = tq_first<T>(words.y), v[3] = tq_second<T>(words.y);
  v[4] = tq_first<T>(words.z), v[5] = tq_second<T>(words.z);
  v[6] = tq_first<T>(words.w), v[7] = tq_second<T>(words.w);
}
TQ_FN void tq_load8(thread float (&v)[8], const device float* x, const device uint* signs) {
  TQ_UNROLL
  for (int e = 0; e < 8; ++e) {
    const uint sign = signs[e / 2] << (16 - 16 * (e % 2)) & 0x80000000u;
    v[e] = as_type<float>(as_type<uint>(x[e]) ^ sign);
  }
}

// Lane p's share of a vector of HEAD_DIM elements, with changed signs.
template <int E, int M, int D, int HEAD_DIM, class T>
TQ_FN void tq_load_share(thread float (&v)[E], const device T* x, const device uint* signs, int p) {
  if (M == 1 && HEAD_DIM == D) {
    TQ_UNROLL
    for (int i = 0; i < E / 8; ++i) {
      const int d = 8 * (p + D / E * i);
      float eight[8];
      tq_load8(eight, x + d, signs + d / 2);
      TQ_UNROLL
      for (int e = 0; e < 8; ++e) v[(8 * i + e) % E] = eight[e];
    }
  } else {
    TQ_UNROLL
    for (int e = 0; e < E; ++e) {
      const int d = tq_element<E, M, D>(e, p);
      const uint sign = signs[d / 2] << (16 - 16 * (d % 2)) & 0x80000000u;
      v[e] = d < HEAD_DIM ? as_type<float>(as_type<uint>(float(x[d])) ^ sign) : 0.0f;
    }
  }
}

// v becomes rest where that is shorter: whether it did.
template <int LANES, int E> TQ_FN bool tq_shorter(thread float (&v)[E], thread float (&rest)[E], bool allowed) {
  float2 squares = float2(0.0f, 0.0f);
  TQ_UNROLL
  for (int e = 0; e < E; ++e) squares.x = fma(v[e], v[e], squares.x), squares.y = fma(rest[e], rest[e], squares.y);
  TQ_UNROLL
  for (int k = 1; k < LANES; k *= 2) {
    squares.x += simd_shuffle_xor(squares.x, ushort(k));
    squares.y += simd_shuffle_xor(squares.y, ushort(k));
  }
  const bool is_shorter = allowed && squares.y < squares.x;
  TQ_UNROLL
  for (int e = 0; e < E; ++e) v[e] = is_shorter ? rest[e] : v[e];
  return is_shorter;
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

// The largest element of a vector, without its sign.
template <int LANES, int E> TQ_FN float tq_peak(thread float (&v)[E]) {
  float peak = 0.0f;
  TQ_UNROLL
  for (int e = 0; e < E; ++e) peak = max(peak, fabs(v[e]));
  TQ_UNROLL
  for (int k = 1; k < LANES; k *= 2) peak = max(peak, simd_shuffle_xor(peak, ushort(k)));
  return peak;
}

TQ_FN half2 tq_twice(float x) { return as_type<half2>(tq_pack(x, x)); }

// The sum of up to four numbers.
template <class HALF2, int N> TQ_FN half2 tq_sum(thread HALF2 (&x)[N]) {
  const half2 even = N > 2 ? x[0] + x[2 % N] : x[0];
  if (N == 1) return even;
  return even + (N > 3 ? x[1 % N] + x[3 % N] : x[1 % N]);
}

// The best of STEPS steps: that with the least square error. Given are a lane's square errors in
// units of each step, in two halves of a number for each eight elements. They are added in an order
// that does not depend on E.
template <int LANES, class HALF2, int STEPS, int EIGHTS>
TQ_FN int tq_best(thread HALF2 (&errors)[STEPS][EIGHTS], const device float* squares) {
  float best = 0.0f;
  int chosen = 0;
  TQ_UNROLL
  for (int i = 0; i < STEPS; ++i) {
    half2 sum = tq_sum(errors[i]);
    TQ_UNROLL
    for (int k = LANES / 2; k > 0; k /= 2) sum = sum + as_type<half2>(simd_shuffle_xor(as_type<float>(sum), ushort(k)));
    const float error = (float(tq_low(as_type<uint>(sum))) + float(tq_high(as_type<uint>(sum)))) * squares[i];
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
// be encoded stays visible.
TQ_FN uint tq_scale_bits(float scale, float element) {
  const uint bits = as_type<ushort>(half(scale));
  const bool wrong = (bits & 0x7c00u) == 0x7c00u || (as_type<uint>(element) & 0x7fffffffu) > 0x7f800000u;
  return wrong ? 0x7e00u : bits;
}
