"""The learning rate as a function of the step. No torch."""

import math

from disttrain.config.schema import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of the optimizer step number `step`, counted from 1 to `total_steps`.

    Linear warm-up reaches the peak at `warmup_steps`. Then, with m = min_lr_ratio and x the share of the remaining
    steps that is done: constant: 1; linear: 1 - (1-m)x; cosine: m + (1-m)(1 + cos(pi x))/2 (Loshchilov and Hutter
    2017); inverse_sqrt: sqrt(warmup/step) (Vaswani et al. 2017); wsd: 1, then linear to m over the last
    `decay_fraction` of all steps (Hu et al. 2024).
    """
    warmup = config.warmup_steps
    if step <= warmup:
        return config.lr * step / warmup
    low = config.min_lr_ratio
    done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    match config.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - (1 - low) * done
        case "cosine":
            factor = low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
        case "inverse_sqrt":
            factor = math.sqrt(warmup / step)
        case "wsd":
            decay_steps = max(round(config.decay_fraction * total_steps), 1)
            factor = 1 - (1 - low) * max(0.0, 1 - (total_steps - step) / decay_steps)
    return config.lr * factor
