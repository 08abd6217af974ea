// The CUDA side of the dialect: Metal's words, for mx.fast.cuda_kernel. A threadgroup is a block,
// a SIMD-group a warp. vllm_metal_tq/kernels/launch.py takes the address spaces out of the kernels.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;

#define TQ_FN __device__ __forceinline__
#define TQ_UNROLL _Pragma("unroll")
#define TQ_NO_UNROLL _Pragma("unroll 1")
#define TQ_TABLE static __device__ const
#define TQ_QUERY float
#define thread_index_in_simdgroup (int(threadIdx.x) & 31)
// By way of lane 0, so all lanes must read it: the compiler then knows that they have the same.
#define simdgroup_index_in_threadgroup __shfl_sync(0xffffffffu, int(threadIdx.x) >> 5, 0)
#define thread_index_in_threadgroup int(threadIdx.x)
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define threadgroup_barrier(flags) __syncthreads()
#define simdgroup_barrier(flags) __syncwarp()
// 0 for every x >= 0, which the compiler cannot know: a mask with it added stays in a register, and
// (w & mask) | bits is then one instruction.
#define TQ_UNKNOWN_ZERO(x) (uint(x) >> 31)

TQ_FN float simd_shuffle_xor(float x, ushort mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
TQ_FN uint simd_shuffle_xor(uint x, ushort mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
TQ_FN half2 simd_shuffle_xor(half2 x, ushort mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
TQ_FN float simd_shuffle(float x, ushort lane) { return __shfl_sync(0xffffffffu, x, lane); }
TQ_FN uint simd_shuffle(uint x, ushort lane) { return __shfl_sync(0xffffffffu, x, lane); }
TQ_FN uint simd_min(uint x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_min_sync(0xffffffffu, x);
#else
  for (int k = 16; k > 0; k /= 2) x = min(x, simd_shuffle_xor(x, ushort(k)));
  return x;
#endif
}
TQ_FN bool simd_any(bool p) { return __any_sync(0xffffffffu, p); }

namespace fast {
TQ_FN float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
}  // namespace fast

template <class T, class S> TQ_FN T as_type(S s) { return *reinterpret_cast<T*>(&s); }
TQ_FN half2 fma(half2 a, half2 b, half2 c) { return __hfma2(a, b, c); }
TQ_FN half2 abs(half2 a) { return __habs2(a); }
TQ_FN uint reverse_bits(uint x) { return __brev(x); }
TQ_FN half2 min(half2 a, half2 b) { return __hmin2(a, b); }
// All bits of each half where a is less than b, else none.
TQ_FN uint tq_less(half2 a, half2 b) { return __hlt2_mask(a, b); }

// Start to bring bytes, a multiple of 16, into the second cache.
TQ_FN void tq_prefetch(const uchar* p, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"(p), "r"(bytes));
#endif
}
// Pages are read once: loads that do not stay in the first cache.
TQ_FN uint4 tq_load4(const uchar* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
  return r;
}
TQ_FN uint2 tq_load2(const uchar* p) {
  uint2 r;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p));
  return r;
}
TQ_FN uint tq_load1(const uchar* p) {
  uint r;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(r) : "l"(p));
  return r;
}
TQ_FN uint tq_load_half(const uchar* p) { return *(const ushort*)p; }
TQ_FN half tq_low(uint x) { return __ushort_as_half((ushort)(x & 0xffffu)); }
TQ_FN half tq_high(uint x) { return __ushort_as_half((ushort)(x >> 16)); }
// The two elements of a word, as floats.
template <class T> TQ_FN float tq_first(uint x) { return float(as_type<T>(ushort(x & 0xffffu))); }
template <class T> TQ_FN float tq_second(uint x) { return float(as_type<T>(ushort(x >> 16))); }
template <> TQ_FN float tq_first<__nv_bfloat16>(uint x) { return as_type<float>(x << 16); }
template <> TQ_FN float tq_second<__nv_bfloat16>(uint x) { return as_type<float>(x & 0xffff0000u); }
TQ_FN uint tq_pack(float a, float b) { return as_type<uint>(__floats2half2_rn(a, b)); }

#define TQ_ROW(lane) ((lane) >> 2)
#define TQ_QUAD(lane) ((lane) & 3)
#define TQ_LANE(row, quad) ((row) << 2 | (quad))
#define TQ_ROW_BITS {4, 8, 16}
#define TQ_B_STEP(row, quad, e) (2 * (quad) + (e))
#define TQ_B_COLUMN(row, quad, e) (row)

TQ_FN void tq_matrix(float4& c, uint a0, uint a1, uint a2, uint a3, uint2 b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}
TQ_FN uint tq_as_b(uint x) {
  uint y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

TQ_FN uint4 tq_table4(const uint* p) { return __ldg((const uint4*)p); }
TQ_FN uint2 tq_table2(const uint* p) { return __ldg((const uint2*)p); }

// A pair of floats as two pairs of halves: the nearest ones, and what they leave. Of an a[16x16], a
// lane's four pairs of nearest halves are words of a table, and what they leave comes 128 words on.
TQ_FN uint2 tq_exact_pair(float a, float b) {
  uint2 x;
  x.x = tq_pack(a, b);
  x.y = tq_pack(a - float(tq_low(x.x)), b - float(tq_high(x.x)));
  return x;
}
TQ_FN uint2 tq_exact_as_b(uint2 x) {
  uint2 y;
  y.x = tq_as_b(x.x);
  y.y = tq_as_b(x.y);
  return y;
}
TQ_FN void tq_exact_matrix(float4& c, const uint* a, uint2 b0, uint2 b1) {
  const uint4 nearest = tq_table4(a), rest = tq_table4(a + 128);
  uint2 b, b_rest;
  b.x = b0.x, b.y = b1.x;
  b_rest.x = b0.y, b_rest.y = b1.y;
  tq_matrix(c, rest.x, rest.y, rest.z, rest.w, b);
  tq_matrix(c, nearest.x, nearest.y, nearest.z, nearest.w, b_rest);
  tq_matrix(c, nearest.x, nearest.y, nearest.z, nearest.w, b);
}

TQ_FN half2 tq_saturated_fma(half2 a, half2 b, half2 c) { return __hfma2_sat(a, b, c); }
TQ_FN float tq_inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The integer nearest to x * N, x limited to 0 and 1, for N up to 2^22.
template <int N> TQ_FN uint tq_nearest(float x) {
  return as_type<uint>(fma(__saturatef(x), float(N), 8388608.0f)) - 0x4b000000u;
}
// The integer nearest to x, plus 1/2, for x from 0 to 2^9, times 2^-SHIFT.
template <int SHIFT> TQ_FN half2 tq_round_and_half(half2 x) {
  constexpr float unit = 1.0f / (1 << SHIFT);
  return __hfma2(x + __float2half2_rn(1024.0f), __float2half2_rn(unit), __float2half2_rn(-1023.5f * unit));
}
