"""Attention over packed rows on a GPU: torch's kernel for documents of varying length, `varlen_documents`.

With a mask SDPA computes and keeps the T x T square of a row, and repeats keys and values for every head.
"""

import inspect

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention import varlen

    OPTIONS = set(inspect.signature(varlen.varlen_attn).parameters)
except ImportError:  # before torch 2.10
    OPTIONS = set()

# Models that leave their window to the mask instead of handing it to the attention.
HIDES_WINDOW = {"blt", "doge", "paligemma", "phimoe", "qwen2_moe"}
KINDS = {"full_attention", "sliding_attention"}  # of layers (config.layer_types)


def supports_varlen(config, kind, dtype: torch.dtype) -> bool:
    """Whether the kernel computes the attention of a model, and nothing of it is lost.

    kind: the model's class. Soft caps and sinks, which the kernel lacks, SDPA lacks, too.
    """
    if not {"scale", "window_size"} <= OPTIONS or dtype == torch.float32 or torch.version.hip:
        return False
    if torch.cuda.is_available():  # else it is asked for a prediction of memory
        is_built = torch.backends.cuda.is_flash_attention_available()
        if not is_built or torch.cuda.get_device_capability() < (8, 0):
            return False
    text = config.get_text_config()
    fields = text.to_dict()
    sizes = [fields.get("head_dim") or text.hidden_size // text.num_attention_heads]
    sizes += [size for name, size in fields.items() if name.endswith("head_dim") and size]
    has_dropout = any(value for name, value in fields.items() if "att" in name and "drop" in name)
    return (
        kind._supports_sdpa
        and kind._supports_flash_attn
        and kind._supports_attention_backend
        and config.model_type not in HIDES_WINDOW
        and set(fields.get("layer_types") or ()) <= KINDS
        and not has_dropout
        and "v_head_dim" not in fields  # of another size than the keys'
        # Between 192 and 256 the backward pass needs more shared memory than consumer cards have.
        and all(size % 8 == 0 and (size <= 192 or size == 256) for size in sizes)
    )


def varlen_documents(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, cu_seq_lens_q=None,
    max_length_q=None, pair_sequences=None, **kwargs,
):  # fmt: skip
    """Causal attention inside each document, in 16 bits; of padded rows SDPA's, by their mask.

    query: (B, heads, T, head_dim); key, value: (B, kv_heads, T, head_dim); cu_seq_lens_q: (documents + 1,) token
    offsets, with which B is 1; without them each row is a document. pair_sequences: instead, of pairs (see
    `attention.describe_pairs`). Returns (B, T, heads, head_dim) and no weights.
    """
    if attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, _, length, _ = query.shape
    total = key.shape[2]
    device = query.device.type  # the kernel knows no autocast
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, *states = (tensor.to(dtype).transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    if pair_sequences is not None:  # with fewer queries than keys, the last query sees the last key
        ends, key_ends, most, most_keys = *pair_sequences["offsets"], *pair_sequences["longest"]
        states = [tensor.index_select(0, pair_sequences["keys"]) for tensor in states]
    else:
        ends, most = cu_seq_lens_q, max_length_q
        if ends is None:  # with a cache there are more keys than queries, which are the last ones
            ends, most = rows_as_documents(rows, length, query), length
        key_ends, most_keys = (ends, most) if length == total else (rows_as_documents(rows, total, query), total)
    is_local = sliding_window is not None and sliding_window < most_keys
    options = dict(scale=scaling, window_size=(sliding_window - 1 if is_local else -1, 0))
    if "enable_gqa" in OPTIONS:  # torch 2.11 needs no leave
        options["enable_gqa"] = True
    output = varlen.varlen_attn(query, *states, ends, key_ends, most, most_keys, **options)
    return output.unflatten(0, (rows, length)), None


def rows_as_documents(rows: int, length: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(rows + 1, dtype=torch.int32, device=like.device) * length


def padding_mask(*args, attention_mask=None, **kwargs):
    """SDPA's mask for padded rows; none for packed ones, whose T x T square nobody would read."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register("varlen_documents", varlen_documents)
AttentionMaskInterface.register("varlen_documents", padding_mask)
