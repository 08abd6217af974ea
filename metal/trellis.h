// Trellis codes: from their planes to numbers of levels. vllm_metal_tq/trellis.py has the code.
//
// TAPS says which bits of the plane c each of the three parities takes: seven bits for each, of
// which bit i stands for the c of the element i before.

TQ_FN constexpr uint tq_taps(int taps, int parity) { return uint(taps) >> 7 * parity & 127u; }

TQ_FN uint tq_select(uint mask, uint a, uint b) { return (a & mask) | (b & ~mask); }

// A word of c moved by t elements. A word holds rows of LENGTH elements: one of 32, two of 16 or four
// of 8; before: the word of those before them, in the same order.
template <int LENGTH> TQ_FN uint tq_delayed(uint c, uint before, int t) {
  if (t == 0) return c;
  constexpr uint firsts = LENGTH == 32 ? 1u : LENGTH == 16 ? 0x00010001u : 0x01010101u;
  return tq_select(((1u << t) - 1u) * firsts, before >> (LENGTH - t), c << t);
}

// The three parities of each element of a word.
template <int TAPS, int LENGTH> TQ_FN void tq_parities(thread uint (&z)[3], uint c, uint before) {
  z[0] = z[1] = z[2] = 0;
  TQ_UNROLL
  for (int t = 0; t < 7; ++t) {
    const uint delayed = tq_delayed<LENGTH>(c, before, t);
    TQ_UNROLL
    for (int j = 0; j < 3; ++j) {
      if (tq_taps(TAPS, j) >> t & 1u) z[j] ^= delayed;
    }
  }
}

// Four planes of 32 bits as words of fields of 4 bits: field i of word w is of bit 4 i + w.
TQ_FN void tq_fields(thread uint (&w)[4], uint p0, uint p1, uint p2, uint p3) {
  const uint even_low = tq_select(0x55555555u, p0, p1 << 1), odd_low = tq_select(0x55555555u, p0 >> 1, p1);
  const uint even_high = tq_select(0x55555555u, p2, p3 << 1), odd_high = tq_select(0x55555555u, p2 >> 1, p3);
  w[0] = tq_select(0x33333333u, even_low, even_high << 2);
  w[2] = tq_select(0x33333333u, even_low >> 2, even_high);
  w[1] = tq_select(0x33333333u, odd_low, odd_high << 2);
  w[3] = tq_select(0x33333333u, odd_low >> 2, odd_high);
}

// The numbers of the levels of a word of elements but for their fifth bits, as tq_fields orders them,
// from the planes of c and u0; before: see tq_delayed.
template <int TAPS, int LENGTH>
TQ_FN void tq_numbers(thread uint (&w)[4], uint c, uint before, uint u) {
  uint z[3];
  tq_parities<TAPS, LENGTH>(z, c, before);
  tq_fields(w, z[0], z[1], z[2], u);
}

// Levels divided by b: w * (a/b + w^8), w = (2 * number + 1 - n) / n. codebook.py rounds alike.
TQ_FN half2 tq_octic(half2 w, half2 a_by_b) {
  const half2 square = w * w;
  const half2 fourth = square * square;
  return w * fma(fourth, fourth, a_by_b);
}
