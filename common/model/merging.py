"""An adapter merged into the weights of its base, by every script in this one place, and compared with the adapter."""

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from common.cli import UserError

PROBE_TOKENS = 64  # of the sequence on which both are compared, spread over the vocabulary
# Highest mean KL divergence, in nats a token, of the merged model from the one with the adapter. Rounding the sums to
# 16 bits gives up to 0.01; LoRA on one side of tied embeddings, merged into both, gives 0.03 and more.
BOUND = 0.02


def merge_adapter(model: PeftModel):
    """The base model with the adapter in its weights; UserError (exit code 5) where it predicts something else.

    On the meta device nothing is compared.
    """
    ids = probe(model)
    expected = None if ids.is_meta else predict(model, ids)
    separate_head(model)
    merged = model.merge_and_unload(safe_merge=True)
    if ids.is_meta:
        return merged
    # An adapter may bring a head of its own to a base whose head is tied to the embeddings.
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    merged.config.get_text_config().tie_word_embeddings = is_tied = torch.equal(head.weight, embeddings.weight)
    merged.all_tied_weights_keys = merged.all_tied_weights_keys if is_tied else {}
    found = predict(merged, ids)
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    if not kl <= BOUND:
        name, problem = model.peft_config["default"].base_model_name_or_path, f"KL {kl:.2g} nats a token"
        bound = f"the bound is {BOUND}. Try DTYPE=float32"
        raise UserError(f"the adapter merged into {name} predicts something else: {problem}, {bound}.", code=5)
    return merged


def separate_head(model: PeftModel) -> None:
    """Give tied embeddings and head a matrix each where an adapter changes one of them, or each in another way."""
    layers = model.get_output_embeddings(), model.get_input_embeddings()
    adapted = [layer for layer in layers if isinstance(layer, BaseTunerLayer)]
    if adapted and layers[0].weight is layers[1].weight:
        layer = adapted[0].get_base_layer()
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        model.get_base_model().config.get_text_config().tie_word_embeddings = False  # or peft ties them again


def probe(model) -> torch.Tensor:
    """Token ids (1, T) from all over the vocabulary, those of trained rows among them."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, rows - 1, PROBE_TOKENS).long()
    trained = model.peft_config[model.active_adapter].to_dict().get("trainable_token_indices") or []
    trained = sum(trained.values(), []) if isinstance(trained, dict) else trained
    return torch.cat([ids, torch.tensor(trained[:PROBE_TOKENS], dtype=torch.long)])[None].to(model.device)


@torch.no_grad()
def predict(model, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (T, vocabulary) after each of the tokens (1, T)."""
    was_training = model.training
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    model.train(was_training)
    return logits.log_softmax(-1)
