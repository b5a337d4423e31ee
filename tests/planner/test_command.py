"""`disttrain plan` as a user meets it."""

import json
import os
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from rich.console import Console

from disttrain import costs
from disttrain.config.load import load
from disttrain.config.problems import RefusedInput
from disttrain.hardware import DEVICES
from disttrain.planner import config as planning
from disttrain.planner import report, speeds
from disttrain.planner.search import search
from tests import warm
from tests.planner.machines import GPU, config, cpu
from tests.unit.test_benchmark import module

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["data.cache_dir=cache", "data.max_bytes=200000"]


def disttrain(folder: Path, *words: str) -> CompletedProcess:
    return warm.run(words, folder, {**os.environ, "HOME": str(folder)}, timeout_s=200)


def test_the_best_config_is_written_and_passes_check(tmp_path: Path) -> None:
    given = str(ROOT / "configs/gpt_3d.yaml")
    done = disttrain(
        tmp_path, "plan", given, "--gpus", "16", "--device", "h100-sxm", "--top", "3", "--out", "best.yaml", "--count"
    )
    assert done.returncode == 0, done.stderr
    for words in ("legal layouts", "MFU full", "memory of the worst rank", "peak: 990 TFLOP/s", "H100 datasheet",
                  "8 heads cannot be split evenly over 16 ranks", "run on tensors without values",
                  "6 N", "written: best.yaml"):  # fmt: skip
        assert words in done.stdout, done.stdout
    checked = disttrain(tmp_path, "check", "best.yaml", "--world-size", "16", *SMALL)
    assert checked.returncode == 0, checked.stderr
    best, before = load(tmp_path / "best.yaml"), load(given)
    same = {"parallel", "train"}
    assert {n: getattr(best, n) for n in type(best).model_fields if n not in same} == {
        n: getattr(before, n) for n in type(before).model_fields if n not in same
    }
    assert best.train.micro_batch_size is not None


def test_json_holds_what_the_tables_show(tmp_path: Path) -> None:
    given = str(ROOT / "configs/gpt_3d.yaml")
    done = disttrain(tmp_path, "plan", given, "--gpus", "8", "--device", "a100-sxm-40gb", "--json", "--out", "a/b.yaml")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["ranks"] == 8 and values["device"] == "a100-sxm-40gb" and values["peak_flops_per_second"] == 312e12
    first = values["layouts"][0]
    assert sum(first["seconds"].values()) == pytest.approx(first["step_seconds"])
    parts = [amount for name, amount in first["memory_bytes"].items() if name != "together"]
    assert sum(parts) == pytest.approx(first["memory_bytes"]["together"])
    assert values["first_counted"] is None
    assert {"MFU full", "MFU causal", "HFU", "6 N"} == {row["name"] for row in values["conventions"]}
    assert "written: a/b.yaml" in done.stderr
    assert load(tmp_path / "a/b.yaml").parallel.zero == first["settings"]["parallel.zero"]


def test_unknown_devices_are_refused_with_the_names_that_there_are(tmp_path: Path) -> None:
    done = disttrain(
        tmp_path,
        "plan",
        str(ROOT / "configs/gpt_tiny.yaml"),
        "--gpus",
        "2",
        "--device",
        "h100-smx",
        "--out",
        "best.yaml",
    )
    assert done.returncode == 2
    words = " ".join(done.stderr.split())
    assert "did you mean h100-sxm?" in words and all(name in words for name in DEVICES)
    assert not (tmp_path / "best.yaml").exists()
    done = disttrain(tmp_path, "plan", str(ROOT / "configs/gpt_tiny.yaml"), "--gpus", "2")
    assert done.returncode == 2 and "run `disttrain calibrate`" in done.stderr


def test_what_fits_nowhere_ends_with_1_and_help(tmp_path: Path) -> None:
    words = ["plan", str(ROOT / "configs/gpt3_175b.yaml"), "train.global_batch_size=4", "--gpus", "2", "--device", "t4",
             "precision=fp16", "model.preset=null", "model.layers=12", "model.hidden_size=12288", "model.heads=96",
             "model.max_positions=2048", "--out", "best.yaml"]  # fmt: skip
    done = disttrain(tmp_path, *words)
    assert done.returncode == 1, done.stderr
    assert "no layout fits" in done.stderr and "GiB of 14.9" in done.stderr and "ranks would do" in done.stderr
    assert not (tmp_path / "best.yaml").exists()


def refused(given: dict, device: str = "h100-sxm", world: int = 8) -> str:
    with pytest.raises(RefusedInput) as caught:
        settings = planning.plannable(config(**given))
        planning.speeds_for(settings, device, world, None, None)
        planning.refuse_hopeless(settings, world)
    return " ".join(f"{problem.settings} {problem.message} {problem.fix}" for problem in caught.value.problems)


def test_what_cannot_be_planned_is_refused() -> None:
    many = {"engine": "deepspeed", "parallel": {"offload": True, "zero": 1}, "outer": {"method": "local_sgd", "every": 2},
            "model": {"source": "mine.py:Model"}}  # fmt: skip
    text = refused({**many, "outer": {"method": "nesterov"}})
    for words in ("engine=deepspeed", "parallel.offload", "outer.method", "model.source"):
        assert words in text
    assert "use one of fp32, bf16, fp16" in refused({"precision": "fp64"})
    assert "--between-gbps" in refused({}, "h100-pcie", 16)
    assert "nothing says how long to train" in refused({"train": {"steps": None}})
    assert "5 heads" not in refused({"model": {"heads": 5}}) and "heads" in refused({"model": {"heads": 5}})


def test_auto_is_what_the_device_multiplies() -> None:
    settings = config(precision="auto")
    assert planning.speeds_for(settings, "h100-sxm", 8, None, None).precision == "bf16"
    assert planning.speeds_for(settings, "v100-sxm", 8, None, None).precision == "fp32"
    across = planning.speeds_for(settings, "h100-sxm", 64, 4, 100.0)
    assert (across.ranks_per_host, across.at_full_speed) == (4, 4)
    assert across.between.bytes_per_second < 12.5e9


def test_measured_speeds_are_read_back(tmp_path: Path) -> None:
    path, machine = tmp_path / "speeds.json", cpu(attention=GPU.attention, notes=("a note",))
    speeds.write(path, machine)
    assert speeds.read(path) == machine
    speeds.write(path, GPU)
    assert speeds.read(path) == GPU
    speeds.write(path, machine)
    settings = config(precision="fp32")
    more = planning.speeds_for(settings, str(path), 16, 4, 8.0)
    assert (more.ranks_per_host, more.at_full_speed, more.between.bytes_per_second) == (4, 2, 1e9)
    assert "it holds speeds in bf16, fp32 only" in refused({"precision": "fp16"}, str(path))
    values = machine._asdict()
    unlike = [{**values, "memory_bytes": 0}, {**values, "products": []}, {**values, "more": 1}]
    wrong = [values, *({"fp32": {"speeds": one}} for one in unlike)]
    for damage in ("{", "[]", "{}", *map(json.dumps, wrong)):
        path.write_text(damage)
        assert "it does not hold measured speeds" in refused({"precision": "fp32"}, str(path))
    assert "there is no such file" in refused({}, str(tmp_path / "none.json"))


def test_a_plan_of_cpus_has_no_mfu() -> None:
    settings, machine = config(precision="fp32"), cpu()
    plan = search(settings, 4, machine, machine.memory_bytes)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(report.shown(plan, settings, 4, machine, machine.memory_bytes, 5))
    assert "unknown, so that there is no MFU" in shown.get()
    values = report.as_values(plan, settings, 4, machine, machine.memory_bytes, 5)
    assert values["layouts"][0]["mfu_full"] is None


def test_what_a_config_leaves_out_of_the_prediction_is_said() -> None:
    codec = report.config_notes(config(compression={"codec": "powersgd"}))
    dropout = report.config_notes(config(model={"dropout": 0.1}))
    assert "coding" in codec[0] and "dropout" in dropout[0] and report.config_notes(config()) == []


def test_published_runs_stand_beside_predictions() -> None:
    table = module("megatron_table")
    rows = [line.split(" | ") for line in table.sequence_parallel(table.SEQUENCE_PARALLEL[:2])]
    assert rows[2][2] == "tp8.sp.selective.mb4" and rows[3][2] == "tp8.sp.pp8-interleaved_1f1b-v3.selective.mb1"
    for row in rows[2:]:
        published, predicted, points = (float(cell.split()[0]) for cell in row[3:6])
        assert points == pytest.approx(predicted - published, abs=0.11)
    shards = "".join(table.fully_sharded(table.FSDP[:1]))
    assert "| dp128.zero2.mb12 | 40.6 %" in shards
    smallest = "".join(table.weak_scaling(table.WEAK_SCALING[:1]))
    assert "| 1.7B | 32 | dp32.full.mb" in smallest and "44 %" in smallest
    row = table.WEAK_SCALING[0]
    forward = costs.forward_flops_per_sequence(table.config_of(row, 2048, 51200).model, 2048, causal=False)
    counted = 512 * (4 * (forward.block_linears + forward.attention) + 3 * forward.head)
    assert table.megatron_flops(row, 2048, 51200) == pytest.approx(counted)


def test_the_readme_shows_the_table_of_published_runs() -> None:
    """Its columns but the last, which is long, from the page that the script wrote."""
    page = (ROOT / "benchmarks/megatron_table.md").read_text().split("## ")[1]
    rows = [line.split(" | ")[:-1] for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 12 and len(page.splitlines()) > 12
    readme = (ROOT / "README.md").read_text().split("<!-- megatron -->\n")[1].split("<!-- /megatron -->")[0]
    assert readme == "".join(f"{' | '.join(row)} |\n" for row in rows)
