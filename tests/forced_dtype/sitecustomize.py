"""TEST_DTYPE=float32 or bfloat16: every process of the tests takes this CPU for one without bf16, or with it.

Python imports this file at its start where its folder is on PYTHONPATH (tests/conftest.py puts it there).
"""

import importlib.util
import os
import sys


class Finder:
    """Lets torch.cpu be loaded as usual and then answer as TEST_DTYPE says."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            module._is_avx512_bf16_supported = lambda: os.environ["TEST_DTYPE"] == "bfloat16"
            module._is_amx_tile_supported = lambda: False

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("TEST_DTYPE"):
    sys.meta_path.insert(0, Finder())
