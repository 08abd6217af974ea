"""Kernels with one fault each: what the kernel tests have to catch.

A mutant is the text of one file of ``metal/`` with one change: a barrier is gone, a comparison or
a bound is off by one, a shuffle goes to another lane. Places are found by pattern, never by line
number, so the list follows the kernels as they change.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vllm_metal_tq.kernels import launch

KERNELS = ["encode", "gather", "decode_mma", "decode_fma", "merge"]
HEADERS = ["attention.h", "decode.h", "encode.h", "gather.h", "dialect_metal.h"]
CENTRING = ["centre.h", "turn.h"]
TRELLIS = ["trellis.h", "viterbi.h", "decode_mma.h", "decode_fma.h"]
FILES = [*(f"{name}.metal" for name in KERNELS), *HEADERS, *CENTRING, *TRELLIS]


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: the file's name in ``metal/``.
        number: the line that is changed.
        before: that line as it is, without indentation.
        line: that line as it becomes; a number follows where the file has several that are equal.
        text: the whole file as it becomes.
    """

    file: str
    number: int
    before: str
    line: str
    text: str

    def __str__(self):
        return f"{self.file}:{self.number}: {self.before}  ->  {self.line}"


def _more(match: re.Match) -> str:
    return re.sub(r"\d+$", lambda number: str(int(number[0]) + 1), match[0])


def _twice(match: re.Match) -> str:
    return str(int(match[0]) * 2)


# What is changed, by a pattern, and what it becomes.
_CHANGES: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"\b(?:threadgroup|simdgroup)_barrier\([^)]*\);", "no_barrier;"),
    # Comparisons; brackets of templates have no spaces on both sides.
    (r"(?<= )<(?= )", "<="),
    (r"(?<= )<=(?= )", "<"),
    (r"(?<= )>(?= )", ">="),
    (r"(?<= )>=(?= )", ">"),
    # Which lane, SIMD-group or column does something for all of them.
    (r"(?<= == )0\b(?!\.)", "1"),
    # The last one, the one behind the last one, a division that rounds up, a clamp at zero.
    (r"(?<=[\w)\]] )- 1(?![\w.])", "- 0"),
    (r"(?<=[\w)\]] )\+ 1(?![\w.])", "+ 0"),
    (r"(?<= \+ )15(?=\) / 16)", "16"),
    (r"(?<=, )0(?=\))", "-1"),
    # The lanes that exchange values, lists of lane masks, what the bits of a lane mean.
    (r"(?<=, )ushort\(", "ushort(1 ^ "),
    (r"\b[1-9]\d*(?=[\d, ]*\}(?:;|$))", _twice),
    (r"(?:\blane|\(lane\)|\beighth) (?:&|>>) \d+", _more),
    # Whether there is centring, the flags of centred tokens, their positions, quarters of a turn.
    (r"\bCENTRE(?= \?)|(?<=if \()CENTRE\b", "!CENTRE"),
    (r"(?<=\+ )CENTRE\b", "0"),
    (r"0x8000u", "0x4000u"),
    (r"\bshift \+ ", ""),
    (r"(?:\bquarter|\(step\)) (?:&|\+|<<|>>) \d+", _more),
]


def mutants(file: str) -> list[Mutant]:
    """All mutants of a file of ``metal/``, in the order of its lines."""
    source = (launch.SOURCES / file).read_text()
    code = re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), source)
    places = [
        (match, match.expand(new) if isinstance(new, str) else new(match))
        for pattern, new in _CHANGES
        for match in re.finditer(pattern, code, re.MULTILINE)
    ]
    places.sort(key=lambda place: place[0].start())
    seen: Counter[str] = Counter()
    return [_mutant(file, source, match, new, seen) for match, new in places]


def _mutant(file: str, source: str, match: re.Match, new: str, seen: Counter) -> Mutant:
    start, end = match.span()
    text = source[:start] + new + source[end:]
    number = source.count("\n", 0, start) + 1
    before, line = (
        re.sub(r"\s*//.*", "", x.splitlines()[number - 1]).strip() for x in (source, text)
    )
    seen[line] += 1
    name = line if seen[line] == 1 else f"{line} #{seen[line]}"
    return Mutant(file, number, before, name, text.replace("no_barrier;", ";"))


# ---- Mutants that change nothing

_EQUIVALENT = """
= how many lanes share the work is free: lanes without any have queries of zero or are not stored
decode_fma.metal: constexpr int KE = D < 64 ? 8 : 16;
viterbi.h: constexpr int PARTS = ITEMS >= 32 ? 1 : ITEMS > 16 ? 2 : ITEMS > 8 ? 4 : 8;
viterbi.h: constexpr int PARTS = ITEMS > 32 ? 1 : ITEMS >= 16 ? 2 : ITEMS > 8 ? 4 : 8;
viterbi.h: constexpr int PARTS = ITEMS > 32 ? 1 : ITEMS > 16 ? 2 : ITEMS >= 8 ? 4 : 8;
decode_fma.metal: constexpr int VQ = VROWS * VSPLIT < 8 ? 4 : VROWS * VSPLIT <= 16 ? 2 : 1;
decode_fma.metal: constexpr int VQ = VROWS * VSPLIT <= 8 ? 4 : VROWS * VSPLIT < 16 ? 2 : 1;
= there is no tail, so the loop over its tokens is not entered
merge.metal: if (TAIL >= 0) {
merge.metal: const size_t at = size_t(ring + t % (TAIL >= 0 ? TAIL : 1)) * head_dim;
= some splits more, none of which is there
merge.metal: for (int first = sg; first <= splits; first += AT_ONCE * NSG) {
= a chunk more, whose queries are zero
decode_fma.metal: constexpr int NKC = (D + 8 * KE - 0) / (8 * KE);
= a minimum of two that are equal
decode_fma.metal: constexpr int VLS = VD * VL / 2 <= 16 ? VD * VL / 2 : 16;
decode_mma.metal: constexpr int VLS = VLB <= 16 ? VLB : 16;
= there is no high plane, so what is loaded of it is not used
decode_fma.metal: constexpr int VHB = VH >= 0 ? VD * VH / 2 : 4;
decode_fma.metal: if (KH >= 0) {
decode_fma.metal: vh[i][p] = VH >= 0 ? tq_load1(base + high_at + i * VQ * VHB + p * (VHB / VHP)) : 0;
decode_mma.metal: if (KH >= 0) tq_load<KHB>(kh[b][c][i][t], high + (2 * D * (KL + i * KHP) + unit * 256 * KHP + t * dims * KHP));
decode_mma.metal: if (VH >= 0) tq_load<VHB>(vh[b][u][i], high + (2 * D * (KB + VL + i * VHP) + u * 256 * VHP));
= a shift by 0, the rest of a division by 1
decode_fma.metal: if (KLB <= 4 && KSPLIT >= 1) kl[i][c][0] >>= part * (KE / 2 * KL);
decode_fma.metal: if (KHB <= 4 && KSPLIT >= 1) kh[i][c][0] >>= part * (KE / 2 * KH);
decode_fma.metal: if (VH == 1 && VSPLIT >= 1) vh[i][p] >>= value_half * VE;
= sub-blocks are tested token by token that need not be; rows are 8 at most, less than a sub-block
decode_fma.metal: const int last_row = (first_column + columns - 0) / G;
decode_mma.metal: const int last_row = (first_column + columns - 0) / G;
decode_fma.metal: const int begin = max(window >= 0 ? see_from + first_row : 0, 0);
decode_mma.metal: const int begin = max(window >= 0 ? see_from + first_row : 0, 0);
decode_fma.metal: const int end_of_all = min(paged, rows_from + first_row + 0);
decode_mma.metal: const int end_of_all = min(paged, rows_from + first_row + 0);
decode_fma.metal: const int begin_of_all = window >= 0 ? see_from + last_row : 0;
decode_mma.metal: const int begin_of_all = window >= 0 ? see_from + last_row : 0;
decode_fma.metal: if (sub * 16 <= begin_of_all || sub * 16 + 16 > end_of_all) {
decode_fma.metal: if (sub * 16 < begin_of_all || sub * 16 + 16 >= end_of_all) {
decode_mma.metal: if (token <= begin_of_all || token + NB * 16 > end_of_all) {
decode_mma.metal: if (token < begin_of_all || token + NB * 16 >= end_of_all) {
= see_from is used where there is a window only
decode_fma.metal: const int see_from = window >= 0 ? rows_from + 1 - window : 0;
decode_mma.metal: const int see_from = window >= 0 ? rows_from + 1 - window : 0;
= -1 / 16 is 0
decode_fma.metal: const int begin = max(window > 0 ? see_from + first_row : 0, -1);
decode_mma.metal: const int begin = max(window > 0 ? see_from + first_row : 0, -1);
= no sub-block: the loop is not entered, whether sub1 is sub0 or less
= a column more in memory that holds several times N of them, and nobody reads it
decode_fma.metal: for (int n = sg; n <= N; n += NSG) {
decode_mma.metal: for (int n = sg; n <= N; n += NSG) {
= columns that are not stored take the query, or the bounds, of another row
decode_fma.metal: const int column = first_column + min(n, columns - 0);
decode_mma.metal: const int column = first_column + min(n, columns - 0);
decode_fma.metal: const int query_row = (first_column + min(2 * h + odd, columns - 0)) / G;
decode_mma.metal: const int row0 = (first_column + min(n0, columns - 0)) / G;
decode_mma.metal: const int row1 = (first_column + min(n1, columns - 0)) / G;
= a condition around it, in front of it or inside is the stricter one
viterbi.h: for (int first = 0; first <= ITEMS * PARTS; first += ring::THREADS) {
decode_fma.metal: q[n][c][e] = TQ_QUERY(d < D ? shared[n * D + (d <= D ? d : 0)] : 0.0f);
decode_fma.metal: if (2 * h + 1 < N) acc[2 * h + 0 < N ? 2 * h + 1 : 0][e] *= odd ? r : other;
decode_fma.metal: if (2 * h + 1 < N) acc[2 * h + 1 <= N ? 2 * h + 1 : 0][e] *= odd ? r : other;
centre.h: for (int i = 0; i <= FOLDS; ++i) { #2
= lanes without dimensions read what follows in the page, its scales at most, and do not use it
decode_fma.metal: const int row = value_row <= VROWS ? value_row : 0;
decode_mma.metal: const int mine = (row <= rows ? row : rows - 1) * 4 + quad;
decode_fma.metal: const int at = (group + 4 * i) * dims + (from <= dims ? from : 0);
decode_fma.metal: tq_key_bits<D, KE, KT ? KB : 1>(kt[c], base, group, d <= D ? d : 0);
= there are no taps of an eighth element, nor of a fourth parity
trellis.h: for (int t = 0; t <= 7; ++t) {
trellis.h: for (int j = 0; j <= 3; ++j) {
viterbi.h: for (int t = 0; t <= 7; ++t) {
viterbi.h: for (int j = 0; j <= 3; ++j) {
viterbi.h: for (int i = 0; i <= 21; ++i) reversed |= (taps >> i & 1) << (i / 7 * 7 + 6 - i % 7);
= places are numbers of six bits
viterbi.h: for (int q = 0; q <= 6; ++q) {
= what is loaded last is not used
viterbi.h: if (back <= ring::BLOCKS - 1) state = way[(ring::BLOCKS - 2 - back) * 128 + (state >> 1) * 4 + (state & 1u)];
= not seen, though out of bounds: clang moves the load into the loop, which is then not entered
decode_fma.metal: int block = block_table[seq * shape[4] + min(sub0, max(sub1 - 0, 0)) / NSB];
decode_fma.metal: int block = block_table[seq * shape[4] + min(sub0, max(sub1 - 1, -1)) / NSB];
= not seen, though out of bounds: all threadgroup memory counts as one piece, here written later
centre.h: for (int i = start; i <= W * C * P; i += step) {
= not seen, though out of bounds: clang checks no index of a vector of which it writes one element
decode_mma.metal: for (int p = 0; p <= NPAIR; ++p) {
= another sub-block of the same page, whose tokens are all masked
decode_mma.metal: const int sub = min(sub0 + tile * NB + b, nsub - 0);
= tq_prefetch does nothing in Metal
decode_mma.metal: const int sub = min(sub0 + (tile + STEP) * NB + b, nsub - 0);
decode_mma.metal: if (lane == 1) {
= all lanes, or SIMD-groups, that could store it have the same value
decode_fma.metal: const float other = simd_shuffle_xor(r, ushort(1 ^ 4));
decode_fma.metal: if (token_of_lane == 1 && n < N) {
decode_fma.metal: if (d == 1) {
decode_mma.metal: if (row == 1) {
decode_mma.metal: if (d == 1) {
merge.metal: if (lane == 1) {
merge.metal: if (lane == 1) { #2
merge.metal: if (sg == 1) {
encode.metal: if (live && p == 1) *(device ushort*)(row + SCALES_AT) = ushort(scale);
encode.metal: if (live && p == 1) *(device ushort*)(row + SCALES_AT + 2) = ushort(scale);
= a tile more, of dimensions that are not stored
decode_mma.metal: for (int j = 0; j <= NT; ++j) { #3
= windows that are computed at once are as many for every reader
centre.h: template <int N> TQ_FN constexpr int tq_windows() { return N >= 4 ? 1 : N > 2 ? 2 : N > 1 ? 4 : 8; }
centre.h: template <int N> TQ_FN constexpr int tq_windows() { return N > 4 ? 1 : N >= 2 ? 2 : N > 1 ? 4 : 8; }
= columns that are not stored take f of another token, or what lies behind f
decode_fma.metal: const float mine = f[(S - ready + token_of_lane) * N + min(2 * h + odd, N - 0)];
= either is right when both sides are equal
viterbi.h: const float unit = step >= 1e-30f ? tq_inverse(step) : 0.0f;
viterbi.h: if (k == 0 || distance <= least) least = distance, u = k;
decode_fma.metal: constexpr int F = CENTRE ? 16 * NW + (S * N >= COEFFICIENTS ? S * N : COEFFICIENTS) : 0;
decode_fma.metal: constexpr int POOL = F >= N * D ? (F + 3) / 4 * 4 : N * D;
decode_mma.metal: constexpr int POOL = F >= N * D ? F : N * D;
decode_fma.metal: for (int h = 0; h < NH; ++h) exceeds = exceeds || s[h] >= m[h] + 6.0f;
decode_mma.metal: if (simd_any(top0 >= m0 + room || top1 > m1 + room)) {
decode_mma.metal: if (simd_any(top0 > m0 + room || top1 >= m1 + room)) {
decode_fma.metal: if (SPARSE && !simd_any(heaviest > numbers[2])) continue;
decode_mma.metal: if (SPARSE && !simd_any(max(max(w.x, w.y), max(w.z, w.w)) > numbers[2])) continue;
= a scale of exactly 1024 is too large for a weight of exactly 64 alone
decode_mma.metal: const float room = largest <= 1024.0f ? 6.0f : 0.0f;
= a minimum of two that are equal
attention.h: for (int k = 1; k < (P <= 32 ? P : 32); k *= 2) {
= a byte more, whose bits lie above those that are used
gather.h: for (int i = 0; i <= HIGH; ++i) b |= uint(page[high[d / 8 * HIGH + i]]) << (8 * i);
= a field may lie in either place, as long as tq_pair and tq_key_offset agree
decode.h: return field % (HIGH == 0 && LOW < 2 ? 10 / LOW : 8 / LOW) * LOW;
= the mask has no bits
decode.h: if (HIGH >= 0) {
= a shift by 0, to the left or to the right
decode.h: pair |= (up > 0 ? high << (up >= 0 ? up : 0) : high >> (up >= 0 ? 0 : -up)) & (high_mask + zero);
decode.h: pair |= (up >= 0 ? high << (up > 0 ? up : 0) : high >> (up >= 0 ? 0 : -up)) & (high_mask + zero);
decode.h: pair |= (up >= 0 ? high << (up >= 0 ? up : 0) : high >> (up > 0 ? 0 : -up)) & (high_mask + zero);
= the branch is that of s above 0
decode.h: const uint middle = ((1u << BITS) - 1u) << (s >= 0 ? s - 1 : 0);
= c/b is 0 up to 4 bits
decode.h: if (LOW + HIGH >= 4) {
encode.h: if (BITS >= 4) {
"""  # noqa: E501


def _equivalent() -> Iterator[tuple[str, str, str]]:
    reason = ""
    for row in _EQUIVALENT.strip().splitlines():
        if row.startswith("= "):
            reason = row[2:]
        else:
            file, line = row.split(": ", 1)
            yield file, line, reason


EQUIVALENT = list(_equivalent())
"""File, line as it becomes (``Mutant.line``), and why no result can tell it from the original."""
