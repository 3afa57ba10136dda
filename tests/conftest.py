"""Tiny random models of each architecture, with a tokenizer trained on our own data: everything offline, on the CPU."""

import gc
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), *(str(path) for path in (ROOT / "tests").iterdir() if path.is_dir())]
os.environ["HF_HUB_OFFLINE"] = "1"
# For this process and all that it starts; TEST_DTYPE=float32 make test: as on a CPU without bf16.
folder = str(ROOT / "tests" / "site")
if folder not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    runpy.run_path(f"{folder}/sitecustomize.py")
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
# A shell's background jobs ignore Ctrl-C, nohup's a closed terminal, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish():
    """Every run ends with a collection, which would look through all that was imported: a quarter of a tiny run."""
    gc.collect()
    gc.freeze()


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Name?"},
    {"role": "assistant", "content": "Brief."},
]
# MATRIX=full: the combinations, too, whose parts the default run proves one by one.
FULL = os.environ.get("MATRIX") == "full"
ARCHITECTURES = ("llama", "stablelm", "gpt2", "mistral", "qwen2")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE of about 600 tokens with the two ChatML tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return save_tokenizer(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>")


@pytest.fixture(scope="session")
def base_tokenizer_folder(tmp_path_factory):
    """The same as GPT-2 has it: no token but <|endoftext|>, no template."""
    return save_tokenizer(tmp_path_factory.mktemp("base_tokenizer"), ["<|endoftext|>"], "<|endoftext|>")


def save_tokenizer(folder: Path, special: list[str], eos: str) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train([str(ROOT / "data" / "brief.jsonl")], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token=eos, pad_token=eos
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    """The tiny tokenizer with our ChatML template."""
    from transformers import AutoTokenizer

    from common.data import templates

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    templates.set_template(tokenizer, "chatml")
    return tokenizer


def tiny_config(architecture: str, **changes):
    """A config of two layers, 64 wide (NF4 wants blocks of 64)."""
    from transformers import AutoConfig

    if architecture == "gpt2":
        settings = dict(
            vocab_size=640, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    else:
        settings = dict(
            vocab_size=640, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=2, pad_token_id=2,
            tie_word_embeddings=architecture == "llama",
        )  # fmt: skip
    return AutoConfig.for_model(architecture, **settings | changes)


def save_tiny(
    architecture: str, folder: Path, tokenizer_folder: Path, seed: int = 0, endless: bool = False, **changes
) -> Path:
    """endless: the first tokens of the vocabulary, the special ones, are never the likeliest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.bfloat16)
    if endless:
        model.get_output_embeddings().weight.data[:3] = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer_folder):
    """tiny(architecture): the folder of a tiny random model."""
    made = {}

    def make(architecture="llama"):
        if architecture not in made:
            made[architecture] = save_tiny(architecture, tmp_path_factory.mktemp(architecture), tokenizer_folder)
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def chats_file(tmp_path_factory):
    """24 short chats."""
    rows = [json.loads(line) for line in open(ROOT / "data" / "brief.jsonl", encoding="utf-8")][:24]
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)


@pytest.fixture
def arguments(tiny, chats_file, tmp_path):
    """arguments(run, "NAME=value", ...): of a run of six steps with dropout and a checkpoint after each."""

    def make(run, *more):
        return [
            f"MODEL={tiny()}", f"DATA={chats_file}", f"OUT_DIR={tmp_path}", f"RUN_NAME={run}", "MAX_STEPS=6",
            "LORA_R=4", "MAX_LENGTH=128", "EVAL_SIZE=4", "EVAL_STEPS=3", "SAVE_STEPS=1", "SAVE_TOTAL_LIMIT=9",
            "LORA_DROPOUT=0.1", "LEARNING_RATE=1e-2", *more,
        ]  # fmt: skip

    return make


# What takes two thirds of a tiny run's time and is proved elsewhere: memory's trace, the picture, peft's card.
LEAN = {
    "common.train.batch_plan.trace": lambda *step: dict.fromkeys(("weights", "gradients", "optimizer states"), 2**20),
    "common.run.report.plot": lambda folder: (folder / "plot.png").touch(),
    "peft.PeftModel.create_or_update_model_card": lambda *args: None,
}


@pytest.fixture
def lean(monkeypatch):
    """Runs without these parts."""
    for name, stand_in in LEAN.items():
        monkeypatch.setattr(name, stand_in)


@pytest.fixture
def undrawn(monkeypatch):
    """Runs that are predicted and not drawn."""
    for name in list(LEAN)[1:]:
        monkeypatch.setattr(name, LEAN[name])


@pytest.fixture(scope="session")
def finished_runs():
    return {}


@pytest.fixture
def finished(arguments, run_here, tmp_path, tmp_path_factory, finished_runs):
    """finished(run, "NAME=value", ...): a copy of a LoRA run that was left alone, trained once for these settings."""

    def make(run, *more):
        if more not in finished_runs:
            folder = tmp_path_factory.mktemp("finished")
            code, _, error = run_here("qlora_train.py", *arguments("run", f"OUT_DIR={folder}", *more))
            assert code == 0, error
            finished_runs[more] = folder / "run"
        return shutil.copytree(finished_runs[more], tmp_path / run)

    return make


@pytest.fixture
def at_step(monkeypatch):
    """at_step({step: action}): the action is taken in the forward pass of this optimizer step (from 1)."""

    from common.train.trainer import ChatTrainer

    honest = ChatTrainer.compute_loss

    def plan(actions):
        def compute_loss(self, *args, **kwargs):
            if self.model.training and self.state.global_step + 1 in actions:
                actions[self.state.global_step + 1]()
            return honest(self, *args, **kwargs)

        monkeypatch.setattr(ChatTrainer, "compute_loss", compute_loss)

    return plan


def write_jsonl(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def execute(script: str, arguments) -> int:
    """Run a script in this process, where its slow imports are done already; returns its exit code."""
    before = sys.argv, sys.excepthook, threading.excepthook
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv, sys.excepthook, threading.excepthook = before
    return 0


def run_script(script: str, *arguments, stdin: str | None = None, **environment) -> subprocess.CompletedProcess:
    """Run an entry script as a user does, from the project's folder."""
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=300, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def run_here(capsys):
    """run_here(script, "NAME=value", ...): a script as the shell runs it, but in this process; exit code, out, err."""

    def run(script, *arguments):
        return execute(script, arguments), *capsys.readouterr()

    return run
