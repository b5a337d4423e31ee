"""Reads variables and collects what is wrong with them."""

import re
from collections.abc import Mapping

from disttrain.config.problems import Problem, RefusedInput


class Reader:
    """The environment, and the problems found in it so far."""

    def __init__(self, environ: Mapping[str, str]):
        self.environ = environ
        self.problems: list[Problem] = []

    def text(self, name: str) -> str:
        """Value of a variable without blanks around it; empty when not set."""
        return self.environ.get(name, "").strip() if name else ""

    def integer(self, name: str) -> int | None:
        """Value of a variable, or None when it is not set or (a Problem) no integer >= 0."""
        text = self.text(name)
        if not text:
            return None
        if re.fullmatch(r"[0-9]+", text):
            return int(text)
        self.refuse([name], "the value is not an integer of at least 0.", f"Correct or unset {name}.")
        return None

    def has(self, *names: str) -> bool:
        """Whether any of the variables is set and not empty."""
        return any(self.text(name) for name in names)

    def refuse(self, names: list[str], message: str, fix: str) -> None:
        """Note a Problem about these variables, once."""
        settings = tuple(f"{name}={self.text(name)}" if self.has(name) else f"{name} is not set" for name in names)
        problem = Problem(settings, message, fix)
        if problem not in self.problems:
            self.problems.append(problem)

    def raise_problems(self) -> None:
        """Raise RefusedInput when something was wrong."""
        if self.problems:
            raise RefusedInput(self.problems)
