// The turns of the rotary embedding, from integer phases.

// Cosine and sine of a phase, of which 2^32 is a full turn: polynomials on an eighth of a turn to
// both sides of the nearest quarter, good to 1.2e-7.
TQ_FN float2 tq_turn(uint phase) {
  const uint quarter = (phase + 0x20000000u) >> 30;
  const float x = float(int(phase - (quarter << 30))) * 1.46291807926715968e-9f;  // 2 pi / 2^32
  const float square = x * x;
  float sine = fma(square, -1.9515295891e-4f, 8.3321608736e-3f);
  sine = fma(square, sine, -1.6666654611e-1f);
  sine = fma(x * square, sine, x);
  float cosine = fma(square, 2.443315711809948e-5f, -1.388731625493765e-3f);
  cosine = fma(square, cosine, 4.166664568298827e-2f);
  cosine = fma(square * square, cosine, fma(square, -0.5f, 1.0f));
  // Each quarter swaps the two and turns the sign of one.
  const uint first = as_type<uint>((quarter & 1u) ? sine : cosine);
  const uint second = as_type<uint>((quarter & 1u) ? cosine : sine);
  float2 turn;
  turn.x = as_type<float>(first ^ ((quarter + 1u) & 2u) << 30);
  turn.y = as_type<float>(second ^ (quarter & 2u) << 30);
  return turn;
}
