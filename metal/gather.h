// What gather does for eight dimensions of a token.
#include "trellis.h"

// The numbers of the levels of dimensions d to d + 7 (d a multiple of 8), from a plane of LOW bits
// and one of HIGH bits (0: no such plane); of a trellis code, with TAPS, from that of c and HIGH
// planes of a bit, each D / 8 bytes on. low and high: offsets in the page of the bytes of a plane.
template <int LOW, int HIGH, int TAPS, int D>
TQ_FN void tq_eight_numbers(thread uint (&numbers)[8], const device uchar* page, const device uint* low, const device uint* high, int d) {
  if (LOW == 8) {
    TQ_UNROLL
    for (int e = 0; e < 8; ++e) numbers[e] = page[low[d + e]];
  } else if (TAPS) {
    const uint before = page[low[(d > 0 ? d : D) / 8 - 1]];  // the last byte is before the first
    uint z[3];
    tq_parities<TAPS, 32>(z, page[low[d / 8]], before << 24);
    TQ_UNROLL
    for (int e = 0; e < 8; ++e) numbers[e] = (z[0] >> e & 1) | (z[1] >> e & 1) << 1 | (z[2] >> e & 1) << 2;
    TQ_UNROLL
    for (int i = 0; i < HIGH; ++i) {
      const uint u = page[high[d / 8 + i * (D / 8)]];
      TQ_UNROLL
      for (int e = 0; e < 8; ++e) numbers[e] |= (u >> e & 1) << (3 + i);
    }
  } else {
    uint a = 0, b = 0;
    TQ_UNROLL
    for (int i = 0; i < LOW; ++i) a |= uint(page[low[d / 8 * LOW + i]]) << (8 * i % 32);
    TQ_UNROLL
    for (int i = 0; i < HIGH; ++i) b |= uint(page[high[d / 8 * HIGH + i]]) << (8 * i);
    TQ_UNROLL
    for (int e = 0; e < 8; ++e) {
      const uint high_bits = b >> (HIGH * e) & ((1u << HIGH) - 1);
      numbers[e] = (a >> (LOW * e % 32) & ((1u << LOW) - 1)) | high_bits << LOW;
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
