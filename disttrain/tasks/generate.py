"""Text generation: autoregressive sampling from a GPT, one token at a time."""

import torch
from torch import Tensor

from disttrain.models import GPT


def generate(
    model: GPT,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_id: int | None = None,
    vocab_size: int | None = None,
) -> list[int]:
    """Continue `prompt_ids` and return the new ids only, at most `max_new_tokens` and none from `stop_id` on.

    Temperature 0 takes the most likely token; otherwise logits are divided by it and tokens are drawn, on the CPU and
    from `seed` alone, among the `top_k` most likely (Fan et al. 2018) and of these the fewest whose probabilities reach
    `top_p` (Holtzman et al. 2020). The model sees the last max_positions tokens. Ids from `vocab_size` on are never
    drawn: give the tokenizer's size where the embedding has more rows. The model is put in evaluation mode and back.
    Raises ValueError for arguments out of range and for prompt ids outside the embedding.
    """
    rows = model.config.vocab_size
    if rows is None:
        raise ValueError("model.vocab_size is not resolved yet")
    allowed = rows if vocab_size is None else min(vocab_size, rows)
    _check(prompt_ids, rows, max_new_tokens, allowed, temperature, top_k, top_p)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(max_new_tokens):
                context = torch.tensor([ids[-model.config.max_positions :]], device=device)
                logits = model(context)[0, -1, :allowed].double().cpu()
                token = _draw(logits, temperature, top_k, top_p, generator)
                if token == stop_id:
                    break
                ids.append(token)
    finally:
        for module, mode in modes:
            module.training = mode
    return ids[len(prompt_ids) :]


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One id from logits float64 [V]."""
    if temperature == 0:
        return int(logits.argmax())
    ranked, ids = logits.sort(descending=True, stable=True)
    probabilities = (ranked[:top_k] / temperature).softmax(0)
    if top_p is not None:
        mass_before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities[mass_before < top_p]
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def _check(
    prompt_ids: list[int],
    rows: int,
    max_new_tokens: int,
    allowed: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if not prompt_ids:
        raise ValueError("the prompt is empty: give at least one token")
    if min(prompt_ids) < 0 or max(prompt_ids) >= rows:
        raise ValueError(f"prompt ids {min(prompt_ids)} to {max(prompt_ids)} are outside the {rows} embedding rows")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative")
    if allowed < 1:
        raise ValueError(f"vocab_size={allowed} leaves no token to draw")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} is not a finite number from 0 up")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} keeps no token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is outside (0, 1]")
