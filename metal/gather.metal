#include "gather.h"
  // Decodes the pages of a sequence. A thread makes eight elements of one key or one value:
  // grid (slots * D / 8 in threadgroups of THREADS, KV heads, keys or values).
  //
  // pages        uint8 (blocks, KV heads, PAGE)
  // block_table  int32 (blocks of the sequence)
  // num_tokens   int32 (2): tokens, and slots of each head in what is written
  // offsets      uint32 (BLOCK, ROW): where in its page each byte of a row lies
  // levels       float (K_LEVELS + those of values): of keys, then of values
  // keys, values T (KV heads, slots, D); zeros beyond the tokens
  const bool of_value = threadgroup_position_in_grid.z == 1;
  const int heads = threadgroups_per_grid.y;
  const int head = threadgroup_position_in_grid.y;
  const int work = int(threadgroup_position_in_grid.x) * THREADS + int(thread_index_in_threadgroup);
  const int token = work / (D / 8);
  const int d = work % (D / 8) * 8;
  if (token >= num_tokens[1]) return;
  device T* slot = (of_value ? values : keys) + (size_t(head) * num_tokens[1] + token) * D + d;
  float x[8] = {};
  if (token >= num_tokens[0]) {
    tq_store8(slot, x);
    return;
  }

  const size_t page_number = size_t(block_table[token / BLOCK]) * heads + head;
  const device uchar* page = pages + page_number * PAGE;
  const device uint* row = offsets + token % BLOCK * ROW;
  uint numbers[8];
  if (of_value) tq_eight_numbers<V_LOW, V_HIGH, V_TAPS, D>(numbers, page, row + V_LOW_AT, row + V_HIGH_AT, d);
  else tq_eight_numbers<K_LOW, K_HIGH, K_TAPS, D>(numbers, page, row + K_LOW_AT, row + K_HIGH_AT, d);
  // The sign is a flag, see vllm_metal_tq/centre.py.
  const float scale = fabs(float(tq_low(tq_load_half(page + row[SCALES_AT + (of_value ? 2 : 0)]))));
  constexpr int K_LEVELS = 1 << (K_LOW + K_HIGH + (K_TAPS ? 2 : 0));
  const int first_level = of_value ? K_LEVELS : 0;
  TQ_UNROLL
  for (int e = 0; e < 8; ++e) x[e] = scale * levels[first_level + int(numbers[e])];
  tq_store8(slot, x);
