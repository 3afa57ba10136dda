"""CUDA as these scripts use it: attention without cuDNN, TF32 where training asks for it, and why a GPU is not used."""

import contextlib
import os
import re

import pynvml
import torch

from common.cli import UserError

# torch's first choice on H100 and B200: NaN gradients under a mask at some lengths (pytorch issue 196678), and a kernel
# built anew for each length, which packed rows change at every step.
torch.backends.cuda.enable_cudnn_sdp(False)

NO_DRIVER = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)


def explain_idle_gpu() -> str | None:
    """A line on why torch does not see a GPU that NVML sees, with the remedy; None without one, or if it is hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        pynvml.nvmlInit()
        if not pynvml.nvmlDeviceGetCount():
            return None
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name, capability = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        driver, cuda = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion()
    except pynvml.NVMLError as error:
        return None if error.value in NO_DRIVER else f"The GPU is not used: NVML reports {error}. Restart the machine."
    head = f"{name} is not used, the CPU computes: torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{head} is built without CUDA. {install_command(tuple(capability), cuda)}"
    if cuda // 1000 < int(torch.version.cuda.partition(".")[0]):
        older = f", or: {install_command(tuple(capability), cuda)}" if cuda >= 12000 else "."
        return f"{head} needs CUDA {torch.version.cuda}, driver {driver} is older. Update the driver{older}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    remedy = f"Unset CUDA_VISIBLE_DEVICES={hidden}" if hidden else "Restart the machine, or see what else uses it"
    return f"{head} cannot open it. {remedy}."


def check_kernels(number: int) -> None:
    """UserError where torch was built without kernels for this GPU of those it sees."""
    built, capability = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(number)
    if torch.version.cuda is None or not built or any(runs_on(capability, code) for code in built):
        return
    name, version = torch.cuda.get_device_name(number), ".".join(map(str, capability))
    problem = f"torch {torch.__version__} has no kernels for {name} (compute capability {version}), only {built}"
    remedy = install_command(capability, 1000 * int(torch.version.cuda.partition(".")[0]))
    raise UserError(f"{problem}. CUDA_VISIBLE_DEVICES=-1 computes on the CPU; for this GPU: {remedy}")


def runs_on(capability: tuple[int, int], code: str) -> bool:
    """Whether code built for "sm_86" or "compute_90" runs: the first within its major version, the other on newer."""
    kind, number = code.split("_")
    built = divmod(int(re.match(r"\d+", number)[0]), 10)
    return capability >= built and (kind == "compute" or capability[0] == built[0])


def install_command(capability: tuple[int, int], cuda: int) -> str:
    """The pip command for a torch with kernels for a GPU. cuda: the driver's, as NVML has it (12040 for 12.4)."""
    if capability < (7, 5):
        index = "cu126"  # Volta and older; torch 2.13 has it, as all these, in torch/cuda/__init__.py
    elif cuda < 13000:
        index = "cu126" if capability < (10, 0) else "cu129"
    else:
        index = "cu130"
    torch_version = torch.__version__.partition("+")[0]
    return f"pip install torch=={torch_version}+{index} --index-url https://download.pytorch.org/whl/{index}"


def uses_tf32(dtype: torch.dtype) -> bool:
    """Whether training in this dtype multiplies in TF32: float32 on a GPU that has it (Ampere and newer)."""
    on_gpu = dtype == torch.float32 and torch.cuda.is_available()
    return on_gpu and torch.version.cuda is not None and torch.cuda.get_device_capability() >= (8, 0)


@contextlib.contextmanager
def float32_products(precision: str):
    """Compute float32 matrix products as torch.set_float32_matmul_precision says: "highest", or "high" in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
