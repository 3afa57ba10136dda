"""An adapter merged into the weights of its base, by every script in this one place, and compared with the adapter."""

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper

from common.cli import UserError
from common.model.adapters import no_merge, trained_rows

PROBE_TOKENS = 64  # of the sequence on which both are compared, spread over the vocabulary
# Highest KL divergence of the merged model from the one with the adapter, in nats: the median over the tokens, since in
# 16 bits single tokens of SmolLM2 reach 7. Measured there with sound merges: float32 1e-7, bfloat16 0.003 to 0.006.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.015, torch.float16: 0.015}
# Highest relative error of a row of the embeddings, or of the logits of a token. No layer amplifies rounding here, so
# that LoRA on one side of tied embeddings, merged into both, or a lost row of a new token is seen in 16 bits, too.
END_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.02}


def merge_adapter(model: PeftModel, name: str):
    """The base model with the adapter in its weights; UserError (exit code 5) where it predicts something else.

    name: what MODEL names, for the error. On the meta device nothing is compared.
    """
    ids = probe(model)
    expected = None if ids.is_meta else (predict(model, ids), *ends(model, ids))
    separate_head(model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
        raise no_merge(name, model.active_peft_config.peft_type) from error
    # An adapter may bring a head of its own to a base whose head is tied to the embeddings.
    is_tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    merged.config.get_text_config().tie_word_embeddings = is_tied
    merged.all_tied_weights_keys = merged.all_tied_weights_keys if is_tied else {}
    if ids.is_meta:
        return merged
    live, embeddings, logits = expected
    kl = (live.exp() * (live - predict(merged, ids))).sum(-1).median().item()
    pairs = zip((embeddings, logits), ends(merged, ids), strict=True)
    errors = [((one - other).norm(dim=-1) / one.norm(dim=-1)).nan_to_num().max().item() for one, other in pairs]
    if not (kl <= BOUNDS[merged.dtype] and max(errors) <= END_BOUNDS[merged.dtype]):
        measured = f"KL {kl:.2g} nats, embeddings {errors[0]:.2g} and logits {errors[1]:.2g} of their size off"
        problem = "merged with its adapter the model is another one"
        raise UserError(f"MODEL={name}: {problem} ({measured}). Try DTYPE=float32.", code=5)
    return merged


@torch.no_grad()
def ends(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings of the tokens (T, hidden), and the head's logits for 16 random states (vocabulary, 16)."""
    embeddings, head = model.get_input_embeddings()(ids)[0], model.get_output_embeddings()
    states = torch.randn(16, embeddings.shape[-1], generator=torch.Generator().manual_seed(0))
    return embeddings.float(), head(states.to(embeddings)).float().T


def separate_head(model: PeftModel) -> None:
    """Give tied embeddings and head a matrix each where an adapter changes one of them, or each in another way."""
    head, embeddings = layers = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = base_layer(head).weight is base_layer(embeddings).weight
    if is_tied and any(isinstance(layer, BaseTunerLayer) for layer in layers):
        base_layer(head).weight = torch.nn.Parameter(base_layer(head).weight.detach().clone(), requires_grad=False)
        model.get_base_model().config.get_text_config().tie_word_embeddings = False  # or peft ties them again


def base_layer(layer):
    """The base's own layer under an adapter's."""
    if isinstance(layer, TrainableTokensWrapper):
        layer = layer.token_adapter
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def probe(model) -> torch.Tensor:
    """Token ids (1, T) from all over the vocabulary, those of trained rows among them."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, rows - 1, PROBE_TOKENS).long()
    trained = trained_rows(model.peft_config[model.active_adapter])
    return torch.cat([ids, torch.tensor(trained[:PROBE_TOKENS], dtype=torch.long)])[None].to(model.device)


@torch.no_grad()
def predict(model, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (T, vocabulary) after each of the tokens (1, T)."""
    was_training = model.training
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    model.train(was_training)
    return logits.log_softmax(-1)
