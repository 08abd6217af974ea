#include "decode_mma.h"
#include "centre.h"
  // Attention of a few query rows over compressed pages, with 8x8 matrix fragments.
  //
  // A threadgroup serves one KV head of one sequence over one split of its context; its columns are
  // N of the (query row, query head) pairs of that KV head, which share every key and value that is
  // unpacked. Each SIMD-group takes NB sub-blocks of 16 tokens at a time. A lane holds, of
  //   the keys:    tokens row and row + 8, and a quarter (quad) of the dimensions;
  //   the logits:  tokens row and row + 8, columns 2 quad and 2 quad + 1;
  //   the values:  tokens 2 quad, 2 quad + 1 and those + 8, and an eighth (row) of the dimensions.
  // The order of bytes is that of vllm_metal_tq/layout.py.
  //
  // queries [B, H, L, head_dim] T; pages uchar; block_table [B, max_blocks] int;
  // lengths [B, 3] int: tokens that are read from pages, tokens in all, shift; the L query rows are
  // the last of these tokens
  // signs [D] float, or [HKV, D] where CENTRE: divided by smoothing
  // shape int: H, HKV, L, head_dim, max_blocks, column groups, window (0: none)
  // numbers float: factor of the logits, softcap, sparse_v; b, a/b, c/b of the value levels, and of
  // those of trellis keys
  // means [HKV, D / 2, 2] float: mu of each pair; turns uint: elements and steps of the pairs, tables
  // (centre.h); both are not read where CENTRE is 0
  // partial [B, H, L, splits, D + 2 + CENTRE] float: sum of weight * value, then maximum (base 2) and
  // sum, and where CENTRE the sum of the weights of values whose mean was left out
  // Template: T, D, M, BS, planes KL, KH, VL, VH, taps KT, VT (trellis.h; 0: scalar codes), N, NSG,
  // NB, SOFTCAP, SPARSE, CENTRE, S (tokens of a window of centre.h).
  constexpr int KB = KL + KH;
  constexpr int VB = VL + VH;
  constexpr int KD = (D <= 64 || KL == 8) ? 16 : 32;        // key dimensions of a lane, per chunk
  constexpr int NKC = (D + 4 * KD - 1) / (4 * KD);          // chunks
  constexpr int KLB = KD * KL / 8;                          // bytes of a lane, token and chunk
  constexpr int KHN = KT ? KH : 1;                          // high planes
  constexpr int KHP = KH / KHN;                             // bits of each
  constexpr int KHB = KH > 0 ? KD * KHP / 8 : 4;
  constexpr int KHW = (KHB + 3) / 4;
  constexpr int NPAIR = NKC * KD / 2;                       // key pairs of a lane and token
  constexpr int VD = D <= 64 ? 8 : 16;                      // value dimensions of a lane, per unit
  constexpr int NU = (D + 127) / 128;                       // units
  constexpr int VLB = VD * VL / 2;                          // bytes of a lane and unit
  constexpr int VLN = (VLB + 15) / 16;                      // loads
  constexpr int VLS = VLB < 16 ? VLB : 16;                  // bytes of a load
  constexpr int VHN = VT ? VH : 1;
  constexpr int VHP = VH / VHN;
  constexpr int VHB = VH > 0 ? VD * VHP / 2 : 4;
  constexpr int VHW = (VHB + 3) / 4;
  constexpr int KTW = KD / 16;                              // words of a trellis plane: of two tokens,
  constexpr int VTW = VD / 8;                               // of two token pairs
  constexpr int SUB = 2 * D * (KB + VB);                    // bytes of a sub-block's codes
  constexpr int NSB = BS / 16;
  constexpr int PAGE = NSB * SUB + 4 * BS;
  constexpr int NT = NU * VD / 2;                           // tiles of 16 value dimensions
  constexpr float NEVER = -3e38f;                           // logit of a token that is not seen
  const int lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int row = TQ_ROW(lane);
  const int quad = TQ_QUAD(lane);
  const int row_bits[3] = TQ_ROW_BITS;

  const int H = shape[0];
  const int HKV = shape[1];
  const int L = shape[2];
  const int head_dim = shape[3];
  const int groups = shape[5];
  const int window = shape[6];
  const int G = H / HKV;
  const int seq = threadgroup_position_in_grid.z;
  const int kvh = threadgroup_position_in_grid.y / groups;
  const int first_column = threadgroup_position_in_grid.y % groups * N;
  const int columns = min(N, G * L - first_column);
  const int splits = threadgroups_per_grid.x;
  const int split = threadgroup_position_in_grid.x;

  // Row l is the token at position `rows_from` + l and sees `window` positions back, itself included.
  const int paged = lengths[3 * seq];
  const int rows_from = lengths[3 * seq + 1] - L;
  const int first_row = first_column / G;
  const int last_row = (first_column + columns - 1) / G;
  const int see_from = window > 0 ? rows_from + 1 - window : 0;
  const int end = min(paged, rows_from + last_row + 1);
  const int begin = max(window > 0 ? see_from + first_row : 0, 0);
  const int end_of_all = min(paged, rows_from + first_row + 1);
  const int begin_of_all = window > 0 ? see_from + last_row : 0;
  const int nsub = (end + 15) / 16;
  const int sub0 = min(begin / 16, nsub);  // a window may begin behind all pages
  const int ntile = (nsub - sub0 + NB - 1) / NB;
  // With centring each SIMD-group takes tiles in a row, else those of a threadgroup take turns.
  const int part = CENTRE ? split * NSG + sg : split;
  const int parts = CENTRE ? splits * NSG : splits;
  const int tile0 = part * ntile / parts + (CENTRE ? 0 : sg);
  const int tile1 = (part + 1) * ntile / parts;
  constexpr int STEP = CENTRE ? 1 : NSG;
  const uint zero = TQ_UNKNOWN_ZERO(paged);

  // Queries, later each SIMD-group's f, at last its sums; behind that A and B of the queries.
  constexpr int TOKENS = CENTRE ? tq_windows<N>() * S : 0;  // that f is computed of at a time
  constexpr int F = TOKENS * tq_columns<N>();
  constexpr int POOL = F > N * D ? F : N * D;  // of a SIMD-group
  threadgroup float4 shared4[(NSG * POOL + (CENTRE ? 8 * tq_stride<D>() : 0)) / 4];
  threadgroup float* shared = (threadgroup float*)shared4;
  threadgroup float shared_m[NSG][N];
  threadgroup float shared_l[NSG][N];
  threadgroup float shared_g[CENTRE ? NSG : 1][CENTRE ? N : 1];

  // Rotate the queries.
  for (int n = sg; n < N; n += NSG) {
    const int column = first_column + min(n, columns - 1);
    const size_t at = (size_t(seq * H + kvh * G + column % G) * L + column / G) * head_dim;
    float v[D / 32];
    TQ_UNROLL
    for (int e = 0; e < D / 32; ++e) {
      const int d = lane + 32 * e;
      v[e] = d < head_dim ? float(queries[at + d]) * signs[CENTRE ? kvh * D + d : d] : 0.0f;
    }
    tq_hadamard<D, M, false>(v, lane);
    const float norm = 1.0f / sqrt(float(D));
    TQ_UNROLL
    for (int e = 0; e < D / 32; ++e) shared[n * D + lane + 32 * e] = v[e] * norm;
  }
  if (CENTRE) {
    tq_centre_queries<T, D, S, tq_windows<N>(), 8 / tq_windows<N>()>(
        shared + NSG * POOL, queries + size_t(seq * H + kvh * G) * L * head_dim, means + kvh * D, turns,
        numbers[0], first_column, columns, G, L, head_dim, thread_index_in_threadgroup, NSG * 32);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Their fragments, and what corrects the logits for the offsets of the key pairs.
  uint2 qf[NPAIR / 2];
  TQ_UNROLL
  for (int p = 0; p < NPAIR; ++p) {
    float f[2];
    TQ_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int step = TQ_B_STEP(row, quad, e);
      const int n = TQ_B_COLUMN(row, quad, e);
      const int d = p / (KD / 2) * (4 * KD) + (step >> 1) * KD + p % (KD / 2) + (step & 1) * (KD / 2);
      f[e] = n < N && d < D ? shared[n * D + d] : 0.0f;
    }
    if (p % 2 == 0) qf[p / 2].x = tq_pack(f[0], f[1]);
    else qf[p / 2].y = tq_pack(f[0], f[1]);
  }
  const int n0 = min(2 * quad, N - 1);
  const int n1 = min(2 * quad + 1, N - 1);
  float offset0 = 0.0f, offset1 = 0.0f;
  for (int d = row; d < D; d += 8) {
    const float by = KT ? 0.0f : -tq_key_offset<KL, KH>(d % (KD / 2) % (16 / KL));
    offset0 = fma(float(half(shared[n0 * D + d])), by, offset0);
    offset1 = fma(float(half(shared[n1 * D + d])), by, offset1);
  }
  TQ_UNROLL
  for (int k = 0; k < 3; ++k) {
    offset0 += simd_shuffle_xor(offset0, ushort(row_bits[k]));
    offset1 += simd_shuffle_xor(offset1, ushort(row_bits[k]));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // What this lane's two columns see.
  const int row0 = (first_column + min(n0, columns - 1)) / G;
  const int row1 = (first_column + min(n1, columns - 1)) / G;
  const int end0 = min(paged, rows_from + row0 + 1);
  const int end1 = min(paged, rows_from + row1 + 1);
  const int begin0 = window > 0 ? see_from + row0 : 0;
  const int begin1 = window > 0 ? see_from + row1 : 0;

  const float level_b = numbers[3];
  const half2 level_a = as_type<half2>(tq_pack(numbers[4], numbers[4]));
  const half2 level_c = as_type<half2>(tq_pack(numbers[5], numbers[5]));
  const half2 key_level_a = as_type<half2>(KT ? tq_pack(numbers[7], numbers[7]) : 0u);
  const float factor = KT ? numbers[0] * numbers[6] : numbers[0];
  // The lanes that hold the elements before this one's; those before the first are the last.
  const ushort before_quad = ushort(TQ_LANE(row, (quad + 3) & 3));
  const ushort before_row = ushort(TQ_LANE((row + 7) & 7, quad));
  float4 acc[NT];
  TQ_UNROLL
  for (int j = 0; j < NT; ++j) {
    acc[j].x = 0.0f;
    acc[j].y = 0.0f;
    acc[j].z = 0.0f;
    acc[j].w = 0.0f;
  }
  float m0 = -1e30f, m1 = -1e30f, l0 = 0.0f, l1 = 0.0f;
  float g0 = 0.0f, g1 = 0.0f;
  // f of this lane's tokens and columns lies in shared from `place` + `passed` on.
  constexpr int NC = tq_columns<N>();
  const int place = sg * POOL + row * NC + (N > 1 ? min(2 * quad, NC - 2) : 0);
  const uint shift = CENTRE ? uint(lengths[3 * seq + 2]) : 0u;
  int passed = F;

  // Pages of this KV head; offsets are sums of what a lane and what the text decides, in this order,
  // so that the latter end up in the loads.
  const device uchar* own = pages + size_t(kvh) * PAGE;
  const uint stride = uint(HKV) * PAGE;
  int blocks[NB];
  TQ_UNROLL
  for (int b = 0; b < NB; ++b) {
    const int sub = min(sub0 + tile0 * NB + b, max(nsub - 1, 0));
    blocks[b] = block_table[seq * shape[4] + sub / NSB];
  }
  TQ_NO_UNROLL
  for (int tile = tile0; tile < tile1; tile += STEP) {
    if (CENTRE) {
      if (passed == F) {
        tq_centre_mma<D, N, S>(shared + sg * POOL, shared + NSG * POOL, turns + D, shift + uint((sub0 + tile * NB) * 16), lane);
        passed = 0;
      }
    }
    // Load. Lanes without dimensions take the last ones, which a trellis needs before the first.
    uint kl[NB][NKC][2][(KLB + 3) / 4];
    uint kh[NB][NKC][KHN][2][KHW];
    uint vl[NB][NU][VLN][(VLS + 3) / 4];
    uint vh[NB][NU][VHN][VHW];
    uint scales[NB][2];
    TQ_UNROLL
    for (int b = 0; b < NB; ++b) {
      const int sub = min(sub0 + tile * NB + b, nsub - 1);
      const device uchar* page = own + size_t(uint(blocks[b])) * stride;
      const device uchar* base = page + sub % NSB * SUB;
      TQ_UNROLL
      for (int c = 0; c < NKC; ++c) {
        constexpr int PER = 128 / (4 * KD);  // chunks of a unit
        const int unit = c / PER;
        const int dims = min(128, D - 128 * unit);
        const bool there = c % PER * 4 + quad < dims / KD;
        const int mine = there ? c % PER * 4 + quad : dims / KD - 1;
        const device uchar* low = base + row * (dims * KL / 8) + mine * KLB;
        const device uchar* high = base + row * (dims * KHP / 8) + mine * KHB;
        TQ_UNROLL
        for (int t = 0; t < 2; ++t) {
          tq_load<KLB>(kl[b][c][t], low + (unit * 256 * KL + t * dims * KL));
          TQ_UNROLL
          for (int i = 0; i < KHN; ++i) {
            if (KH > 0) tq_load<KHB>(kh[b][c][i][t], high + (2 * D * (KL + i * KHP) + unit * 256 * KHP + t * dims * KHP));
            else kh[b][c][i][t][0] = 0;
          }
        }
      }
      TQ_UNROLL
      for (int u = 0; u < NU; ++u) {
        const int rows = min(128, D - 128 * u) / VD;
        const int mine = (row < rows ? row : rows - 1) * 4 + quad;
        const device uchar* low = base + mine * VLS;
        const device uchar* high = base + mine * VHB;
        TQ_UNROLL
        for (int i = 0; i < VLN; ++i) tq_load<VLS>(vl[b][u][i], low + (2 * D * KB + u * 256 * VL + i * rows * 4 * VLS));
        TQ_UNROLL
        for (int i = 0; i < VHN; ++i) {
          if (VH > 0) tq_load<VHB>(vh[b][u][i], high + (2 * D * (KB + VL + i * VHP) + u * 256 * VHP));
          else vh[b][u][i][0] = 0;
        }
      }
      const device uchar* mine = page + (sub % NSB * 16 + row) * 4;
      TQ_UNROLL
      for (int t = 0; t < 2; ++t) scales[b][t] = tq_load1(mine + (NSB * SUB + t * 32));
    }

    TQ_UNROLL
    for (int b = 0; b < NB; ++b) {
      blocks[b] = block_table[seq * shape[4] + min(sub0 + (tile + STEP) * NB + b, nsub - 1) / NSB];
    }

    // Logits.
    float4 s[NB];
    TQ_UNROLL
    for (int b = 0; b < NB; ++b) {
      s[b].x = offset0;
      s[b].y = offset1;
      s[b].z = offset0;
      s[b].w = offset1;
    }
    if (KT) {
      TQ_UNROLL
      for (int b = 0; b < NB; ++b) {
        TQ_UNROLL
        for (int c = 0; c < NKC; ++c) {
          uint number[KTW][4];
          TQ_UNROLL
          for (int t = 0; t < KTW; ++t) {
            const uint mine = tq_tokens<KTW>(kl[b][c], t);
            const uint wrapped = tq_tokens<KTW>(kl[b][(c + NKC - 1) % NKC], t);
            const uint before = simd_shuffle(quad == 3 ? wrapped : mine, before_quad);
            const uint u = tq_tokens<KTW>(kh[b][c][0], t);
            if (KTW == 2) tq_numbers<KT, 32>(number[t], mine, before, u);
            else tq_numbers<KT, 8>(number[t], mine, before >> 16 | mine << 16, u);
          }
          TQ_UNROLL
          for (int j = 0; j < KD / 2; j += 2) {
            uint a[2][2];
            TQ_UNROLL
            for (int i = 0; i < 2; ++i) {
              TQ_UNROLL
              for (int t = 0; t < 2; ++t) {
                const uint fifth = tq_tokens<KTW>(kh[b][c][KHN - 1], t % KTW);
                a[i][t] = tq_trellis_pair<KH == 2>(number[t % KTW], fifth, t / KTW * 8 + j + i, zero, key_level_a);
              }
            }
            tq_matrix(s[b], a[0][0], a[0][1], a[1][0], a[1][1], qf[(c * (KD / 2) + j) / 2]);
          }
        }
      }
    } else {
      TQ_UNROLL
      for (int p = 0; p < NPAIR; p += 2) {
        TQ_UNROLL
        for (int b = 0; b < NB; ++b) {
          uint a[2][2];
          TQ_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int c = (p + i) / (KD / 2);
            const int j = (p + i) % (KD / 2);
            TQ_UNROLL
            for (int t = 0; t < 2; ++t) {
              a[i][t] = tq_pair<KL, KH, 0>(kl[b][c][t][j * KL / 16], j % (16 / KL),
                                           kh[b][c][0][t][j * KH / 16 % KHW], j * KH % 16, zero);
            }
          }
          tq_matrix(s[b], a[0][0], a[0][1], a[1][0], a[1][1], qf[p / 2]);
        }
      }
    }
    TQ_UNROLL
    for (int b = 0; b < NB; ++b) {
      const float scale0 = float(tq_low(scales[b][0])), scale1 = float(tq_low(scales[b][1]));
      const float k0 = (CENTRE ? abs(scale0) : scale0) * factor;
      const float k1 = (CENTRE ? abs(scale1) : scale1) * factor;
      if (CENTRE) {
        float2 f0, f1;
        f0.x = f0.y = f1.x = f1.y = 0.0f;
        const threadgroup float* f = shared + place + passed + 16 * b * NC;
        if (scales[b][0] & 0x8000u) f0 = tq_two<N>(f);
        if (scales[b][1] & 0x8000u) f1 = tq_two<N>(f + 8 * NC);
        s[b].x = fma(s[b].x, k0, f0.x);
        s[b].y = fma(s[b].y, k0, f0.y);
        s[b].z = fma(s[b].z, k1, f1.x);
        s[b].w = fma(s[b].w, k1, f1.y);
      } else {
        s[b].x *= k0;
        s[b].y *= k0;
        s[b].z *= k1;
        s[b].w *= k1;
      }
      if (SOFTCAP) {
        s[b].x = tq_softcap(s[b].x, numbers[1]);
        s[b].y = tq_softcap(s[b].y, numbers[1]);
        s[b].z = tq_softcap(s[b].z, numbers[1]);
        s[b].w = tq_softcap(s[b].w, numbers[1]);
      }
    }
    if (CENTRE) passed += 16 * NB * NC;
    const int token = (sub0 + tile * NB) * 16;
    if (token < begin_of_all || token + NB * 16 > end_of_all) {
      TQ_UNROLL
      for (int b = 0; b < NB; ++b) {
        const int t = token + b * 16 + row;
        if (t < begin0 || t >= end0) s[b].x = NEVER;
        if (t < begin1 || t >= end1) s[b].y = NEVER;
        if (t + 8 < begin0 || t + 8 >= end0) s[b].z = NEVER;
        if (t + 8 < begin1 || t + 8 >= end1) s[b].w = NEVER;
        // Bytes that no token has written may be any number, so their scales are not used.
        if (t >= paged) scales[b][0] = 0;
        if (t + 8 >= paged) scales[b][1] = 0;
      }
    }

    // Lazy maximum: rescale only when a logit exceeds it by more than 6, a factor of 64, or at once
    // where a value's scale is at least 1024: a half would not hold 64 times as much.
    float top0 = NEVER, top1 = NEVER;
    float largest = 0.0f;
    TQ_UNROLL
    for (int b = 0; b < NB; ++b) {
      top0 = max(top0, max(s[b].x, s[b].z));
      top1 = max(top1, max(s[b].y, s[b].w));
      largest = max(largest, max(abs(float(tq_high(scales[b][0]))), abs(float(tq_high(scales[b][1])))));
    }
    const float room = largest < 1024.0f ? 6.0f : 0.0f;
    if (simd_any(top0 > m0 + room || top1 > m1 + room)) {
      TQ_UNROLL
      for (int k = 0; k < 3; ++k) {
        top0 = max(top0, simd_shuffle_xor(top0, ushort(row_bits[k])));
        top1 = max(top1, simd_shuffle_xor(top1, ushort(row_bits[k])));
      }
      top0 = max(top0, m0);
      top1 = max(top1, m1);
      const float r0 = fast::exp2(m0 - top0), r1 = fast::exp2(m1 - top1);
      m0 = top0;
      m1 = top1;
      l0 *= r0;
      l1 *= r1;
      g0 *= r0;
      g1 *= r1;
      TQ_UNROLL
      for (int j = 0; j < NT; ++j) {
        acc[j].x *= r0;
        acc[j].y *= r1;
        acc[j].z *= r0;
        acc[j].w *= r1;
      }
    }

    // Have the next sub-blocks on their way while this one's values are weighed.
    TQ_UNROLL
    for (int b = 0; b < NB; ++b) {
      const int sub = min(sub0 + (tile + STEP) * NB + b, nsub - 1);
      const device uchar* page = own + size_t(uint(blocks[b])) * stride;
      if (lane == 0) {
        tq_prefetch(page + sub % NSB * SUB, SUB);
        tq_prefetch(page + NSB * SUB + sub % NSB * 64, 64);
      }
    }

    // Weights, and their products with the values.
    TQ_UNROLL
    for (int b = 0; b < NB; ++b) {
      float4 w;
      w.x = fast::exp2(s[b].x - m0);
      w.y = fast::exp2(s[b].y - m1);
      w.z = fast::exp2(s[b].z - m0);
      w.w = fast::exp2(s[b].w - m1);
      l0 += w.x + w.z;
      l1 += w.y + w.w;
      if (CENTRE) {
        if (int(scales[b][0]) < 0) g0 += w.x, g1 += w.y;
        if (int(scales[b][1]) < 0) g0 += w.z, g1 += w.w;
      }
      if (SPARSE && !simd_any(max(max(w.x, w.y), max(w.z, w.w)) >= numbers[2])) continue;
      const float scale0 = float(tq_high(scales[b][0])), scale1 = float(tq_high(scales[b][1]));
      const float v0 = CENTRE ? abs(scale0) : scale0;
      const float v1 = CENTRE ? abs(scale1) : scale1;
      uint2 weights;
      weights.x = tq_as_b(tq_pack(w.x * v0, w.y * v0));
      weights.y = tq_as_b(tq_pack(w.z * v1, w.w * v1));
      if (VT) {
        TQ_UNROLL
        for (int u = 0; u < NU; ++u) {
          uint number[VTW][4];
          TQ_UNROLL
          for (int p = 0; p < VTW; ++p) {
            const uint mine = vl[b][u][0][p];
            const uint wrapped = vl[b][(u + NU - 1) % NU][0][p];
            const uint before = simd_shuffle(row == 7 ? wrapped : mine, before_row);
            tq_numbers<VT, VD>(number[p], mine, before, vh[b][u][0][p % VHW]);
          }
          TQ_UNROLL
          for (int j = 0; j < VD; j += 2) {
            uint a[2][2];
            TQ_UNROLL
            for (int i = 0; i < 2; ++i) {
              TQ_UNROLL
              for (int p = 0; p < 2; ++p) {
                const uint fifth = vh[b][u][VHN - 1][p % VTW % VHW];
                a[p][i] = tq_trellis_pair<VH == 2>(number[p % VTW], fifth, p / VTW * 8 + j + i, zero, level_a);
              }
            }
            tq_matrix(acc[u * (VD / 2) + j / 2], a[0][0], a[0][1], a[1][0], a[1][1], weights);
          }
        }
      } else {
        TQ_UNROLL
        for (int u = 0; u < NU; ++u) {
          TQ_UNROLL
          for (int j = 0; j < VD; j += 2) {
            uint a[2][2];
            TQ_UNROLL
            for (int i = 0; i < 2; ++i) {
              TQ_UNROLL
              for (int p = 0; p < 2; ++p) {
                const int word = (p * VD + j + i) * VL / 16;
                const int bit = VD * VH == 8 ? p * 8 + j + i : (j + i) * VH % 16;
                const int high = VD * VH == 8 ? 0 : (p * VD + j + i) * VH / 16 % VHW;
                a[p][i] = tq_value_pair<VL, VH>(vl[b][u][word / 4][word % 4], (j + i) % (16 / VL),
                                                vh[b][u][0][high], bit, zero, level_a, level_c);
              }
            }
            tq_matrix(acc[u * (VD / 2) + j / 2], a[0][0], a[0][1], a[1][0], a[1][1], weights);
          }
        }
      }
    }
  }

  // Merge the SIMD-groups.
  TQ_UNROLL
  for (int k = 0; k < 3; ++k) {
    l0 += simd_shuffle_xor(l0, ushort(row_bits[k]));
    l1 += simd_shuffle_xor(l1, ushort(row_bits[k]));
    if (CENTRE) {
      g0 += simd_shuffle_xor(g0, ushort(row_bits[k]));
      g1 += simd_shuffle_xor(g1, ushort(row_bits[k]));
    }
  }
  if (CENTRE) simdgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int n = 2 * quad + e;
    if (n < N) {
      if (row == 0) {
        shared_m[sg][n] = e == 0 ? m0 : m1;
        shared_l[sg][n] = e == 0 ? l0 : l1;
        if (CENTRE) shared_g[CENTRE ? sg : 0][CENTRE ? n : 0] = e == 0 ? g0 : g1;
      }
      TQ_UNROLL
      for (int j = 0; j < NT; ++j) {
        const int d = j / (VD / 2) * 128 + row * VD + j % (VD / 2) * 2;
        if (d < D) {
          shared[sg * POOL + n * D + d] = e == 0 ? acc[j].x : acc[j].y;
          shared[sg * POOL + n * D + d + 1] = e == 0 ? acc[j].z : acc[j].w;
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index_in_threadgroup; i < columns * D; i += NSG * 32) {
    const int n = i / D;
    const int d = i % D;
    const int column = first_column + n;
    float top = -1e30f;
    for (int j = 0; j < NSG; ++j) top = max(top, shared_m[j][n]);
    float sum = 0.0f, weights = 0.0f, flagged = 0.0f;
    for (int j = 0; j < NSG; ++j) {
      const float r = fast::exp2(shared_m[j][n] - top);
      weights = fma(shared_l[j][n], r, weights);
      if (CENTRE) flagged = fma(shared_g[CENTRE ? j : 0][CENTRE ? n : 0], r, flagged);
      sum = fma(shared[j * POOL + n * D + d], r, sum);
    }
    const size_t out = ((size_t(seq * H + kvh * G + column % G) * L + column / G) * splits + split) * (D + 2 + CENTRE);
    partial[out + d] = sum * level_b;
    if (d == 0) {
      partial[out + D] = top;
      partial[out + D + 1] = weights;
      if (CENTRE) partial[out + D + 2] = flagged;
    }
  }
