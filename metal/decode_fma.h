// Trellis codes as the lanes of decode_fma take them. A word holds LENGTH neighbouring bits of a
// plane for each of 32 / LENGTH tokens: words[0] of c, [1] of u0, [2] of u1, [3] of the c before.
#include "decode.h"

// Where the dimensions from d of a token's key lie in a plane of bits: units of 128 dimensions.
template <int D> TQ_FN int tq_key_bits_at(int token, int d) {
  const int unit = d / 128;
  return unit * 256 + (token * min(128, D - 128 * unit) + d % 128) / 8;
}

template <int LENGTH> TQ_FN uint tq_few_bits(const device uchar* p) {
  return LENGTH == 16 ? tq_load_half(p) : uint(*p);
}

// LENGTH dimensions from d of the keys of the tokens group, group + 4, + 8 and + 12.
template <int D, int LENGTH, int PLANES>
TQ_FN void tq_key_bits(thread uint (&words)[LENGTH / 8][4], const device uchar* planes, int group, int d) {
  TQ_UNROLL
  for (int i = 0; i < LENGTH / 8; ++i) {
    TQ_UNROLL
    for (int k = 0; k < 4; ++k) words[i][k] = 0;
  }
  TQ_UNROLL
  for (int i = 0; i < 4; ++i) {
    const device uchar* mine = planes + tq_key_bits_at<D>(group + 4 * i, d);
    const device uchar* before = planes + tq_key_bits_at<D>(group + 4 * i, (d > 0 ? d : D) - LENGTH);
    thread uint (&word)[4] = words[i * LENGTH / 32];
    const int shift = i * LENGTH % 32;
    TQ_UNROLL
    for (int k = 0; k < PLANES; ++k) word[k] |= tq_few_bits<LENGTH>(mine + 2 * D * k) << shift;
    word[3] |= tq_few_bits<LENGTH>(before) << shift;
  }
}

// The eighth `number` of the dimensions of a quad's values: tokens 2 q, 2 q + 8, 2 q + 1, 2 q + 9.
// Where VD = 16 dimensions lie together, a word in memory is of a pair of these tokens.
template <int VD> TQ_FN uint tq_quad_bits(const device uchar* plane, int number, int quad) {
  if (VD == 8) return tq_load1(plane + (number * 4 + quad) * 4);
  const uint2 pairs = tq_load2(plane + (number / 2 * 4 + quad) * 8);
  const int shift = number % 2 * 8;
  return (pairs.x >> shift & 0x00ff00ffu) | (pairs.y >> shift & 0x00ff00ffu) << 8;
}
template <int D, int VD, int PLANES>
TQ_FN void tq_value_bits(thread uint (&words)[4], const device uchar* planes, int number, int quad) {
  words[2] = 0;
  TQ_UNROLL
  for (int k = 0; k < PLANES; ++k) words[k] = tq_quad_bits<VD>(planes + 2 * D * k, number, quad);
  words[3] = tq_quad_bits<VD>(planes, (number > 0 ? number : D / 8) - 1, quad);
}
