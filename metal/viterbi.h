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

// The set of levels on the way to a place from itself, after an element of phase t % 6 in the block;
// from the other place it is another by the column of 6.
TQ_FN constexpr int tq_own_set(int taps, int place, int phase) {
  int set = 0;
  for (int q = 0; q < 6; ++q) {
    const int column = tq_column(taps, (q + phase + 1) % 6) ^ (q + phase == 5 ? tq_column(taps, 6) : 0);
    set ^= (place >> q & 1) ? column : 0;
  }
  return set;
}

TQ_FN uint4 tq_four(uint x, uint y, uint z, uint w) {
  uint4 v;
  v.x = x, v.y = y, v.z = z, v.w = w;
  return v;
}
TQ_FN half2 tq_nearer(half2 best, half2 x, uint level, bool first) {
  const half2 distance = abs(x - as_type<half2>(level));
  return first ? distance : min(best, distance);
}

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

// An index of a ring.
template <int D> TQ_FN int tq_around(int d) { return d < 0 ? d + D : d >= D ? d - D : d; }

// Where the costs of a set for an element of a block lie, with those of set ^ 1, set ^ 2 and set ^ 3
// beside them: for each set, so that a lane finds those of its own sets in order. Those of elements
// side by side are in different banks of memory.
TQ_FN int tq_costs_at(int element, int set) { return element * 8 + (set ^ (element & 7)); }

// Costs of the eight sets for a block, start and the five elements after (NEXT 1) or before it (-1),
// of PAIRS pairs of vectors: the least square error of a set's levels, and offset more.
template <int NUMBERS, int PAIRS, int D, int NEXT>
TQ_FN void tq_find_costs(threadgroup uint4* costs, const threadgroup ushort* x, const device uint* levels, half2 offset, int start, int lane) {
  constexpr int PARTS = PAIRS > 2 ? 1 : 2;  // lanes that share an element
  constexpr int SETS = 8 / PARTS;
  TQ_UNROLL
  for (int some = 0; some < PAIRS * 6; some += 32 / PARTS) {
    const int element = some + lane / PARTS, first = lane % PARTS * SETS;
    const int pair = element / 6, step = element % 6;
    if (element < PAIRS * 6) {
      const int d = tq_around<D>(start + NEXT * step);
      const half2 both = as_type<half2>(uint(x[2 * pair * D + d]) | uint(x[(2 * pair + 1) * D + d]) << 16);
      half2 c[SETS];
      TQ_UNROLL
      for (int u = 0; u < NUMBERS / 8; ++u) {
        TQ_UNROLL
        for (int k = 0; k < SETS; k += 4) {
          const uint4 four = tq_load_numbers(levels + 8 * u + first + k);
          c[k] = tq_nearer(c[k], both, four.x, u == 0), c[k + 1] = tq_nearer(c[k + 1], both, four.y, u == 0);
          c[k + 2] = tq_nearer(c[k + 2], both, four.z, u == 0), c[k + 3] = tq_nearer(c[k + 3], both, four.w, u == 0);
        }
      }
      uint w[SETS];
      TQ_UNROLL
      for (int k = 0; k < SETS; ++k) w[k] = as_type<uint>(fma(c[k], c[k], offset));
      TQ_UNROLL
      for (int k = 0; k < SETS; ++k) costs[tq_costs_at(element, first + k)] = tq_four(w[k], w[k ^ 1], w[k ^ 2], w[k ^ 3]);
    }
  }
}

// Costs of a lane's own sets, that of its first place first.
struct tq_costs {
  uint4 near, far;
};
TQ_FN tq_costs tq_own_costs(const threadgroup uint4* costs, int at) {
  tq_costs own;
  own.near = costs[at], own.far = costs[at ^ 4];
  return own;
}

// One element.
template <int TAPS, int LANES, int PHASE, class HALF2>
TQ_FN void tq_step(thread HALF2 (&total)[64 / LANES], thread uint (&from)[32 / LANES], tq_costs own) {
  constexpr int WORDS = 64 / LANES;
  constexpr int BIT = 1 << (5 - PHASE);  // of places, in which the two that pair differ
  const uint cost[8] = {own.near.x, own.near.y, own.near.z, own.near.w, own.far.x, own.far.y, own.far.z, own.far.w};
  half2 best[WORDS];
  uint worse[WORDS];
  TQ_UNROLL
  for (int i = 0; i < WORDS; ++i) {
    const int set = tq_own_set(TAPS, i, PHASE);
    half2 other = total[(i ^ BIT) % WORDS];
    if (BIT >= WORDS) other = simd_shuffle_xor(total[i], ushort(BIT / WORDS));
    const half2 stays = total[i] + as_type<half2>(cost[set]);
    const half2 comes = other + as_type<half2>(cost[set ^ tq_column(TAPS, 6)]);
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
  for (int i = 0; i < WORDS; ++i) total[i] = best[i];
  TQ_UNROLL
  for (int j = 0; j < WORDS / 2; ++j) from[j] = moved[j];
}

// Goes through blocks of elements, start and those after (NEXT 1) or before it (-1), of which those
// that are skipped come first. total: of a lane's places the least cost of a way there; ways: where
// they came from, of each block, if that is kept.
template <int TAPS, int NUMBERS, int LANES, int D, int NEXT, class HALF2>
TQ_FN void tq_walk(thread HALF2 (&total)[64 / LANES], threadgroup uint4* costs, threadgroup uint* ways, const threadgroup ushort* x, const device uint* levels, HALF2 offset, int start, int skipped, int blocks, bool kept, int lane) {
  constexpr int WORDS = 64 / LANES;
  const int pair = lane / LANES, l = lane % LANES;
  int at[6];  // where the costs of a lane's own sets lie
  TQ_UNROLL
  for (int phase = 0; phase < 6; ++phase) at[phase] = tq_costs_at(pair * 6 + phase, tq_own_set(TAPS, l * WORDS, phase));
  start = tq_around<D>(start - NEXT * skipped);
  TQ_NO_UNROLL
  for (int block = 0; block < blocks; ++block) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    tq_find_costs<NUMBERS, 32 / LANES, D, NEXT>(costs, x, levels, offset, start, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    uint from[WORDS / 2];
    TQ_UNROLL
    for (int j = 0; j < WORDS / 2; ++j) from[j] = uint(l * WORDS + 2 * j) * 0x01010101u + 0x01000100u;
    const int first = block == 0 ? skipped : 0;
    // Costs are loaded an element ahead.
    tq_costs even = tq_own_costs(costs, at[0]), odd = tq_own_costs(costs, at[1]);
    if (first < 1) tq_step<TAPS, LANES, 0>(total, from, even);
    even = tq_own_costs(costs, at[2]);
    if (first < 2) tq_step<TAPS, LANES, 1>(total, from, odd);
    odd = tq_own_costs(costs, at[3]);
    if (first < 3) tq_step<TAPS, LANES, 2>(total, from, even);
    even = tq_own_costs(costs, at[4]);
    if (first < 4) tq_step<TAPS, LANES, 3>(total, from, odd);
    odd = tq_own_costs(costs, at[5]);
    if (first < 5) tq_step<TAPS, LANES, 4>(total, from, even);
    tq_step<TAPS, LANES, 5>(total, from, odd);
    if (kept) {
      TQ_UNROLL
      for (int j = 0; j < WORDS / 2; ++j) ways[block * 32 + l * (WORDS / 2) + j] = from[j];
    }
    start = tq_around<D>(start + NEXT * 6);
  }
}

TQ_FN uint tq_backwards(uint state) { return reverse_bits(state) >> 26; }

// Of both vectors the state at which ways meet that cost least together: those of a SIMD-group, and
// those that come the other way, which others found.
template <int LANES, class HALF2>
TQ_FN void tq_meet(thread uint (&state)[2], thread HALF2 (&total)[64 / LANES], const threadgroup uint* others, bool backwards, int l) {
  constexpr int WORDS = 64 / LANES;
  HALF2 sum[WORDS];
  TQ_UNROLL
  for (int i = 0; i < WORDS; ++i) sum[i] = total[i] + as_type<HALF2>(others[tq_backwards(l * WORDS + i)]);
  TQ_UNROLL
  for (int v = 0; v < 2; ++v) {
    float least = 0.0f;
    uint best = 0;
    TQ_UNROLL
    for (int i = 0; i < WORDS; ++i) {
      const uint word = as_type<uint>(sum[i]), place = l * WORDS + i;
      const uint here = backwards ? tq_backwards(place) : place;
      const float cost = float(v == 0 ? tq_low(word) : tq_high(word));
      if (i == 0 || cost < least || (cost == least && here < best)) least = cost, best = here;
    }
    TQ_UNROLL
    for (int k = LANES / 2; k > 0; k /= 2) {
      const float cost = simd_shuffle_xor(least, ushort(k));
      const uint there = simd_shuffle_xor(best, ushort(k));
      if (cost < least || (cost == least && there < best)) least = cost, best = there;
    }
    state[v] = best & 63u;
  }
}

// Words of 16 bytes of threadgroup memory that tq_encode_trellis needs: the vectors, costs of two
// blocks, and of each block where its states come from.
TQ_FN constexpr int tq_trellis_memory(int lanes, int dim) {
  return 32 / lanes * (dim / 4 + 2 * 48 + (dim / 2 + 5) / 6 * 16);
}

// Codes of a threadgroup's vectors, which lie in memory in steps, as halves. levels: of each number
// the level in both halves; error: an element's expected square error, which costs leave out to stay
// small; planes: those of these codes in the first row.
//
// Of two SIMD-groups one goes forwards and one backwards: first from 30 elements away to the seam of
// the ring, which gives the state there, then from there until they meet half way round. Backwards a
// register holds the same c's in the other order.
template <int TAPS, int BITS, int LANES, int D, int ROW>
TQ_FN void tq_encode_trellis(device uchar* planes, threadgroup uint4* memory, const device uint* levels, float error, int vectors, bool backwards, int lane) {
  constexpr int NUMBERS = 4 << BITS;
  constexpr int WORDS = 64 / LANES, PAIRS = 32 / LANES;
  constexpr int BLOCKS = (D / 2 + 5) / 6;  // of half a vector
  constexpr int SKIPPED = 6 * BLOCKS - D / 2;  // elements of the first block: the last one is whole
  threadgroup ushort* x = (threadgroup ushort*)memory;
  threadgroup uint4* costs = memory + PAIRS * (D / 4 + (backwards ? 48 : 0));
  const threadgroup uint4* their_costs = memory + PAIRS * (D / 4 + (backwards ? 0 : 48));
  const int pair = lane / LANES, l = lane % LANES;
  threadgroup uint* ways = (threadgroup uint*)(memory + PAIRS * (D / 4 + 96)) + (2 * pair + backwards) * BLOCKS * 32;
  const half2 offset = tq_twice(-error);

  half2 total[WORDS];
  uint seam[2] = {0, 0}, met[2];
  TQ_UNROLL
  for (int i = 0; i < WORDS; ++i) total[i] = tq_twice(0.0f);
  TQ_NO_UNROLL
  for (int turn = 0; turn < 2; ++turn) {
    const int skipped = turn == 0 ? 0 : SKIPPED, blocks = turn == 0 ? 5 : BLOCKS;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (backwards) {
      tq_walk<tq_reversed_taps(TAPS), NUMBERS, LANES, D, -1>(total, costs, ways, x, levels, offset, turn == 0 ? 29 : D - 1, skipped, blocks, turn == 1, lane);
    } else {
      tq_walk<TAPS, NUMBERS, LANES, D, 1>(total, costs, ways, x, levels, offset, turn == 0 ? D - 30 : 0, skipped, blocks, turn == 1, lane);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    TQ_UNROLL
    for (int i = 0; i < WORDS; ++i) ((threadgroup uint*)costs)[pair * 64 + l * WORDS + i] = as_type<uint>(total[i]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    tq_meet<LANES>(met, total, (const threadgroup uint*)their_costs + pair * 64, backwards, l);
    if (turn == 0) {
      seam[0] = met[0], seam[1] = met[1];
      const uint start[2] = {backwards ? tq_backwards(seam[0]) : seam[0], backwards ? tq_backwards(seam[1]) : seam[1]};
      TQ_UNROLL
      for (int i = 0; i < WORDS; ++i) {
        const uint place = l * WORDS + i, state = (place << SKIPPED | place >> (6 - SKIPPED)) & 63u;
        total[i] = as_type<half2>(tq_pack(state == start[0] ? 0.0f : 30000.0f, state == start[1] ? 0.0f : 30000.0f));
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // The states after each block in the order of the elements, behind what is known before them.
  constexpr int STATES = 2 * BLOCKS + 1;
  threadgroup uchar* states = (threadgroup uchar*)(memory + PAIRS * (D / 4));
  if (l < 2) {
    const threadgroup uchar* way = (const threadgroup uchar*)ways + 2 * l;
    threadgroup uchar* its_states = states + (2 * pair + l) * STATES + BLOCKS;
    const uint ends = l == 0 ? seam[0] : seam[1], middle = l == 0 ? met[0] : met[1];
    its_states[backwards ? BLOCKS : -BLOCKS] = uchar(backwards ? ends << SKIPPED & 63u : ends >> SKIPPED);
    uint state = backwards ? tq_backwards(middle) : middle;
    TQ_NO_UNROLL
    for (int back = 0; back < BLOCKS; ++back) {
      if (backwards && back > 0) its_states[back] = uchar(tq_backwards(state));
      if (!backwards) its_states[-back] = uchar(state);
      state = way[(BLOCKS - 1 - back) * 128 + (state >> 1) * 4 + (state & 1u)];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // A byte of each plane at a time: of the set that the c's choose, the nearest level.
  constexpr int BYTES = D / 8;
  TQ_NO_UNROLL
  for (int i = lane + (backwards ? 32 : 0); i < 2 * PAIRS * BYTES; i += 64) {
    const int vector = i / BYTES, byte = i % BYTES;
    if (vector >= vectors) break;
    // The c's of the elements, in bits 7 to 0, and above them those of the six before. They begin with
    // the first, third or fifth element of a block.
    const int first = 8 * byte + SKIPPED, block = first / 6;
    const threadgroup uchar* its_states = states + vector * STATES + block;
    const uint seen = (uint(its_states[0]) << 12 | uint(its_states[1]) << 6 | its_states[2]) >> (4 - first % 6);
    uint z[3] = {0, 0, 0};
    TQ_UNROLL
    for (int t = 0; t < 7; ++t) {
      TQ_UNROLL
      for (int j = 0; j < 3; ++j) {
        if (tq_taps(TAPS, j) >> t & 1u) z[j] ^= seen >> t;
      }
    }
    uint c = 0, low = 0, high = 0;
    TQ_UNROLL
    for (int e = 0; e < 8; ++e) {
      const int from_end = 7 - e;
      const uint set = (z[0] >> from_end & 1u) | (z[1] >> from_end & 1u) << 1 | (z[2] >> from_end & 1u) << 2;
      const float element = float(tq_low(x[vector * D + 8 * byte + e]));
      float least = 0.0f;
      uint u = 0;
      TQ_UNROLL
      for (int k = 0; k < NUMBERS / 8; ++k) {
        const float distance = fabs(element - float(tq_low(levels[8 * k + set])));
        if (k == 0 || distance < least) least = distance, u = k;
      }
      c |= (seen >> from_end & 1u) << e, low |= (u & 1u) << e, high |= (u >> 1) << e;
    }
    device uchar* row = planes + size_t(vector) * ROW + byte;
    row[0] = uchar(c), row[BYTES] = uchar(low);
    if (BITS == 3) row[2 * BYTES] = uchar(high);
  }
}
