#include "attention.h"
  // Merge the splits of decode, add the tokens that are not in pages yet, rotate back.
  // One threadgroup a query row and head: (head of its KV head and row, KV head, sequence).
  //
  // partial: as decode writes it; queries [B, H, L, head_dim] T; lengths [B, 3] int: tokens that are
  // read from pages, tokens in all, shift; tail_keys, tail_values [B, HKV, TAIL, head_dim] T: the
  // tokens between, as the model made them, token i in slot i % TAIL; sinks [H] float: logits;
  // signs [D] float; value_mean [HKV, head_dim] float, not read where CENTRE is 0; shape int: L,
  // head_dim, splits, window (0: none)
  // numbers float: factor of the logits, softcap
  // attended [B, H, L, head_dim] T
  // Template: T, D, M, NSG, TAIL (slots; 0: no tail), SINKS, SOFTCAP, CENTRE.
  constexpr int E = D / 32;
  constexpr int AT_ONCE = 4;  // splits of a SIMD-group
  const int lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int L = shape[0];
  const int head_dim = shape[1];
  const int splits = shape[2];
  const int window = shape[3];
  // No division but where it is needed: what waits for one comes late.
  const int kvh = threadgroup_position_in_grid.y;
  const int own = threadgroup_position_in_grid.x;  // row l of a head of this KV head
  const int kv = threadgroup_position_in_grid.z * threadgroups_per_grid.y + kvh;
  const int row = kv * threadgroups_per_grid.x + own;  // (seq * H + head) * L + l
  const int seq = threadgroup_position_in_grid.z;

  threadgroup float sums[NSG][D];
  threadgroup float tail_sums[NSG][D];
  threadgroup float split_ms[NSG];
  threadgroup float split_ls[NSG];
  threadgroup float split_gs[NSG];
  threadgroup float tail_m[NSG];
  threadgroup float tail_l[NSG];

  // What is used last is asked for first.
  float own_signs[E], own_mean[E];
  TQ_UNROLL
  for (int e = 0; e < E; ++e) {
    own_signs[e] = signs[lane + 32 * e];
    own_mean[e] = CENTRE ? value_mean[kvh * head_dim + min(lane + 32 * e, head_dim - 1)] : 0.0f;
  }

  // This SIMD-group's share of the splits, a few at a time, whose loads are under way together.
  float m = -1e30f, l = 0.0f, g = 0.0f;
  float v[E];
  TQ_UNROLL
  for (int e = 0; e < E; ++e) v[e] = 0.0f;
  TQ_NO_UNROLL
  for (int first = sg; first < splits; first += AT_ONCE * NSG) {
    float ms[AT_ONCE], ls[AT_ONCE], gs[AT_ONCE], vs[AT_ONCE][E];
    TQ_UNROLL
    for (int i = 0; i < AT_ONCE; ++i) {
      const int s = first + i * NSG;
      const size_t at = (size_t(row) * splits + min(s, splits - 1)) * (D + 2 + CENTRE);
      ms[i] = s < splits ? partial[at + D] : -1e30f;
      ls[i] = partial[at + D + 1];
      gs[i] = CENTRE ? partial[at + D + 2] : 0.0f;
      TQ_UNROLL
      for (int e = 0; e < E; ++e) vs[i][e] = partial[at + lane + 32 * e];
    }
    float higher = m;
    TQ_UNROLL
    for (int i = 0; i < AT_ONCE; ++i) higher = max(higher, ms[i]);
    const float r = fast::exp2(m - higher);
    m = higher;
    l *= r;
    g *= r;
    TQ_UNROLL
    for (int e = 0; e < E; ++e) v[e] *= r;
    TQ_UNROLL
    for (int i = 0; i < AT_ONCE; ++i) {
      const float w = fast::exp2(ms[i] - higher);
      l = fma(w, ls[i], l);
      g = fma(w, gs[i], g);
      TQ_UNROLL
      for (int e = 0; e < E; ++e) v[e] = fma(w, vs[i][e], v[e]);
    }
  }
  TQ_UNROLL
  for (int e = 0; e < E; ++e) sums[sg][lane + 32 * e] = v[e];
  if (lane == 0) {
    split_ms[sg] = m;
    split_ls[sg] = l;
    if (CENTRE) split_gs[sg] = g;
  }

  if (TAIL > 0) {
    const int paged = lengths[3 * seq];
    const int position = lengths[3 * seq + 1] - L + own % L;
    const int first = window > 0 ? max(position + 1 - window, paged) : paged;
    const int ring = kv * TAIL;
    float top = -1e30f, weights = 0.0f;
    TQ_UNROLL
    for (int e = 0; e < E; ++e) v[e] = 0.0f;
    for (int t = first + sg; t <= position; t += NSG) {
      const size_t at = size_t(ring + t % (TAIL > 0 ? TAIL : 1)) * head_dim;
      float dot = 0.0f;
      for (int d = lane; d < head_dim; d += 32) {
        dot = fma(float(queries[size_t(row) * head_dim + d]), float(tail_keys[at + d]), dot);
      }
      TQ_UNROLL
      for (int k = 1; k < 32; k *= 2) dot += simd_shuffle_xor(dot, ushort(k));
      dot *= numbers[0];
      if (SOFTCAP) dot = tq_softcap(dot, numbers[1]);
      const float higher = max(top, dot);
      const float r = fast::exp2(top - higher), w = fast::exp2(dot - higher);
      top = higher;
      weights = fma(weights, r, w);
      TQ_UNROLL
      for (int e = 0; e < E; ++e) {
        const int d = lane + 32 * e;
        v[e] = fma(v[e], r, d < head_dim ? w * float(tail_values[at + d]) : 0.0f);
      }
    }
    TQ_UNROLL
    for (int e = 0; e < E; ++e) tail_sums[sg][lane + 32 * e] = v[e];
    if (lane == 0) {
      tail_m[sg] = top;
      tail_l[sg] = weights;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (sg == 0) {
    const int head = SINKS ? (kvh * int(threadgroups_per_grid.x) + own) / L : 0;
    float top = SINKS ? sinks[head] * 1.44269504f : -1e30f;
    for (int j = 0; j < NSG; ++j) top = max(top, split_ms[j]);
    if (TAIL > 0) {
      for (int j = 0; j < NSG; ++j) top = max(top, tail_m[j]);
    }
    float total = SINKS ? fast::exp2(sinks[head] * 1.44269504f - top) : 0.0f;
    if (TAIL > 0) {
      for (int j = 0; j < NSG; ++j) total = fma(tail_l[j], fast::exp2(tail_m[j] - top), total);
    }
    TQ_UNROLL
    for (int e = 0; e < E; ++e) v[e] = 0.0f;
    float flagged = 0.0f;
    for (int j = 0; j < NSG; ++j) {
      const float w = fast::exp2(split_ms[j] - top);
      total = fma(split_ls[j], w, total);
      if (CENTRE) flagged = fma(split_gs[j], w, flagged);
      TQ_UNROLL
      for (int e = 0; e < E; ++e) v[e] = fma(sums[j][lane + 32 * e], w, v[e]);
    }
    tq_hadamard<D, M, true>(v, lane);
    const float norm = 1.0f / sqrt(float(D));
    const float per_total = total > 0.0f ? 1.0f / total : 0.0f;
    TQ_UNROLL
    for (int e = 0; e < E; ++e) {
      const int d = lane + 32 * e;
      float x = v[e] * norm * own_signs[e];
      if (CENTRE) x = fma(flagged, own_mean[e], x);
      if (TAIL > 0) {
        for (int j = 0; j < NSG; ++j) x = fma(tail_sums[j][d], fast::exp2(tail_m[j] - top), x);
      }
      if (d < head_dim) attended[size_t(row) * head_dim + d] = T(x * per_total);
    }
  }
