// The Metal side of the dialect that the kernels are written in; dialect_cuda.h is the other.
#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;

#define TQ_FN inline
#define TQ_UNROLL _Pragma("clang loop unroll(full)")
#define TQ_NO_UNROLL _Pragma("clang loop unroll(disable)")
#define TQ_TABLE constant
// Queries in registers are halves here, where registers are scarce.
#define TQ_QUERY half
// See dialect_cuda.h.
#define TQ_UNKNOWN_ZERO(x) 0u

// Metal has no instruction that fetches memory ahead of a load.
inline void tq_prefetch(const device uchar*, int) {}
inline uint4 tq_load4(const device uchar* p) { return *(const device uint4*)p; }
inline uint2 tq_load2(const device uchar* p) { return *(const device uint2*)p; }
inline uint tq_load1(const device uchar* p) { return *(const device uint*)p; }
inline uint tq_load_half(const device uchar* p) { return *(const device ushort*)p; }
inline half tq_low(uint x) { return as_type<half2>(x).x; }
inline half tq_high(uint x) { return as_type<half2>(x).y; }
// The two elements of a word, as floats.
template <class T> inline float tq_first(uint x) { return float(as_type<T>(ushort(x & 0xffffu))); }
template <class T> inline float tq_second(uint x) { return float(as_type<T>(ushort(x >> 16))); }
inline uint tq_pack(float a, float b) { return as_type<uint>(half2(half(a), half(b))); }

// How a lane's bits name its row and its pair of columns in an 8x8 matrix: the order that MLX's
// own kernels rely on, bits 4 2 1 for the row and 3 0 for the pair.
#define TQ_ROW(lane) ((((lane) >> 2) & 4) | (((lane) >> 1) & 3))
#define TQ_QUAD(lane) ((((lane) >> 2) & 2) | ((lane) & 1))
// The lane of a row and quad.
#define TQ_LANE(row, quad) ((((row) & 4) << 2) | (((row) & 3) << 1) | (((quad) & 2) << 2) | ((quad) & 1))
// Lane masks that step through the rows.
#define TQ_ROW_BITS {2, 4, 16}
// Row (of 8 steps) and column of element e of a lane's B matrix.
#define TQ_B_STEP(row, quad, e) (row)
#define TQ_B_COLUMN(row, quad, e) (2 * (quad) + (e))

inline void tq_matrix_8x8(thread float2& c, uint a, uint b) {
  simdgroup_matrix<half, 8, 8> A, B;
  simdgroup_matrix<float, 8, 8> C;
  reinterpret_cast<thread half2&>(A.thread_elements()) = as_type<half2>(a);
  reinterpret_cast<thread half2&>(B.thread_elements()) = as_type<half2>(b);
  reinterpret_cast<thread float2&>(C.thread_elements()) = c;
  simdgroup_multiply_accumulate(C, A, B, C);
  c = reinterpret_cast<thread float2&>(C.thread_elements());
}

// c[16x8] += a[16x16] b[16x8]. A lane holds rows r and r + 8 of c in xy and zw, and of a the
// quarters (r, k), (r + 8, k), (r, k + 8), (r + 8, k + 8).
inline void tq_matrix(thread float4& c, uint a0, uint a1, uint a2, uint a3, uint2 b) {
  float2 top = c.xy, bottom = c.zw;
  tq_matrix_8x8(top, a0, b.x);
  tq_matrix_8x8(top, a2, b.y);
  tq_matrix_8x8(bottom, a1, b.x);
  tq_matrix_8x8(bottom, a3, b.y);
  c = float4(top, bottom);
}

// A pair in the order of c, as a pair in the order of b: the same order here.
inline uint tq_as_b(uint x) { return x; }

// Tables stay in the caches.
inline uint4 tq_table4(const device uint* p) { return *(const device uint4*)p; }
inline uint2 tq_table2(const device uint* p) { return *(const device uint2*)p; }

// Products that are exact to about 2^-21, of floats: here a pair of floats is kept as it is. Of an
// a[16x16], a lane's quarters are pairs of words of a table, and lie 128 words apart two by two.
inline uint2 tq_exact_pair(float a, float b) { return uint2(as_type<uint>(a), as_type<uint>(b)); }
inline uint2 tq_exact_as_b(uint2 x) { return x; }
inline void tq_exact_matrix_8x8(thread float2& c, uint2 a, uint2 b) {
  simdgroup_matrix<float, 8, 8> A, B, C;
  reinterpret_cast<thread float2&>(A.thread_elements()) = as_type<float2>(a);
  reinterpret_cast<thread float2&>(B.thread_elements()) = as_type<float2>(b);
  reinterpret_cast<thread float2&>(C.thread_elements()) = c;
  simdgroup_multiply_accumulate(C, A, B, C);
  c = reinterpret_cast<thread float2&>(C.thread_elements());
}
inline void tq_exact_matrix(thread float4& c, const device uint* a, uint2 b0, uint2 b1) {
  const uint4 first = tq_table4(a), second = tq_table4(a + 128);
  float2 top = c.xy, bottom = c.zw;
  tq_exact_matrix_8x8(top, first.xy, b0);
  tq_exact_matrix_8x8(top, second.xy, b1);
  tq_exact_matrix_8x8(bottom, first.zw, b0);
  tq_exact_matrix_8x8(bottom, second.zw, b1);
  c = float4(top, bottom);
}

inline uint tq_less(half2 a, half2 b) { return as_type<uint>(select(ushort2(0), ushort2(0xffff), a < b)); }
inline half2 tq_saturated_fma(half2 a, half2 b, half2 c) { return clamp(fma(a, b, c), half2(0.0f), half2(1.0f)); }
inline float tq_inverse(float x) { return fast::divide(1.0f, x); }
// The integer nearest to x * N, x limited to 0 and 1, for N up to 2^22.
template <int N> inline uint tq_nearest(float x) { return uint(rint(saturate(x) * float(N))); }
// The integer nearest to x, plus 1/2, for x from 0 to 2^9, times 2^-SHIFT.
template <int SHIFT> inline half2 tq_round_and_half(half2 x) {
  return (rint(x) + half2(0.5f)) * half2(1.0f / float(1 << SHIFT));
}
