#include "encode.h"
  // Encodes keys and values: centring, rotation, search of the step, codes, scales. A vector belongs
  // to D / E lanes, which do the key and then the value of a token. More threadgroups put the last
  // tokens, as they came, into a copy of the tail.
  //
  // keys, values T (KV heads, tokens, HEAD_DIM)
  // tail_keys, tail_values  T (KV heads, TAIL, HEAD_DIM): the token of index i lies in slot i % TAIL
  // count        int32: KV heads * tokens, tokens, how many tokens keep their mean whatever it is
  // start        int32: position and index of the first token
  // turns        uint32 (D): the step of each element's pair. CENTRE only
  // means        float (KV heads, 4, D): factors of cosine and sine that give an element of R_j mu,
  //              smoothing, mean value. All but smoothing with changed signs, the first two smoothed
  // signs        uint32 (D / 2): bits 15 and 31 of number i: elements 2 i and 2 i + 1 change signs
  // numbers      float; of each step of keys: its square, its scale, the factor that takes an element
  //              to its code / (2^bits - 1); of each step of values: its square, its scale; the unit
  //              of values in largest elements, inverted; a centre of squares; of each step of values
  //              TERMS coefficients that take an element to its code, see tq_slope
  // halves       half2, as uint32: of each step of keys: its inverse, and that of the size that
  //              tq_saturated_fma takes; of each step of values: its inverse; the centre, a/b and
  //              c/b of the levels; of each step of values SEARCH_TERMS coefficients
  // rows         uint8 (KV heads, tokens, ROW); the sign bits of the scales say that a mean is left out
  // next_keys, next_values  the tail with the new tokens
  constexpr int LANES = D / E;
  constexpr int EIGHTS = (E + 7) / 8;
  constexpr int K_BITS = K_LOW + K_HIGH;
  constexpr int V_BITS = V_LOW + V_HIGH;
  constexpr int K_CELLS = 1 << (K_BITS - 1);  // of one sign
  constexpr int V_CELLS = 1 << (V_BITS - 1);
  constexpr float K_SPAN = K_CELLS - 0.75f;
  constexpr float V_SPAN = V_CELLS - 0.75f;
  constexpr int V_NUMBERS = 3 * K_STEPS;
  constexpr int UNIT = V_NUMBERS + 2 * V_STEPS;
  constexpr int V_HALVES = 2 * K_STEPS;
  constexpr int LEVELS = V_HALVES + V_STEPS;
  constexpr int AT_ONCE = GROUPS * 32 / LANES;  // vectors of a threadgroup
  const int encoding = (count[0] + AT_ONCE - 1) / AT_ONCE;
  if (int(threadgroup_position_in_grid.x) >= encoding) {
    const int copied = count[0] / count[1] * TAIL * HEAD_DIM;
    int i = (int(threadgroup_position_in_grid.x) - encoding) * COPIED + int(thread_index_in_threadgroup);
    TQ_NO_UNROLL
    for (int k = 0; k < COPIED && i < copied; k += GROUPS * 32, i += GROUPS * 32) {
      const int slot = i / HEAD_DIM % TAIL;
      const int token = count[1] - 1 - ((start[1] + count[1] - 1 - slot) & (TAIL - 1));
      const size_t at = (size_t(i / (TAIL * HEAD_DIM)) * count[1] + max(token, 0)) * HEAD_DIM + i % HEAD_DIM;
      next_keys[i] = token < 0 ? tail_keys[i] : keys[at];
      next_values[i] = token < 0 ? tail_values[i] : values[at];
    }
    return;
  }
  const int lane = thread_index_in_simdgroup;
  const int p = lane % LANES;
  const int group = int(threadgroup_position_in_grid.x) * GROUPS + int(simdgroup_index_in_threadgroup);
  const int wanted = group * (32 / LANES) + lane / LANES;
  const bool live = wanted < count[0];
  const size_t token = live ? wanted : count[0] - 1;  // every lane takes part in the shuffles
  device uchar* row = rows + token * ROW;
  const int number = int(token) % count[1];
  const device float* mean = means + (CENTRE ? token / count[1] * 4 * D : 0);

  constexpr int EXCHANGED = M == 1 ? 1 : GROUPS * 32 * E;
  threadgroup uchar exchanged[EXCHANGED];
  threadgroup uchar* exchange = exchanged + (M == 1 ? 0 : (int(simdgroup_index_in_threadgroup) * 32 + lane - p) * E);

  float y[E];
  uint codes[E];
  uint scales;

  // ---- The key
  {
    tq_load_share<E, M, D, HEAD_DIM>(y, keys + token * HEAD_DIM, signs, p);
    uint flag = 0;
    if (CENTRE) {
      float rest[E];
      TQ_UNROLL
      for (int e = 0; e < E; ++e) {
        const int d = tq_element<E, M, D>(e, p);
        const float2 turn = tq_turn(uint(start[0] + number) * turns[d]);
        y[e] *= mean[2 * D + d];
        rest[e] = y[e] - fma(mean[d], turn.x, mean[D + d] * turn.y);
      }
      flag = tq_shorter<LANES>(y, rest, number >= count[2]) ? 0x8000u : 0u;
    }
    tq_hadamard_share<E, M, D>(y, p);
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
        const half2 inverse = as_type<half2>(halves[i]), to_cell = as_type<half2>(halves[K_STEPS + i]);
        const half2 fraction = tq_saturated_fma(x, to_cell, tq_twice(-0.5f / K_SPAN));
        const half2 rest = fma(x, inverse, -tq_round_and_half<0>(fraction * tq_twice(K_SPAN)));
        errors[i][e / 8] = e % 8 == 0 ? rest * rest : fma(rest, rest, errors[i][e / 8]);
      }
    }
    const int chosen = tq_best<LANES>(errors, numbers);
    scales = tq_scale_bits(peak * numbers[K_STEPS + chosen], y[0]) | flag;
    const float factor = numbers[2 * K_STEPS + chosen];
    TQ_UNROLL
    for (int e = 0; e < E; ++e) codes[e] = tq_nearest<2 * K_CELLS - 1>(fma(y[e], factor, 0.5f));
    tq_store_codes<K_LOW, K_HIGH, E, M, D>(row, row + K_HIGH_AT, codes, exchange, p, live);
  }

  // ---- The value
  {
    tq_load_share<E, M, D, HEAD_DIM>(y, values + token * HEAD_DIM, signs, p);
    uint flag = 0;
    if (CENTRE) {
      float rest[E];
      TQ_UNROLL
      for (int e = 0; e < E; ++e) rest[e] = y[e] - mean[3 * D + tq_element<E, M, D>(e, p)];
      flag = tq_shorter<LANES>(y, rest, true) ? 0x80000000u : 0u;
    }
    tq_hadamard_share<E, M, D>(y, p);
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
    scales |= tq_scale_bits(peak * numbers[V_NUMBERS + V_STEPS + chosen], y[0]) << 16 | flag;
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
  if (live && p == 0) *(device uint*)(row + SCALES_AT) = scales;
