from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from rows import rows_of

from vllm_metal_tq.config import BLOCK_SIZES, TurboQuantConfig
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.pages import GROWTH_TOKENS, BlockTable, OutOfBlocks, PagePool

HEADS = 2


def pool(block_size=16, k_width=4, v_width=3):
    return PagePool(PageLayout(TurboQuantConfig(k_width, v_width, block_size), 64), HEADS)


def random_rows(p, count, seed=0):
    shape = (HEADS, count, p.layout.row_bytes)
    return mx.random.randint(0, 256, shape, key=mx.random.key(seed)).astype(mx.uint8)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("chunks", [[1], [16], [17], [5, 11, 1], [300, 1, 1], [16, 240, 16]])
def test_rows_come_back_as_they_went_in(block_size, chunks):
    table = BlockTable(pool(block_size))
    rows = [random_rows(table.pool, n, seed) for seed, n in enumerate(chunks)]
    for piece in rows:
        table.append(piece)
    assert np.array_equal(rows_of(table, sum(chunks)), mx.concatenate(rows, axis=1))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bytes_lie_where_the_layout_says(block_size):
    p = pool(block_size)
    rows = random_rows(p, 3)
    slots = 0, 5 + block_size, block_size - 1
    p.allocate(2)
    p.write((slots,), rows[None])
    pages, offsets = np.array(p.pages), p.layout.byte_offsets
    for i, slot in enumerate(slots):
        block, place = divmod(slot, block_size)
        for head in range(HEADS):
            assert np.array_equal(pages[block, head][offsets[place]], np.array(rows)[head, i])


def test_blocks_need_not_be_in_order():
    p = pool()
    first, second = BlockTable(p), BlockTable(p)
    rows = random_rows(p, 64, 1), random_rows(p, 64, 2)
    for start in range(0, 64, 16):
        first.append(rows[0][:, start : start + 16])
        second.append(rows[1][:, start : start + 16])
    assert first.blocks == [0, 2, 4, 6]
    assert np.array_equal(rows_of(first, 64), rows[0])
    assert np.array_equal(rows_of(second, 64), rows[1])


def test_an_append_changes_no_other_token():
    table = BlockTable(pool())
    rows = random_rows(table.pool, 20)
    table.append(rows)
    before = np.array(table.pool.pages)
    table.append(random_rows(table.pool, 1, seed=9))
    after = np.array(table.pool.pages)
    changed = np.argwhere(before != after)
    own = set(table.pool.layout.byte_offsets[20 % 16].tolist())
    assert set(changed[:, 0]) == {table.blocks[1]}
    assert {int(byte) for byte in changed[:, 2]} <= own


def test_the_pool_grows_by_256_tokens():
    table = BlockTable(pool())
    table.append(random_rows(table.pool, 1))
    assert table.pool.num_blocks * 16 == GROWTH_TOKENS
    assert table.pool.pages.nbytes == GROWTH_TOKENS * HEADS * table.pool.layout.row_bytes
    table.append(random_rows(table.pool, GROWTH_TOKENS))
    assert table.pool.num_blocks * 16 == 2 * GROWTH_TOKENS


def test_an_append_of_one_token_does_not_copy_the_pages():
    table = BlockTable(pool())
    table.append(random_rows(table.pool, 100_000))
    row = random_rows(table.pool, 1)
    table.append(row)
    mx.eval(table.pool.pages)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    table.append(row)
    mx.eval(table.pool.pages)
    assert mx.get_peak_memory() - held < table.pool.pages.nbytes / 100


def test_trimmed_blocks_are_used_again():
    table = BlockTable(pool())
    table.append(random_rows(table.pool, 40))
    table.trim(30)
    assert table.num_tokens == 10
    assert table.blocks == [0]
    rows = random_rows(table.pool, 246, seed=3)
    table.append(rows)
    assert table.pool.num_blocks * 16 == GROWTH_TOKENS
    assert np.array_equal(rows_of(table, 256)[:, 10:], rows)


def test_eviction_drops_the_oldest_blocks_but_the_first():
    table = BlockTable(pool())
    rows = random_rows(table.pool, 70)
    table.append(rows)
    assert table.evict(table.oldest_but_first(17)) == 32
    assert table.num_tokens == 38
    expected = mx.concatenate([rows[:, :16], rows[:, 48:]], axis=1)
    assert np.array_equal(rows_of(table, 38), expected)


def test_eviction_never_drops_the_first_block_or_a_part_of_one():
    table = BlockTable(pool())
    rows = np.array(random_rows(table.pool, 40))
    table.append(mx.array(rows))
    assert table.evict(table.oldest_but_first(10_000)) == 16
    assert table.evict(table.oldest_but_first(10_000)) == 0
    assert np.array_equal(rows_of(table), np.delete(rows, np.s_[16:32], axis=1))


def test_the_oldest_blocks_may_go_with_the_first_among_them():
    table = BlockTable(pool())
    rows = random_rows(table.pool, 70)
    table.append(rows)
    assert table.evict(table.oldest(47)) == 32  # never a part of a block
    assert np.array_equal(rows_of(table, 38), rows[:, 32:])
    assert table.evict(table.oldest(-1)) == 0
    assert table.evict(table.oldest(10_000)) == 32
    assert table.num_tokens == 6


def test_compaction_leaves_what_is_needed_at_once():
    table = BlockTable(pool())
    table.append(random_rows(table.pool, 2000))
    table.evict(table.oldest(1900))
    table.pool.compact(needed=60)
    assert table.pool.num_blocks == 2048 // 16
    table.pool.compact(needed=20)
    assert table.pool.num_blocks == len(table.blocks)


def test_compaction_gives_free_blocks_back_and_keeps_the_rows():
    table = BlockTable(pool())
    rows = np.array(random_rows(table.pool, 2000))
    table.append(mx.array(rows))
    table.pool.compact()
    assert table.pool.num_blocks == 2048 // 16  # little of it was free
    table.evict(table.oldest_but_first(1900))
    table.pool.compact()
    assert table.pool.num_blocks == len(table.blocks)
    assert np.array_equal(rows_of(table), np.delete(rows, np.s_[16:1920], axis=1))


def test_many_blocks_grow_by_an_eighth():
    table = BlockTable(pool())
    table.append(random_rows(table.pool, 10_240))
    table.append(random_rows(table.pool, 1))
    assert table.pool.num_blocks == 640 + 80


class TestFork:
    def test_it_shares_blocks_and_none_is_copied(self):
        table = BlockTable(pool())
        rows = random_rows(table.pool, 40)
        table.append(rows)
        forks = [table.fork() for _ in range(8)]
        assert table.pool.num_used == 3
        assert all(np.array_equal(rows_of(fork), rows) for fork in forks)

    @pytest.mark.parametrize("writer", [0, 1])
    @pytest.mark.parametrize("common", [32, 33, 47])
    def test_who_writes_to_a_shared_block_copies_it_first(self, writer, common):
        tables = [BlockTable(pool())]
        rows = random_rows(tables[0].pool, common)
        tables[0].append(rows)
        tables.append(tables[0].fork())
        own = random_rows(tables[0].pool, 20, seed=1)
        tables[writer].append(own)
        assert np.array_equal(rows_of(tables[1 - writer]), rows)
        assert np.array_equal(rows_of(tables[writer]), mx.concatenate([rows, own], axis=1))
        assert tables[0].pool.num_used == -(-(common + 20) // 16) + (common % 16 > 0)
        tables[1 - writer].append(own)  # alone with the block by now: nothing is copied
        assert tables[0].blocks[:2] == tables[1].blocks[:2]
        assert tables[0].pool.num_used == 2 * len(tables[0].blocks) - 2

    def test_blocks_are_free_when_the_last_table_is_gone(self):
        p = pool()
        table = BlockTable(p)
        table.append(random_rows(p, 40))
        fork = table.fork()
        del table
        assert p.num_used == 3
        fork.trim(20)
        assert p.num_used == 2
        del fork
        assert p.num_used == 0
        assert p.num_free == p.num_blocks

    def test_it_moves_to_another_pool_with_its_rows(self):
        table, p = BlockTable(pool()), pool()
        p.allocate(3)
        rows = random_rows(table.pool, 40)
        table.append(rows)
        moved = table.moved(p)
        assert moved.pool is p
        assert np.array_equal(rows_of(moved), rows)
        assert moved.moved(p) is moved


class TestBudget:
    def limited(self, max_blocks):
        p = pool()
        p.max_blocks = max_blocks
        return p

    def test_what_does_not_fit_is_refused_and_nothing_changes(self):
        table = BlockTable(self.limited(4))
        rows = random_rows(table.pool, 60)
        table.append(rows)
        with pytest.raises(OutOfBlocks, match="1 more blocks of 16 tokens are needed, 4 of 4"):
            table.append(random_rows(table.pool, 5))
        assert np.array_equal(rows_of(table), rows)
        table.append(random_rows(table.pool, 4))
        assert table.pool.num_blocks == 4

    def test_a_copy_on_write_counts(self):
        table = BlockTable(self.limited(2))
        table.append(random_rows(table.pool, 20))
        fork = table.fork()
        with pytest.raises(OutOfBlocks):
            fork.append(random_rows(table.pool, 1))
        del table
        fork.append(random_rows(fork.pool, 1))
        assert fork.num_tokens == 21

    def test_a_pool_may_grow_up_to_its_budget(self):
        table = BlockTable(self.limited(17))
        table.append(random_rows(table.pool, 17 * 16))
        assert table.pool.num_blocks == 17


class TablesAgainstLists(RuleBasedStateMachine):
    """Sequences in one pool behave like lists of rows, whatever is done to them.

    The pool is checked against counts: each block is free, or held as often as tables name it.
    """

    MOST = 40

    def __init__(self):
        super().__init__()
        self.pool = pool()
        self.pool.max_blocks = self.MOST
        self.tables, self.lists, self.seed = [], [], 0
        self.start()

    @rule()
    def start(self):
        self.tables.append(BlockTable(self.pool))
        self.lists.append(np.zeros((HEADS, 0, self.pool.layout.row_bytes), np.uint8))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), count=st.integers(1, 60))
    def append(self, data, count):
        i = self.one(data)
        self.seed += 1
        rows = random_rows(self.pool, count, self.seed)
        table = self.tables[i]
        last = (
            sum(
                table.blocks[-1:] == other.blocks[len(table.blocks) - 1 :][:1]
                for other in self.tables
            )
            if table.num_tokens % 16
            else 0
        )
        needed = -(-(table.num_tokens + count) // 16) - len(table.blocks) + (last > 1)
        used = len({block for other in self.tables for block in other.blocks})
        if used + needed > self.MOST:
            with pytest.raises(OutOfBlocks):
                table.append(rows)
            return
        table.append(rows)
        self.lists[i] = np.concatenate([self.lists[i], np.array(rows)], axis=1)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), share=st.floats(0, 1))
    def trim(self, data, share):
        i = self.one(data)
        count = int(share * self.tables[i].num_tokens)
        self.tables[i].trim(count)
        self.lists[i] = self.lists[i][:, : self.lists[i].shape[1] - count]

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), count=st.integers(1, 50))
    def evict(self, data, count):
        i = self.one(data)
        dropped = self.tables[i].evict(self.tables[i].oldest_but_first(count))
        self.lists[i] = np.delete(self.lists[i], np.s_[16 : 16 + dropped], axis=1)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), count=st.integers(1, 50))
    def pass_a_window(self, data, count):
        i = self.one(data)
        dropped = self.tables[i].evict(self.tables[i].oldest(count))
        self.lists[i] = self.lists[i][:, dropped:]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        i = self.one(data)
        self.tables.append(self.tables[i].fork())
        self.lists.append(self.lists[i])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data):
        i = self.one(data)
        del self.tables[i], self.lists[i]

    @rule()
    def compact(self):
        self.pool.compact()

    def one(self, data):
        return data.draw(st.integers(0, len(self.tables) - 1))

    @invariant()
    def all_hold_what_the_lists_hold(self):
        for table, rows in zip(self.tables, self.lists, strict=True):
            assert table.num_tokens == rows.shape[1]
            assert np.array_equal(rows_of(table), rows)

    @invariant()
    def blocks_are_free_or_in_use_as_often_as_tables_name_them(self):
        named = Counter(block for table in self.tables for block in table.blocks)
        assert self.pool.num_used == len(named)
        assert sorted([*self.pool._free, *named]) == list(range(self.pool.num_blocks))
        assert all(self.pool._users[block] == named[block] for block in range(self.pool.num_blocks))
        assert self.pool.num_blocks <= self.MOST


TestTablesAgainstLists = TablesAgainstLists.TestCase
TestTablesAgainstLists.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
