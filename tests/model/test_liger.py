"""Liger's kernels, by a stand-in for the package: whom they are for, and what they change."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from common.cli import UserError
from common.model import liger
from common.train import sft

HALF = torch.bfloat16


class Kernel:
    """As Triton's: kernel[grid](result, ...) writes into the result."""

    launched = []

    def __getitem__(self, grid):
        def launch(result, values):
            self.launched.append(grid)
            result.copy_(values)

        return launch


class Scale(torch.autograd.Function):
    """Its product with a weight, by one kernel each way."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(weight)
        Kernel()[(1,)](result := torch.empty_like(inputs), inputs * weight)
        return result

    @staticmethod
    def backward(ctx, gradient):
        Kernel()[(2,)](result := torch.empty_like(gradient), gradient * ctx.saved_tensors[0])
        return result, None


def norm(self, inputs):
    root = inputs.float().square().mean(-1, keepdim=True).add(self.variance_epsilon).rsqrt()
    return Scale.apply((inputs.float() * root).to(inputs.dtype), self.weight)


def wrong_norm(self, inputs):
    return 1.5 * norm(self, inputs)


def swiglu(self, inputs):
    return self.down_proj(torch.nn.functional.silu(self.gate_proj(inputs)) * self.up_proj(inputs))


@pytest.fixture
def package(monkeypatch):
    """The package, with `norm` to choose; `calls` are those of its function."""
    package = SimpleNamespace(calls=[], norm=norm, kinds=("Norm", "MLP"))
    for name in ("LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"):  # whatever happens, other tests have these
        monkeypatch.setattr(modeling_llama, name, rotate := getattr(modeling_llama, name))

    def apply(model, **flags):
        package.calls.append((model, flags))
        if model.config.model_type == "llama":
            modeling_llama.apply_rotary_pos_emb = lambda *args: rotate(*args)
            modeling_llama.LlamaMLP = modeling_llama.LlamaRMSNorm = None
        for module in model.modules():
            if type(module).__name__.endswith(package.kinds):
                forward = package.norm if "Norm" in type(module).__name__ else swiglu
                module.forward = forward.__get__(module)

    known = {"llama": apply, "mixtral": apply}
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch", "triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["liger_kernel.transformers"]._apply_liger_kernel_to_instance = apply
    sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN = known
    sys.modules["triton"].runtime = SimpleNamespace(jit=SimpleNamespace(KernelInterface=Kernel))
    monkeypatch.setattr(Kernel, "launched", [])
    return package


@pytest.mark.parametrize(
    "kind, dtype, compiled, device, obstacle",
    [
        ("llama", HALF, False, "cuda", None),
        ("llama", torch.float16, False, "cuda", None),
        ("llama", HALF, False, "cpu", "no CUDA GPU"),
        ("llama", torch.float32, False, "cuda", "DTYPE=bfloat16"),
        ("llama", HALF, True, "cuda", "TORCH_COMPILE=True"),
        ("stablelm", HALF, False, "cuda", "none for stablelm"),
    ],
)
def test_who_gets_kernels(kind, dtype, compiled, device, obstacle, package):
    what = tiny_config(kind), dtype, compiled, device
    words = f", no Liger kernels ({liger.find_obstacle(*what)})" if device == "cuda" else ""
    assert obstacle is None or obstacle in liger.find_obstacle(*what)
    assert liger.choose_kernels(None, *what) == ((False, words) if obstacle else (True, ", Liger kernels"))
    assert liger.choose_kernels(False, *what)[0] is False
    if obstacle:
        with pytest.raises(UserError, match=f"LIGER_KERNEL=True: .*{obstacle}.*LIGER_KERNEL=None"):
            liger.choose_kernels(True, *what)
    else:
        assert liger.choose_kernels(True, *what)[0] is True
        assert liger.choose_kernels(False, *what)[1] == ", no Liger kernels (LIGER_KERNEL=False)"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    what = tiny_config("llama"), HALF, False, "cuda"
    use, words = liger.choose_kernels(None, *what)
    assert not use and "liger_kernel" in words and "pip install liger-kernel" in words
    with pytest.raises(UserError, match="LIGER_KERNEL=True: .*pip install liger-kernel"):
        liger.choose_kernels(True, *what)


def test_kernels_are_put_under_an_adapter_and_taken_out_again(package):
    torch.manual_seed(0)
    names = vars(modeling_llama).copy()
    model = AutoModelForCausalLM.from_config(tiny_config("llama", mlp_bias=True))
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    state, ids = adapted.state_dict(), torch.arange(3, 40)[None]
    plain = adapted(input_ids=ids).logits
    changes = liger.apply_kernels(adapted)
    assert package.calls == [(model, dict(fused_linear_cross_entropy=False, cross_entropy=False))]
    assert "forward" not in vars(model) and len(changes) == 5 + 2 + 1
    assert modeling_llama.LlamaMLP is names["LlamaMLP"]  # of models built later
    torch.testing.assert_close(adapted(input_ids=ids).logits, plain)  # the adapters in the MLP, too
    assert len(Kernel.launched) == 5
    assert adapted.state_dict().keys() == state.keys()
    with liger.put_aside(changes):
        assert adapted(input_ids=ids).logits.equal(plain) and len(Kernel.launched) == 5
    adapted(input_ids=ids)
    assert len(Kernel.launched) == 10
    second = liger.apply_kernels(AutoModelForCausalLM.from_config(tiny_config("llama")))
    for each in (changes, second):
        liger.swap(each)
    adapted(input_ids=ids)
    assert len(Kernel.launched) == 10 and vars(modeling_llama) == names


@pytest.mark.parametrize("adapted", [False, True])
def test_experts_stay_the_models_own(adapted, package):
    """Liger's compute a gradient for all of their weights, frozen or not, and would be put on the adapter."""
    model = AutoModelForCausalLM.from_config(tiny_config("mixtral", num_local_experts=2, num_experts_per_tok=1))
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    package.kinds = "Experts", "Norm", "ParamWrapper"
    assert len({type(m).__name__ for m in model.modules() if type(m).__name__.endswith(package.kinds)}) == 2 + adapted
    liger.apply_kernels(model)
    assert {type(m).__name__ for m in model.modules() if "forward" in vars(m)} == {"MixtralRMSNorm"}


def test_a_package_that_does_not_fit_is_the_users_to_switch_off(package, monkeypatch):
    def fail(*args, **kwargs):
        raise AttributeError("no attribute norm")

    monkeypatch.setattr(sys.modules["liger_kernel.transformers"], "_apply_liger_kernel_to_instance", fail)
    with pytest.raises(UserError, match="does not fit LlamaForCausalLM.*LIGER_KERNEL=False"):
        liger.apply_kernels(AutoModelForCausalLM.from_config(tiny_config("llama")))


def logged(folder, name: str):
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry[name] for entry in entries if "grad_norm" in entry]


@pytest.mark.usefixtures("undrawn")
def test_a_run_with_kernels_is_traced_checked_and_trains_alike(package, arguments, run_here, tmp_path, monkeypatch):
    """And with kernels that are wrong, as if there were none; those asked for end the run."""
    words = ["MAX_STEPS=2", "EVAL_STEPS=None", "SAVE_STEPS=None", "LORA_DROPOUT=0", "DTYPE=float32", "KL_WEIGHT=0"]
    assert run_here("qlora_train.py", *arguments("plain", *words))[0] == 0
    launched, honest, rotate = [], sft.batch_plan.trace, modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(sft, "choose_kernels", lambda *args: (True, ", Liger kernels"))
    monkeypatch.setattr(
        sft.batch_plan, "trace", lambda *args: [honest(*args), launched.append(len(Kernel.launched))][0]
    )
    code, out, err = run_here("qlora_train.py", *arguments("kernels", *words))
    assert code == 0 and "could not be predicted" not in err, err
    assert ", Liger kernels\n" in out and "check: losses differ by" in out and "no Liger" not in out
    assert len(package.calls) == 2 and launched == [0] and len(Kernel.launched) > 20
    assert modeling_llama.apply_rotary_pos_emb is rotate
    assert logged(tmp_path / "kernels", "loss") == pytest.approx(logged(tmp_path / "plain", "loss"), rel=1e-6)
    package.norm = wrong_norm
    code, out, err = run_here("qlora_train.py", *arguments("wrong", *words))
    assert code == 0 and "check: no Liger kernels, which give other losses" in out, err
    assert logged(tmp_path / "wrong", "loss") == logged(tmp_path / "plain", "loss")
    # KL_WEIGHT of full fine-tuning: the base beside the model has transformers' own code, too.
    full, plain = (
        [word for word in arguments(name, *words, "KL_WEIGHT=1", "OPTIM=adamw") if not word.startswith("LORA")]
        for name in ("full", "plain-full")
    )
    code, out, err = run_here("galore_train.py", *full)
    assert code == 0 and "check: no Liger kernels" in out, err
    monkeypatch.setattr(sft, "choose_kernels", lambda *args: (False, ""))
    assert run_here("galore_train.py", *plain)[0] == 0
    assert logged(tmp_path / "full", "kl") == logged(tmp_path / "plain-full", "kl")
    monkeypatch.setattr(sft, "choose_kernels", lambda *args: (True, ", Liger kernels"))
    code, _, err = run_here("qlora_train.py", *arguments("asked", *words, "LIGER_KERNEL=True"))
    assert code == 2 and "LIGER_KERNEL=True: the loss is not the model's own" in err and "LIGER_KERNEL=None" in err


def test_an_estimate_counts_the_kernels(package, tiny, run_here):
    code, out, err = run_here("estimate_memory.py", f"MODEL={tiny()}", "MAX_LENGTH=64", "GRADIENT_CHECKPOINTING=False")
    assert code == 0 and ", bfloat16, Liger kernels" in out and package.calls and not Kernel.launched, err
