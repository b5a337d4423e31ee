"""`disttrain verify`: the reference, then one layout after the other, then the certificate."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from rich.console import Console

from disttrain import inputs, preflight
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.data import Prepared
from disttrain.parallel import own_model
from disttrain.precision import choose
from disttrain.verify import certificate
from disttrain.verify.batches import from_data, synthetic
from disttrain.verify.layouts import Layout, parse_list, refuse_illegal
from disttrain.verify.matrix import full_matrix, small_matrix
from disttrain.verify.plan import STEPS, proof_config, refuse_too_large
from disttrain.verify.proof import Proof, Verdict
from disttrain.verify.table import Table

EXPLAINED = 3
"""Layouts that are taken apart when they fail; of further ones only the first difference is told."""

IMPORTED_BEFORE_FORKS = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.pipelining",
                         "torch.distributed.checkpoint.state_dict")  # fmt: skip
"""Slow imports: what the parent has, its forked ranks have too."""


def run(
    config: Config, *, layouts: str | None = None, matrix: Literal["small", "full"] = "small",
    precision: Literal["fp64", "own"] = "fp64", prepared: Prepared | None = None, out: Path | None = None,
    resume: bool = False, command: str = "disttrain verify", console: Console | None = None,
) -> bool:  # fmt: skip
    """Whether every layout trains exactly like one process; the `disttrain verify` command.

    `layouts` are names separated by commas; without them the matrix is verified. `prepared` data give the batches,
    random tokens without. The certificate goes to `out`, or verify.json in the run folder, after every layout; with
    `resume` the layouts that it already calls equal are not run again. Ctrl-C keeps it (KeyboardInterrupt goes on to
    the caller). `command` starts the line that says how to rerun one layout. Raises RefusedInput for a layout that is
    none, or not legal for this config, for a model that does not fit, and for a certificate of something else.
    """
    if precision == "fp64" and (config.engine if layouts is None else layouts).count("deepspeed"):
        raise RefusedInput([Problem(("engine=deepspeed", "--precision fp64"), "DeepSpeed does not compute in float64",
                                    "add --precision own, with precision=fp32 in the config")])  # fmt: skip
    torch.set_num_threads(1)  # a fork must not find other threads at work
    for name in IMPORTED_BEFORE_FORKS:
        import_module(name)
    corpus = inputs.open_data(config, prepared) if prepared else None
    chosen = "fp64" if precision == "fp64" else choose(config.precision, "cpu")
    proof = proof_config(config, chosen, corpus.vocab_size if corpus else 0)
    refuse_too_large(proof, psutil.virtual_memory().available)
    batches = from_data(proof, corpus, STEPS) if corpus else synthetic(proof, STEPS)
    chosen_layouts = chosen_for(proof, layouts, matrix)
    path = out or preflight.run_folder(config) / "verify.json"
    overflows = all(layout.engine != "deepspeed" for layout in chosen_layouts)
    if not overflows:
        import_module("disttrain.engines.deepspeed").quiet_deepspeed("cpu")  # slow as well
    return prove(
        config,
        Proof(proof, batches, chosen, overflows=overflows),
        chosen_layouts,
        path,
        command,
        console or Console(),
        resume,
    )


def chosen_for(proof: Config, layouts: str | None, matrix: Literal["small", "full"]) -> list[Layout]:
    """The layouts to verify. Raises RefusedInput when one is not legal or there is none."""
    if layouts is not None:
        chosen = parse_list(layouts)
        refuse_illegal(proof, chosen)
        own = [problem for layout in chosen for problem in own_problems(proof, layout)]
        if own:
            raise RefusedInput(own)
        return chosen
    chosen = full_matrix(proof) if matrix == "full" else small_matrix(proof)
    chosen = [layout for layout in chosen if not own_problems(proof, layout)]
    if not chosen:
        refuse_illegal(proof, [Layout()])
        raise RefusedInput([Problem((f"--matrix {matrix}",), "no layout of it is legal for this model",
                                    "name some with --layouts")])  # fmt: skip
    return chosen


def own_problems(proof: Config, layout: Layout) -> list[Problem]:
    """Why a model of the user's own cannot be cut as a layout says; [] for the families."""
    if proof.model.source is None:
        return []
    found = own_model.problems(layout.applied(proof))
    return [Problem((f"layout {layout}", *problem.settings), problem.message, problem.fix) for problem in found]


def prove(
    config: Config, proof: Proof, layouts: Sequence[Layout], path: Path, command: str, console: Console,
    resume: bool = False,
) -> bool:  # fmt: skip
    """Verify the layouts, show them, write the certificate; whether all are equal."""
    verdicts: list[Verdict] = []
    code = certificate.code_hash(config)

    def certify(interrupted: bool) -> dict[str, Any]:
        return certificate.certificate(config, proof.config, proof.batches, verdicts, len(layouts), interrupted, code)

    before = certificate.proven(path, certify(True)) if resume else {}
    verdicts += [before[layout.name] for layout in layouts if layout.name in before]
    left = [layout for layout in layouts if layout.name not in before]
    if verdicts:
        console.print(
            f"{len(verdicts)} of {len(layouts)} layouts were compared before and are equal\n", highlight=False
        )
    interrupted = True
    try:
        with proof, Table(console, len(left), max(len(layout.name) for layout in layouts)) as table:
            for verdict in _verdicts(proof, left, command, table.now):
                verdicts.append(verdict)
                table.row(verdict)
                certificate.write(path, certify(True))
        interrupted = False
    finally:
        found = certify(interrupted)
        certificate.write(path, found)
        equal = sum(verdict.equal for verdict in verdicts)
        state = "interrupted: " if interrupted else ""
        console.print(f"\n{state}{equal} of {len(layouts)} layouts are equal to one process; certificate: {path}",
                      highlight=False, soft_wrap=True)  # fmt: skip
        if interrupted:
            console.print("the same command with --resume goes on from there", highlight=False)
    return bool(found["equal"])


def _verdicts(proof: Proof, layouts: Sequence[Layout], command: str, now: Callable[[str], None]) -> Iterator[Verdict]:
    if not layouts:
        return
    now("one process")
    proof.reference()
    failed = 0
    for layout in layouts:
        now(layout.name)
        verdict = proof.verify(layout)
        if not verdict.equal:
            failed += 1
            if failed <= EXPLAINED:
                now(f"{layout.name} differs: looking for the axis")
            verdict = replace(verdict, finding=proof.explain(verdict, command, failed <= EXPLAINED))
        yield verdict
