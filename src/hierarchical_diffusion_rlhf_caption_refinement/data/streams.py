"""Index-addressed batches: which examples batch i holds depends on the seed and on i alone, so any batch can be replayed."""

from functools import lru_cache

import torch

from ..utils.seeding import generator


@lru_cache(maxsize=4)
def _order(count: int, seed: int, name: str, epoch: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, name, "order", epoch)).tolist()


def batch_indices(count: int, size: int, index: int, seed: int, name: str) -> list[int]:
    """Rows of batch `index` in an endless sequence of shuffled passes over `count` examples."""
    places = range(index * size, (index + 1) * size)
    return [_order(count, seed, name, place // count)[place % count] for place in places]


def share(size: int, rank: int, world: int) -> slice:
    """This process's part of a batch of `size`; parts are equal, so that means of means are means."""
    if size % world:
        raise ValueError(f"a batch of {size} cannot be split evenly among {world} processes")
    return slice(rank * size // world, (rank + 1) * size // world)
