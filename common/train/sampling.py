"""Rows dealt out evenly to several processes."""

import torch
from torch.utils.data import Sampler


class EvenSampler(Sampler):
    """Random numbers below `rows`, in the order that one process takes them, and then those of `blanks` blank rows.

    Processes take turns batch by batch, and accelerate would fill the last turn with the first rows a second time.
    """

    def __init__(self, rows: int, blanks: int, seed: int):
        self.rows, self.blanks, self.seed, self.epoch = rows, blanks, seed, 0

    def __len__(self):
        return self.rows + self.blanks

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)  # as accelerate's SeedableRandomSampler
        yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from range(self.rows, len(self))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def with_blanks(dataset, blank: dict, share: int):
    """The dataset with blank rows at its end, so that its length is a multiple of `share`."""
    from datasets import Dataset, concatenate_datasets  # slow import

    if not (missing := -len(dataset) % share):
        return dataset
    row = {name: blank[name] for name in dataset.column_names}
    return concatenate_datasets([dataset, Dataset.from_list([row] * missing, features=dataset.features)])
