#include "encode.h"
  // Encodes keys and values: rotation, search of the step, codes, scales. A vector belongs to
  // D / E lanes, which do the key and then the value of a token.
  //
  // keys, values T (count, HEAD_DIM), count is int32 (1)
  // signs        uint32 (D / E): bit e of number p: element e of lane p changes its sign
  // steps        float: of every step the factor that takes a key to its cell, in units of the
  //              largest element; of every step of the values TERMS coefficients that take a value
  //              to its cell, in units of the RMS (see tq_slope); FINAL_TERMS such coefficients
  //              for the codes, which are exact up to 4 bits; the centre of s; b, a/b and c/b
  //              of the levels; the inverse steps of values
  // rows         uint8 (count, ROW)
  constexpr int LANES = D / E;
  constexpr int K_CELLS = 1 << (K_LOW + K_HIGH - 1);
  constexpr int V_BITS = V_LOW + V_HIGH;
  constexpr int V_CELLS = 1 << (V_BITS - 1);
  constexpr float K_SPAN = K_CELLS - 0.75f;  // see tq_cell
  constexpr float V_SPAN = V_CELLS - 0.75f;
  constexpr int FINAL = STEPS + STEPS * TERMS;
  constexpr int LEVELS = FINAL + STEPS * FINAL_TERMS;
  const int lane = thread_index_in_simdgroup;
  const int p = lane % LANES;
  const int group = int(threadgroup_position_in_grid.x) * GROUPS + int(simdgroup_index_in_threadgroup);
  const int wanted = group * (32 / LANES) + lane / LANES;
  const bool live = wanted < count[0];
  const size_t token = live ? wanted : count[0] - 1;  // every lane takes part in the shuffles
  device uchar* row = rows + token * ROW;

  // Elements that a lane has are not side by side where M is not 1, the codes it stores are.
  constexpr int EXCHANGED = M == 1 ? 1 : GROUPS * 32 * E;
  threadgroup uchar exchange[EXCHANGED];
  const int vector = (int(simdgroup_index_in_threadgroup) * 32 + lane - p) * E;

  float y[E];
  uint codes[E];
  uint scales;

  // ---- The key
  {
    tq_load_share<E, M, D, HEAD_DIM>(y, keys + token * HEAD_DIM, p, signs[p]);
    tq_hadamard_share<E, M, D>(y, p);
    float peak = 0.0f;
    TQ_UNROLL
    for (int e = 0; e < E; ++e) peak = max(peak, fabs(y[e]));
    peak = tq_max_over<LANES>(peak);
    const float unit = peak > 1e-30f ? tq_inverse(peak) * (1.0f / K_SPAN) : 0.0f;
    float best = -1.0f, factor = 0.0f, length = 1.0f;
    TQ_NO_UNROLL
    for (int step = 0; step < STEPS; ++step) {
      const float x = unit * steps[step];
      float yz = 0.0f, zz = 0.0f;
      TQ_UNROLL
      for (int e = 0; e < E; ++e) {
        const float z = tq_cell<K_CELLS>(fma(fabs(y[e]), x, -0.5f / K_SPAN));
        yz = fma(fabs(y[e]), z, yz);
        zz = fma(z, z, zz);
      }
      yz = tq_sum_over<LANES>(yz);
      zz = tq_sum_over<LANES>(zz);
      const float cosine = yz * tq_inverse_root(zz);
      // The first step is taken whatever it gives, so that a NaN reaches the scale.
      if (step == 0 || cosine > best) best = cosine, factor = x, length = zz;
    }
    TQ_UNROLL
    for (int e = 0; e < E; ++e) {
      const float z = tq_cell<K_CELLS>(fma(fabs(y[e]), factor, -0.5f / K_SPAN));
      codes[e] = tq_code<K_CELLS>(z, y[e] < 0.0f);
    }
    if (M != 1) {
      TQ_UNROLL
      for (int e = 0; e < E; ++e) exchange[vector + p + LANES * e] = uchar(codes[e]);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      TQ_UNROLL
      for (int e = 0; e < E; ++e) codes[e] = exchange[vector + p * E + e];
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    tq_store_plane<K_LOW, 0>(row, codes, p, live);
    if (K_HIGH != 0) tq_store_plane<K_HIGH, K_LOW>(row + K_HIGH_AT, codes, p, live);
    scales = tq_scale_bits(best * rsqrt(length * D));
  }

  // ---- The value
  {
    tq_load_share<E, M, D, HEAD_DIM>(y, values + token * HEAD_DIM, p, signs[p]);
    tq_hadamard_share<E, M, D>(y, p);
    float square = 0.0f;
    TQ_UNROLL
    for (int e = 0; e < E; ++e) square = fma(y[e], y[e], square);
    square = tq_sum_over<LANES>(square);
    const float unit = square > 1e-30f ? tq_inverse_root(square * (1.0f / D)) : 0.0f;
    TQ_UNROLL
    for (int e = 0; e < E; ++e) y[e] *= unit;
    const float centre = steps[LEVELS];
    const float b = steps[LEVELS + 1];
    const half2 a_by_b = tq_twice(steps[LEVELS + 2]), c_by_b = tq_twice(steps[LEVELS + 3]);
    float best = -1.0f;
    int chosen = 0;
    TQ_NO_UNROLL
    for (int step = 0; step < STEPS; ++step) {
      float to_cell[TERMS];
      TQ_UNROLL
      for (int i = 0; i < TERMS; ++i) to_cell[i] = steps[STEPS + step * TERMS + i] * (1.0f / V_SPAN);
      half2 half_to_cell[TERMS];
      TQ_UNROLL
      for (int i = 0; i < TERMS; ++i) half_to_cell[i] = tq_twice(to_cell[i]);
      float yz = 0.0f, zz = 0.0f;
      TQ_UNROLL
      for (int e = 0; e < E; e += 2) {
        half2 w;
        if (V_BITS <= 4) {
          // Half precision finds the cell but for few elements that lie near its end.
          const half2 size = abs(as_type<half2>(tq_pack(y[e], y[e + 1])));
          const half2 s = fma(size, size, tq_twice(-centre));
          half2 slope = half_to_cell[TERMS - 1];
          TQ_UNROLL
          for (int i = TERMS - 2; i >= 0; --i) slope = fma(slope, s, half_to_cell[i]);
          const half2 fraction = tq_saturated_fma(size, slope, tq_twice(-0.5f / V_SPAN));
          w = tq_round_and_half<V_BITS - 1>(fraction * tq_twice(V_SPAN));
        } else {
          float middle[2];
          TQ_UNROLL
          for (int i = 0; i < 2; ++i) {
            const float slope = tq_slope<TERMS>(fma(y[e + i], y[e + i], -centre), to_cell);
            middle[i] = tq_cell<V_CELLS>(fma(fabs(y[e + i]), slope, -0.5f / V_SPAN));
          }
          w = as_type<half2>(tq_pack(middle[0], middle[1])) * tq_twice(1.0f / V_CELLS);
        }
        const uint levels = tq_value_levels<V_BITS>(w, a_by_b, c_by_b);
        const float first = float(tq_low(levels)), second = float(tq_high(levels));
        yz = fma(fabs(y[e]), first, yz);
        zz = fma(first, first, zz);
        yz = fma(fabs(y[e + 1]), second, yz);
        zz = fma(second, second, zz);
      }
      yz = tq_sum_over<LANES>(yz);
      zz = tq_sum_over<LANES>(zz);
      const float cosine = yz * tq_inverse_root(zz);
      if (cosine > best) best = cosine, chosen = step;
    }
    float to_cell[FINAL_TERMS];
    TQ_UNROLL
    for (int i = 0; i < FINAL_TERMS; ++i) to_cell[i] = steps[FINAL + chosen * FINAL_TERMS + i] * (1.0f / V_SPAN);
    const float inverse = steps[LEVELS + 4 + chosen];
    float zz = 0.0f;
    TQ_UNROLL
    for (int e = 0; e < E; e += 2) {
      float middle[2];
      TQ_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float size = fabs(y[e + i]);
        const float slope = tq_slope<FINAL_TERMS>(fma(size, size, -centre), to_cell);
        if (V_BITS <= 4) {
          middle[i] = tq_cell<V_CELLS>(fma(size, slope, -0.5f / V_SPAN));
        } else {
          // The polynomial misses boundaries by a little: compare with the one that is nearest.
          const float outside = max(tq_cell<V_CELLS>(size * slope), 1.5f), inside = outside - 1.0f;
          const half2 w = as_type<half2>(tq_pack(inside, outside)) * tq_twice(1.0f / V_CELLS);
          const uint levels = tq_value_levels<V_BITS>(w, a_by_b, c_by_b);
          const float boundary = b * 0.5f * (float(tq_low(levels)) + float(tq_high(levels)));
          middle[i] = size * inverse > boundary ? outside : inside;
        }
        codes[e + i] = tq_code<V_CELLS>(middle[i], !(y[e + i] > 0.0f));
      }
      const half2 w = as_type<half2>(tq_pack(middle[0], middle[1])) * tq_twice(1.0f / V_CELLS);
      const uint levels = tq_value_levels<V_BITS>(w, a_by_b, c_by_b);
      const float first = float(tq_low(levels)), second = float(tq_high(levels));
      zz = fma(first, first, zz);
      zz = fma(second, second, zz);
    }
    zz = tq_sum_over<LANES>(zz);
    if (M != 1) {
      TQ_UNROLL
      for (int e = 0; e < E; ++e) exchange[vector + p + LANES * e] = uchar(codes[e]);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      TQ_UNROLL
      for (int e = 0; e < E; ++e) codes[e] = exchange[vector + p * E + e];
    }
    tq_store_plane<V_LOW, 0>(row + V_LOW_AT, codes, p, live);
    if (V_HIGH != 0) tq_store_plane<V_HIGH, V_LOW>(row + V_HIGH_AT, codes, p, live);
    scales |= tq_scale_bits(sqrt(square) * rsqrt(zz * D) * tq_inverse(b)) << 16;
  }
  if (live && p == 0) *(device uint*)(row + SCALES_AT) = scales;
