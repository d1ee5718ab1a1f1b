import pytest

from tailserve.engine.blocks import BlockPool, chain_hash, root_hash


def hashes(tokens: list[int], size: int, scope: str = "s", adapter: str = "") -> list[bytes]:
    chain, parent = [], root_hash(scope, adapter)
    for begin in range(0, len(tokens) - size + 1, size):
        parent = chain_hash(parent, tokens[begin : begin + size])
        chain.append(parent)
    return chain


def test_blocks_are_free_again_after_their_last_holder() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(3)
    pool.acquire(blocks[:1])
    pool.release(blocks)
    assert pool.num_free == 3
    pool.check_integrity([blocks[:1]])
    pool.release(blocks[:1])
    pool.check_integrity([])


def test_a_prefix_is_found_until_its_blocks_are_needed() -> None:
    pool = BlockPool(4, 2)
    chain = hashes([1, 2, 3, 4], 2)
    blocks = pool.allocate(2)
    for block, content in zip(blocks, chain, strict=True):
        pool.register(block, content)
    pool.release(blocks)
    assert pool.match(chain) == blocks
    assert pool.match(hashes([1, 2, 9, 9], 2)) == blocks[:1]
    # Anonymous blocks go first, then the end of the prefix, then its beginning.
    pool.allocate(2)
    assert pool.match(chain) == blocks
    pool.allocate(1)
    assert pool.match(chain) == blocks[:1]


def test_scopes_and_adapters_never_share() -> None:
    chains = [hashes([1, 2], 2, scope, adapter) for scope, adapter in (("a", ""), ("b", ""), ("a", "lora"))]
    assert len({chain[0] for chain in chains}) == 3


def test_more_than_is_free_cannot_be_taken() -> None:
    pool = BlockPool(2, 2)
    with pytest.raises(IndexError, match="3 blocks asked, 2 free"):
        pool.allocate(3)


def test_integrity_names_a_lost_block() -> None:
    pool = BlockPool(2, 2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="1 references counted, 0 held"):
        pool.check_integrity([])


def test_nothing_is_found_without_prefix_caching() -> None:
    pool = BlockPool(2, 2, enable_prefix_caching=False)
    chain = hashes([1, 2], 2)
    pool.register(pool.allocate(1)[0], chain[0])
    assert pool.match(chain) == []
