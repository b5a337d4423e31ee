"""`disttrain verify` as a person meets it: table, certificate, exit codes, interruption, models of one's own."""

import io
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from disttrain.config.load import load
from disttrain.config.problems import RefusedInput
from disttrain.verify.certificate import certificate
from disttrain.verify.layouts import Layout, parse
from disttrain.verify.plan import config_hash, refuse_too_large
from disttrain.verify.proof import Proof
from disttrain.verify.verification import chosen_for, prove
from tests import warm
from tests.verify.mutants.data import averaged
from tests.verify.small import config_for, proof_for

DOCS = Path(__file__).resolve().parents[2] / "docs" / "verify.md"
CONFIG = """
model: {layers: 2, hidden_size: 16, heads: 2, max_positions: 16, dropout: 0.1}
data: {corpus: text, path: text.txt, sequence_length: 16, cache_dir: cache}
train: {steps: 4}
optim: {epsilon: 1.0e-20}
precision: bf16
"""


def shown(proof: Proof, layouts: list[Layout], path: Path, resume: bool = False) -> tuple[bool, str]:
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=False)
    return prove(proof.config, proof, layouts, path, "disttrain verify x.yaml", console, resume), text.getvalue()


def test_table_and_certificate_of_equal_layouts(tmp_path: Path) -> None:
    proof = proof_for()
    equal, text = shown(proof, [parse("dp2"), parse("mb4")], tmp_path / "deep" / "verify.json")
    assert equal
    rows = [line for line in text.splitlines() if re.match(r"(dp2|mb4) on", line)]
    assert [row.split()[3] for row in rows] == ["=" * 13, "=" * 13]
    assert "2 of 2 layouts are equal to one process" in text
    found = json.loads((tmp_path / "deep" / "verify.json").read_text())
    assert found["equal"] and not found["interrupted"]
    assert found["config_sha256"] == config_hash(proof.config)
    assert found["tolerance"]["relative_error"] == 1e-10
    assert {"torch", "python", "disttrain"} <= set(found["versions"])
    assert 0 < found["worst"]["error"] < 1e-10
    first = found["results"][0]
    assert first["layout"] == "dp2 on 2"
    assert first["settings"]["world"] == 2
    assert len(first["worst"]) == 13
    assert first["seconds"] > 0


def test_table_and_certificate_of_a_fault(tmp_path: Path) -> None:
    proof = replace(proof_for(), plant=averaged)
    equal, text = shown(proof, [parse("tp2.dp2 on 4")], tmp_path / "verify.json")
    assert not equal
    assert "===XX=XX=" in text and "0 of 1 layouts are equal" in text
    assert "a factor of 0.5" in text and "needs: data\n" in text
    assert "rerun: disttrain verify x.yaml --layouts 'dp2 on 2'" in text
    found = json.loads((tmp_path / "verify.json").read_text())
    finding = found["results"][0]["finding"]
    assert not found["equal"]
    assert finding["first"]["phase"] == "gradients" and finding["first"]["step"] == 1
    assert finding["needs"] == ["data"] and finding["smallest_layout"] == "dp2 on 2"
    assert "1/2 of what it should be" in finding["likely_cause"]


def test_an_empty_certificate_is_not_equal() -> None:
    config = config_for()
    proof = proof_for()
    assert not certificate(config, proof.config, proof.batches, [], planned=0, interrupted=False, code="")["equal"]
    assert not certificate(config, proof.config, proof.batches, [], planned=3, interrupted=True, code="")["equal"]


def test_a_model_that_does_not_fit_is_refused() -> None:
    config = config_for()
    refuse_too_large(config, free_bytes=1 << 30)
    with pytest.raises(RefusedInput, match="GiB"):
        refuse_too_large(config, free_bytes=1 << 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("".join(f"{i} apples and {i * i} pears.\n" for i in range(2000)))
    return tmp_path


def command(folder: Path, *words: str) -> warm.Running:
    return warm.Running(("verify", "config.yaml", *words), folder, os.environ)


def test_the_command(folder: Path) -> None:
    done = command(folder, "--layouts", "tp2 on 2", "model.heads=4")
    text = done.communicate(timeout=200)
    assert done.returncode == 0, text
    found = json.loads((folder / "runs" / "config" / "verify.json").read_text())
    assert found["equal"]
    assert found["batches"] == "text, bytes"
    changed = found["changed_for_the_proof"]
    assert changed["precision"] == "fp64" and changed["train.global_batch_size"] == 16
    assert changed["optim.epsilon"] == 1e-8


def test_a_layout_that_is_not_legal_is_refused(folder: Path) -> None:
    done = command(folder, "--layouts", "tp3, dp2.zero9")
    text = done.communicate(timeout=200)
    assert done.returncode == 2, text
    assert "'zero9' is no part of a layout's name" in text
    assert not (folder / "runs").exists()


def test_ctrl_c_leaves_the_certificate_so_far(folder: Path) -> None:
    running = command(folder, "--matrix", "small", "--out", "proof.json")
    while "\nfull.mb2 on 1" not in running.output.read_text():
        assert running.poll() is None, running.output.read_text()
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    text = running.communicate(timeout=60)
    assert running.returncode == 130, text
    found = json.loads((folder / "proof.json").read_text())
    assert found["interrupted"] and not found["equal"]
    assert found["layouts"]["compared"] >= 1
    assert "--resume goes on from there" in text


def test_an_interrupted_verification_goes_on(tmp_path: Path) -> None:
    """What is equal counts, what differed is run again, and nothing of another proof or other code is taken over."""
    proof, path = proof_for(), tmp_path / "verify.json"
    layouts = [parse("dp2"), parse("mb4"), parse("tp2")]
    shown(replace(proof, plant=averaged), layouts[:2], path)  # dp2 differs, mb4 is equal
    interrupted = json.loads(path.read_text())
    equal, text = shown(proof, layouts, path, resume=True)
    assert equal, text
    assert "1 of 3 layouts were compared before and are equal" in text
    assert [line.split()[0] for line in text.splitlines() if " on " in line and "=" in line] == ["dp2", "tp2"]
    found = json.loads(path.read_text())
    assert found["equal"] and found["layouts"] == {"planned": 3, "compared": 3, "equal": 3}
    again, text = shown(proof, layouts, path, resume=True)
    assert again and "3 of 3 layouts were compared before" in text
    path.write_text(json.dumps(interrupted | {"code_sha256": "another"}))
    with pytest.raises(RefusedInput, match="of another code_sha256"):
        shown(proof, layouts, path, resume=True)
    path.write_text("[]")
    with pytest.raises(RefusedInput, match="no certificate"):
        shown(proof, layouts, path, resume=True)


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)


def test_the_tutorials_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own model and config are equal, and what it says goes wrong does."""
    monkeypatch.chdir(folder)
    (source,) = blocks("python")
    (config,) = blocks("yaml")
    Path("gated.py").write_text(source)
    Path("gated.yaml").write_text(config)
    small = ["model.hidden_size=16", "model.max_positions=16", "data.sequence_length=16", "model.vocab_size=61"]
    loaded = load("gated.yaml", small)
    from disttrain.verify.batches import synthetic
    from disttrain.verify.plan import STEPS, proof_config

    proof_of = proof_config(loaded, "fp64", 61)
    equal, _ = shown(
        Proof(proof_of, synthetic(proof_of, STEPS)), chosen_for(proof_of, "tp2.sp.pp2-1f1b.mb4 on 4", "small"),
        Path("verify.json"),
    )  # fmt: skip
    assert equal
    Path("centred.py").write_text(source.replace("self.gate(x)", "self.gate(x - x.mean(dim=(0, 1)))"))
    centred = proof_config(load("gated.yaml", [*small, "model.source=centred.py:GatedGPT"]), "fp64", 61)
    equal, text = shown(Proof(centred, synthetic(centred, STEPS)), [parse("tp2.dp2.zero2")], Path("verify.json"))
    assert not equal
    assert "needs: data\n" in text and "looks from one sequence to another" in text
    Path("forgot.py").write_text(source.replace(', "blocks.*.mlp.gate": "column"', ""))
    forgot = proof_config(load("gated.yaml", [*small, "model.source=forgot.py:GatedGPT"]), "fp64", 61)
    with pytest.raises(RefusedInput, match="has no role"):
        chosen_for(forgot, "tp2 on 2", "small")
    assert all(layout.tensor == 1 for layout in chosen_for(forgot, None, "small"))
