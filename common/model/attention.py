"""Attention: what a model supports, and attention over packed rows one document at a time.

transformers knows it as `sdpa_documents` and `eager_documents`. With a block-diagonal mask SDPA still computes the full
T x T square: on two cores a third of the step. Some models do not even build that mask.
"""

import functools
import sys
from importlib.util import find_spec

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from common import distributed
from common.cli import UserError
from common.model.varlen import supports_varlen

# Kinds of layers (config.layer_types) whose tokens can be kept apart by attention alone. Convolutions and running
# states, as in Qwen3.5, LFM2 and Mamba, go on from one document to the next.
PACKABLE = {"full_attention", "sliding_attention", "chunked_attention"}
# Models with an attention of their own that separates the documents of a row; Falcon's, BLOOM's and MPT's do not.
SEPARATES_DOCUMENTS = {"stablelm", "gptj", "codegen"}
# Models whose mask does not, but that take one of our attentions.
MIXES_DOCUMENTS = {"opt", "gpt_oss"}


def model_class(config):
    """The class that AutoModelForCausalLM makes from a config; UserError where it makes none."""
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UserError(f"MODEL: transformers has no causal language model of type {config.model_type}.") from None
    return found[0] if isinstance(found, tuple) else found


def can_pack(config, max_length: int) -> bool:
    """Whether rows of several documents, max_length tokens long, can be computed as if these stood alone."""
    text = config.get_text_config().to_dict()
    # Chunks are counted from the beginning of the row, not of a document.
    layers, kind = set(text.get("layer_types") or ()), model_class(config)
    is_cut = "chunked_attention" in layers and max_length > text["attention_chunk_size"]
    separates = kind._supports_attention_backend or config.model_type in SEPARATES_DOCUMENTS
    return separates and layers <= PACKABLE and not (is_cut or kind._is_stateful)


def choose_attention(
    config, name: str | None, packed: bool = False, device: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> str:
    """transformers' name of the attention: the one asked for, else SDPA, or eager where the model has no SDPA.

    packed: attend per document where rows hold several and the model's own mask is slow or not to be relied on (eager).
    device: its type; None: this process's. dtype: of the computation. Raises UserError where the model does not support
    `name`.
    """
    kind, device = model_class(config), device or distributed.device().type
    has_varlen = device == "cuda" and supports_varlen(config, kind, dtype)
    if name == "varlen_documents" and not has_varlen:
        raise UserError(f"ATTN_IMPLEMENTATION={name}: not for this {config.model_type}, GPU or DTYPE. Set None.")
    if name in ("sdpa", "flash_attention_2", "flex_attention"):
        supported = dict(sdpa=kind._supports_sdpa, flex_attention=kind._supports_flex_attn)
        if not (supported | {"flash_attention_2": kind._supports_flash_attn})[name]:
            raise UserError(f"ATTN_IMPLEMENTATION={name}: {config.model_type} does not support it. Set None or eager.")
        if name == "flash_attention_2" and not find_spec("flash_attn"):
            raise UserError(f"ATTN_IMPLEMENTATION={name}: the package is missing: pip install flash-attn.")
    chosen = name or ("sdpa" if kind._supports_sdpa else "eager")
    if packed and name is None and has_varlen:
        return "varlen_documents"
    on_cpu = name is None and device == "cpu"
    is_ours = on_cpu or chosen == "eager" or chosen == "sdpa" and config.model_type in MIXES_DOCUMENTS
    if packed and is_ours and kind._supports_attention_backend:
        return f"{chosen}_documents"
    return chosen


def can_share_prompts(config, attention: str, longest: int) -> bool:
    """Whether two answers may follow one prompt in a row (`compared.share_prompts`).

    longest: tokens of a prompt and its longer answer. It must fit into windows that `document_attention` disregards.
    """
    if attention not in ("sdpa_documents", "eager_documents"):
        return attention == "varlen_documents"
    windows = [getattr(layer, "sliding_window", longest) for layer in DynamicCache(config=config).layers]
    return longest <= min(windows)


def describe_pairs(shapes: list[tuple[int, int, int]]) -> dict:
    """What attention has to know of pairs in a row; made on the CPU, so that no GPU is waited for.

    shared_prompts: the shapes, which are tokens of each pair's prompt and two answers. pair_sequences: each pair as
    two, prompt and first answer, and the second one, whose keys are the prompt's, too. Of these `keys`, indices of
    all keys in the row, (T_k,); `offsets` of queries and of keys, (sequences + 1,) both; and `longest`, most queries
    and most keys of a sequence.
    """
    keys, lengths, start = [], [], 0
    for prompt, better, worse in shapes:
        second = start + prompt + better
        keys += [*range(start, second), *range(start, start + prompt), *range(second, second + worse)]
        lengths += [(prompt + better, prompt + better), (worse, prompt + worse)]
        start = second + worse
    columns = list(zip(*lengths, strict=True))
    offsets = [torch.tensor([0, *column]).cumsum(0, dtype=torch.int32) for column in columns]
    sequences = dict(keys=torch.tensor(keys), offsets=offsets, longest=[max(column) for column in columns])
    return dict(shared_prompts=shapes, pair_sequences=sequences)


def eager_attention(module, *args, **kwargs):
    """The model's own attention, as the paper has it, from its modeling file."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def document_attention(
    attend, module, query, key, value, attention_mask, cu_seq_lens_q=None, shared_prompts=None, **kwargs
):
    """Causal attention inside each document; `attend` itself where no document boundaries are given.

    query: (1, heads, T, head_dim); key, value: (1, kv_heads, T, head_dim); cu_seq_lens_q: (documents + 1,)
    token offsets, from TRL's padding-free collator. shared_prompts: instead, of pairs (see `describe_pairs`).
    Returns (1, T, heads, head_dim) and no weights.
    """
    if shared_prompts is not None:
        outputs, start = [], 0
        for shape in shared_prompts:
            part = slice(start, start := start + sum(shape))
            states = (tensor[:, :, part] for tensor in (query, key, value))
            outputs += pair_attention(functools.partial(attend, module), *states, attention_mask, shape, **kwargs)
        return torch.cat(outputs, dim=1), None
    if cu_seq_lens_q is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    kwargs["is_causal"], outputs, start = True, [], 0
    for length in cu_seq_lens_q.diff().tolist():
        part = slice(start, start := start + length)
        mask = None if attention_mask is None else attention_mask[:, :, part, part]
        # The last token sees the first: there is no window, or a longer one. SDPA is faster without a mask.
        if mask is not None and mask.dtype == torch.bool and mask[0, 0, -1, 0]:
            mask = None
        states = (tensor[:, :, part] for tensor in (query, key, value))
        outputs.append(attend(module, *states, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def pair_attention(attend, query, key, value, mask, shape: tuple[int, int, int], **kwargs) -> list[torch.Tensor]:
    """Causal attention in a prompt and two answers to it, which do not see each other.

    shape: tokens of each of the three. mask: the row's, of which only the kind matters: SDPA does without one, to a
    model's own attention it is added. Returns the outputs of prompt and first answer, and those of the second.
    """
    prompt, second = shape[0], shape[0] + shape[1]
    first = [tensor[:, :, :second] for tensor in (query, key, value)]
    # Its prompt's outputs once more: with fewer queries than keys, SDPA would need a mask, and be slower.
    other = [torch.cat([tensor[:, :, :prompt], tensor[:, :, second:]], dim=2) for tensor in (query, key, value)]
    outputs = []
    for states in (first, other):
        sees, length = None, states[0].shape[2]
        if mask is not None and mask.dtype != torch.bool:
            sees = mask.new_full((1, 1, length, length), torch.finfo(mask.dtype).min).triu(1)
        outputs.append(attend(*states, sees, is_causal=True, **kwargs)[0])
    return [outputs[0], outputs[1][:, prompt:]]


def sdpa_documents(*args, **kwargs):
    return document_attention(sdpa_attention_forward, *args, **kwargs)


def eager_documents(*args, **kwargs):
    return document_attention(eager_attention, *args, **kwargs)


AttentionInterface.register("sdpa_documents", sdpa_documents)
AttentionMaskInterface.register("sdpa_documents", sdpa_mask)
AttentionInterface.register("eager_documents", eager_documents)
AttentionMaskInterface.register("eager_documents", eager_mask)
