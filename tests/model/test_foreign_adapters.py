"""Adapters of other tools, in the layouts they publish: chat, training on, evaluation, merge and GGUF as peft has them."""

import json
import shutil

import pytest
import torch
from conftest import save_tiny
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.model import generation, location
from common.model.adapters import prompt_cache

IDS = torch.arange(3, 60)[None]
MODULES = ["q_proj", "v_proj", "up_proj", "down_proj"]
PADDED = 704  # rows, as Unsloth and Axolotl pad them


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A base with a head of its own, 640 rows, and a chat template."""
    folder = save_tiny("qwen2", tmp_path_factory.mktemp("base"), tokenizer.name_or_path)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder, rows=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def save_adapter(folder, base, config, rows=None, named=None, **fields):
    """A random adapter of a config on the base, whose embeddings get so many rows; fields: of its adapter_config.json."""
    torch.manual_seed(1)
    model = get_peft_model(load(base, rows), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": named or str(base)} | fields
    file.write_text(json.dumps(config))
    return folder


def lora(**changes):
    return LoraConfig(task_type="CAUSAL_LM", **dict(r=4, lora_alpha=8, target_modules=MODULES) | changes)


def peft_form(folder, base):
    return save_adapter(folder, base, lora(use_dora=True), named=str(base)), None


def trl_form(folder, base):
    """SFTTrainer's output folder: the adapter, its tokenizer, a checkpoint, training_args.bin, a card."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}] * 8
    args = SFTConfig(output_dir=str(folder), max_steps=1, save_steps=1, report_to="none", use_cpu=True, bf16=False,
                     learning_rate=1e-2, gradient_checkpointing=False)  # fmt: skip
    config = lora(modules_to_save=["lm_head"])
    trainer = SFTTrainer(load(base), args, train_dataset=Dataset.from_list(rows), peft_config=config,
                         processing_class=AutoTokenizer.from_pretrained(base))  # fmt: skip
    trainer.train()
    trainer.save_model()
    return folder, None


def unsloth_form(folder, base):
    mapping = dict(base_model_class="Qwen2ForCausalLM", parent_library="transformers.models.qwen2.modeling_qwen2",
                   unsloth_fixed=True)  # fmt: skip
    config = lora(modules_to_save=["embed_tokens", "lm_head"])
    save_adapter(folder, base, config, PADDED, "unsloth/tiny-bnb-4bit", auto_mapping=mapping, revision=None)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder, PADDED


def axolotl_form(folder, base):
    """The base's config.json beside the adapter, checkpoints below it, a path of the machine that trained it."""
    config = lora(modules_to_save=["embed_tokens", "lm_head"], lora_dropout=0.05)
    save_adapter(folder, base, config, PADDED, "/workspace/data/base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    load(base, PADDED).config.save_pretrained(folder)
    save_adapter(folder / "checkpoint-2", base, config, PADDED, "/workspace/data/base")
    return folder, PADDED


def llama_factory_form(folder, base):
    save_adapter(folder, base, lora(target_modules="all-linear"), named="./base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    for file in ("all_results.json", "trainer_state.json", "settings.json"):
        (folder / file).write_text('{"epoch": 1.0}')
    (folder / "training_args.yaml").write_text("stage: sft\n")
    return folder, None


FORMS = [peft_form, trl_form, unsloth_form, axolotl_form, llama_factory_form]


def divergence(one, other) -> float:
    """Highest KL divergence of a token, in nats."""
    one, other = (logits[0].double().log_softmax(-1) for logits in (one, other))
    return (one.exp() * (one - other)).sum(-1).max().item()
