"""The base's pass of KL_WEIGHT takes the layers below the adapter from the model's pass, and nothing changes."""

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from common.train.loss import add_chunked_loss
from common.train.shared_layers import SharedLayers, layers_below

LAYERS = 3
LINEAR = torch.nn.Linear, Conv1D
GIVEN = ("layer_types", "no_rope_layers", "num_hidden_layers")  # for another number of layers
NAMES = [name for name, (_, changes) in ARCHITECTURES.items() if not set(GIVEN) & set(changes)]


def adapted(kind: str, first: int = LAYERS - 1, attention: str = "eager", **changes):
    """A model of LAYERS layers, with an adapter that changes it from layer `first` on, and its decoder layers."""
    torch.manual_seed(0)
    config = tiny_config(kind, **{"num_hidden_layers": LAYERS, **changes})
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()
    (layers,) = (m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
    paths = [name for name, m in base.named_modules() if isinstance(m, LINEAR) and not name.endswith("head")]
    numbers = [name for name in paths if any(f".{n}." in name for n in range(first, LAYERS))]
    model = get_peft_model(base, LoraConfig(target_modules=numbers, init_lora_weights=False, task_type="CAUSAL_LM"))
    return model.train(), layers


def step(model, monkeypatch, shares: bool):
    """Loss, divergence and gradients of a step, and how often each layer was computed."""
    calls, layers = [], layers_below(model.get_base_model())
    inside = enumerate(next(layer.children()) for layer in layers)
    hooks = [module.register_forward_hook(lambda *_, n=n: calls.append(n)) for n, module in inside]
    with monkeypatch.context() as patch:
        if not shares:
            patch.setattr("common.train.shared_layers.layers_below", lambda model: [])
        add_chunked_loss(model.get_base_model(), model.disable_adapter)
    torch.manual_seed(1)
    ids = torch.randint(3, 600, (2, 20))
    losses, divergence, _ = model(input_ids=ids, learn=ids.masked_fill(ids % 2 == 0, -100), use_cache=False)
    model.zero_grad()
    (losses.sum() + divergence).backward()
    for hook in hooks:
        hook.remove()
    del model.get_base_model().forward
    return [losses, divergence, *(p.grad.clone() for p in model.parameters() if p.requires_grad)], sorted(calls)


@pytest.mark.parametrize("name", [*NAMES, "falcon-sdpa"])
def test_numbers_are_those_of_a_pass_of_its_own(name, monkeypatch):
    kind, changes = ARCHITECTURES.get(name) or ("falcon", {"attention": "sdpa"})  # whose layers return (hidden, None)
    model, _ = adapted(kind, **changes)
    ours, once = step(model, monkeypatch, shares=True)
    expected, twice = step(model, monkeypatch, shares=False)
    assert once == [0, 1] and twice == [0, 0, 1, 1] and expected[1] > 0
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_checkpointed_layers_are_shared_and_what_they_gave_is_let_go(monkeypatch):
    model, _ = adapted("llama")
    expected, _ = step(model, monkeypatch, shares=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    shared = []
    monkeypatch.setattr("common.train.loss.SharedLayers", lambda model: shared.append(SharedLayers(model)) or shared[0])
    ours, _ = step(model, monkeypatch, shares=True)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    assert shared[0].layers and shared[0].output is None


def test_nothing_is_shared_where_the_layers_below_are_trained_or_noisy(monkeypatch):
    below = [len(layers_below(adapted("llama", first)[0].get_base_model())) for first in range(LAYERS)]
    assert below == [0, 1, 2]
    assert layers_below(adapted("llama", attention_dropout=0.1)[0].get_base_model()) == []
    assert layers_below(adapted("mixtral", router_jitter_noise=0.1)[0].get_base_model()) == []
    assert layers_below(adapted("opt", layerdrop=0.1)[0].get_base_model()) == []
    sharing = dict(num_kv_shared_layers=1, layer_types=["sliding_attention", "full_attention", "full_attention"])
    assert layers_below(adapted("gemma4_text", **sharing)[0].get_base_model()) == []
    assert layers_below(adapted("gpt2", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.1)[0].get_base_model()) == []
    model = adapted("llama")[0].get_base_model()
    model.get_input_embeddings().weight.requires_grad_()
    assert layers_below(model) == []
    model, _ = adapted("llama")
    expected, _ = step(model, monkeypatch, shares=False)
    model.get_base_model().get_input_embeddings().neftune_noise_alpha = 5
    ours, calls = step(model, monkeypatch, shares=True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert calls == [0, 0, 1, 1]
