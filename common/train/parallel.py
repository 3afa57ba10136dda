"""Several processes that train one model: rows dealt out evenly, gradients exchanged, weights gathered."""

import dataclasses

import torch
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import Sampler

from common import distributed

ZERO_BUCKET = 50_000_000  # gradients that DeepSpeed exchanges at a time; its 500 million would take 2 GB by themselves


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


def exchange_in_float32(state) -> None:
    """Have accelerate's engines sum up gradients, and return losses, in float32; they would in 16 bits."""
    if distributed.engine() == "fsdp" and (policy := state.fsdp_plugin.mixed_precision_policy):
        policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        state.fsdp_plugin.mixed_precision_policy = policy
    elif (distributed.engine() or "").startswith("zero"):
        config = state.deepspeed_plugin.deepspeed_config
        config |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
        config["zero_optimization"]["reduce_bucket_size"] = ZERO_BUCKET


def gather_weights(trainer) -> dict[str, torch.Tensor] | None:
    """The trained weights on the CPU of the first process, where processes hold parts of them; else None."""
    if distributed.engine() == "zero3":
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if distributed.engine() != "fsdp":
        return None
    model, is_adapter = trainer.model, isinstance(trainer.model, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=is_adapter)
    weights = get_model_state_dict(model, options=options)
    if is_adapter:
        return weights
    for name in model.all_tied_weights_keys:  # a second name of the same
        weights.pop(name, None)
    return {name: weight.to(trainer.dtype) for name, weight in weights.items()}  # accelerate has made them float32
