"""Sequences that step together hold what each would hold alone, whatever happens to them."""

from functools import lru_cache

import centres
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from rows import rows_of

from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.pages import OutOfBlocks, PagePool
from vllm_metal_tq.sequences import Sequences
from vllm_metal_tq.tail import FEW, TAIL

HEADS, HEAD_DIM, BLOCK = 1, 32, 16
LAYOUT = PageLayout(TurboQuantConfig(8, 8, BLOCK), HEAD_DIM)
KINDS = 64  # of tokens: the key and value of a token are those of its kind
KEYS, VALUES = (mx.random.normal((KINDS, HEADS, HEAD_DIM), key=mx.random.key(i)) for i in (0, 1))


def made(count=1, max_blocks=None, **options):
    return Sequences(PagePool(LAYOUT, HEADS, max_blocks), count, **options)


def arrays(kinds):
    """Keys and values ``(B, HEADS, L, HEAD_DIM)`` of token kinds ``(B, L)``."""
    return (x[mx.array(kinds)].swapaxes(1, 2) for x in (KEYS, VALUES))


def store(sequences, kinds, columns=None):
    sequences.store(*arrays(kinds), columns)


@lru_cache
def stored_alone():
    """The rows of all kinds, whatever encodes them on this machine."""
    sequences = made()
    store(sequences, [list(range(KINDS))])
    return rows_of(sequences.tables[0])


def check(sequences, expected):
    """Pages, tails and block table hold ``expected``: of each sequence its token kinds."""
    shown = np.array(sequences.block_table)
    for i, (table, kinds) in enumerate(zip(sequences.tables, expected, strict=True)):
        assert np.array_equal(rows_of(table), stored_alone()[:, kinds])
        assert shown[i, : len(table.blocks)].tolist() == table.blocks
        if length := sequences.tail.lengths[i]:
            (keys, _) = sequences.tail.ordered(i, table.num_tokens)
            assert mx.array_equal(keys, KEYS[mx.array(kinds[-length:])].swapaxes(0, 1))


class AgainstLists(RuleBasedStateMachine):
    """Batches of one pool against lists of token kinds: with a limit, a budget and padding."""

    BUDGET, LIMIT, KEPT = 24, {"max_kv_size": 48}, BLOCK  # the first KEPT tokens stay

    def __init__(self):
        super().__init__()
        first = made(1, self.BUDGET, **self.LIMIT)
        self.pool, self.batches, self.lists = first.pool, [first], [[[]]]

    @rule(data=st.data(), length=st.sampled_from([1, 1, 2, 8, 9, 33, 60]), ragged=st.booleans())
    def store(self, data, length, ragged):
        batch, lists = self.one(data)
        kinds = [[data.draw(st.integers(0, KINDS - 1))] * length for _ in lists]
        columns = [slice(0, length)] * len(lists)
        if ragged:
            ends = (sorted(data.draw(st.tuples(*[st.integers(0, length)] * 2))) for _ in lists)
            columns = [slice(*x) for x in ends]
        try:
            store(batch, kinds, columns)
        except OutOfBlocks:
            return  # and nothing has changed
        for i, (new, some) in enumerate(zip(kinds, columns, strict=True)):
            dropped = len(lists[i]) + len(new[some]) - batch.lengths[i]
            assert dropped % BLOCK == 0
            lists[i] = lists[i][: self.KEPT] + lists[i][self.KEPT + dropped :] + new[some]

    @rule(data=st.data(), count=st.integers(0, 12))
    def trim(self, data, count):
        batch, lists = self.one(data)
        count = min(count, *map(len, lists))
        if batch.offsets == batch.lengths:
            batch.trim(count)
            lists[:] = [x[: len(x) - count] for x in lists]

    @rule(data=st.data())
    def take(self, data):
        batch, lists = self.one(data)
        which = data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=3))
        self.batches.append(batch.take(which))
        self.lists.append([list(lists[i]) for i in which])

    @rule(data=st.data())
    def keep(self, data):
        batch, lists = self.one(data)
        which = data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=3))
        batch.keep(which)
        lists[:] = [list(lists[i]) for i in which]

    @precondition(lambda self: sum(map(len, self.lists)) < 8)
    @rule(data=st.data())
    def extend(self, data):
        (batch, lists), (others, more) = self.one(data), self.one(data)
        if batch is not others:
            batch.extend(others)
            lists += [list(x) for x in more]

    @precondition(lambda self: len(self.batches) > 1)
    @rule(data=st.data())
    def free(self, data):
        i = data.draw(st.integers(0, len(self.batches) - 1))
        del self.batches[i], self.lists[i]

    def one(self, data):
        i = data.draw(st.integers(0, len(self.batches) - 1))
        return self.batches[i], self.lists[i]

    @invariant()
    def all_hold_what_the_lists_hold(self):
        for batch, lists in zip(self.batches, self.lists, strict=True):
            check(batch, lists)

    def teardown(self):
        self.batches.clear()
        assert self.pool.num_used == 0


class InAWindow(AgainstLists):
    """The same where the oldest blocks go with the first among them."""

    WINDOW = 30
    LIMIT, KEPT = {"window": WINDOW}, 0

    @rule(data=st.data(), count=st.integers(1, FEW))
    def trim_in_the_window(self, data, count):
        batch, lists = self.one(data)
        if count > batch.trimmable:
            with pytest.raises(ValueError, match=f"{count} tokens cannot be trimmed"):
                batch.trim(count)
        else:
            batch.trim(count)
            lists[:] = [x[: len(x) - count] for x in lists]

    @invariant()
    def all_that_is_seen_is_there(self):
        for batch in self.batches:
            for stored, seen in zip(batch.lengths, batch.offsets, strict=True):
                assert stored >= min(self.WINDOW - 1, seen)


TestAgainstLists, TestInAWindow = AgainstLists.TestCase, InAWindow.TestCase
for case in (TestAgainstLists, TestInAWindow):
    case.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def kinds_of(*lengths):
    return [[(7 * i + n) % KINDS for n in range(length)] for i, length in enumerate(lengths)]


def test_a_chunk_that_does_not_fit_drops_nothing_before_it_is_refused():
    sequences = made(max_blocks=5, max_kv_size=48)
    kinds = kinds_of(64)
    store(sequences, kinds)
    with pytest.raises(OutOfBlocks):
        store(sequences, kinds_of(80))
    check(sequences, kinds)


def test_forks_in_one_batch_copy_a_shared_block_once_less_than_they_are():
    first = made(max_blocks=2)
    store(first, kinds_of(8))
    both = first.take([0, 0])
    del first
    store(both, [[1], [2]])
    check(both, [kinds_of(8)[0] + [1], kinds_of(8)[0] + [2]])


def test_a_chunk_of_padding_alone_changes_nothing_and_gives_zeros():
    sequences = made(2)
    store(sequences, kinds_of(5, 5))
    store(sequences, kinds_of(4, 4), [slice(0, 0), slice(4, 4)])
    assert sequences.lengths == [5, 5]
    output = sequences.attend(mx.ones((2, 2, 4, HEAD_DIM)), *arrays(kinds_of(4, 4)), scale=1.0)
    assert output.shape == (2, 2, 4, HEAD_DIM)
    assert not output.any()


def test_sequences_in_a_batch_that_drop_blocks_attend_as_alone():
    batch, alone = made(1, max_kv_size=48), made(1, max_kv_size=48)
    for one in (batch, alone):
        store(one, kinds_of(48))
    short = made(1, max_kv_size=48)
    store(short, kinds_of(3))
    batch.extend(short)
    for step in range(3):
        queries = mx.random.normal((2, 2, 1, HEAD_DIM), key=mx.random.key(step))
        store(batch, [[step], [step]])
        store(alone, [[step]])
        together, single = (
            one.attend(q, *arrays([[step]] * len(one)), scale=1.0)
            for one, q in ((batch, queries), (alone, queries[:1]))
        )
        assert mx.abs(together[0] - single[0]).max().item() < 1e-5


class TestOthersThatCannotJoin:
    def refused(self, ours, theirs):
        with pytest.raises(
            ValueError, match="must have the same widths, block size, limit, window and"
        ):
            ours.extend(theirs)
        assert len(ours) == len(ours.tail.lengths) == len(ours.offsets) == 1

    def test_other_widths(self):
        other = PagePool(PageLayout(TurboQuantConfig(4, 8, BLOCK), HEAD_DIM), HEADS)
        self.refused(made(), Sequences(other))

    def test_another_limit(self):
        self.refused(made(max_kv_size=48), made())

    def test_another_window(self):
        self.refused(made(window=48), made(window=64))

    def test_another_centre_unless_it_says_the_same(self):
        one, same, other = (centres.random(HEADS, HEAD_DIM, seed=seed) for seed in (0, 0, 1))
        self.refused(made(centre=one), made(centre=other))
        self.refused(made(centre=one), made())
        ours = made(centre=one)
        ours.extend(made(centre=same))
        assert len(ours) == 2

    def test_too_many_for_the_pool(self):
        ours, theirs = made(max_blocks=2), made(2)
        store(ours, kinds_of(20))
        store(theirs, kinds_of(5, 5))
        with pytest.raises(OutOfBlocks):
            ours.extend(theirs)
        check(ours, kinds_of(20))
        assert len(ours.tail.lengths) == 1


class TestMemory:
    def peak(self, change):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        change()
        return mx.get_peak_memory() - before

    def test_copying_a_shared_block_copies_no_other(self):
        first = made()
        store(first, [[1] * 20_008])
        fork = first.take([0])
        mx.eval(first.pool.pages)

        def change():
            store(fork, [[2]])
            mx.eval(first.pool.pages)

        assert self.peak(change) < first.pool.nbytes / 10

    def test_layers_that_grow_in_one_step_are_copied_one_after_the_other(self):
        layers = [made() for _ in range(8)]
        for layer in layers:
            store(layer, [[1] * 4096])
        rows = mx.zeros((1, HEADS, 1, LAYOUT.row_bytes), mx.uint8)
        mx.eval([layer.pool.pages for layer in layers])

        def change():  # as kernels do it: nothing is evaluated between layers
            for layer in layers:
                layer.pool.write((layer.tables[0].extend(1),), rows)
            mx.eval([layer.pool.pages for layer in layers])

        before = layers[0].pool.nbytes
        added = 8 * before / 8
        assert self.peak(change) < added + 2.5 * before
        assert layers[0].pool.nbytes == 9 / 8 * before


def test_a_fork_can_be_trimmed_like_the_original():
    first = made()
    store(first, kinds_of(40))
    store(first, kinds_of(5))
    fork = first.take([0])
    for one in (first, fork):
        one.trim(3)
        assert one.tail.lengths == [TAIL]
        check(one, [kinds_of(40)[0] + kinds_of(2)[0]])
