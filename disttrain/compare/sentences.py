"""A comparison in plain sentences: what is best, and what to keep in mind. Imports no torch."""

from collections.abc import Callable, Iterator
from typing import Any

from disttrain.compare.columns import columns
from disttrain.compare.comparison import Comparison, Measured, largest_spread, learns_less, typical_spread
from disttrain.loggers import readable


def subject(comparison: Comparison) -> str:
    """What was trained, and where, in one line."""
    header = comparison.headers[0]
    config, hardware = header.get("config") or {}, header.get("hardware") or {}
    family = str((config.get("model") or {}).get("family", "model")).upper()
    parts = [
        f"a {family} of {readable.count(header['parameters'])} parameters"
        if header.get("parameters")
        else f"a {family}",
        f"on {hardware['device']}, {hardware['cores']} cores" if hardware.get("cores") else "",
    ]
    runs = sum(len(s.group.runs) for s in comparison.strategies)
    return f"{len(comparison.strategies)} ways to train {' '.join(p for p in parts if p)}: {runs} runs"


def findings(comparison: Comparison) -> list[str]:
    """What is best, each in a sentence."""
    tokens, seconds = readable.count(comparison.equal_tokens), readable.duration(comparison.equal_seconds)
    said = [
        _best(comparison, "Fastest", "tokens_per_second", max, lambda v: f"{readable.count(v)} tokens/s"),
        _best(comparison, "Least memory on the worst rank", "memory_bytes", min, readable.size),
        _best(comparison, f"Lowest loss after the same {tokens} tokens", "loss_at_equal_tokens", min, readable.loss),
        _best(comparison, f"Lowest loss after the same {seconds}", "loss_at_equal_seconds", min, readable.loss),
        _best(comparison, "Cheapest", "cost_per_million_tokens", min,
              lambda v: f"{v:.3g} {comparison.currency} per million tokens"),
    ]  # fmt: skip
    found = [text for text in said if text]
    if comparison.front:
        names = ", ".join(s.name for s in comparison.strategies if s.name in comparison.front)
        found.append(f"Pareto front (nothing else is as fast with as little memory): {names}.")
    if comparison.not_run:
        names = ", ".join(dict.fromkeys(f"{n.name} ({n.state})" for n in comparison.not_run))
        found.append(f"Without a result, or with fewer: {names}.")
    return found


def _best(
    comparison: Comparison, label: str, key: str, end: Callable, show: Callable[[float | None], str]
) -> str | None:
    """The best strategy by one number beside the baseline; None where nobody has it or all show the same."""
    known = {s.name: v for s in comparison.strategies if (v := s.values[key]) is not None and v == v}
    value = end(known.values(), default=None)
    first = [name for name, v in known.items() if show(v) == show(value)]
    if len(first) == len(known):
        return None
    names = ", ".join(first[:3]) + (f" and {len(first) - 3} others" if len(first) > 3 else "")
    other = known.get(comparison.baseline)
    if comparison.baseline in first or other is None:
        return f"{label}: {names}, {show(value)}{' (the baseline)' if len(first) == 1 and other is not None else ''}."
    times = f", {value / other:.2f} times" if key == "tokens_per_second" else ""
    return f"{label}: {names}, {show(value)} ({comparison.baseline}, the baseline: {show(other)}{times})."


def caveats(comparison: Comparison) -> list[str]:
    """What to keep in mind before concluding anything."""
    return [*_spread(comparison), *_quality(comparison), *_machine(comparison), *_memory(comparison), *_mfu(comparison),
            *_mixed(comparison), *_unlike(comparison)]  # fmt: skip


def _spread(comparison: Comparison) -> Iterator[str]:
    largest, typical = largest_spread(comparison), typical_spread(comparison)
    if largest is None or typical is None:
        yield "Nothing was repeated, so that nobody knows how much of a difference is chance."
        return
    yield (f"Repeats of one strategy differ by {readable.percent(typical)} in speed as a rule and by "
           f"{readable.percent(largest[1])} at the most ({largest[0]}): smaller differences between strategies say "
           "little.")  # fmt: skip


def _quality(comparison: Comparison) -> Iterator[str]:
    def by(share: float) -> str:
        return "no number" if share == float("inf") else f"{100 * share:.1f} % higher"

    worse = [(s, share) for s in comparison.strategies if (share := learns_less(comparison, s)) is not None]
    if worse:
        names = ", ".join(f"{s.name} ({by(share)})" for s, share in worse)
        yield (f"Speed is not all: after the same tokens the loss of these is more than 1 % above that of "
               f"{comparison.baseline}: {names}.")  # fmt: skip
    skipped = [s.name for s in comparison.strategies if s.values["skipped_steps"]]
    if skipped:
        yield f"Some updates were left out because a gradient was no number: {', '.join(skipped)}."


def _machine(comparison: Comparison) -> Iterator[str]:
    crowded = [s for s in comparison.strategies if _cores(s) < (s.values["ranks"] or 0)]
    if crowded:
        names = ", ".join(f"{s.name} ({s.values['ranks']:g} ranks on {_cores(s):g} cores)" for s in crowded)
        yield f"Ranks took turns on too few cores, which a larger machine would not make them do: {names}."
    ranks = sorted({s.values["ranks"] or 0 for s in comparison.strategies})
    if len(ranks) > 1:
        yield ("Strategies ran on different numbers of ranks, and tokens/s count all ranks together: compare the figures "
               "for one rank, or the cost, where ranks are not free.")  # fmt: skip


def _cores(strategy: Measured) -> float:
    """Cores that the ranks of a strategy shared; infinite where they had a device each, or it is not known."""
    header = strategy.group.runs[0].header
    hardware = header.get("hardware") or {}
    on_cpu = strategy.values["device_bytes"] is None
    return float(hardware["cores"]) if on_cpu and hardware.get("cores") else float("inf")


def _memory(comparison: Comparison) -> Iterator[str]:
    if not comparison.on_device:
        yield ("Memory is that of a process with its libraries (torch alone takes hundreds of MiB): compare differences, "
               "not ratios.")  # fmt: skip


def _mfu(comparison: Comparison) -> Iterator[str]:
    if all(s.values["mfu_causal"] is None for s in comparison.strategies):
        why = next((h["peak_flops_source"] for h in comparison.headers if h.get("peak_flops_source")), "no known peak")
        yield f"MFU and HFU are not known: {why}."


def _mixed(comparison: Comparison) -> Iterator[str]:
    """Where runs differ in what should be the same."""
    facts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "hosts": lambda h: (h.get("hardware") or {}).get("host"),
        "devices": lambda h: (h.get("hardware") or {}).get("device"),
        "commits of disttrain": lambda h: _commit(h.get("git_commit")),
        "versions of torch": lambda h: (h.get("versions") or {}).get("torch"),
    }
    for what, of in facts.items():
        different = sorted({str(of(h)) for h in comparison.headers})
        if len(different) > 1:
            yield f"The runs come from different {what}: {', '.join(different)}."


def _commit(commit: str | None) -> str | None:
    """The first characters of a commit, with + where files were changed."""
    return commit and commit[:10] + ("+" if commit.endswith("+") else "")


def _unlike(comparison: Comparison) -> Iterator[str]:
    def trained(header: dict[str, Any]) -> str:
        config = header.get("config") or {}
        data = {k: v for k, v in (config.get("data") or {}).items() if k not in ("cache_dir", "workers")}
        return repr((header.get("parameters"), data))

    if len({trained(h) for h in comparison.headers}) > 1:
        yield "The strategies do not train the same model on the same data: their losses cannot be compared."


def glossary(comparison: Comparison) -> list[tuple[str, str]]:
    """(heading, meaning) of every column."""
    return [(column.title, column.meaning) for column in columns(comparison)]
