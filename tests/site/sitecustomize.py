"""What every process of the tests does first: Python imports this file where its folder is on PYTHONPATH.

TEST_DTYPE=float32 or bfloat16: this CPU passes for one without bf16, or with it. And DeepSpeed leaves out its exchange
through shared memory, which compiles for a minute and waits by computing: beside other tests, three times as long.
"""

import importlib.util
import os
import sys


def force_dtype(cpu) -> None:
    if dtype := os.environ.get("TEST_DTYPE"):
        cpu._is_avx512_bf16_supported = lambda: dtype == "bfloat16"
        cpu._is_amx_tile_supported = lambda: False


def leave_out_shared_memory(comm) -> None:
    comm.build_shm_op = lambda: None


class Finder:
    """Lets a module be loaded as usual, and then changes it."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            self.change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path[:0] = [Finder("torch.cpu", force_dtype), Finder("deepspeed.comm.torch", leave_out_shared_memory)]
