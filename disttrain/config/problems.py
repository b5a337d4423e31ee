"""What is wrong with a configuration, said all at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One reason to refuse a run: the settings involved, what is wrong, and what to do about it."""

    settings: tuple[str, ...]
    """Dotted names with their values, for example ``("model.heads=5", "model.hidden_size=128")``."""
    message: str
    """What is wrong, one sentence."""
    fix: str
    """What to do about it, one sentence."""


class RefusedInput(ValueError):
    """The input was refused before anything was started or written; carries every problem found."""

    def __init__(self, problems: list[Problem]):
        super().__init__("; ".join(f"{', '.join(p.settings)}: {p.message}" for p in problems))
        self.problems = problems
