#include "viterbi.h"
  // Encodes keys and values: centring, rotation, search of the step, codes, scales. A vector belongs
  // to D / E lanes, which do the key and then the value of a token. Where either has a trellis code,
  // which takes longer, some threadgroups do keys and as many do values, and twice PAIR lanes find
  // the codes of two vectors. More threadgroups put the last tokens, as they came, into a copy of the
  // tail.
  //
  // keys, values T (sequences, KV heads, tokens, HEAD_DIM)
  // tail_keys, tail_values  T (sequences, KV heads, TAIL, HEAD_DIM): the token of index i lies in
  //              slot i % TAIL
  // count        int32: vectors, tokens of a sequence, how many of these keep their mean whatever it
  //              is, KV heads
  // starts       int32 (sequences, 2): position and index of the first token
  // turns        uint32 (D): the step of each element's pair. CENTRE only, as what follows
  // means        float (KV heads, 4 * D + 4): factors of cosine and sine that give an element of R_j mu,
  //              smoothing, mean value; the first two smoothed, and all with changed signs; then the
  //              squares of the means of keys and of values
  // signs        uint32 (D / 2): bits 15 and 31 of number i: elements 2 i and 2 i + 1 change signs
  // numbers      float; of each step of keys: its square, its scale, the factor that takes an element
  //              to its code / (2^bits - 1); of each step of values: its square, its scale; the unit
  //              of values in largest elements, inverted; a centre of squares; of each step of values
  //              TERMS coefficients that take an element to its code, see tq_slope. Instead, for a
  //              trellis code: the factor of the scale, an element's expected square error
  // halves       half2, as uint32: levels of keys and of values that have a trellis code, by their
  //              numbers. Of others: of each step of keys: its inverse, and that of the size that
  //              tq_saturated_fma takes; of each step of values: its inverse; the centre, a/b and
  //              c/b of the levels; of each step of values SEARCH_TERMS coefficients
  // rows         uint8 (sequences, KV heads, tokens, ROW); the sign bits of the scales say that a mean is left out
  // next_keys, next_values  the tail with the new tokens
  constexpr int LANES = D / E;
  constexpr int EIGHTS = (E + 7) / 8;
  constexpr int K_BITS = K_LOW + K_HIGH;
  constexpr int V_BITS = V_LOW + V_HIGH;
  constexpr int K_CELLS = 1 << (K_BITS - 1);  // of one sign
  constexpr int V_CELLS = 1 << (V_BITS - 1);
  constexpr float K_SPAN = K_CELLS - 0.75f;
  constexpr float V_SPAN = V_CELLS - 0.75f;
  constexpr bool TRELLIS = K_TAPS != 0 || V_TAPS != 0;
  constexpr int V_NUMBERS = K_TAPS != 0 ? 2 : 3 * K_STEPS;
  constexpr int UNIT = V_NUMBERS + 2 * V_STEPS;
  constexpr int V_TRELLIS = K_TAPS != 0 ? 4 << K_BITS : 0;
  constexpr int K_HALVES = V_TRELLIS + (V_TAPS != 0 ? 4 << V_BITS : 0);
  constexpr int V_HALVES = K_HALVES + (K_TAPS != 0 ? 0 : 2 * K_STEPS);
  constexpr int LEVELS = V_HALVES + V_STEPS;
  constexpr int SHARED_OUT = 32 / LANES;  // vectors that a SIMD-group transforms at a time
  constexpr int TAKEN = TRELLIS ? 32 / PAIR : SHARED_OUT;  // those that it takes
  constexpr int AT_ONCE = GROUPS * TAKEN;  // those of a threadgroup
  const int vectors = count[0], tokens = count[1], heads = count[3];
  const int needed = (vectors + AT_ONCE - 1) / AT_ONCE;
  const int encoding = TRELLIS ? 2 * needed : needed;
  if (int(threadgroup_position_in_grid.x) >= encoding) {
    const int first = (int(threadgroup_position_in_grid.x) - encoding) * GROUPS * 32 * COPIED + int(thread_index_in_threadgroup);
    const int rings = vectors / tokens;
    if (HEAD_DIM * sizeof(T) % 16 == 0) {
      constexpr int WORDS = HEAD_DIM * sizeof(T) / 16;
      const int words = rings * TAIL * WORDS;
      tq_push<TAIL, WORDS, COPIED, GROUPS * 32>((device uint4*)next_keys, (const device uint4*)tail_keys, (const device uint4*)keys, starts, heads, tokens, first, words);
      tq_push<TAIL, WORDS, COPIED, GROUPS * 32>((device uint4*)next_values, (const device uint4*)tail_values, (const device uint4*)values, starts, heads, tokens, first, words);
    } else {
      const int words = rings * TAIL * HEAD_DIM;
      tq_push<TAIL, HEAD_DIM, COPIED, GROUPS * 32>(next_keys, tail_keys, keys, starts, heads, tokens, first, words);
      tq_push<TAIL, HEAD_DIM, COPIED, GROUPS * 32>(next_values, tail_values, values, starts, heads, tokens, first, words);
    }
    return;
  }

  const int lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int p = lane % LANES;
  const bool of_values = int(threadgroup_position_in_grid.x) >= needed;
  const int group = (int(threadgroup_position_in_grid.x) - (of_values ? needed : 0)) * GROUPS + sg;

  constexpr int EXCHANGED = M == 1 ? 1 : GROUPS * 32 * E;
  threadgroup uchar exchanged[EXCHANGED];
  threadgroup uchar* exchange = exchanged + (M == 1 ? 0 : (sg * 32 + lane - p) * E);

  threadgroup uint4 memory[TRELLIS ? int(tq_ring<PAIR, D>::SIZE) : 1];
  threadgroup uint4 levels[TRELLIS ? 8 : 1];  // of what a threadgroup encodes, keys or values
  const int index = thread_index_in_threadgroup;
  if (index < (of_values ? K_HALVES - V_TRELLIS : V_TRELLIS)) {
    ((threadgroup uint*)levels)[index] = halves[(of_values ? V_TRELLIS : 0) + index];
  }

  TQ_NO_UNROLL
  for (int first = 0; first < TAKEN; first += SHARED_OUT) {
    const int place = first + lane / LANES;
    const int wanted = group * TAKEN + place;
    const bool live = wanted < vectors && (TAKEN % SHARED_OUT == 0 || place < TAKEN);
    const size_t vector = wanted < vectors ? wanted : vectors - 1;  // every lane takes part in the shuffles
    const int token = CENTRE ? int(vector) % tokens : 0;
    const int head = CENTRE ? int(vector) / tokens : 0;
    const device float* its_means = means + (CENTRE ? head % heads * (4 * D + 4) : 0);
    device uchar* row = rows + vector * ROW;
    threadgroup ushort* in_steps = (threadgroup ushort*)memory + (sg * TAKEN + place) * D;

    float y[E];
    uint codes[E];

    // ---- The key
    if (!TRELLIS || !of_values) {
      bool flag = false;
      if (CENTRE) {
        float mean[E];
        tq_load_share<E, M, D, HEAD_DIM, false>(y, keys + vector * HEAD_DIM, signs, p);
        tq_load_table<E, M, D>(mean, its_means + 2 * D, p);
        TQ_UNROLL
        for (int e = 0; e < E; ++e) y[e] *= mean[e];
        tq_turned_mean<E, M, D, ALIKE>(mean, its_means, its_means + D, turns, uint(starts[head / heads * 2] + token), p);
        flag = tq_leave_out<LANES>(y, mean, its_means[4 * D], token >= count[2]);
      } else {
        tq_load_share<E, M, D, HEAD_DIM, true>(y, keys + vector * HEAD_DIM, signs, p);
      }
      tq_hadamard_share<E, M, D>(y, p);
      uint scale;
      if (K_TAPS != 0) {
        const float step = tq_put_in_steps<E, M, D>(in_steps, y, p, place < TAKEN);
        scale = tq_scale_bits(step * numbers[0], y[0], flag);
      } else {
        const float peak = tq_peak<LANES>(y);
        const float unit = peak > 1e-30f ? tq_inverse(peak) : 0.0f;
        TQ_UNROLL
        for (int e = 0; e < E; ++e) y[e] *= unit;

        half2 errors[K_STEPS][EIGHTS];
        TQ_UNROLL
        for (int e = 0; e < E; e += 2) {
          const half2 x = abs(as_type<half2>(tq_pack(y[e], y[e + 1])));
          TQ_UNROLL
          for (int i = 0; i < K_STEPS; ++i) {
            const half2 inverse = as_type<half2>(halves[K_HALVES + i]), to_cell = as_type<half2>(halves[K_HALVES + K_STEPS + i]);
            const half2 fraction = tq_saturated_fma(x, to_cell, tq_twice(-0.5f / K_SPAN));
            const half2 rest = fma(x, inverse, -tq_round_and_half<0>(fraction * tq_twice(K_SPAN)));
            errors[i][e / 8] = e % 8 == 0 ? rest * rest : fma(rest, rest, errors[i][e / 8]);
          }
        }
        const int chosen = tq_best<LANES>(errors, numbers);
        scale = tq_scale_bits(peak * numbers[K_STEPS + chosen], y[0], flag);
        const float factor = numbers[2 * K_STEPS + chosen];
        TQ_UNROLL
        for (int e = 0; e < E; ++e) codes[e] = tq_nearest<2 * K_CELLS - 1>(fma(y[e], factor, 0.5f));
        tq_store_codes<K_LOW, K_HIGH, E, M, D>(row, row + K_HIGH_AT, codes, exchange, p, live);
      }
      if (live && p == 0) *(device ushort*)(row + SCALES_AT) = ushort(scale);
    }

    // ---- The value
    if (!TRELLIS || of_values) {
      tq_load_share<E, M, D, HEAD_DIM, true>(y, values + vector * HEAD_DIM, signs, p);
      bool flag = false;
      if (CENTRE) {
        float mean[E];
        tq_load_table<E, M, D>(mean, its_means + 3 * D, p);
        flag = tq_leave_out<LANES>(y, mean, its_means[4 * D + 1], true);
      }
      tq_hadamard_share<E, M, D>(y, p);
      uint scale;
      if (V_TAPS != 0) {
        const float step = tq_put_in_steps<E, M, D>(in_steps, y, p, place < TAKEN);
        scale = tq_scale_bits(step * numbers[V_NUMBERS], y[0], flag);
      } else {
        const float peak = tq_peak<LANES>(y);
        const float unit = peak > 1e-30f ? tq_inverse(peak) * numbers[UNIT] : 0.0f;
        TQ_UNROLL
        for (int e = 0; e < E; ++e) y[e] *= unit;

        half2 errors[V_STEPS][EIGHTS];
        TQ_UNROLL
        for (int e = 0; e < E; e += 2) {
          const half2 x = abs(as_type<half2>(tq_pack(y[e], y[e + 1])));
          const half2 s = fma(x, x, -as_type<half2>(halves[LEVELS]));
          TQ_UNROLL
          for (int i = 0; i < V_STEPS; ++i) {
            const int at = LEVELS + 3 + i * SEARCH_TERMS;
            half2 slope = as_type<half2>(halves[at + SEARCH_TERMS - 1]);
            TQ_UNROLL
            for (int j = SEARCH_TERMS - 2; j >= 0; --j) slope = fma(slope, s, as_type<half2>(halves[at + j]));
            const half2 fraction = tq_saturated_fma(x, slope, tq_twice(-0.5f / V_SPAN));
            const half2 w = tq_round_and_half<V_BITS - 1>(fraction * tq_twice(V_SPAN));
            const half2 level = tq_value_level<V_BITS>(w, as_type<half2>(halves[LEVELS + 1]), as_type<half2>(halves[LEVELS + 2]));
            const half2 rest = fma(x, as_type<half2>(halves[V_HALVES + i]), -level);
            errors[i][e / 8] = e % 8 == 0 ? rest * rest : fma(rest, rest, errors[i][e / 8]);
          }
        }
        const int chosen = tq_best<LANES>(errors, numbers + V_NUMBERS);
        scale = tq_scale_bits(peak * numbers[V_NUMBERS + V_STEPS + chosen], y[0], flag);
        float coefficients[TERMS];
        TQ_UNROLL
        for (int i = 0; i < TERMS; ++i) coefficients[i] = numbers[UNIT + 2 + chosen * TERMS + i];
        TQ_UNROLL
        for (int e = 0; e < E; ++e) {
          // Zero gets the lower of the middle codes: these are of what has the other sign.
          const float slope = tq_slope<TERMS>(fma(y[e], y[e], -numbers[UNIT + 1]), coefficients);
          codes[e] = 2 * V_CELLS - 1 - tq_nearest<2 * V_CELLS - 1>(fma(y[e], slope, 0.5f));
        }
        tq_store_codes<V_LOW, V_HIGH, E, M, D>(row + V_LOW_AT, row + V_HIGH_AT, codes, exchange, p, live);
      }
      if (live && p == 0) *(device ushort*)(row + SCALES_AT + 2) = ushort(scale);
    }
  }

  // ---- Trellis codes
  const int its_first = (group - sg) * TAKEN;
  const bool backwards = sg == 1;
  device uchar* its_rows = rows + size_t(its_first) * ROW;
  if (K_TAPS != 0 && (K_TAPS == V_TAPS || !of_values)) {
    // Code of both, if they have the same.
    device uchar* planes = its_rows + (of_values ? V_LOW_AT : 0);
    const float error = numbers[of_values ? V_NUMBERS + 1 : 1];
    tq_encode_trellis<K_TAPS, K_BITS, PAIR, D, ROW, WARM>(planes, memory, levels, error, vectors - its_first, backwards, lane);
  } else if (V_TAPS != 0 && of_values) {
    tq_encode_trellis<V_TAPS, V_BITS, PAIR, D, ROW, WARM>(its_rows + V_LOW_AT, memory, levels, numbers[V_NUMBERS + 1], vectors - its_first, backwards, lane);
  }
