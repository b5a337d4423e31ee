"""`disttrain sample`: a trained GPT continues a text."""

from pathlib import Path

from disttrain.config.problems import Problem, RefusedInput
from disttrain.data import Tokenizer
from disttrain.models import GPT
from disttrain.tasks.generate import generate
from disttrain.tasks.trained import load_trained


def continue_text(
    folder: Path, prompt: str, max_new_tokens: int, temperature: float, top_k: int | None, seed: int
) -> str:
    """The prompt and what the run's model writes after it. Raises RefusedInput for another family or an empty prompt."""
    trained = load_trained(folder)
    if not isinstance(trained.model, GPT):
        raise RefusedInput([Problem((f"run {folder}", f"model.family={trained.config.model.family}"),
                                    "only a gpt writes text", "give the folder of a gpt's run")])  # fmt: skip
    tokenizer = trained.tokenizer
    assert isinstance(tokenizer, Tokenizer)  # a language model's
    ids = tokenizer.encode(prompt).tolist()
    if not ids:
        raise RefusedInput([Problem(("--prompt",), "the prompt has no tokens", "give at least one character")])
    new = generate(
        trained.model, ids, max_new_tokens, temperature, top_k, seed=seed,
        stop_id=tokenizer.end_of_text, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    return prompt + tokenizer.decode(new)
