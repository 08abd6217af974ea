#include "decode_fma.h"
#include "centre.h"
  // Attention of a few query rows over compressed pages, with plain float32 arithmetic.
  //
  // The same work as decode_mma.metal, with its inputs, outputs and template constants, for GPUs
  // whose matrix instructions do not pay: N is the number of columns that are served in one pass,
  // NB is not used, and one more constant is TURNED, see centre.h. A SIMD-group takes a sub-block of
  // 16 tokens at a time. A lane holds, of
  //   the keys:    tokens group, group + 4, + 8 and + 12, and an eighth (eighth) of the dimensions;
  //   the logits:  one of these tokens, and every other column (odd says which);
  //   the values:  8 dimensions (value_row, value_half), of the tokens of every VQ-th quad.
  // A quad q is, as there, the tokens 2 q, 2 q + 1 and those + 8. Weights go from the lanes of the
  // logits to those of the values through threadgroup memory. Trellis codes: see decode_fma.h.
  constexpr int KB = KL + KH;
  constexpr int VB = VL + VH;
  constexpr int KE = D <= 64 ? 8 : 16;                      // a lane's key dimensions of a chunk
  constexpr int KD = KT ? KE : D <= 64 || KL == 8 ? 16 : 32;  // those that lie together
  constexpr int KSPLIT = KD / KE;                           // lanes that share them
  constexpr int NKC = (D + 8 * KE - 1) / (8 * KE);          // chunks
  constexpr int KLB = KD * KL / 8;                          // bytes that lie together
  constexpr int KLS = KLB > 4 ? KLB / KSPLIT : KLB;         // bytes that a lane loads of these
  constexpr int KHB = KH > 0 ? KD * KH / 8 : 4;
  constexpr int KHS = KHB > 4 ? KHB / KSPLIT : KHB;
  constexpr int VD = D <= 64 ? 8 : 16;                      // value dimensions that lie together
  constexpr int VE = 8;                                     // of these a lane's
  constexpr int VSPLIT = VD / VE;                           // lanes that share them
  constexpr int VROWS = D / VD;                             // rows of VD dimensions
  constexpr int VQ = VROWS * VSPLIT <= 8 ? 4 : VROWS * VSPLIT <= 16 ? 2 : 1;
  constexpr int NQ = 4 / VQ;                                // quads of a lane
  constexpr int VLW = VD * VL / 16;                         // words of a token pair
  constexpr int VLS = VD * VL / 2 < 16 ? VD * VL / 2 : 16;  // bytes of a load in decode_mma
  constexpr int VLE = VT ? 1 : VE * VL / 16;                // words of a token pair that are a lane's
  constexpr int VHB = VH > 0 ? VD * VH / 2 : 4;             // bytes of a row and quad
  constexpr int VHP = VD * VH == 8 ? 1 : 2;                 // words of a lane, row and quad
  constexpr int SUB = 2 * D * (KB + VB);                    // bytes of a sub-block's codes
  constexpr int NSB = BS / 16;
  constexpr int PAGE = NSB * SUB + 4 * BS;
  constexpr int NH = (N + 1) / 2;                           // columns of a lane's logits
  constexpr int NW = N == 1 ? 1 : 2 * NH;                   // columns of the weights in memory
  constexpr float NEVER = -3e38f;                           // logit of a token that is not seen
  const int lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int eighth = lane & 7;
  const int group = lane >> 3;
  const int odd = eighth >> 2;
  const int token_of_lane = (eighth & 3) * 4 + group;
  const int token_bits[4] = {1, 2, 8, 16};  // lane masks that step through the tokens of the logits

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
  const int first_sub = min(begin / 16, (end + 15) / 16);  // a window may begin behind all pages
  const int nsub = (end + 15) / 16 - first_sub;
  // With centring each SIMD-group takes sub-blocks in a row, else those of a threadgroup take turns.
  const int part = CENTRE ? split * NSG + sg : split;
  const int parts = CENTRE ? splits * NSG : splits;
  const int sub0 = first_sub + part * nsub / parts + (CENTRE ? 0 : sg);
  const int sub1 = first_sub + (part + 1) * nsub / parts;
  constexpr int STEP = CENTRE ? 1 : NSG;
  const uint zero = TQ_UNKNOWN_ZERO(paged);

  // Queries, later each SIMD-group's weights and behind them its f, at last its sums; behind all that
  // A and B of the queries.
  constexpr int COEFFICIENTS = 2 * N * (D / 2 + 4);
  constexpr int F = CENTRE ? 16 * NW + (S * N > COEFFICIENTS ? S * N : COEFFICIENTS) : 0;
  constexpr int POOL = F > N * D ? (F + 3) / 4 * 4 : N * D;  // of a SIMD-group
  threadgroup float4 shared4[(NSG * POOL + (CENTRE ? N * tq_stride<D>() : 0)) / 4];
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
    tq_centre_queries<T, D, S, 1, N>(
        shared + NSG * POOL, queries + size_t(seq * H + kvh * G) * L * head_dim, means + kvh * D, turns,
        numbers[0], first_column, columns, G, L, head_dim, thread_index_in_threadgroup, NSG * 32);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // This lane's share of them, and what corrects its logits for the offsets of the key pairs.
  TQ_QUERY q[N][NKC][KE];
  float offset[NH];
  {
    float sum[N];
    TQ_UNROLL
    for (int n = 0; n < N; ++n) {
      sum[n] = 0.0f;
      TQ_UNROLL
      for (int c = 0; c < NKC; ++c) {
        TQ_UNROLL
        for (int e = 0; e < KE; ++e) {
          const int j = e % (KE / 2);
          const int d = c * (8 * KE) + eighth / KSPLIT * KD + e / (KE / 2) * (KD / 2) + eighth % KSPLIT * (KE / 2) + j;
          q[n][c][e] = TQ_QUERY(d < D ? shared[n * D + (d < D ? d : 0)] : 0.0f);
          const float by = KT ? 0.0f : -tq_key_offset<KL, KH>(j % (16 / KL));
          sum[n] = fma(float(q[n][c][e]), by, sum[n]);
        }
      }
      TQ_UNROLL
      for (int k = 1; k < 8; k *= 2) sum[n] += simd_shuffle_xor(sum[n], ushort(k));
    }
    TQ_UNROLL
    for (int h = 0; h < NH; ++h) offset[h] = odd ? sum[2 * h + 1 < N ? 2 * h + 1 : 2 * h] : sum[2 * h];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Where this lane's values lie in a sub-block. Lanes without a row do as those of row 0 do.
  const int value_half = lane % VSPLIT;
  const int value_quad = lane / VSPLIT % VQ;
  const int value_row = lane / (VSPLIT * VQ);
  const int row = value_row < VROWS ? value_row : 0;
  const int unit = row / (128 / VD);
  const int load_bytes = min(128, D - 128 * unit) / VD * 4 * VLS;  // from a load to the next one
  const int place = row % (128 / VD) * 4 + value_quad;
  const int low_at = 2 * D * KB + unit * 256 * VL + place * VLS + value_half * (VLW == 8 ? load_bytes : VLE * 4);
  const int low_pair = VLW >= 4 ? VLW / 4 * load_bytes : VLW * 4;
  const int high_at = 2 * D * (KB + VL) + unit * 256 * VH + place * VHB + (VH == 2 ? value_half * 4 : 0);

  const float level_b = numbers[3];
  const half2 level_a = as_type<half2>(tq_pack(numbers[4], numbers[4]));
  const half2 level_c = as_type<half2>(tq_pack(numbers[5], numbers[5]));
  const half2 key_level_a = as_type<half2>(KT ? tq_pack(numbers[7], numbers[7]) : 0u);
  const float factor = KT ? numbers[0] * numbers[6] : numbers[0];
  float acc[N][VE];
  float m[NH], l[NH], g[NH];
  threadgroup float* f = shared + (CENTRE ? sg * POOL + 16 * NW : 0);
  const uint shift = CENTRE ? uint(lengths[3 * seq + 2]) : 0u;
  int ready = 0;  // tokens that f is known of
  TQ_UNROLL
  for (int n = 0; n < N; ++n) {
    TQ_UNROLL
    for (int e = 0; e < VE; ++e) acc[n][e] = 0.0f;
  }
  TQ_UNROLL
  for (int h = 0; h < NH; ++h) {
    m[h] = -1e30f;
    l[h] = 0.0f;
    g[h] = 0.0f;
  }

  int block = block_table[seq * shape[4] + min(sub0, max(sub1 - 1, 0)) / NSB];
  TQ_NO_UNROLL
  for (int sub = sub0; sub < sub1; sub += STEP) {
    if (CENTRE) {
      if (ready == 0) {
        tq_centre_fma<D, N, S, TURNED>(f, shared + NSG * POOL, turns + D, shift + uint(sub * 16), lane);
        ready = S;
      }
    }
    // Load.
    const device uchar* page = pages + (size_t(block) * HKV + kvh) * size_t(PAGE);
    const device uchar* base = page + sub % NSB * SUB;
    uint kl[4][NKC][(KLS + 3) / 4];
    uint kh[4][NKC][(KHS + 3) / 4];
    uint kt[NKC][KE / 8][4];
    // KT ? KB : 1, and so of values: scalar codes compile it too, though they do not run it.
    if (KT) {
      TQ_UNROLL
      for (int c = 0; c < NKC; ++c) {
        const int d = c * (8 * KE) + eighth * KE;
        tq_key_bits<D, KE, KT ? KB : 1>(kt[c], base, group, d < D ? d : 0);
      }
    } else {
      TQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        TQ_UNROLL
        for (int c = 0; c < NKC; ++c) {
          const int dims = min(128, D - 128 * c);
          const int part = eighth % KSPLIT;
          const int from = eighth / KSPLIT * KD;
          const int at = (group + 4 * i) * dims + (from < dims ? from : 0);
          // Where the lanes that share KD dimensions load the same word, the second one shifts.
          tq_load<KLS>(kl[i][c], base + c * 256 * KL + at * KL / 8 + (KLB > 4 ? part * KLS : 0));
          if (KLB <= 4 && KSPLIT > 1) kl[i][c][0] >>= part * (KE / 2 * KL);
          if (KH > 0) {
            tq_load<KHS>(kh[i][c], base + 2 * D * KL + c * 256 * KH + at * KH / 8 + (KHB > 4 ? part * KHS : 0));
            if (KHB <= 4 && KSPLIT > 1) kh[i][c][0] >>= part * (KE / 2 * KH);
          } else {
            kh[i][c][0] = 0;
          }
        }
      }
    }
    uint vl[NQ][2][VLE];
    uint vh[NQ][VHP];
    uint vt[NQ][4];
    TQ_UNROLL
    for (int i = 0; i < NQ; ++i) {
      if (VT) {
        tq_value_bits<D, VD, VT ? VB : 1>(vt[i], base + 2 * D * KB, row * VSPLIT + value_half, value_quad + i * VQ);
      } else {
        TQ_UNROLL
        for (int p = 0; p < 2; ++p) tq_load<VLE * 4>(vl[i][p], base + low_at + i * VQ * VLS + p * low_pair);
        TQ_UNROLL
        for (int p = 0; p < VHP; ++p) {
          vh[i][p] = VH > 0 ? tq_load1(base + high_at + i * VQ * VHB + p * (VHB / VHP)) : 0;
          if (VH == 1 && VSPLIT > 1) vh[i][p] >>= value_half * VE;
        }
      }
    }
    uint scales = tq_load1(page + NSB * SUB + (sub % NSB * 16 + token_of_lane) * 4);
    block = block_table[seq * shape[4] + min(sub + STEP, sub1 - 1) / NSB];

    // Each lane's share of the logits.
    float x[4][N];
    TQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      TQ_UNROLL
      for (int n = 0; n < N; ++n) x[i][n] = 0.0f;
    }
    if (KT) {
      TQ_UNROLL
      for (int c = 0; c < NKC; ++c) {
        TQ_UNROLL
        for (int k = 0; k < KE / 8; ++k) {
          uint number[4];
          tq_numbers<KT, KE>(number, kt[c][k][0], kt[c][k][3], kt[c][k][1]);
          TQ_UNROLL
          for (int at = 0; at < 16; ++at) {
            const uint pair = tq_trellis_pair<KH == 2>(number, kt[c][k][2], at, zero, key_level_a);
            const float first = float(tq_low(pair));
            const float second = float(tq_high(pair));
            const int i = (32 * k + at) / KE;
            TQ_UNROLL
            for (int n = 0; n < N; ++n) {
              x[i][n] = fma(float(q[n][c][at % KE]), first, x[i][n]);
              x[i + 16 / KE][n] = fma(float(q[n][c][at % KE]), second, x[i + 16 / KE][n]);
            }
          }
        }
      }
    } else {
      TQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        TQ_UNROLL
        for (int c = 0; c < NKC; ++c) {
          TQ_UNROLL
          for (int j = 0; j < KE / 2; ++j) {
            const uint pair = tq_pair<KL, KH, 0>(kl[i][c][j * KL / 16], j % (16 / KL),
                                                 kh[i][c][j * KH / 16], j * KH % 16, zero);
            const float first = float(tq_low(pair));
            const float second = float(tq_high(pair));
            TQ_UNROLL
            for (int n = 0; n < N; ++n) {
              x[i][n] = fma(float(q[n][c][j]), first, x[i][n]);
              x[i][n] = fma(float(q[n][c][j + KE / 2]), second, x[i][n]);
            }
          }
        }
      }
    }

    // Their sum over eight lanes: each step hands over half of what a lane has, and adds what it
    // gets to the other half, until one token and half of the columns are left.
    float s[NH];
    TQ_UNROLL
    for (int n = 0; n < N; ++n) {
      const bool bit0 = eighth & 1, bit1 = eighth & 2;
      float a = bit0 ? x[1][n] : x[0][n];
      float b = bit0 ? x[3][n] : x[2][n];
      a += simd_shuffle_xor(bit0 ? x[0][n] : x[1][n], ushort(1));
      b += simd_shuffle_xor(bit0 ? x[2][n] : x[3][n], ushort(1));
      x[0][n] = (bit1 ? b : a) + simd_shuffle_xor(bit1 ? a : b, ushort(2));
    }
    TQ_UNROLL
    for (int h = 0; h < NH; ++h) {
      const float a = x[0][2 * h], b = x[0][2 * h + 1 < N ? 2 * h + 1 : 2 * h];
      s[h] = (odd ? b : a) + simd_shuffle_xor(odd ? a : b, ushort(4));
      const float scale = float(tq_low(scales));
      s[h] = (s[h] + offset[h]) * ((CENTRE ? abs(scale) : scale) * factor);
      if (CENTRE) {
        const float mine = f[(S - ready + token_of_lane) * N + min(2 * h + odd, N - 1)];
        s[h] += (scales & 0x8000u) != 0 ? mine : 0.0f;
      }
      if (SOFTCAP) s[h] = tq_softcap(s[h], numbers[1]);
    }
    if (CENTRE) ready -= 16;
    if (sub * 16 < begin_of_all || sub * 16 + 16 > end_of_all) {
      const int t = sub * 16 + token_of_lane;
      TQ_UNROLL
      for (int h = 0; h < NH; ++h) {
        const int query_row = (first_column + min(2 * h + odd, columns - 1)) / G;
        if (window > 0 && t < see_from + query_row) s[h] = NEVER;
        if (t >= min(paged, rows_from + query_row + 1)) s[h] = NEVER;
      }
      // Bytes that no token has written may be any number, so their scales are not used.
      if (t >= paged) scales = 0;
    }

    // Lazy maximum: rescale only when a logit exceeds it by more than 6, a factor of 64.
    bool exceeds = false;
    TQ_UNROLL
    for (int h = 0; h < NH; ++h) exceeds = exceeds || s[h] > m[h] + 6.0f;
    if (simd_any(exceeds)) {
      TQ_UNROLL
      for (int h = 0; h < NH; ++h) {
        float top = s[h];
        TQ_UNROLL
        for (int k = 0; k < 4; ++k) top = max(top, simd_shuffle_xor(top, ushort(token_bits[k])));
        top = max(top, m[h]);
        const float r = fast::exp2(m[h] - top);
        m[h] = top;
        l[h] *= r;
        g[h] *= r;
        const float other = simd_shuffle_xor(r, ushort(4));
        TQ_UNROLL
        for (int e = 0; e < VE; ++e) {
          acc[2 * h][e] *= odd ? other : r;
          if (2 * h + 1 < N) acc[2 * h + 1 < N ? 2 * h + 1 : 0][e] *= odd ? r : other;
        }
      }
    }

    // Weights, to the lanes that hold the values.
    float w[NH];
    float heaviest = 0.0f;
    TQ_UNROLL
    for (int h = 0; h < NH; ++h) {
      w[h] = fast::exp2(s[h] - m[h]);
      l[h] += w[h];
      if (CENTRE) g[h] += int(scales) < 0 ? w[h] : 0.0f;
      heaviest = max(heaviest, w[h]);
    }
    if (SPARSE && !simd_any(heaviest >= numbers[2])) continue;
    // Quad by quad, and in a quad tokens 2 q, 2 q + 1, 2 q + 8, 2 q + 9.
    const int slot = token_of_lane % 8 / 2 * 4 + token_of_lane / 8 * 2 + token_of_lane % 2;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    TQ_UNROLL
    for (int h = 0; h < NH; ++h) {
      const float scale = float(tq_high(scales));
      const float weight = w[h] * (CENTRE ? abs(scale) : scale);
      if (N > 1 || odd == 0) shared[sg * POOL + slot * NW + 2 * h + odd] = weight;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    // Their products with the values.
    TQ_UNROLL
    for (int i = 0; i < NQ; ++i) {
      float weight[4 * NW];
      TQ_UNROLL
      for (int k = 0; k < NW; ++k) {
        const float4 four = shared4[sg * POOL / 4 + (value_quad + i * VQ) * NW + k];
        weight[4 * k] = four.x;
        weight[4 * k + 1] = four.y;
        weight[4 * k + 2] = four.z;
        weight[4 * k + 3] = four.w;
      }
      uint number[4];
      if (VT) tq_numbers<VT, VE>(number, vt[i][0], vt[i][3], vt[i][1]);
      TQ_UNROLL
      for (int p = 0; p < 2; ++p) {
        TQ_UNROLL
        for (int e = 0; e < VE; ++e) {
          const int bit = VD * VH == 8 ? p * 8 + e : e * VH;
          const uint pair = VT ? tq_trellis_pair<VH == 2>(number, vt[i][2], p * VE + e, zero, level_a)
                               : tq_value_pair<VL, VH>(vl[i][p][e * VL / 16], e % (16 / VL),
                                                       vh[i][p % VHP], bit, zero, level_a, level_c);
          const float first = float(tq_low(pair));
          const float second = float(tq_high(pair));
          TQ_UNROLL
          for (int n = 0; n < N; ++n) {
            acc[n][e] = fma(weight[2 * p * NW + n], first, acc[n][e]);
            acc[n][e] = fma(weight[(2 * p + 1) * NW + n], second, acc[n][e]);
          }
        }
      }
    }
  }

  // Merge the SIMD-groups.
  TQ_UNROLL
  for (int h = 0; h < NH; ++h) {
    TQ_UNROLL
    for (int k = 0; k < 4; ++k) {
      l[h] += simd_shuffle_xor(l[h], ushort(token_bits[k]));
      if (CENTRE) g[h] += simd_shuffle_xor(g[h], ushort(token_bits[k]));
    }
    const int n = 2 * h + odd;
    if (token_of_lane == 0 && n < N) {
      shared_m[sg][n] = m[h];
      shared_l[sg][n] = l[h];
      if (CENTRE) shared_g[CENTRE ? sg : 0][CENTRE ? n : 0] = g[h];
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int n = 0; n < N; ++n) {
    TQ_UNROLL
    for (int e = 0; e < VE; ++e) {
      TQ_UNROLL
      for (int k = 1; k < VQ; k *= 2) acc[n][e] += simd_shuffle_xor(acc[n][e], ushort(k * VSPLIT));
      if (value_quad == 0 && value_row < VROWS) {
        shared[sg * POOL + n * D + value_row * VD + value_half * VE + e] = acc[n][e];
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
