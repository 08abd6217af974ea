// Trellis codes of vectors: Viterbi's algorithm, as vllm_metal_tq/trellis.py has it.
#include "encode.h"
#include "trellis.h"

// LANES lanes code two vectors at a time, one in each half of a half2, and each of them has
// 64 / LANES of the 64 states. A state is the last six c's, the last in bit 0. After n elements it
// lies at its number rotated right by n: of the two states that come from the same two, one takes
// the place of each. Bits 0 and on of a place say which of a lane's words it is, the others which
// lane. Elements are taken six at a time, a block, after which places are numbers of states.
//
// For each place, in two bytes of a block that are those of the two vectors, stands the place six
// elements before on the best way to it. Ties go to the way that changes no bit of the place, so
// codes do not depend on LANES.

// Of which parities the c of the element i before is a term.
TQ_FN constexpr int tq_column(int taps, int i) {
  return int((tq_taps(taps, 0) >> i & 1u) | (tq_taps(taps, 1) >> i & 1u) << 1 | (tq_taps(taps, 2) >> i & 1u) << 2);
}

// The same for the c's in the other order.
TQ_FN constexpr int tq_reversed_taps(int taps) {
  int reversed = 0;
  for (int i = 0; i < 21; ++i) reversed |= (taps >> i & 1) << (i / 7 * 7 + 6 - i % 7);
  return reversed;
}

// The set of levels on the way to a place from itself, after the element of this phase in its block.
// From the other place it is that, exclusive or the column of 6.
TQ_FN constexpr int tq_own_set(int taps, int place, int phase) {
  int set = 0;
  TQ_UNROLL
  for (int q = 0; q < 6; ++q) {
    const int column = tq_column(taps, (q + phase + 1) % 6) ^ (q + phase == 5 ? tq_column(taps, 6) : 0);
    set ^= (place >> q & 1) ? column : 0;
  }
  return set;
}

TQ_FN half2 tq_distance(half2 x, uint level) { return abs(x - as_type<half2>(level)); }

// Puts a lane's share of a vector into memory as halves, in steps. The step comes back: it is the
// vector's root mean square.
template <int E, int M, int D> TQ_FN float tq_put_in_steps(threadgroup ushort* x, thread float (&y)[E], int p, bool wanted) {
  constexpr int LANES = D / E;
  float squares[(E + 7) / 8];
  TQ_UNROLL
  for (int e = 0; e < E; ++e) squares[e / 8] = e % 8 == 0 ? y[e] * y[e] : fma(y[e], y[e], squares[e / 8]);
  const float step = sqrt(tq_sum_over<LANES>(tq_sum(squares)) * (1.0f / D));
  const float unit = step > 1e-30f ? tq_inverse(step) : 0.0f;
  if (wanted) {
    TQ_UNROLL
    for (int e = 0; e < E; e += 2) {
      const uint two = tq_pack(y[e] * unit, y[e + 1] * unit);
      if (M == 1) {
        ((threadgroup uint*)x)[4 * (p + LANES * (e / 8)) + e % 8 / 2] = two;
      } else {
        x[p + LANES * e] = ushort(two & 0xffffu), x[p + LANES * (e + 1)] = ushort(two >> 16);
      }
    }
  }
  return step;
}

// Threadgroup memory of the pairs of vectors that two SIMD-groups code, in words of 16 bytes: the
// vectors in steps, as halves; the costs of each element, which later give way to states; of each
// SIMD-group the totals where it met the other; of each of its blocks but the first, which begins in
// a known state, where places come from. An enum: Metal's static members have an address space.
template <int LANES, int D> struct tq_ring {
  enum {
    THREADS = 64,
    PAIRS = 32 / LANES,
    BLOCKS = (D / 2 + 5) / 6,      // of half a vector
    SKIPPED = 6 * BLOCKS - D / 2,  // elements that the first block lacks: the last one is whole
    PAIR_COSTS = 2 * D + 2,        // 2 more, so that lanes of different pairs use different banks
    COSTS = PAIRS * D / 4,
    TOTALS = COSTS + PAIRS * PAIR_COSTS,
    WAYS = TOTALS + PAIRS * 32,
    PAIR_WAYS = (BLOCKS - 1) * 8,  // of one SIMD-group
    SIZE = WAYS + PAIRS * 2 * PAIR_WAYS,
  };
};

// Costs of the eight sets for each element: the least square error of a set's levels, and offset more.
template <int NUMBERS, int LANES, int D>
TQ_FN void tq_find_costs(threadgroup uint4* memory, const threadgroup uint4* levels, half2 offset, int index) {
  typedef tq_ring<LANES, D> ring;
  const threadgroup ushort* x = (const threadgroup ushort*)memory;
  TQ_NO_UNROLL
  for (int i = index; i < ring::PAIRS * D; i += ring::THREADS) {
    const int pair = i / D, d = i % D;
    const half2 both = as_type<half2>(uint(x[2 * pair * D + d]) | uint(x[(2 * pair + 1) * D + d]) << 16);
    TQ_UNROLL
    for (int four = 0; four < 2; ++four) {
      uint4 own = levels[four];
      half2 c[4] = {tq_distance(both, own.x), tq_distance(both, own.y), tq_distance(both, own.z), tq_distance(both, own.w)};
      TQ_UNROLL
      for (int u = 1; u < NUMBERS / 8; ++u) {
        own = levels[2 * u + four];
        c[0] = min(c[0], tq_distance(both, own.x)), c[1] = min(c[1], tq_distance(both, own.y));
        c[2] = min(c[2], tq_distance(both, own.z)), c[3] = min(c[3], tq_distance(both, own.w));
      }
      own.x = as_type<uint>(fma(c[0], c[0], offset)), own.y = as_type<uint>(fma(c[1], c[1], offset));
      own.z = as_type<uint>(fma(c[2], c[2], offset)), own.w = as_type<uint>(fma(c[3], c[3], offset));
      memory[ring::COSTS + pair * ring::PAIR_COSTS + 2 * d + four] = own;
    }
  }
}

// Of each place of a lane the least cost of a way there.
template <int LANES> struct tq_totals {
  half2 of[64 / LANES];
};

// Costs of a block's elements, of each those of the sets of a lane's places: that of its first
// place's own set first, the others by the difference of their sets from it.
struct tq_costs {
  uint of[6][8];
};
TQ_FN tq_costs tq_own_costs(const threadgroup uint* costs, const thread int (&at)[6]) {
  tq_costs own;
  TQ_UNROLL
  for (int phase = 0; phase < 6; ++phase) {
    TQ_UNROLL
    for (int k = 0; k < 8; ++k) own.of[phase][k] = costs[at[phase] ^ k];
  }
  return own;
}

// One element.
template <int TAPS, int LANES, int PHASE>
TQ_FN void tq_step(thread tq_totals<LANES>& total, thread uint (&from)[32 / LANES], const thread tq_costs& own) {
  constexpr int WORDS = 64 / LANES;
  constexpr int BIT = 1 << (5 - PHASE);  // of places, in which the two that pair differ
  half2 best[WORDS];
  uint worse[WORDS];
  TQ_UNROLL
  for (int i = 0; i < WORDS; ++i) {
    const int set = tq_own_set(TAPS, i, PHASE);
    half2 other = total.of[(i ^ BIT) % WORDS];
    if (BIT >= WORDS) other = simd_shuffle_xor(total.of[i], ushort(BIT / WORDS));
    const half2 stays = total.of[i] + as_type<half2>(own.of[PHASE][set]);
    const half2 comes = other + as_type<half2>(own.of[PHASE][set ^ tq_column(TAPS, 6)]);
    best[i] = min(stays, comes);
    worse[i] = tq_less(comes, stays);
  }
  uint moved[WORDS / 2];
  TQ_UNROLL
  for (int j = 0; j < WORDS / 2; ++j) {
    uint other = from[(j ^ BIT / 2) % (WORDS / 2)];
    if (BIT == 1) other = ((from[j] << 8 ^ from[j] >> 8) & 0x00ff00ffu) ^ from[j] << 8;
    if (BIT >= WORDS) other = simd_shuffle_xor(from[j], ushort(BIT / WORDS));
    // As an exclusive or, each of the two is one instruction.
    const uint bytes = ((worse[2 * j] ^ worse[2 * j + 1]) & 0x00ff00ffu) ^ worse[2 * j + 1];
    moved[j] = ((other ^ from[j]) & bytes) ^ from[j];
  }
  TQ_UNROLL
  for (int i = 0; i < WORDS; ++i) total.of[i] = best[i];
  TQ_UNROLL
  for (int j = 0; j < WORDS / 2; ++j) from[j] = moved[j];
}

// A block of elements, without the FIRST ones: 0, 2 or 4.
template <int TAPS, int LANES, int FIRST>
TQ_FN void tq_block(thread tq_totals<LANES>& total, thread uint (&from)[32 / LANES], const thread tq_costs& own, int l) {
  TQ_UNROLL
  for (int j = 0; j < 32 / LANES; ++j) from[j] = uint(l * (64 / LANES) + 2 * j) * 0x01010101u + 0x01000100u;
  if (FIRST == 0) {
    tq_step<TAPS, LANES, 0>(total, from, own);
    tq_step<TAPS, LANES, 1>(total, from, own);
  }
  if (FIRST < 4) {
    tq_step<TAPS, LANES, 2>(total, from, own);
    tq_step<TAPS, LANES, 3>(total, from, own);
  }
  tq_step<TAPS, LANES, 4>(total, from, own);
  tq_step<TAPS, LANES, 5>(total, from, own);
}

// Goes through BLOCKS blocks of elements, start and those after (NEXT 1) or before it (-1); the first
// block lacks SKIPPED elements. at: where the costs of element 0 lie; ways: of each block but
// the first where places come from, if KEPT.
template <int TAPS, int LANES, int NEXT, int BLOCKS, int SKIPPED, bool KEPT>
TQ_FN void tq_walk(thread tq_totals<LANES>& total, const threadgroup uint* costs, int at, threadgroup uint* ways, int start, int l) {
  constexpr int WORDS = 64 / LANES;
  // Lanes of few places would wait for their costs, and have registers to load them a block ahead.
  constexpr bool AHEAD = WORDS == 2;
  // Where the costs of the element of each phase lie; one that is skipped lends any element's.
  int own_at[6];
  TQ_UNROLL
  for (int phase = 0; phase < 6; ++phase) {
    const int element = start + NEXT * max(phase - SKIPPED, 0);
    own_at[phase] = at + 8 * element + tq_own_set(TAPS, l * WORDS, phase);
  }
  uint from[WORDS / 2];
  tq_costs own = tq_own_costs(costs, own_at);
  TQ_UNROLL
  for (int phase = 0; phase < 6; ++phase) own_at[phase] += NEXT * 8 * (6 - max(SKIPPED - phase, 0));
  tq_costs ahead = AHEAD ? tq_own_costs(costs, own_at) : own;
  tq_block<TAPS, LANES, SKIPPED>(total, from, own, l);
  TQ_NO_UNROLL
  for (int block = 1; block < BLOCKS; ++block) {
    own = AHEAD ? ahead : tq_own_costs(costs, own_at);
    const int next = block + 1 < BLOCKS ? NEXT * 48 : 0;
    TQ_UNROLL
    for (int phase = 0; phase < 6; ++phase) own_at[phase] += next;
    if (AHEAD) ahead = tq_own_costs(costs, own_at);
    tq_block<TAPS, LANES, 0>(total, from, own, l);
    if (KEPT) {
      TQ_UNROLL
      for (int j = 0; j < WORDS / 2; ++j) ways[(block - 1) * 32 + l * (WORDS / 2) + j] = from[j];
    }
  }
}

TQ_FN uint tq_backwards(uint state) { return reverse_bits(state) >> 26; }

// Halves as integers in the same order.
TQ_FN uint tq_in_order(uint two) { return two ^ ((two >> 15 & 0x00010001u) * 0x7fffu | 0x80008000u); }

// Of both vectors the state at which ways meet that cost least together: those of a SIMD-group, and
// those that come the other way, which others found. The least of equals.
template <int LANES>
TQ_FN void tq_meet(thread uint (&state)[2], thread tq_totals<LANES>& total, const threadgroup uint* others, bool backwards, int l) {
  constexpr int WORDS = 64 / LANES;
  uint least[2] = {0xffffffffu, 0xffffffffu};  // a cost, and behind it the state
  TQ_UNROLL
  for (int i = 0; i < WORDS; ++i) {
    const uint place = l * WORDS + i, from_end = tq_backwards(place);
    const uint costs = tq_in_order(as_type<uint>(total.of[i] + as_type<half2>(others[from_end])));
    const uint here = backwards ? from_end : place;
    least[0] = min(least[0], costs << 16 | here);
    least[1] = min(least[1], (costs & 0xffff0000u) | here);
  }
  TQ_UNROLL
  for (int v = 0; v < 2; ++v) {
    if (LANES == 32) {
      least[v] = simd_min(least[v]);
    } else {
      TQ_UNROLL
      for (int k = LANES / 2; k > 0; k /= 2) least[v] = min(least[v], simd_shuffle_xor(least[v], ushort(k)));
    }
    state[v] = least[v] & 63u;
  }
}

// Finds the states of both vectors of a pair at the seam of the ring and half way round, and of each
// block on the cheapest way between them where places come from.
//
// Of two SIMD-groups one goes forwards and one backwards: first from WARM elements away to the seam,
// which gives the state there, then from there until they meet half way round. Backwards a register
// holds the same c's in the other order.
template <int TAPS, int LANES, int D, int WARM>
TQ_FN void tq_find_ways(thread uint (&seam)[2], thread uint (&middle)[2], threadgroup uint4* memory, bool backwards, int lane) {
  static_assert(WARM % 6 == 0 && WARM <= D, "the walk to the seam takes whole blocks");
  typedef tq_ring<LANES, D> ring;
  constexpr int WORDS = 64 / LANES, REVERSED = tq_reversed_taps(TAPS);
  constexpr float FAR = 30000.0f;  // more than any way costs
  const int pair = lane / LANES, l = lane % LANES;
  const threadgroup uint* costs = (const threadgroup uint*)(memory + ring::COSTS);
  const int at = pair * ring::PAIR_COSTS * 4;
  threadgroup uint* totals = (threadgroup uint*)(memory + ring::TOTALS) + pair * 128;
  threadgroup uint* own_totals = totals + (backwards ? 64 : 0) + l * WORDS;
  const threadgroup uint* others = totals + (backwards ? 0 : 64);
  threadgroup uint* ways = (threadgroup uint*)(memory + ring::WAYS + (2 * pair + backwards) * ring::PAIR_WAYS);

  tq_totals<LANES> total;
  TQ_UNROLL
  for (int i = 0; i < WORDS; ++i) total.of[i] = tq_twice(0.0f);
  if (backwards) {
    tq_walk<REVERSED, LANES, -1, WARM / 6, 0, false>(total, costs, at, ways, WARM - 1, l);
  } else {
    tq_walk<TAPS, LANES, 1, WARM / 6, 0, false>(total, costs, at, ways, D - WARM, l);
  }
  TQ_UNROLL
  for (int i = 0; i < WORDS; ++i) own_totals[i] = as_type<uint>(total.of[i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  tq_meet<LANES>(seam, total, others, backwards, l);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  TQ_UNROLL
  for (int i = 0; i < WORDS; ++i) {
    const uint place = l * WORDS + i, turned = (place << ring::SKIPPED | place >> (6 - ring::SKIPPED)) & 63u;
    const uint state = backwards ? tq_backwards(turned) : turned;
    total.of[i] = as_type<half2>(tq_pack(state == seam[0] ? 0.0f : FAR, state == seam[1] ? 0.0f : FAR));
  }
  if (backwards) {
    tq_walk<REVERSED, LANES, -1, ring::BLOCKS, ring::SKIPPED, true>(total, costs, at, ways, D - 1, l);
  } else {
    tq_walk<TAPS, LANES, 1, ring::BLOCKS, ring::SKIPPED, true>(total, costs, at, ways, 0, l);
  }
  TQ_UNROLL
  for (int i = 0; i < WORDS; ++i) own_totals[i] = as_type<uint>(total.of[i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  tq_meet<LANES>(middle, total, others, backwards, l);
}

// Puts the states of a vector after each block in the order of the elements, behind what is known
// before them. A lane goes back from the middle to the seam.
template <int LANES, int D>
TQ_FN void tq_trace(threadgroup uint4* memory, uint seam, uint middle, bool backwards, int pair, int v) {
  typedef tq_ring<LANES, D> ring;
  const threadgroup uchar* way = (const threadgroup uchar*)(memory + ring::WAYS + (2 * pair + backwards) * ring::PAIR_WAYS) + 2 * v;
  threadgroup uchar* states = (threadgroup uchar*)(memory + ring::COSTS) + (2 * pair + v) * (2 * ring::BLOCKS + 1) + ring::BLOCKS;
  states[backwards ? ring::BLOCKS : -ring::BLOCKS] = uchar(backwards ? seam << ring::SKIPPED & 63u : seam >> ring::SKIPPED);
  uint state = backwards ? tq_backwards(middle) : middle;
  TQ_NO_UNROLL
  for (int back = 0; back < ring::BLOCKS; ++back) {
    if (backwards && back > 0) states[back] = uchar(tq_backwards(state));
    if (!backwards) states[-back] = uchar(state);
    if (back < ring::BLOCKS - 1) state = way[(ring::BLOCKS - 2 - back) * 128 + (state >> 1) * 4 + (state & 1u)];
  }
}

// Stores codes: the c's, and of each element the nearest level of the set that they choose.
template <int TAPS, int BITS, int LANES, int D, int ROW>
TQ_FN void tq_store_trellis(device uchar* planes, const threadgroup uint4* memory, const threadgroup uint4* levels, int vectors, int index) {
  typedef tq_ring<LANES, D> ring;
  constexpr int NUMBERS = 4 << BITS, BYTES = D / 8, ITEMS = 2 * ring::PAIRS * BYTES;
  constexpr int PARTS = ITEMS > 32 ? 1 : ITEMS > 16 ? 2 : ITEMS > 8 ? 4 : 8;  // lanes that share a byte
  const threadgroup ushort* x = (const threadgroup ushort*)memory;
  const threadgroup uint* level = (const threadgroup uint*)levels;
  TQ_NO_UNROLL
  for (int first = 0; first < ITEMS * PARTS; first += ring::THREADS) {
    const int i = first + index;
    const int part = i % PARTS, byte = i / PARTS % BYTES, vector = i / PARTS / BYTES;
    const bool live = vector < min(vectors, 2 * int(ring::PAIRS));
    const int its = live ? vector : 0;
    // The c's of the elements, in bits 7 to 0, and above them those of the six before. They begin with
    // the first, third or fifth element of a block.
    const int place = 8 * byte + ring::SKIPPED, block = place / 6;
    const threadgroup uchar* states = (const threadgroup uchar*)(memory + ring::COSTS) + its * (2 * ring::BLOCKS + 1) + block;
    const uint seen = (uint(states[0]) << 12 | uint(states[1]) << 6 | states[2]) >> (4 - place % 6);
    uint z[3] = {0, 0, 0};
    TQ_UNROLL
    for (int t = 0; t < 7; ++t) {
      TQ_UNROLL
      for (int j = 0; j < 3; ++j) {
        if (tq_taps(TAPS, j) >> t & 1u) z[j] ^= seen >> t;
      }
    }
    uint codes = 0;  // a byte of each plane
    TQ_UNROLL
    for (int e = 0; e < 8 / PARTS; ++e) {
      const int at = e * PARTS + part, from_end = 7 - at;
      const uint set = (z[0] >> from_end & 1u) | (z[1] >> from_end & 1u) << 1 | (z[2] >> from_end & 1u) << 2;
      const float element = float(tq_low(x[its * D + 8 * byte + at]));
      float least = 0.0f;
      uint u = 0;
      TQ_UNROLL
      for (int k = 0; k < NUMBERS / 8; ++k) {
        const float distance = fabs(element - float(tq_low(level[8 * k + set])));
        if (k == 0 || distance < least) least = distance, u = k;
      }
      codes |= ((seen >> from_end & 1u) | (u & 1u) << 8 | (u >> 1) << 16) << at;
    }
    TQ_UNROLL
    for (int k = PARTS / 2; k > 0; k /= 2) codes |= simd_shuffle_xor(codes, ushort(k));
    if (live && part == 0) {
      device uchar* row = planes + size_t(vector) * ROW + byte;
      row[0] = uchar(codes), row[BYTES] = uchar(codes >> 8);
      if (BITS == 3) row[2 * BYTES] = uchar(codes >> 16);
    }
  }
}

// Codes of the vectors of two SIMD-groups, which lie in memory in steps. levels: of each number the
// level in both halves; error: an element's expected square error, which costs leave out to stay
// small; planes: those of these codes in the first row.
template <int TAPS, int BITS, int LANES, int D, int ROW, int WARM>
TQ_FN void tq_encode_trellis(device uchar* planes, threadgroup uint4* memory, const threadgroup uint4* levels, float error, int vectors, bool backwards, int lane) {
  const int index = lane + (backwards ? 32 : 0), l = lane % LANES;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  tq_find_costs<4 << BITS, LANES, D>(memory, levels, tq_twice(-error), index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint seam[2], middle[2];
  tq_find_ways<TAPS, LANES, D, WARM>(seam, middle, memory, backwards, lane);
  // States take the place of costs, which both SIMD-groups have done with since they met.
  if (l < 2) tq_trace<LANES, D>(memory, l == 0 ? seam[0] : seam[1], l == 0 ? middle[0] : middle[1], backwards, lane / LANES, l);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  tq_store_trellis<TAPS, BITS, LANES, D, ROW>(planes, memory, levels, vectors, index);
}
