"""Bounds and choices of every setting, by name, for all scripts; nothing slow is imported."""

import codecs
import importlib.util
import os
import re
from pathlib import Path

from common.cli import UserError, nearest

HQQ = ("hqq-4bit", "hqq-3bit", "hqq-2bit", "hqq-1bit")
DTYPES = ("bfloat16", "float16", "float32")
TRAINERS_OPTIMIZERS = (
    *("adamw_torch_fused", "adamw_torch", "adamw_anyprecision", "adafactor", "sgd"),
    *("adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),  # with an NVIDIA GPU
)
OPTIMIZERS = {
    "qlora_train": TRAINERS_OPTIMIZERS,
    "preference_train": TRAINERS_OPTIMIZERS,
    "estimate_memory": TRAINERS_OPTIMIZERS,
    "galore_train": ("galore", "galore_8bit", "galore_torch", "adamw", "adamw_8bit", "adamw_anyprecision"),
}
TAKE_TRAINED = ("chat_pipe", "evaluate_model", "merge_and_export")  # may load a base as its adapter was trained on it
ADAPTERS = ("lora", "dora", "rslora", "pissa", "loftq", "ia3")
ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
ATTENTIONS += ("sdpa_documents", "eager_documents", "varlen_documents")  # ours, which a run chooses and prints
TEMPLATES = ("chatml", "llama3", "zephyr", "mistral", "alpaca")
CHANGEABLE = """DATA EVAL_DATA EVAL_SIZE MAX_SAMPLES TOO_LONG DROP_PATTERN NUM_TRAIN_EPOCHS MAX_STEPS BATCH_SIZE
GRADIENT_ACCUMULATION_STEPS LEARNING_RATE MIN_LR LR_SCHEDULER WARMUP_RATIO WARMUP_STEPS MAX_GRAD_NORM KL_WEIGHT
NEFTUNE_NOISE_ALPHA GRADIENT_CHECKPOINTING ATTN_IMPLEMENTATION LIGER_KERNEL LORA_DROPOUT GALORE_SCALE
GALORE_UPDATE_GAP DOCTOR LOGGING_STEPS EVAL_STEPS EVAL_FACTS EVAL_PROMPTS EARLY_STOPPING_PATIENCE SAVE_STEPS
SAVE_TOTAL_LIMIT KEEP REPORT_TO
""".split()  # within a run, by ALLOW_CHANGE

CHOICES = {
    "QUANTIZATION": (None, "nf4", "int8", *HQQ),
    "DTYPE": (None, *DTYPES),
    "ATTN_IMPLEMENTATION": ATTENTIONS,
    "PROOF_DTYPE": (None, *DTYPES),
    "MERGE_INTO": (None, "original", "dequantized"),
    "TRAIN_ON": ("assistant", "last", "content", "all"),
    "BAD_ROWS": ("stop", "skip"),
    "COMPLETION": ("answer", "continue"),
    "TOO_LONG": ("cut", "drop", "error"),
    "DOCTOR": ("stop", "warn"),
    "LR_SCHEDULER": ("constant", "linear", "cosine"),
    "KEEP": (None, "best", "last"),
    "RESUME": (None, "auto"),
    "METHOD": ("full", "lora", "qlora", "int8", "galore", *HQQ),
    "DEVICE": ("cuda", "cpu"),
    "LOSS": ("dpo", "ipo", "simpo", "orpo", "kto"),
    "REFERENCE": ("kept", "live"),
    "JUDGE_MODE": ("single", "pair"),
    "JUDGE_SCALE": ("1-10", "0-100"),
}
# Comma-separated values.
LISTS = {
    "GGUF": ("f32", "f16", "bf16", "q8_0", "q4_0", "q5_0", "q4_k_m", "q5_k_m", "q6_k"),
    "SUITES": ("loss", "pairs", "facts", "health", "judge"),
    "REPORT_TO": ("tensorboard", "wandb", "mlflow", "trackio"),
    "ALLOW_CHANGE": CHANGEABLE,
}
# The words of a bound: whether a value keeps it, and the settings it is for.
BOUNDS = {
    "at least 1 and at most 1000000": (
        lambda x: 1 <= x <= 10**6,
        """BATCH_SIZE PER_DEVICE_TRAIN_BATCH_SIZE GRADIENT_ACCUMULATION_STEPS GENERATION_BATCH_SIZE SAVE_TOTAL_LIMIT
        LORA_PLUS_RATIO EARLY_STOPPING_PATIENCE""",
    ),
    "at least 1 and at most 1000000000": (
        lambda x: 1 <= x <= 10**9,
        """MAX_LENGTH MAX_SAMPLES MAX_STEPS LOGGING_STEPS GALORE_UPDATE_GAP CONTEXT MAX_NEW_TOKENS PROOF_TOKENS
        MAX_CHATS ANSWER_TOKENS JUDGE_MAX_TOKENS""",
    ),
    "at least 1 and at most 1000": (lambda x: 1 <= x <= 1000, "PROCESSES JUDGE_REPEATS JUDGE_IN_FLIGHT THREADS"),
    "at least 0 and at most 65535": (lambda x: 0 <= x <= 65535, "PORT"),
    "at least 1 and at most 8192": (lambda x: 1 <= x <= 8192, "LORA_R GALORE_RANK"),
    "above 0 and at most 65536": (lambda x: 0 < x <= 65536, "LORA_ALPHA"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "LORA_DROPOUT"),
    "at least 0 and at most 1": (lambda x: 0 <= x <= 1, "WARMUP_RATIO"),
    "above 0 and at most 1": (lambda x: 0 < x <= 1, "TOP_P"),
    "above 0 and at most 100": (lambda x: 0 < x <= 100, "LEARNING_RATE GALORE_SCALE"),
    "at least 0 and at most 100": (lambda x: 0 <= x <= 100, "MIN_LR WEIGHT_DECAY TEMPERATURE"),
    "at least 0 and at most 1000": (lambda x: 0 <= x <= 1000, "NEFTUNE_NOISE_ALPHA"),
    "at least 0 and below 0.5": (lambda x: 0 <= x < 0.5, "LABEL_SMOOTHING"),
    "above 0 and at most 1000000": (lambda x: 0 < x <= 10**6, "NUM_TRAIN_EPOCHS JUDGE_TIMEOUT"),
    "above 0 and at most 1000": (lambda x: 0 < x <= 1000, "BETA"),
    "at least 0 and at most 1000000": (lambda x: 0 <= x <= 10**6, "KL_WEIGHT WARMUP_STEPS SFT_WEIGHT GAMMA"),
    "at least 0 and at most 1e30": (lambda x: 0 <= x <= 1e30, "MAX_GRAD_NORM"),
    "at least 0 and at most 4294967295": (lambda x: 0 <= x < 2**32, "SEED"),
}
WHOLE_OR_SHARE = ("EVAL_SIZE", "EVAL_STEPS", "SAVE_STEPS")  # a number, or a share below 1
FILES = ("EVAL_FACTS", "EVAL_PROMPTS", "FACTS", "PROMPTS", "TOOLS", "VOCAB")
PATHS = (*FILES, "MODEL", "ADAPTER", "CHAT_TEMPLATE", "LLAMA_CPP", "OUT_DIR")
SIZES = ("MEMORY_LIMIT", "FIT")
SIZE = r"(\d+\.?\d*|\.\d+) *(MiB|GiB|)"
TARGETS = ("LORA_TARGET_MODULES", "GALORE_TARGET_MODULES")
TEXTS = ("PROMPT", "SYSTEM")  # settings that may have several lines
CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]"  # the last: bytes that are no UTF-8
COLUMN = r'\s*("[^"\r\n]+"|[^",\r\n]+):\s*\w+\s*'  # a field of the rows and the name it is read as
# Forms, and their words.
PATTERNS = {
    "HUB_ID": (r"[\w.-]+/[\w.-]+", "it must be org/name."),
    "RUN_NAME": (r"(?!\.+$)[A-Za-z0-9._-]{1,64}", "use 1 to 64 letters, digits, dots, dashes and underscores."),
    "COLUMNS": (
        f"{COLUMN}(,{COLUMN})*",
        'it must be a list of "field:name", the name one of user, assistant, messages and so on.',
    ),
}
LAYERS = r"-?\d+|(-?\d+)?:(-?\d+)?(:[1-9]\d*)?"  # a number, or a slice as Python has it


def check_setting(name: str, value, script: str = "") -> None:
    """Raise UserError unless the value is possible. script: its name, for the choices of OPTIM."""
    choices = OPTIMIZERS.get(script, ()) if name == "OPTIM" else CHOICES.get(name, ())
    if name == "QUANTIZATION" and script in TAKE_TRAINED:
        choices = ("auto", *choices)
    if value in HQQ:
        check_package(name, value, "hqq", "hqq==0.2.8.post1")
    if name == "ATTN_IMPLEMENTATION" and "/" in str(value):  # of the hub
        check_package(name, value, "kernels", "kernels")
    elif choices and value is not None:  # None was checked by the setting's type
        check_choice(name, value, choices)
    elif name == "ADAPTER" and script == "qlora_train" and value and not re.search(r"[/\\]", value):
        if not Path(value).is_dir():
            check_choice(name, value, [None, *ADAPTERS, "an adapter folder", "a run folder", "a hub id"])
    elif value is None:
        return
    elif name in LISTS:
        for item in split_list(value):
            if name == "ALLOW_CHANGE" and item not in CHANGEABLE:
                these = f"{nearest(item, CHANGEABLE)} These can: {', '.join(CHANGEABLE)}."
                raise UserError(f"{name}={value}: {item} cannot change within a run; start a new one.{these}")
            check_choice(name, item, LISTS[name])
    else:
        try:
            problem = find_problem(name, value)
        except (OSError, RuntimeError) as error:  # too long a name; a home folder that is not known
            problem = f"{getattr(error, 'strerror', error)} Choose another."
        if problem:
            raise UserError(f"{name}={value}: {problem}")


def split_list(value: str | None) -> list[str]:
    """The items of a comma-separated setting."""
    return [item for item in (value or "").replace(" ", "").split(",") if item]


def is_pattern(value: str) -> bool:
    """Whether the value of a setting in TARGETS is a regular expression, not names."""
    return re.search(r"[][\\(){}*+?|^$]", value) is not None


def check_choice(name: str, value, choices) -> None:
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise UserError(f"{name}={value} is not known.{nearest(value, choices)} Choose one of: {listed}.")


def find_problem(name: str, value) -> str | None:
    for words, (keeps, names) in BOUNDS.items():
        if name in names.split() and not keeps(value):
            return f"it must be {words}."
    path = Path(str(value)).expanduser() if name in PATHS else None
    if name in WHOLE_OR_SHARE and (not 0 <= value <= 10**9 or value > 1 and value % 1):
        return "it must be a whole number below a billion, or a share below 1; 0 means none."
    if name in FILES and not path.is_file():
        return "file not found."
    if name == "ENCODING" and not is_encoding(value):
        return "no encoding of text; utf-8, utf-16, cp1252, latin-1, gbk and shift_jis are some."
    if name == "LLAMA_CPP" and not (path / "convert_hf_to_gguf.py").is_file():
        return "convert_hf_to_gguf.py not found. Name a checkout of llama.cpp."
    if name == "OUT_DIR":
        existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            return f"{existing} is not a folder that can be written. Choose another."
    if name in SIZES:
        size = re.fullmatch(SIZE, value.strip())
        if not size or float(size[1]) <= 0 or (not size[2] and float(size[1]) > 1):
            return 'it must be a share of the memory such as "0.9", or a size such as "7500MiB" or "8GiB".'
    if name in PATTERNS and not re.fullmatch(PATTERNS[name][0], value):
        return PATTERNS[name][1]
    if name == "CHAT_TEMPLATE" and not value.endswith(".jinja"):
        check_choice(name, value, [*TEMPLATES, "a .jinja file"])
    elif name == "CHAT_TEMPLATE" and not path.is_file():
        return "file not found."
    if name in (*TARGETS, "OUT_DIR", "MODEL", "ADAPTER", "DATA") and not value.strip():
        return "it must not be empty."
    if name == "LORA_LAYERS" and not all(re.fullmatch(LAYERS, item) for item in split_list(value) or [""]):
        return 'it must be numbers or slices of the layers, comma-separated: "-4:", "0,1,-1".'
    if name == "DROP_PATTERN" and value != "auto" or name in TARGETS and is_pattern(value):
        try:
            re.compile(value)
        except (re.error, OverflowError) as error:
            return f"not a regular expression: {error}."


def is_encoding(name: str) -> bool:
    try:
        "".encode(codecs.lookup(name).name)  # LookupError for those of bytes, such as base64
        return True
    except (LookupError, ValueError):
        return False


def check_package(setting: str, value, package: str, requirement: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{setting}={value}: the package is missing: pip install {requirement}.")
