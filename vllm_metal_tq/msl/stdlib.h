// Stand-in for Metal's standard library, for clang on a machine without Metal.
//   MSL_CHECK: address spaces are real; for -fsyntax-only.
//   MSL_SIM:   address spaces vanish, SIMD-group operations go to simulator.cpp.
// It includes nothing, so no name of the C library can stand in for one that Metal lacks. It holds
// what custom kernels of MLX tend to use; names that start with msl_ or MSL_ are its own.
#pragma once
#pragma clang system_header
#define __METAL_VERSION__ 310
#define __METAL__ 1

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef _Float16 half;
typedef __bf16 bfloat;

#ifdef MSL_CHECK
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
// Clang knows no local variables with an address space, but local declarations of others.
#define MSL_THREADGROUP_VAR extern
#else
#define device
#define constant const
#define threadgroup
// One section of its own holds all of a kernel's threadgroup memory.
#define MSL_THREADGROUP_VAR static __attribute__((section("msl_tg"), used))
#endif
#define thread
#define METAL_FUNC inline __attribute__((always_inline))

#define MSL_VECTORS(T)                                \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
MSL_VECTORS(bool)

// ---- Facts about types, and conditions on template parameters

template <class T>
struct msl_type {
  typedef T elem;
  static constexpr int n = 1;
};
template <class T, int N>
struct msl_type<T __attribute__((ext_vector_type(N)))> {
  typedef T elem;
  static constexpr int n = N;
};
template <class T>
using msl_elem = typename msl_type<T>::elem;
#define MSL_EACH(T) for (int i = 0; i < msl_type<T>::n; ++i)

template <class T>
struct msl_is {
  static constexpr bool fp = false, num = false, word = false;
};
#define MSL_NUM(T, F)                                                \
  template <>                                                        \
  struct msl_is<T> {                                                 \
    static constexpr bool fp = F, num = true, word = sizeof(T) <= 4; \
  };
MSL_NUM(signed char, false)
MSL_NUM(char, false)
MSL_NUM(uchar, false)
MSL_NUM(short, false)
MSL_NUM(ushort, false)
MSL_NUM(int, false)
MSL_NUM(uint, false)
MSL_NUM(long, false)
MSL_NUM(ulong, false)
MSL_NUM(half, true)
MSL_NUM(bfloat, true)
MSL_NUM(float, true)

// Metal and MLX's prelude have no functions on vectors of bfloat.
template <class T>
struct msl_is_bfloat_vector {
  static constexpr bool value = false;
};
template <int N>
struct msl_is_bfloat_vector<bfloat __attribute__((ext_vector_type(N)))> {
  static constexpr bool value = true;
};

template <bool B, class T = int>
struct msl_if {};
template <class T>
struct msl_if<true, T> {
  typedef T type;
};
// Template parameter T, restricted to: floating point, integers, any number, numbers that
// SIMD-group operations take. All arguments of a function have the same T, as in Metal.
#define MSL_FP(T) \
  class T, typename msl_if<msl_is<msl_elem<T>>::fp && !msl_is_bfloat_vector<T>::value>::type = 0
#define MSL_INT(T) \
  class T, typename msl_if<msl_is<msl_elem<T>>::num && !msl_is<msl_elem<T>>::fp>::type = 0
#define MSL_ANY(T) class T, typename msl_if<msl_is<msl_elem<T>>::num>::type = 0
#define MSL_WORD(T) \
  class T, typename msl_if<msl_is<msl_elem<T>>::word && !msl_is_bfloat_vector<T>::value>::type = 0

// ---- Vector constructors: function-like macros, so that only "float4(" is replaced

template <class T>
METAL_FUNC msl_elem<T> msl_get(T x, int i) {
  if constexpr (msl_type<T>::n == 1)
    return x;
  else
    return x[i];
}

template <class T>
METAL_FUNC void msl_set(T& x, int i, msl_elem<T> v) {
  if constexpr (msl_type<T>::n == 1)
    x = v;
  else
    x[i] = v;
}

template <class V>
METAL_FUNC void msl_fill(V&, int) {}

template <class V, class A, class... R>
METAL_FUNC void msl_fill(V& v, int at, A a, R... r) {
  MSL_EACH(A) v[at + i] = static_cast<msl_elem<V>>(msl_get(a, i));
  msl_fill(v, at + msl_type<A>::n, r...);
}

template <class V, class A>
METAL_FUNC V msl_make(A a) {
  static_assert(msl_type<A>::n == 1 || msl_type<A>::n == msl_type<V>::n,
                "vector constructor: wrong number of components");
  V v{};
  MSL_EACH(V) v[i] = static_cast<msl_elem<V>>(msl_get(a, i));
  return v;
}

template <class V, class A, class B, class... R>
METAL_FUNC V msl_make(A a, B b, R... r) {
  static_assert(msl_type<A>::n + msl_type<B>::n + (0 + ... + msl_type<R>::n) == msl_type<V>::n,
                "vector constructor: wrong number of components");
  V v{};
  msl_fill(v, 0, a, b, r...);
  return v;
}

#define char2(...) msl_make<char2>(__VA_ARGS__)
#define char3(...) msl_make<char3>(__VA_ARGS__)
#define char4(...) msl_make<char4>(__VA_ARGS__)
#define uchar2(...) msl_make<uchar2>(__VA_ARGS__)
#define uchar3(...) msl_make<uchar3>(__VA_ARGS__)
#define uchar4(...) msl_make<uchar4>(__VA_ARGS__)
#define short2(...) msl_make<short2>(__VA_ARGS__)
#define short3(...) msl_make<short3>(__VA_ARGS__)
#define short4(...) msl_make<short4>(__VA_ARGS__)
#define ushort2(...) msl_make<ushort2>(__VA_ARGS__)
#define ushort3(...) msl_make<ushort3>(__VA_ARGS__)
#define ushort4(...) msl_make<ushort4>(__VA_ARGS__)
#define int2(...) msl_make<int2>(__VA_ARGS__)
#define int3(...) msl_make<int3>(__VA_ARGS__)
#define int4(...) msl_make<int4>(__VA_ARGS__)
#define uint2(...) msl_make<uint2>(__VA_ARGS__)
#define uint3(...) msl_make<uint3>(__VA_ARGS__)
#define uint4(...) msl_make<uint4>(__VA_ARGS__)
#define long2(...) msl_make<long2>(__VA_ARGS__)
#define long3(...) msl_make<long3>(__VA_ARGS__)
#define long4(...) msl_make<long4>(__VA_ARGS__)
#define ulong2(...) msl_make<ulong2>(__VA_ARGS__)
#define ulong3(...) msl_make<ulong3>(__VA_ARGS__)
#define ulong4(...) msl_make<ulong4>(__VA_ARGS__)
#define half2(...) msl_make<half2>(__VA_ARGS__)
#define half3(...) msl_make<half3>(__VA_ARGS__)
#define half4(...) msl_make<half4>(__VA_ARGS__)
#define bfloat2(...) msl_make<bfloat2>(__VA_ARGS__)
#define bfloat3(...) msl_make<bfloat3>(__VA_ARGS__)
#define bfloat4(...) msl_make<bfloat4>(__VA_ARGS__)
#define float2(...) msl_make<float2>(__VA_ARGS__)
#define float3(...) msl_make<float3>(__VA_ARGS__)
#define float4(...) msl_make<float4>(__VA_ARGS__)
#define bool2(...) msl_make<bool2>(__VA_ARGS__)
#define bool3(...) msl_make<bool3>(__VA_ARGS__)
#define bool4(...) msl_make<bool4>(__VA_ARGS__)

template <class T, class U>
METAL_FUNC constexpr T as_type(U x) {
  static_assert(sizeof(T) == sizeof(U), "as_type: sizes differ");
  return __builtin_bit_cast(T, x);
}

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// ---- Mathematics; half and bfloat are computed in float and rounded once

#define MSL_F1(name, expr)                           \
  template <MSL_FP(T)>                               \
  METAL_FUNC T name(T v) {                           \
    T r{};                                           \
    MSL_EACH(T) {                                    \
      const float x = msl_get(v, i);                 \
      msl_set(r, i, static_cast<msl_elem<T>>(expr)); \
    }                                                \
    return r;                                        \
  }
#define MSL_F2(name, expr)                              \
  template <MSL_FP(T)>                                  \
  METAL_FUNC T name(T v, T w) {                         \
    T r{};                                              \
    MSL_EACH(T) {                                       \
      const float x = msl_get(v, i), y = msl_get(w, i); \
      msl_set(r, i, static_cast<msl_elem<T>>(expr));    \
    }                                                   \
    return r;                                           \
  }
#define MSL_MATH                           \
  MSL_F1(exp, __builtin_expf(x))           \
  MSL_F1(exp2, __builtin_exp2f(x))         \
  MSL_F1(exp10, __builtin_powf(10.0f, x))  \
  MSL_F1(log, __builtin_logf(x))           \
  MSL_F1(log2, __builtin_log2f(x))         \
  MSL_F1(log10, __builtin_log10f(x))       \
  MSL_F1(sin, __builtin_sinf(x))           \
  MSL_F1(cos, __builtin_cosf(x))           \
  MSL_F1(tan, __builtin_tanf(x))           \
  MSL_F1(tanh, __builtin_tanhf(x))         \
  MSL_F1(sqrt, __builtin_sqrtf(x))         \
  MSL_F1(rsqrt, 1.0f / __builtin_sqrtf(x)) \
  MSL_F2(pow, __builtin_powf(x, y))        \
  MSL_F2(powr, __builtin_powf(x, y))       \
  MSL_F2(fmod, __builtin_fmodf(x, y))      \
  MSL_F2(atan2, __builtin_atan2f(x, y))    \
  MSL_F2(divide, x / y)
MSL_MATH
namespace fast {
MSL_MATH
}
namespace precise {
MSL_MATH
}
MSL_F1(fabs, __builtin_fabsf(x))
MSL_F1(floor, __builtin_floorf(x))
MSL_F1(ceil, __builtin_ceilf(x))
MSL_F1(rint, __builtin_rintf(x))
MSL_F1(round, __builtin_roundf(x))
MSL_F1(trunc, __builtin_truncf(x))
MSL_F1(fract, x - __builtin_floorf(x))
MSL_F1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x)
MSL_F1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
MSL_F2(fmin, __builtin_fminf(x, y))
MSL_F2(fmax, __builtin_fmaxf(x, y))
MSL_F2(copysign, __builtin_copysignf(x, y))
MSL_F2(step, y < x ? 0.0f : 1.0f)

// Of half and bfloat, float holds the product exactly, so only the sum and the result round.
template <MSL_FP(T)>
METAL_FUNC T fma(T a, T b, T c) {
  T r{};
  MSL_EACH(T) {
    const float x = __builtin_fmaf(msl_get(a, i), msl_get(b, i), msl_get(c, i));
    msl_set(r, i, static_cast<msl_elem<T>>(x));
  }
  return r;
}
template <MSL_FP(T)>
METAL_FUNC T mix(T a, T b, T c) { return a + (b - a) * c; }
template <MSL_ANY(T)>
METAL_FUNC T min(T a, T b) {
  T r{};
  MSL_EACH(T) {
    const auto x = msl_get(a, i), y = msl_get(b, i);
    msl_set(r, i, (y < x || x != x) ? y : x);
  }
  return r;
}
template <MSL_ANY(T)>
METAL_FUNC T max(T a, T b) {
  T r{};
  MSL_EACH(T) {
    const auto x = msl_get(a, i), y = msl_get(b, i);
    msl_set(r, i, (x < y || x != x) ? y : x);
  }
  return r;
}
template <MSL_ANY(T)>
METAL_FUNC T clamp(T x, T a, T b) { return min(max(x, a), b); }
template <MSL_ANY(T)>
METAL_FUNC T abs(T a) {
  T r{};
  MSL_EACH(T) {
    const auto x = msl_get(a, i);
    msl_set(r, i, x < 0 ? static_cast<msl_elem<T>>(-x) : static_cast<msl_elem<T>>(x == 0 ? 0 : x));
  }
  return r;
}
template <MSL_ANY(T)>
METAL_FUNC msl_elem<T> dot(T a, T b) {
  static_assert(msl_type<T>::n > 1, "dot takes vectors");
  msl_elem<T> r = 0;
  MSL_EACH(T) r += a[i] * b[i];
  return r;
}
template <MSL_ANY(T)>
METAL_FUNC T select(T a, T b, bool c) { return c ? b : a; }
template <class T, class C,
          typename msl_if<(msl_type<T>::n > 1 && msl_type<T>::n == msl_type<C>::n)>::type = 0>
METAL_FUNC T select(T a, T b, C c) {
  T r{};
  MSL_EACH(T) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class T>
METAL_FUNC bool any(T c) {
  bool r = false;
  MSL_EACH(T) r = r || msl_get(c, i);
  return r;
}
template <class T>
METAL_FUNC bool all(T c) {
  bool r = true;
  MSL_EACH(T) r = r && msl_get(c, i);
  return r;
}
template <MSL_FP(T)>
METAL_FUNC bool isnan(T x) { return x != x; }
template <MSL_FP(T)>
METAL_FUNC bool isinf(T x) { return __builtin_isinf(static_cast<float>(x)); }
template <MSL_FP(T)>
METAL_FUNC bool isfinite(T x) { return __builtin_isfinite(static_cast<float>(x)); }

#define MSL_I1(name, expr)                                                       \
  template <MSL_INT(T)>                                                          \
  METAL_FUNC T name(T v) {                                                       \
    T r{};                                                                       \
    MSL_EACH(T) {                                                                \
      const ulong bits = 8 * sizeof(msl_elem<T>);                                \
      const ulong x = static_cast<ulong>(msl_get(v, i)) & (~0ul >> (64 - bits)); \
      msl_set(r, i, static_cast<msl_elem<T>>(expr));                             \
    }                                                                            \
    return r;                                                                    \
  }
MSL_I1(popcount, __builtin_popcountl(x))
MSL_I1(clz, x ? __builtin_clzl(x) - (64 - bits) : bits)
MSL_I1(ctz, x ? __builtin_ctzl(x) : bits)
METAL_FUNC uint extract_bits(uint x, uint off, uint n) {
  return n == 0 ? 0 : (x >> off) & (~0u >> (32 - n));
}
METAL_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
METAL_FUNC int mulhi(int a, int b) { return static_cast<int>((static_cast<long>(a) * b) >> 32); }
METAL_FUNC uint mulhi(uint a, uint b) {
  return static_cast<uint>((static_cast<ulong>(a) * b) >> 32);
}

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT __FLT_MAX__
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define HALF_MAX 6.5504e4f
#define INT_MAX __INT_MAX__
#define UINT_MAX (__INT_MAX__ * 2u + 1u)
#define M_PI_F 3.14159265358979323846f
#define M_LN2_F 0.693147180559945309417f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f

template <class T>
struct numeric_limits;
#define MSL_LIMITS(T, lo, hi, inf)                \
  template <>                                     \
  struct numeric_limits<T> {                      \
    static constexpr T lowest() { return lo; }    \
    static constexpr T min() { return lo; }       \
    static constexpr T max() { return hi; }       \
    static constexpr T infinity() { return inf; } \
  };
MSL_LIMITS(float, -__FLT_MAX__, __FLT_MAX__, __builtin_inff())
MSL_LIMITS(half, half(-65504.0f), half(65504.0f), half(__builtin_inff()))
MSL_LIMITS(bfloat, bfloat(-3.3895314e38f), bfloat(3.3895314e38f), bfloat(__builtin_inff()))
MSL_LIMITS(int, -__INT_MAX__ - 1, __INT_MAX__, 0)
MSL_LIMITS(uint, 0, ~0u, 0)
MSL_LIMITS(short, -32768, 32767, 0)
MSL_LIMITS(ushort, 0, 65535, 0)
MSL_LIMITS(uchar, 0, 255, 0)

template <class A, class B>
struct is_same {
  static constexpr bool value = false;
};

template <class A>
struct is_same<A, A> {
  static constexpr bool value = true;
};

template <class A, class B>
inline constexpr bool is_same_v = is_same<A, B>::value;
template <bool B, class T, class U>
struct conditional {
  typedef T type;
};

template <class T, class U>
struct conditional<false, T, U> {
  typedef U type;
};

template <bool B, class T, class U>
using conditional_t = typename conditional<B, T, U>::type;
template <bool B, class T = void>
struct enable_if {};

template <class T>
struct enable_if<true, T> {
  typedef T type;
};

template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

// ---- Barriers and SIMD-group operations

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
}  // namespace metal

extern "C" {  // in simulator.cpp
void msl_barrier(int whole, int flags, int line);
// Gives data to the lanes of the SIMD-group, and takes all their data into table, lane by lane.
void msl_post(int kind, int line, const void* data, int size, void* table);
int msl_lane(void);
int msl_lanes(void);
void msl_fault(const char* what, int line);
}

// What all operations take: the caller's line, which shows whether all lanes are at the same one.
#define MSL_LINE int line = __builtin_LINE()
// Kind tells operations of one line from each other.
#define MSL_POST(kind, T) \
  T t[32];                \
  msl_post(kind, line, &x, sizeof(T), t);

namespace metal {
inline void threadgroup_barrier(mem_flags f, MSL_LINE) { msl_barrier(1, int(f), line); }
inline void simdgroup_barrier(mem_flags f, MSL_LINE) { msl_barrier(0, int(f), line); }

// lane: an expression of me and n; missing: what happens if there is no such lane, before the
// caller's own value is returned.
#define MSL_SHUFFLE(kind, name, lane, missing)           \
  template <MSL_WORD(T)>                                 \
  inline T name(T x, ushort n, MSL_LINE) {               \
    MSL_POST(kind, T)                                    \
    [[maybe_unused]] const int me = msl_lane();          \
    const int from = lane;                               \
    if (from >= 0 && from < msl_lanes()) return t[from]; \
    missing;                                             \
    return x;                                            \
  }
MSL_SHUFFLE(1, simd_shuffle, int(n), msl_fault("simd_shuffle: no such lane", line))
MSL_SHUFFLE(2, simd_shuffle_xor, me ^ int(n), msl_fault("simd_shuffle_xor: no such lane", line))
MSL_SHUFFLE(3, simd_shuffle_up, me - int(n), )
MSL_SHUFFLE(4, simd_shuffle_down, me + int(n), )
MSL_SHUFFLE(5, simd_broadcast, int(n), msl_fault("simd_broadcast: no such lane", line))
MSL_SHUFFLE(6, simd_shuffle_rotate_up, (me - int(n) + 32 * 32) % 32, )
MSL_SHUFFLE(7, simd_shuffle_rotate_down, (me + int(n)) % 32, )

template <MSL_WORD(T)>
inline T simd_broadcast_first(T x, MSL_LINE) {
  MSL_POST(8, T)
  return t[0];
}

#define MSL_REDUCE(kind, name, P, combined) \
  template <P(T)>                           \
  inline T name(T x, MSL_LINE) {            \
    MSL_POST(kind, T)                       \
    T a = t[0];                             \
    for (int i = 1; i < msl_lanes(); ++i) { \
      const T b = t[i];                     \
      a = combined;                         \
    }                                       \
    return a;                               \
  }
MSL_REDUCE(10, simd_sum, MSL_WORD, a + b)
MSL_REDUCE(11, simd_product, MSL_WORD, a * b)
MSL_REDUCE(12, simd_max, MSL_WORD, max(a, b))
MSL_REDUCE(13, simd_min, MSL_WORD, min(a, b))
MSL_REDUCE(14, simd_or, MSL_INT, a | b)
MSL_REDUCE(15, simd_and, MSL_INT, a & b)
MSL_REDUCE(16, simd_xor, MSL_INT, a ^ b)

#define MSL_SCAN(kind, name, end)               \
  template <MSL_WORD(T)>                        \
  inline T name(T x, MSL_LINE) {                \
    MSL_POST(kind, T)                           \
    T a{};                                      \
    for (int i = 0; i < end; ++i) a = a + t[i]; \
    return a;                                   \
  }
MSL_SCAN(17, simd_prefix_inclusive_sum, msl_lane() + 1)
MSL_SCAN(18, simd_prefix_exclusive_sum, msl_lane())

struct simd_vote {
  typedef ulong vote_t;
  vote_t v;
  explicit constexpr simd_vote(vote_t x) : v(x) {}
  explicit constexpr operator vote_t() const { return v; }
  bool all() const { return v == 0xFFFFFFFFul; }
  bool any() const { return v != 0; }
};
inline ulong msl_ballot(int kind, bool x, int line) {
  MSL_POST(kind, bool)
  ulong votes = 0;
  for (int i = 0; i < msl_lanes(); ++i) votes |= ulong(t[i]) << i;
  return votes;
}
inline bool simd_any(bool x, MSL_LINE) { return msl_ballot(20, x, line) != 0; }
inline bool simd_all(bool x, MSL_LINE) { return msl_ballot(21, !x, line) == 0; }
inline simd_vote simd_ballot(bool x, MSL_LINE) { return simd_vote(msl_ballot(22, x, line)); }
inline bool simd_is_first() { return msl_lane() == 0; }

// ---- 8x8 matrices: a lane holds two neighbouring elements of one row, in the layout that MLX's
// own kernels rely on (Apple documents none)

template <class T, int R = 8, int C = R>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8 && msl_is<T>::fp, "simdgroup_matrix: half, bfloat or float, 8x8");
  typedef vec<T, 2> storage_type;
  storage_type e;
  simdgroup_matrix() {}
  explicit simdgroup_matrix(T x) : e(x) {}
  thread storage_type& thread_elements() thread { return e; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int R, int C>
METAL_FUNC simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  return simdgroup_matrix<T, R, C>(x);
}

// Row and first column of lane l's elements, and the lane of element (r, c).
METAL_FUNC int msl_row(int l) { return ((l >> 2) & 4) | ((l >> 1) & 3); }
METAL_FUNC int msl_col(int l) { return (((l >> 2) & 2) | (l & 1)) * 2; }
METAL_FUNC int msl_owner(int r, int c) {
  return ((r & 4) << 2) | ((r & 3) << 1) | ((c & 4) << 1) | ((c >> 1) & 1);
}

template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
    simdgroup_matrix<C, 8, 8> c, MSL_LINE) {
  struct Pair {
    vec<A, 2> a;
    vec<B, 2> b;
  };
  Pair x;
  x.a = a.e;
  x.b = b.e;
  MSL_POST(30, Pair)
  if (msl_lanes() != 32) msl_fault("simdgroup_matrix in a partial SIMD-group", line);
  const int row = msl_row(msl_lane()), col = msl_col(msl_lane());
  float first = c.e.x, second = c.e.y;
  for (int k = 0; k < 8; ++k) {
    const Pair left = t[msl_owner(row, k)], right = t[msl_owner(k, col)];
    const float factor = (k & 1) ? left.a.y : left.a.x;
    first = __builtin_fmaf(factor, right.b.x, first);
    second = __builtin_fmaf(factor, right.b.y, second);
  }
  d.e.x = D(first);
  d.e.y = D(second);
}
template <class D, class A, class B>
inline void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                               simdgroup_matrix<B, 8, 8> b, MSL_LINE) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<float, 8, 8>(0.0f), line);
}

// Without address spaces the two versions would be the same function.
#define MSL_MATRIX_MEMORY(space)                                                                 \
  template <class T>                                                                             \
  inline void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& d, const space T* p,              \
                             ulong row = 8, ulong2 at = 0, bool transposed = false) {            \
    const ulong r = msl_row(msl_lane()), c = msl_col(msl_lane());                                \
    for (ulong i = c; i < c + 2; ++i)                                                            \
      d.e[i - c] = transposed ? p[(i + at.y) * row + r + at.x] : p[(r + at.y) * row + i + at.x]; \
  }                                                                                              \
  template <class T>                                                                             \
  inline void simdgroup_store(simdgroup_matrix<T, 8, 8> d, space T* p, ulong row = 8,            \
                              ulong2 at = 0, bool transposed = false) {                          \
    const ulong r = msl_row(msl_lane()), c = msl_col(msl_lane());                                \
    for (ulong i = c; i < c + 2; ++i)                                                            \
      p[transposed ? (i + at.y) * row + r + at.x : (r + at.y) * row + i + at.x] = d.e[i - c];    \
  }
MSL_MATRIX_MEMORY(device)
#ifdef MSL_CHECK
MSL_MATRIX_MEMORY(threadgroup)
#endif
}  // namespace metal

// ---- What MLX's prelude (utils.h, bf16.h, defines.h) adds before a custom kernel

using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
typedef float float32_t;
struct complex64_t {
  float real;
  float imag;
};

template <class T>
struct Limits {
  static constexpr constant T max = numeric_limits<T>::max(), min = numeric_limits<T>::lowest();
  static constexpr constant T finite_max = max, finite_min = min;
};
#define MSL_FLOAT_LIMITS(T)                                               \
  template <>                                                             \
  struct Limits<T> {                                                      \
    static constexpr constant T max = numeric_limits<T>::infinity();      \
    static constexpr constant T min = -numeric_limits<T>::infinity();     \
    static constexpr constant T finite_max = numeric_limits<T>::max();    \
    static constexpr constant T finite_min = numeric_limits<T>::lowest(); \
  };
MSL_FLOAT_LIMITS(float)
MSL_FLOAT_LIMITS(half)
MSL_FLOAT_LIMITS(bfloat)

inline float log1p(float x) {
  const float y = 1.0f + x;
  return y == 1.0f ? x : x * (metal::log(y) / (y - 1.0f));
}
inline uint16_t bfloat16_to_uint16(const bfloat16_t x) { return as_type<uint16_t>(x); }
inline bfloat16_t uint16_to_bfloat16(const uint16_t x) { return as_type<bfloat16_t>(x); }
template <bool B, typename T, typename U>
struct ConditionalType {
  using type = U;
};
template <typename T, typename U>
struct ConditionalType<true, T, U> {
  using type = T;
};
template <typename U, typename T>
inline U cast_to(T x) {
  return static_cast<U>(x);
}
template <typename U>
struct WorkPerThread {
  static constexpr int constant n = 8 / sizeof(U);
};
#define MLX_MTL_CONST static constant constexpr const
#define MLX_MTL_LOOP_UNROLL _Pragma("clang loop unroll(full)")
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")
template <typename T, typename U>
inline T ceildiv(T N, U M) {
  return (N + M - 1) / M;
}

#ifdef MSL_CHECK
// Words of C++ that Metal has not.
#define double msl_double_is_not_in_Metal
#define goto msl_goto_is_not_in_Metal
#define virtual msl_virtual_is_not_in_Metal
#define new msl_new_is_not_in_Metal
#define delete msl_delete_is_not_in_Metal
#define throw msl_throw_is_not_in_Metal
#define try msl_try_is_not_in_Metal
#define dynamic_cast msl_dynamic_cast_is_not_in_Metal
#define typeid msl_typeid_is_not_in_Metal
#define thread_local msl_thread_local_is_not_in_Metal
#define asm msl_asm_is_not_in_Metal
#endif
