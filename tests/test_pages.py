import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from rows import rows_of

from vllm_metal_tq.config import BLOCK_SIZES, TurboQuantConfig
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.pages import GROWTH_TOKENS, BlockTable, PagePool

HEADS = 2


def pool(block_size=16, k_bits=4, v_bits=3):
    return PagePool(PageLayout(TurboQuantConfig(k_bits, v_bits, block_size), 64), HEADS)


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
    slots = np.array([0, 5 + block_size, block_size - 1])
    p.allocate(2)
    p.write(slots, rows)
    pages, offsets = np.array(p.pages), p.layout.byte_offsets
    for i, slot in enumerate(slots):
        block, place = divmod(int(slot), block_size)
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
    assert table.evictable(17) == 32
    table.evict(17)
    assert table.num_tokens == 38
    expected = mx.concatenate([rows[:, :16], rows[:, 48:]], axis=1)
    assert np.array_equal(rows_of(table, 38), expected)


def test_eviction_never_drops_the_first_block_or_a_part_of_one():
    table = BlockTable(pool())
    rows = np.array(random_rows(table.pool, 40))
    table.append(mx.array(rows))
    assert table.evictable(10_000) == 16
    table.evict(10_000)
    table.evict(10_000)
    assert np.array_equal(rows_of(table), np.delete(rows, np.s_[16:32], axis=1))


def test_compaction_gives_free_blocks_back_and_keeps_the_rows():
    table = BlockTable(pool())
    rows = np.array(random_rows(table.pool, 2000))
    table.append(mx.array(rows))
    table.compact()
    assert table.pool.num_blocks == 2048 // 16  # little of it was free
    table.evict(1900)
    table.compact()
    assert table.pool.num_blocks == len(table.blocks)
    assert np.array_equal(rows_of(table), np.delete(rows, np.s_[16:1920], axis=1))


class TablesAgainstLists(RuleBasedStateMachine):
    """Two sequences in one pool behave like two lists of rows, whatever is done to them."""

    def __init__(self):
        super().__init__()
        self.pool = pool()
        self.tables = [BlockTable(self.pool), BlockTable(self.pool)]
        self.lists = [np.zeros((HEADS, 0, self.pool.layout.row_bytes), np.uint8)] * 2
        self.seed = 0

    @rule(which=st.integers(0, 1), count=st.integers(1, 40))
    def append(self, which, count):
        self.seed += 1
        rows = random_rows(self.pool, count, self.seed)
        self.tables[which].append(rows)
        self.lists[which] = np.concatenate([self.lists[which], np.array(rows)], axis=1)

    @rule(which=st.integers(0, 1), share=st.floats(0, 1))
    def trim(self, which, share):
        count = int(share * self.tables[which].num_tokens)
        self.tables[which].trim(count)
        self.lists[which] = self.lists[which][:, : self.lists[which].shape[1] - count]

    @rule(which=st.integers(0, 1), count=st.integers(1, 50))
    def evict(self, which, count):
        dropped = self.tables[which].evictable(count)
        self.tables[which].evict(count)
        self.lists[which] = np.delete(self.lists[which], np.s_[16 : 16 + dropped], axis=1)

    @invariant()
    def both_hold_what_the_lists_hold(self):
        for table, rows in zip(self.tables, self.lists, strict=True):
            assert table.num_tokens == rows.shape[1]
            assert np.array_equal(rows_of(table), rows)

    @invariant()
    def every_block_is_free_or_in_one_table(self):
        blocks = [*self.pool._free, *self.tables[0].blocks, *self.tables[1].blocks]
        assert sorted(blocks) == list(range(self.pool.num_blocks))


TestTablesAgainstLists = TablesAgainstLists.TestCase
TestTablesAgainstLists.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


def test_the_block_table_follows_its_blocks_as_they_come_and_go():
    p = pool()
    table, other = BlockTable(p), BlockTable(p)
    for step in (20, 300, -40, 16, 1, 17, -200, 900, 16):
        if step > 0:
            table.append(random_rows(p, step))
            other.append(random_rows(p, 16))  # so that blocks are not consecutive
        else:
            table.trim(-step)
        shown = table.block_table[0].tolist()
        assert shown[: len(table.blocks)] == table.blocks
        assert len(shown) >= 64


def test_the_block_table_is_made_anew_only_when_blocks_change():
    p = pool()
    table = BlockTable(p)
    table.append(random_rows(p, 20))
    first = table.block_table
    assert first[0, :2].tolist() == table.blocks
    table.append(random_rows(p, 1))
    table.evict(0)
    assert table.block_table is first
    table.append(random_rows(p, 16))
    assert table.block_table[0, :3].tolist() == table.blocks
    table.trim(20)
    assert table.block_table[0, : len(table.blocks)].tolist() == table.blocks
