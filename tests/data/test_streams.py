from collections import Counter

import pytest

from hierarchical_diffusion_rlhf_caption_refinement.data.streams import batch_indices, share


def test_a_batch_depends_on_its_number_seed_and_name_alone() -> None:
    batches = [batch_indices(10, 4, i, 0, "base") for i in range(8)]
    assert batches[5] == batch_indices(10, 4, 5, 0, "base")
    assert batches != [batch_indices(10, 4, i, 1, "base") for i in range(8)]
    assert batches != [batch_indices(10, 4, i, 0, "rlhf") for i in range(8)]


@pytest.mark.parametrize("size", [1, 3, 4, 10, 25])
def test_every_example_once_per_pass_in_another_order(size: int) -> None:
    rows = [row for i in range(-(-50 // size)) for row in batch_indices(10, size, i, 0, "base")][:50]
    passes = [rows[i : i + 10] for i in range(0, 50, 10)]
    assert all(sorted(p) == list(range(10)) for p in passes) and len({tuple(p) for p in passes}) == 5


def test_shares_partition_the_batch_evenly() -> None:
    rows = list(range(12))
    assert [row for rank in range(4) for row in rows[share(12, rank, 4)]] == rows
    assert Counter(len(rows[share(12, rank, 4)]) for rank in range(4)) == {3: 4}
    with pytest.raises(ValueError, match="10 cannot be split evenly among 4"):
        share(10, 0, 4)
