"""The short rows of gpu_check: the scripts as a user runs them, on a tiny model, for what no CPU covers."""

import contextlib
import functools
import io
import json
import math
import runpy
import shutil
import signal
import sys
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from common.hardware import now

QLORA, GALORE, PREFERENCE = "qlora_train.py", "galore_train.py", "preference_train.py"
STEPS = 4
# Rows of one run of a script: its settings beside COMMON.
RUNS = {
    "lora": (QLORA, "LORA_R=8"),
    "nf4": (QLORA, "QUANTIZATION=nf4"),
    "full": (QLORA, "ADAPTER=None"),
    "galore": (GALORE, "OPTIM=galore GALORE_RANK=16"),
    "dpo kept": (PREFERENCE, "REFERENCE=kept"),
    "dpo live": (PREFERENCE, "REFERENCE=live"),
    "int8": (QLORA, "QUANTIZATION=int8"),
    "hqq": (QLORA, "QUANTIZATION=hqq-4bit"),
    "galore_8bit": (GALORE, "OPTIM=galore_8bit GALORE_RANK=16"),
    "float16": (QLORA, "DTYPE=float16"),
    "float32": (QLORA, "DTYPE=float32 ADAPTER=None"),
    "adamw_bnb_8bit": (QLORA, "OPTIM=adamw_bnb_8bit ADAPTER=None"),
    "paged_adamw_8bit": (QLORA, "OPTIM=paged_adamw_8bit ADAPTER=None"),
    "loftq": (QLORA, "ADAPTER=loftq QUANTIZATION=nf4"),
    "kl": (QLORA, "KL_WEIGHT=1"),
    "checkpointing": (QLORA, "GRADIENT_CHECKPOINTING=True"),
    "offloading": (QLORA, "ACTIVATION_OFFLOADING=True"),
    "compile": (QLORA, "TORCH_COMPILE=True"),
    "liger": (QLORA, "LIGER_KERNEL=True"),
    "unpacked": (QLORA, "PACKING=False PER_DEVICE_TRAIN_BATCH_SIZE=2"),
}
WORK = tempfile.TemporaryDirectory(prefix="gpu_check")  # of models and run folders, until this process ends


def run_smoke(name: str) -> str:
    """Run a row; what it says. Raises RuntimeError where it fails."""
    if name in RUNS:
        script, settings = RUNS[name]
        return train(script, name, *settings.split())
    return globals()[name.replace(" ", "_")]()


def train(script: str, name: str, *settings: str) -> str:
    """A few steps of a training script with finite losses; its last line, the row for runs.md, shortened."""
    folder = Path(WORK.name) / "out" / name.replace(" ", "-")
    data = "data/pairs.jsonl[:24]" if script == PREFERENCE else "data/brief.jsonl[:40]"
    run_script(
        script, f"MODEL={tiny_model()}", f"DATA={data}", f"OUT_DIR={folder.parent}", f"RUN_NAME={folder.name}",
        "MAX_LENGTH=320", f"MAX_STEPS={STEPS}", "EVAL_SIZE=4", "SAVE_STEPS=2", "LEARNING_RATE=1e-3", *settings,
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    loss, held_out = summary["train_loss"], summary["eval_loss"]
    if summary["steps"] != STEPS or not math.isfinite(loss + held_out):
        raise RuntimeError(f"{summary['steps']} steps, loss {loss}, held out {held_out}")
    return f"loss {loss:.3f}, held out {held_out:.3f}"


def resume() -> str:
    """A run stopped by Ctrl-C in its third step, and the same command again."""
    from common.train.trainer import ChatTrainer

    honest = ChatTrainer.training_step

    def stop_in_third(self, *args, **kwargs):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return honest(self, *args, **kwargs)

    with mock.patch.object(ChatTrainer, "training_step", stop_in_third):
        try:
            train(QLORA, "resume")
        except RuntimeError as error:
            if not str(error).startswith("exit code 130"):
                raise
    return f"stopped in step 3, then {train(QLORA, 'resume')}"


def chat(*settings: str) -> str:
    wish = "PROMPT=Hi", "TEMPERATURE=0", "MAX_NEW_TOKENS=8"
    return ascii(run_script("chat_pipe.py", f"MODEL={trained()}", *wish, *settings))


def chat_nf4() -> str:
    return chat("QUANTIZATION=nf4")


def evaluate() -> str:
    folder = Path(WORK.name) / "evaluation"
    chats = ("SUITES=loss", "CHATS=data/brief.jsonl[:8]", "MAX_LENGTH=256", f"OUT_DIR={folder}")
    with mock.patch.dict(sys.modules, {} if find_spec("openai") else {"openai": mock.MagicMock()}):  # of the judge
        return run_script("evaluate_model.py", f"MODEL={trained()}", *chats)


def export() -> str:
    """A merge, and a GGUF file where the package that checks it is there."""
    gguf = "f16" if find_spec("xllamacpp") else None
    folder = Path(WORK.name) / "out" / "export"
    shutil.rmtree(folder, ignore_errors=True)
    run_script(
        "merge_and_export.py", f"MODEL={trained()}", f"GGUF={gguf}", f"OUT_DIR={folder.parent}", "RUN_NAME=export"
    )
    return f"merged{', and GGUF f16' if gguf else '; no GGUF: the package xllamacpp is missing'}"


def trained() -> Path:
    """The folder of the row lora, which is run where it has not been in this process."""
    folder = Path(WORK.name) / "out" / "lora"
    if not (folder / "summary.json").exists():
        run_smoke("lora")
    return folder


def cudnn_kernels() -> str:
    """Gradients of SDPA under a mask of documents, with cuDNN's kernel and without; the seconds of a new length."""
    said, before = [], torch.backends.cuda.cudnn_sdp_enabled()
    for use in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(use)
        attention_has_nan(256)  # loads the kernels
        seconds, bad = [], []
        for length in (1000, 1088, 4160):  # the last two leave 64 when divided by 128
            started = now()
            bad += [length] * attention_has_nan(length)
            seconds.append(now() - started)
            started = now()
            attention_has_nan(length)
            seconds[-1] -= now() - started
        torch.backends.cuda.enable_cudnn_sdp(before)
        nan = f"NaN at {', '.join(map(str, bad))}" if bad else "no NaN"
        said.append(f"cuDNN {'on' if use else 'off'}: {nan}, a new length {max(seconds):.3f} s")
    return "; ".join(said)


def attention_has_nan(length: int, device="cuda") -> bool:
    """With a logsumexp below -88.7 in each row of a causal mask of two documents (pytorch issue 196678)."""
    generator = torch.Generator(device).manual_seed(0)
    shape = dict(size=(1, 8, length, 128), generator=generator, device=device)
    query, key, value = (torch.randn(**shape) * scale for scale in (0.1, 0.1, 1.0))
    query, key = query + 4, key - 4  # products of -2,048, scaled to -181
    states = [state.bfloat16().requires_grad_() for state in (query, key, value)]
    number = torch.arange(length, device=device) >= length // 3
    mask = (number[:, None] == number[None]).tril()[None, None]
    torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=mask).float().square().sum().backward()
    return any(state.grad.isnan().any().item() for state in states)


@functools.cache
def tiny_model() -> Path:
    """A folder with a Llama of two layers, random weights, and a tokenizer trained on our own data."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder, special = Path(WORK.name) / "tiny", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train([str(ROOT / "data" / "brief.jsonl")], trainer)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    ends = dict(bos_token=special[0], eos_token=special[2], pad_token=special[2])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)
    return folder


def run_script(script: str, *arguments: str) -> str:
    """Run a script in this process as a command line would; returns the last line of its output.

    Where it fails, its error is raised, or RuntimeError with its exit code, with all of its output as a note.
    RuntimeError, too, where training left its attention because of other losses.
    """
    before = sys.argv, sys.excepthook, threading.excepthook
    sys.argv = [str(ROOT / script), *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as stop:
                if stop.code:
                    raise RuntimeError(f"exit code {stop.code}: {last_line(errors.getvalue())}") from None
    except Exception as error:
        error.add_note(f"{script} {' '.join(arguments)}\n{out.getvalue()}{errors.getvalue()}")
        raise
    finally:
        sys.argv, sys.excepthook, threading.excepthook = before
    for line in out.getvalue().splitlines():
        if line.startswith("check: ") and "other losses" in line:
            raise RuntimeError(line)
    return last_line(out.getvalue())


def last_line(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    return lines[-1][:200]
