"""Attention over packed rows on the CPU, one document at a time: `sdpa_documents` in transformers.

With a block-diagonal mask SDPA still computes the full T x T square: on two cores a third of the step.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def document_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
    """Causal attention inside each document; plain SDPA where no document boundaries are given.

    query: (1, heads, T, head_dim); key, value: (1, kv_heads, T, head_dim); cu_seq_lens_q: (documents + 1,)
    token offsets, from TRL's padding-free collator. Returns (1, T, heads, head_dim) and no weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs["is_causal"] = True
    lengths = cu_seq_lens_q.diff().tolist()
    documents = zip(*(states.split(lengths, 2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *qkv, None, **kwargs)[0] for qkv in documents]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register("sdpa_documents", document_attention)
AttentionMaskInterface.register("sdpa_documents", sdpa_mask)
