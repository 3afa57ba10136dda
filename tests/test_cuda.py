"""What CUDA needs, on machines without it: stand-ins for NVML, for a GPU and for torch's builds."""

import ast
import json
import os
import subprocess
import sys

import pynvml
import pytest
import torch
from conftest import ROOT
from torch.torch_version import TorchVersion

from common import cuda, distributed
from common.cli import UserError
from common.model import load, merging
from common.train import preflight

COMPUTING = "qlora_train galore_train preference_train chat_pipe evaluate_model merge_and_export".split()
BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # torch 2.13 for CUDA 13.0


@pytest.fixture
def idle_gpu(monkeypatch):
    """idle_gpu(capability, CUDA of driver and torch): NVML sees a GPU, and torch does not."""

    def make(capability=(8, 9), driver=13000, built_for=None, error=None):
        def init():
            if error:
                raise pynvml.NVMLError(error)

        answers = dict(
            DeviceGetCount=1, DeviceGetHandleByIndex="handle", DeviceGetName="NVIDIA Test",
            DeviceGetCudaComputeCapability=capability, SystemGetDriverVersion="535.1",
            SystemGetCudaDriverVersion=driver,
        )  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, f"nvml{name}", lambda *a, answer=answer: answer)
        monkeypatch.setattr(pynvml, "nvmlInit", init)
        monkeypatch.setattr(torch.version, "cuda", built_for)
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0+cpu" if built_for is None else "2.13.0"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        distributed.device.cache_clear()

    yield make
    distributed.device.cache_clear()


@pytest.fixture
def gpu_of(monkeypatch):
    """gpu_of(capability, built): torch has a GPU, and was built for these."""

    def make(capability, built=BUILT):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA Test")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0+cu130"))
        distributed.device.cache_clear()

    yield make
    distributed.device.cache_clear()


# What torch is told


def python(code: str, **environment) -> dict:
    """What the code, in a process of its own, prints as JSON."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    done = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}"],
        cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_attention_is_computed_by_cudnn():
    """Also where torch was there first; and it is told in time by whatever loads or runs a model."""
    code = (
        "import torch\nassert torch.backends.cuda.cudnn_sdp_enabled()\nimport common.model.load, common.train.memory\n"
    )
    assert python(f"{code}print(json.dumps(torch.backends.cuda.cudnn_sdp_enabled()))") is False


def imported_files(file, seen) -> set[str]:
    """The packages that a file imports at its top, itself or through files of ours, which are added to `seen`."""
    packages = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {
                f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
                for alias in node.names
            }
            for name in names | {name.rpartition(".")[0] for name in names}:
                packages.add(name.split(".")[0])
                for folder in {ROOT, file.parent}:  # benches import each other
                    ours = folder / (name.replace(".", "/") + ".py")
                    if ours.is_file() and ours not in seen:
                        seen.add(ours)
                        packages |= imported_files(ours, seen)
    return packages


@pytest.mark.parametrize("file", [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py")], ids=lambda file: file.name)
def test_whatever_computes_with_torch_imports_what_tells_it(file):
    seen = set()
    assert "torch" not in imported_files(file, seen) or ROOT / "common" / "cuda.py" in seen


def test_only_training_in_float32_multiplies_in_tf32(arguments, run_here, at_step, monkeypatch, tmp_path):
    """Its checks, a merge before it, and whatever comes after it are exact."""
    seen = {}

    def record(name, function=lambda *args: None):
        def call(*args):
            seen.setdefault(name, torch.get_float32_matmul_precision())
            return function(*args)

        return call

    monkeypatch.setattr(cuda, "uses_tf32", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(preflight, "check_row", record("check", preflight.check_row))
    monkeypatch.setattr(merging, "predict", record("merge", merging.predict))
    at_step({1: record("step")})
    for script, dtype, expected in (
        ("qlora_train.py", "bfloat16", {"check": "highest", "step": "highest"}),
        ("qlora_train.py", "float32", {"check": "highest", "step": "high"}),
        ("galore_train.py", "float32", {"merge": "highest", "check": "highest", "step": "high"}),
    ):
        seen.clear()
        run = f"{script.partition('_')[0]}-{dtype}"
        more = [f"MODEL={tmp_path / 'qlora-float32'}"] if script == "galore_train.py" else []
        more += ["GALORE_RANK=4"] if more else []
        settings = [a for a in arguments(run, f"DTYPE={dtype}", "MAX_STEPS=1", *more) if not more or "LORA" not in a]
        code, out, err = run_here(script, *settings)
        assert code == 0 and seen == expected, err
        assert ("products in TF32" in out) == (dtype == "float32")
        assert torch.get_float32_matmul_precision() == "highest"


def test_products_are_exact_beside_what_transformers_sets_for_torch_compile():
    """Without a choice, torch refuses to say which precision it has, and its compiler asks."""
    code = "import torch\nfrom common import cuda\nwith cuda.float32_products('highest'):\n"
    code += "    torch.backends.fp32_precision = 'tf32'\n    print(json.dumps(torch.get_float32_matmul_precision()))"
    assert python(code) == "highest"


def test_tf32_is_for_float32_on_gpus_that_have_it(gpu_of):
    assert not cuda.uses_tf32(torch.float32)  # there is no GPU
    gpu_of((8, 0))
    assert cuda.uses_tf32(torch.float32) and not cuda.uses_tf32(torch.bfloat16)
    gpu_of((7, 5))
    assert not cuda.uses_tf32(torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
@pytest.mark.parametrize(
    "chosen, release, expected",
    [
        ({}, "6.1.0-generic", "expandable_segments:True"),
        ({}, "6.6.87.2-microsoft-standard-WSL2", None),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "6.1.0", "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "6.1.0", None),
    ],
)
def test_segments_of_memory_can_grow_unless_the_user_has_chosen(chosen, release, expected):
    code = f"import os, sys, types\nos.uname = lambda: types.SimpleNamespace(release={release!r})\nimport common\n"
    code += "print(json.dumps([os.environ.get('PYTORCH_ALLOC_CONF'), 'torch' in sys.modules]))"
    assert python(code, **chosen) == [expected, False]  # before torch, which reads it


# A GPU that is not used


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(), ["NVIDIA Test", "without CUDA", "torch==2.13.0+cu130", "whl/cu130"]),
        (dict(capability=(7, 0)), ["without CUDA", "torch==2.13.0+cu126"]),
        (dict(driver=12040), ["without CUDA", "+cu126"]),
        (dict(driver=12080, capability=(12, 0)), ["without CUDA", "+cu129"]),
        (dict(driver=12040, built_for="13.0"), ["needs CUDA 13.0", "driver 535.1", "Update the driver", "+cu126"]),
        (dict(driver=11040, built_for="13.0"), ["Update the driver."]),
        (dict(driver=13000, built_for="13.0"), ["cannot open it", "Restart"]),
        (dict(error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH), ["mismatch", "Restart"]),
    ],
)
def test_an_idle_gpu_is_named_with_the_remedy(how, words, idle_gpu):
    idle_gpu(**how)
    line = cuda.explain_idle_gpu()
    assert all(word in line for word in words) and "\n" not in line, line


def test_nothing_is_said_without_a_driver_or_where_gpus_are_hidden(idle_gpu, monkeypatch):
    for error in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED):
        idle_gpu(error=error)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which idle_gpu deletes
        assert cuda.explain_idle_gpu() is None
    idle_gpu()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert cuda.explain_idle_gpu() is None
    idle_gpu(built_for="13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # there is one
    assert "Unset CUDA_VISIBLE_DEVICES=7." in cuda.explain_idle_gpu()


@pytest.mark.parametrize(
    "capability, built, runs",
    [
        ((8, 9), BUILT, True), ((8, 6), BUILT, True), ((7, 5), BUILT, True), ((12, 1), BUILT, True),
        ((7, 0), BUILT, False), ((6, 1), BUILT, False), ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "sm_90", "compute_90"], True), ((9, 0), ["sm_90a"], True), ((8, 0), ["sm_86"], False),
    ],
)  # fmt: skip
def test_kernels_run_within_a_major_version_and_ptx_on_all_that_is_newer(capability, built, runs, gpu_of):
    gpu_of(capability, built)
    if runs:
        return cuda.check_kernels(0)
    with pytest.raises(UserError, match=r"NVIDIA Test.*torch==2.13.0\+cu") as refusal:
        cuda.check_kernels(0)
    assert refusal.value.code == 2


@pytest.mark.parametrize("script", COMPUTING)
def test_scripts_that_compute_say_it_before_anything_else(
    script, tiny, idle_gpu, gpu_of, run_here, tmp_path, monkeypatch
):
    def later(source):
        raise UserError("later")

    monkeypatch.setattr(load, "load_config", later)
    arguments = f"{script}.py", f"MODEL={tiny()}", f"OUT_DIR={tmp_path}", "DTYPE=float32"
    arguments = [a for a in arguments if script != "chat_pipe" or "OUT_DIR" not in a]
    idle_gpu()
    code, out, err = run_here(*arguments)
    lines = [line for line in err.splitlines() if " (was " not in line]  # what the shell changes
    assert code == 2 and lines[-2:] == [cuda.explain_idle_gpu(), "error: later"]
    assert not any(line for line in out.splitlines() if "real_accelerator" not in line)  # DeepSpeed's import
    gpu_of((7, 0))
    code, out, err = run_here(*arguments)
    assert code == 2 and not out and "error: torch 2.13.0+cu130 has no kernels for NVIDIA Test" in err
