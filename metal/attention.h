// What decode and merge share: the rotation, for lanes that hold every 32nd element, and softcap.

// v = H v, not normalised, where a lane holds the elements lane + 32 e of a vector of D = M * 2^k.
// H is MLX's, the product of the Hadamard matrix of size M and Sylvester's of size D / M; or its
// transpose.
template <int D, int M, bool TRANSPOSED> TQ_FN void tq_hadamard(thread float (&v)[D / 32], int lane) {
  constexpr int P = D / M;
  constexpr int E = D / 32;
  TQ_UNROLL
  for (int k = 1; k < (P < 32 ? P : 32); k *= 2) {
    TQ_UNROLL
    for (int e = 0; e < E; ++e) {
      const float other = simd_shuffle_xor(v[e], ushort(k));
      v[e] = (lane & k) ? other - v[e] : v[e] + other;
    }
  }
  if (M == 1) {
    TQ_UNROLL
    for (int k = 1; k < E; k *= 2) {
      TQ_UNROLL
      for (int e = 0; e < E; ++e) {
        if ((e & k) == 0) {
          const float a = v[e], b = v[(e | k) % E];
          v[e] = a + b;
          v[(e | k) % E] = a - b;
        }
      }
    }
  } else {
    float sum[E];
    TQ_UNROLL
    for (int e = 0; e < E; ++e) sum[e] = 0.0f;
    TQ_UNROLL
    for (int i = 0; i < M; ++i) {
      const float x = simd_shuffle(v[i * P / 32], ushort(i * P % 32 + lane % P));
      TQ_UNROLL
      for (int e = 0; e < E; ++e) {
        const int row = lane / P + (32 / P) * e;
        const uint sign = TRANSPOSED ? tq_hadamard_row(M, i) >> row : tq_hadamard_row(M, row) >> i;
        sum[e] += (sign & 1u) ? -x : x;
      }
    }
    TQ_UNROLL
    for (int e = 0; e < E; ++e) v[e] = sum[e];
  }
}

// softcap * tanh(x) for a logit 2 x log2(e), in base 2: softcap is given times log2(e).
TQ_FN float tq_softcap(float x, float softcap) {
  return softcap * (1.0f - 2.0f / (fast::exp2(x) + 1.0f));
}
