// What both decode kernels share: loads of a page, and codes as half floats.
#include "attention.h"
#include "trellis.h"

#ifdef __CUDACC__
// At most 128 registers a lane, so that 16 SIMD-groups fit a processor: MLX's own signatures say
// nothing of it, and decode_mma then takes up to 138.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(256, 2)
#endif

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

// Two codes as w = (2 * code + 1 - n) / n, n = 2^bits, from where tq_pair finds them.
template <int LOW, int HIGH> TQ_FN half2 tq_w(uint low, int field, uint high, int at, uint zero) {
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
  return w;
}

// Two value codes as levels divided by b: w * (a/b + w^2 + c/b * w^16);
// vllm_metal_tq/codebook.py rounds them in the same way.
template <int LOW, int HIGH>
TQ_FN uint tq_value_pair(uint low, int field, uint high, int at, uint zero, half2 a_by_b, half2 c_by_b) {
  const half2 w = tq_w<LOW, HIGH>(low, field, high, at, zero);
  half2 factor = fma(w, w, a_by_b);
  if (LOW + HIGH > 4) {
    const half2 square = w * w;
    const half2 fourth = square * square;
    const half2 eighth = fourth * fourth;
    factor = fma(eighth * c_by_b, eighth, factor);
  }
  return as_type<uint>(w * factor);
}

// Two trellis codes as levels divided by b: those of the bits `at` and `at` + 16 of the words that
// tq_numbers made, and where WIDE of the word of their fifth bits.
template <bool WIDE>
TQ_FN uint tq_trellis_pair(thread uint (&number)[4], uint fifth, int at, uint zero, half2 a_by_b) {
  return as_type<uint>(tq_octic(tq_w<4, WIDE>(number[at % 4], at / 4, fifth, at, zero), a_by_b));
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
