"""Models and tokenizers loaded in the right form, and saved; what cannot work is refused."""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import AutoHfQuantizer

from common import distributed
from common.cli import UserError
from common.files import sync_files
from common.model.location import Source, trained_quantization
from common.model.model_folders import convert_gguf
from common.model.quantize import (
    BITS,
    BITSANDBYTES,
    UNPACKED,
    adopt_dtype,
    forget_codes,
    own_quantization,
    quantization_config,
    quantize_hqq,
    report_unquantized,
)


def from_hub(load, source: Source, **kwargs):
    """Call a from_pretrained on the source; an error gets a note for cli.explain."""
    try:
        if source.gguf and not Path(source.path).is_dir():
            convert_gguf(Path(source.gguf), Path(source.path))
        return load(source.path, trust_remote_code=False, revision=source.revision, **kwargs)
    except Exception as error:
        hint = "Is the name right, the network there, and access granted?"
        if source.gguf or Path(source.path).is_dir():
            hint = "Copy its files again; if it is newer than transformers, update that: pip install -U transformers."
        elif source.adapter:
            hint += " Or name its base: MODEL=<base>, with ADAPTER=<adapter> where the script has that."
        error.add_note(f"MODEL={source.name} cannot be loaded. {hint}")
        raise


def load_config(source: Source):
    config = from_hub(AutoConfig.from_pretrained, source)
    text = config.get_text_config()
    if text.pad_token_id is not None and not 0 <= text.pad_token_id < text.vocab_size:
        text.pad_token_id = None  # only the embeddings ask for it, and stop
    return config


def load_tokenizer(source: Source):
    """The adapter's tokenizer, else the base's, which must not be larger than the embeddings."""
    is_adapters = source.adapter and (Path(source.adapter) / "tokenizer_config.json").exists()
    holder = Source(source.adapter, source.adapter) if is_adapters else source
    tokenizer = from_hub(AutoTokenizer.from_pretrained, holder)
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        templates = tokenizer.chat_template
        tokenizer.chat_template = templates.get("default", next(iter(templates.values())))
    vocab_size = load_config(source).get_text_config().vocab_size
    if len(tokenizer) > vocab_size and not is_adapters:  # an adapter has rows for its own
        problem = f"its tokenizer has {len(tokenizer)} tokens, its embeddings {vocab_size} rows"
        raise UserError(f"MODEL={source.name}: {problem}. Use the tokenizer that it came with, or resize these first.")
    return tokenizer


def choose_dtype(name: str | None, full: bool = False) -> torch.dtype:
    """The dtype asked for; None: bf16, where the device computes it badly fp16 (GPU) or fp32 (CPU).

    full: all weights are to be trained, which fp16 cannot.
    """
    if name is not None:
        return getattr(torch, name)
    device = distributed.device().type
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        if full:
            print("full fine-tuning in float32: this GPU has no bfloat16")
        return torch.float32 if full else torch.float16
    if device == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.float32
    return torch.bfloat16


def find_quantization(source: Source, requested: str | None, wish: str = "") -> str | None:
    """How the source's base is quantised once loaded: as its folder has it (UNPACKED: not), else as requested.

    requested: "auto" means as in the run that trained the source's adapter. wish: the setting that requests it, with
    its value; "": QUANTIZATION. UserError where the folder's is another, or cannot be loaded here.
    """
    config = load_config(source)
    own = own_quantization(config)
    if requested == "auto":
        requested = own or trained_quantization(source)
    if own is None:
        return requested
    quantized = f"MODEL={source.name} is quantised already ({own})"
    if requested not in (None, own):
        wish, remedy = wish or f"QUANTIZATION={requested}", "Leave this setting out, or take the 16-bit model."
        raise UserError(f"{wish}: {quantized}. {remedy}")
    if own in UNPACKED:
        return None
    if distributed.engine() in ("fsdp", "zero3"):
        raise UserError(f"{quantized}, which {distributed.engine()} cannot shard. Use launch/ddp.yaml.")
    if own not in BITSANDBYTES:
        try:
            quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
            quantizer.validate_environment(device_map={"": distributed.device()})
        except (ImportError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{quantized}, which does not run here: {reason} Take the 16-bit model.") from error
    return own


def count_weights(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def context_length(config) -> int:
    """Tokens that a model has positions for."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_length(source: Source, max_length: int) -> None:
    if max_length > (most := context_length(load_config(source))):
        raise UserError(f"MAX_LENGTH={max_length}: {source.name} has {most} positions. Set MAX_LENGTH={most}.")


def load_model(
    source: Source, quantization: str | None, dtype: torch.dtype, attention: str, trainable=False, vocabulary=0,
    device: torch.device | None = None,
):  # fmt: skip
    """The model with its adapter, its embeddings with at least so many rows. device: None means this process's."""
    model = load_base(source, quantization, dtype, attention, device or distributed.device())
    model.config.name_or_path = model.name_or_path = source.name  # for peft's adapter_config.json
    # After an evaluation on CPUs with AVX512-BF16, bitsandbytes 0.50 would silently cut the gradients.
    for module in model.modules() if trainable else ():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
    model.base_fingerprint = fingerprint(model)  # before the rows of new tokens come
    if source.adapter:
        check_adapter(model, source)
    if vocabulary > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(vocabulary)
    if source.adapter:
        from common.model.adapters import load_adapter  # imports peft, which is slow

        model = load_adapter(model, source.adapter, trainable)
        model.active_peft_config.revision = source.revision  # as it is saved again, with the model's name
    return model


def load_base(source: Source, quantization: str | None, dtype: torch.dtype, attention: str, device: torch.device):
    """The model without adapter, quantised as its folder is or else as requested."""
    quantization, config = find_quantization(source, quantization), load_config(source)
    own, options = own_quantization(config), {}
    if own in UNPACKED:
        name = str(dtype).removeprefix("torch.")
        print(f"MODEL={source.name} is quantised ({own}); its weights are taken in {name}", file=sys.stderr)
        options["quantization_config"] = UNPACKED[own](dequantize=True)
    elif own is None:  # for others, None would be an order to read the folder's codes as if they were weights
        options["quantization_config"] = quantization_config(quantization, dtype, config)
    # transformers would put an adapter that was left over beside the model on it.
    options["adapter_kwargs"] = {"subfolder": "none"}
    # hqq's layers are packed one by one: the device need not hold the 16-bit model.
    elsewhere = distributed.holds_parts() or quantization in BITS
    model = load_weights(
        source,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        device_map=None if elsewhere else {"": device},
        use_safetensors=True,
        **options,
    )
    if quantization in BITS:
        quantize_hqq(model, quantization, dtype, device)
    if own in (*BITSANDBYTES, *UNPACKED):
        adopt_dtype(model, dtype)
        forget_codes(model)
    if quantization:
        report_unquantized(model, quantization)
    return model


def load_weights(source: Source, **options):
    """The model of the source; UserError where its files lack weights, which would be random ones."""
    checks = dict(output_loading_info=True, ignore_mismatched_sizes=True)
    model, found = from_hub(AutoModelForCausalLM.from_pretrained, source, **checks, **options)
    wrong = [f"{name} is missing" for name in found["missing_keys"]]
    wrong += [f"{name} is {tuple(has)}, not {tuple(wanted)}" for name, has, wanted in found["mismatched_keys"]]
    if wrong:
        problem = f"its weights are not those of its config.json: {min(wrong)}, and {len(wrong) - 1} more like it"
        raise UserError(f"MODEL={source.name}: {problem}. Copy its files again, or name another.")
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # settings of sampling without it, as Llama 2 came: they could not be saved
        model.generation_config.do_sample = True
    return model


def fingerprint(model) -> list[float]:
    """Mean absolute value of 16 embedding rows, to tell two models of one shape apart."""
    weight = model.get_input_embeddings().weight
    rows = torch.linspace(0, weight.shape[0] - 1, 16).long().to(weight.device)
    return [round(x, 6) for x in weight.detach()[rows].float().abs().mean(dim=1).tolist()]


def check_adapter(model, source: Source) -> None:
    file = Path(source.adapter) / "base_fingerprint.json"
    if file.is_file() and not same_weights(json.loads(file.read_text()), model.base_fingerprint):
        problem = f"the adapter was trained on other weights than {source.name} holds now"
        raise UserError(
            f"MODEL={source.name} ADAPTER={source.adapter}: {problem}. Set MODEL to its base as it was then."
        )


def same_weights(one: list[float], other: list[float]) -> bool:
    """Whether two fingerprints are alike, in any dtype."""
    one, other = torch.tensor(one), torch.tensor(other)
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.02)


def save_final(folder: Path, model, tokenizer, base_fingerprint=None, weights: dict | None = None) -> None:
    """Write adapter or model and tokenizer; weights: where the model holds only a part of them."""
    is_adapter = hasattr(model, "peft_config")
    # It holds the rows of new tokens by itself; "auto" would ask the hub for the base's config.
    options = {"save_embedding_layers": False} if is_adapter else {"max_shard_size": "5GB"}
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    try:
        model.save_pretrained(partial, state_dict=weights, **options)
    except SafetensorError as error:
        remedy = "Make room, then the same command again."
        raise UserError(f"{folder} cannot be written: {error}. {remedy}") from error
    tokenizer.save_pretrained(partial)
    if is_adapter:
        (partial / "base_fingerprint.json").write_text(json.dumps(base_fingerprint))
    sync_files(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
