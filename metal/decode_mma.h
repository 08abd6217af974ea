// Trellis codes as the lanes of decode_mma take them.
#include "decode.h"

// Bits of a plane of a trellis code as a lane loads them of two tokens: WORDS of them, for each token
// one, or bytes of both in turn where a token has only 16 bits.
template <int WORDS, int N> TQ_FN uint tq_tokens(thread uint (&bits)[2][N], int i) {
  return WORDS == 2 ? bits[i][0] : bits[0][0] | bits[1][0] << 8;
}
