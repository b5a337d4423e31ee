"""A GPT that learns from adversaries of its own, for layouts to be tried on."""

from torch import Tensor

from disttrain.models import GPT, LossSum
from disttrain.models.adversarial import with_adversaries


class Adversary(GPT):
    def loss(self, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> dict[str, LossSum]:
        assert self.embed is not None
        tokens = self.embed.tokens
        return {"lm": with_adversaries(tokens, lambda: super(Adversary, self).loss(batch, label_smoothing)["lm"], 0.5)}
