// Key centring: f(j) = q . R_j mu, in base 2, of tokens in a row.
//
// With A_c = q_first mu_first + q_second mu_second and B_c = q_second mu_first - q_first mu_second of
// a pair c of elements that the rotary embedding turns by phi_c(j),
//   f(j) = sum_c A_c cos phi_c(j) + B_c sin phi_c(j).
// Around the middle of a window of tokens f is an even and an odd function of the distance s:
//   f(middle +- s) = E(s) +- O(s), E = sum_c A'_c cos(s theta_c), O = sum_c B'_c sin(s theta_c),
// where (A', B') is (A, B) turned to the middle. So a window costs one cosine and sine for each pair,
// and E and O are taken of half of its tokens. Theirs are tables, of the same functions for every
// window: vllm_metal_tq/kernels/centre.py makes them and keeps them short.
#include "turn.h"

// The phase of a pair in the middle of `tokens` tokens, an even number, of which position is the
// first: that of the token behind the middle, less half a step.
TQ_FN uint tq_middle(uint step, uint position, int tokens) {
  return step * (position + uint(tokens / 2)) - uint(int(step) >> 1);
}

// (A, B) turned by a phase whose cosine and sine are given.
TQ_FN float2 tq_turned(float2 x, float2 turn) {
  float2 y;
  y.x = fma(x.x, turn.x, x.y * turn.y);
  y.y = fma(x.y, turn.x, -(x.x * turn.y));
  return y;
}

// How many numbers lie between the coefficients of two columns: lanes that read different columns
// at a time then use different banks.
template <int D> TQ_FN constexpr int tq_stride() { return D + 16; }
// Windows that are computed at once, so that 8 columns of a fragment are used by N queries.
template <int N> TQ_FN constexpr int tq_windows() { return N > 4 ? 1 : N > 2 ? 2 : N > 1 ? 4 : 8; }
// Numbers stored for a token.
template <int N> TQ_FN constexpr int tq_columns() { return N == 1 ? 1 : (N + 1) / 2 * 2; }

// f of a token and a lane's two columns; of one query there is one.
template <int N> TQ_FN float2 tq_two(const threadgroup float* f) {
  if (N > 1) return *(const threadgroup float2*)f;
  float2 x;
  x.x = x.y = f[0];
  return x;
}

// A and B of each pair, for W windows of C columns each; a column beyond the last one repeats it.
// queries: those of a KV head; means: mu of each pair; turns: elements and steps of the pairs.
template <class T, int D, int S, int W, int C>
TQ_FN void tq_centre_queries(threadgroup float* ab, const device T* queries, const device float* means, const device uint* turns, float factor, int first_column, int columns, int G, int L, int head_dim, int start, int step) {
  constexpr int P = D / 2;
  for (int i = start; i < W * C * P; i += step) {
    const int n = i / P;
    const int c = i % P;
    const int column = first_column + min(n % C, columns - 1);
    const device T* query = queries + size_t(column % G * L + column / G) * head_dim;
    const float first = float(query[turns[c]]) * factor;
    const float second = float(query[turns[P + c]]) * factor;
    const float mu_first = means[2 * c];
    const float mu_second = means[2 * c + 1];
    float2 x;
    x.x = fma(first, mu_first, second * mu_second);
    x.y = fma(second, mu_first, -(first * mu_second));
    const int tokens = (2 * (n / C) + 1 - W) * (S / 2);  // to the middle of the column's window
    *(threadgroup float2*)(ab + n * tq_stride<D>() + 2 * c) = tq_turned(x, tq_turn(turns[2 * P + c] * uint(tokens)));
  }
}

// f of tq_windows<N>() windows of S tokens, to f[token][column], with matrix fragments.
// f: threadgroup memory of a SIMD-group, at least D numbers; ab: A and B of each pair, for 8 columns:
// those of the first window, turned by its distance to the middle of all windows, then the next's.
// turns: step of each pair; tables of fragments: weights of the pairs in 16 functions of s, even ones
// then odd ones, and those functions, 16 tokens at a time.
template <int D, int N, int S>
TQ_FN void tq_centre_mma(threadgroup float* f, const threadgroup float* ab, const device uint* turns, uint position, int lane) {
  constexpr int P = D / 2;
  constexpr int W = tq_windows<N>();
  constexpr int NC = tq_columns<N>();
  const int row = TQ_ROW(lane);
  const int quad = TQ_QUAD(lane);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int c = lane; c < P; c += 32) {
    *(threadgroup float2*)(f + 2 * c) = tq_turn(tq_middle(turns[c], position, W * S));
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);

  const device uint* weights = turns + P + lane * 4;
  float4 even, odd;
  even.x = even.y = even.z = even.w = 0.0f;
  odd = even;
  TQ_UNROLL
  for (int k = 0; k < P / 16; ++k) {
    uint2 a[2], b[2];
    TQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      float2 x[2];
      TQ_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int c = 16 * k + 8 * h + TQ_B_STEP(row, quad, e);
        const int n = TQ_B_COLUMN(row, quad, e);
        x[e] = tq_turned(*(const threadgroup float2*)(ab + n * tq_stride<D>() + 2 * c),
                         *(const threadgroup float2*)(f + 2 * c));
      }
      a[h] = tq_exact_pair(x[0].x, x[1].x);
      b[h] = tq_exact_pair(x[0].y, x[1].y);
    }
    tq_exact_matrix(even, weights + 256 * k, a[0], a[1]);
    tq_exact_matrix(odd, weights + 256 * (P / 16 + k), b[0], b[1]);
  }
  const uint2 even0 = tq_exact_as_b(tq_exact_pair(even.x, even.y));
  const uint2 even1 = tq_exact_as_b(tq_exact_pair(even.z, even.w));
  const uint2 odd0 = tq_exact_as_b(tq_exact_pair(odd.x, odd.y));
  const uint2 odd1 = tq_exact_as_b(tq_exact_pair(odd.z, odd.w));
  simdgroup_barrier(mem_flags::mem_threadgroup);

  const device uint* functions = weights + 512 * (P / 16);
  const int window = 2 * quad / (8 / W);
  const int column = 2 * quad % (8 / W);
  threadgroup float* middle = f + (window * S + S / 2) * NC + column;
  TQ_UNROLL
  for (int i = 0; i < S / 32; ++i) {
    float4 x, y;
    x.x = x.y = x.z = x.w = 0.0f;
    y = x;
    tq_exact_matrix(x, functions + 256 * i, even0, even1);
    tq_exact_matrix(y, functions + 256 * (S / 32 + i), odd0, odd1);
    threadgroup float* after = middle + (16 * i + row) * NC;
    threadgroup float* before = middle - (16 * i + row + 1) * NC;
    if (N == 1) {
      after[0] = x.x + y.x, after[S] = x.y + y.y, after[8] = x.z + y.z, after[S + 8] = x.w + y.w;
      before[0] = x.x - y.x, before[S] = x.y - y.y, before[-8] = x.z - y.z, before[S - 8] = x.w - y.w;
    } else if (column < NC) {
      after[0] = x.x + y.x, after[1] = x.y + y.y, after[8 * NC] = x.z + y.z, after[8 * NC + 1] = x.w + y.w;
      before[0] = x.x - y.x, before[1] = x.y - y.y, before[-8 * NC] = x.z - y.z, before[1 - 8 * NC] = x.w - y.w;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// f of a window of S tokens, to f[token * N + column], with plain multiply-adds.
// f: threadgroup memory of a SIMD-group, at least 2 N (D / 2 + 4) numbers; ab: as above, but for N
// columns of one window. Of the pairs, the T fastest are functions of s themselves, the others are folded into
// 4 even and 4 odd ones.
// turns: step of each pair, fastest first; weights of the other pairs in 4 even functions, then in
// 4 odd ones; values of all even and odd functions, at distances lane + 1/2, lane + 32 + 1/2...
template <int D, int N, int S, int T>
TQ_FN void tq_centre_fma(threadgroup float* f, const threadgroup float* ab, const device uint* turns, uint position, int lane) {
  constexpr int P = D / 2;
  constexpr int ROW = P + 4;    // from the coefficients of a column to the next one's
  constexpr int R = T + 4;      // functions
  constexpr int NS = S / 64;    // distances of a lane
  constexpr int FOLDS = (8 * N + 31) / 32;  // sums of a lane
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int c = lane; c < P; c += 32) {
    const float2 turn = tq_turn(tq_middle(turns[c], position, S));
    TQ_UNROLL
    for (int n = 0; n < N; ++n) {
      const float2 x = tq_turned(*(const threadgroup float2*)(ab + n * tq_stride<D>() + 2 * c), turn);
      f[n * ROW + c] = x.x;
      f[(N + n) * ROW + c] = x.y;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);

  // Sums of the slow pairs: function by function, even ones first, and column by column.
  const device uint* weights = turns + P;
  float sums[FOLDS];
  TQ_UNROLL
  for (int i = 0; i < FOLDS; ++i) {
    const int sum = min(lane + 32 * i, 8 * N - 1);
    const threadgroup float* x = f + (sum / N / 4 * N + sum % N) * ROW;
    const device uint* w = weights + sum / N * (P - T);
    sums[i] = 0.0f;
    for (int c = T; c < P; c += 4) {
      const float4 four = *(const threadgroup float4*)(x + c);
      const float4 by = as_type<float4>(tq_table4(w + c - T));
      sums[i] = fma(four.x, by.x, sums[i]);
      sums[i] = fma(four.y, by.y, sums[i]);
      sums[i] = fma(four.z, by.z, sums[i]);
      sums[i] = fma(four.w, by.w, sums[i]);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int i = 0; i < FOLDS; ++i) {
    const int sum = lane + 32 * i;
    if (sum < 8 * N) f[(sum / N / 4 * N + sum % N) * ROW + T + sum / N % 4] = sums[i];
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);

  float even[NS][N], odd[NS][N];
  TQ_UNROLL
  for (int i = 0; i < NS; ++i) {
    TQ_UNROLL
    for (int n = 0; n < N; ++n) even[i][n] = odd[i][n] = 0.0f;
  }
  const device uint* functions = weights + 8 * (P - T) + 2 * lane;
  for (int r = 0; r < R; r += 4) {
    float2 u[4][NS];
    TQ_UNROLL
    for (int k = 0; k < 4; ++k) {
      TQ_UNROLL
      for (int i = 0; i < NS; ++i) u[k][i] = as_type<float2>(tq_table2(functions + ((r + k) * NS + i) * 64));
    }
    TQ_UNROLL
    for (int n = 0; n < N; ++n) {
      const float4 a = *(const threadgroup float4*)(f + n * ROW + r);
      const float4 b = *(const threadgroup float4*)(f + (N + n) * ROW + r);
      TQ_UNROLL
      for (int i = 0; i < NS; ++i) {
        even[i][n] = fma(a.x, u[0][i].x, fma(a.y, u[1][i].x, even[i][n]));
        even[i][n] = fma(a.z, u[2][i].x, fma(a.w, u[3][i].x, even[i][n]));
        odd[i][n] = fma(b.x, u[0][i].y, fma(b.y, u[1][i].y, odd[i][n]));
        odd[i][n] = fma(b.z, u[2][i].y, fma(b.w, u[3][i].y, odd[i][n]));
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int i = 0; i < NS; ++i) {
    const int s = lane + 32 * i;
    TQ_UNROLL
    for (int n = 0; n < N; ++n) {
      f[(S / 2 + s) * N + n] = even[i][n] + odd[i][n];
      f[(S / 2 - 1 - s) * N + n] = even[i][n] - odd[i][n];
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}
