"""The numbers of a comparison, worked out by hand from made-up runs, and the report's forms."""

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from disttrain.compare import plan as plans
from disttrain.compare.columns import TABLES, columns
from disttrain.compare.comparison import Comparison, learns_less, pareto_front
from disttrain.compare.files import markdown, strategies_csv
from disttrain.compare.measures import cost_per_million_tokens, loss_at, middle
from disttrain.compare.outcomes import Outcome, save
from disttrain.compare.page import html
from disttrain.compare.plots import POINTS, plots, thinned
from disttrain.compare.reading import of_folders, of_plan, of_runs
from disttrain.compare.report import FILES, write
from disttrain.compare.sentences import caveats, findings
from disttrain.compare.terminal import show
from disttrain.config.problems import RefusedInput
from tests.unit.compare import made_up
from tests.unit.compare.conftest import Place
from tests.unit.compare.made_up import records, step

MIB = 2**20


@pytest.fixture
def folder(place: Place) -> Path:
    """A comparison of three strategies that ran and three that did not; 20 steps of 100 tokens."""
    strategies = {
        "base": {"about": "The <first> one"},
        "fast": {"settings": {"parallel.tensor": 2}},
        "small": None,
        "three": {"nproc": 3, "optional": True},
        "oom": None,
        "later": None,
    }
    plan = place.plan(strategies, price_per_rank_hour=3.6, currency="EUR")
    runs = plan.folder / "runs"

    def run(name: str, seconds: float, loss: float, **more) -> None:
        steps = [step(n, seconds, loss + 1 / n, **more) for n in range(1, 21)]
        made_up.write(runs / name, records(name, steps))

    run("base-1", 0.5, 2.0)
    run("base-2", 0.4, 2.0)
    run("fast-1", 0.25, 2.5, host_rss_bytes_max=500 * MIB)
    run("fast-2", 0.25, 2.5, host_rss_bytes_max=510 * MIB)
    run("small-1", 1.0, 2.0, host_rss_bytes_max=100 * MIB, pipeline_bubble_fraction=0.3,
        pipeline_bubble_fraction_theory=0.2)  # fmt: skip
    made_up.write(runs / "small-2", records("small-2", [step(1, 1.0, 3.0)])[:-1])  # killed
    save(plan.folder, Outcome("small", 2, "killed", "by somebody", -9, 1.0, ["x"]))
    save(plan.folder, Outcome("oom", 1, "out of memory", "CUDA out of memory", 1, 1.0, ["x"]))
    (plan.folder / plans.FILE).write_text(plans.save(plan))
    return plan.folder


def comparison(folder: Path) -> Comparison:
    return of_plan(plans.read(folder))


def test_medians_ratios_and_cost(folder: Path) -> None:
    c = comparison(folder)
    base, fast, small = (c.strategy(name).values for name in ("base", "fast", "small"))
    assert base["tokens_per_second"] == pytest.approx((200 + 250) / 2)  # 100 tokens in 0.5 and in 0.4 s
    assert (base["tokens_per_second_min"], base["tokens_per_second_max"]) == pytest.approx((200, 250))
    assert c.strategy("base").spread == pytest.approx(50 / 225)
    assert fast["ratio"] == pytest.approx(400 / 225) and base["ratio"] == 1
    assert fast["memory_bytes"] == 505 * MIB and not c.on_device
    assert small["repeats"] == 1 and c.strategy("small").spread is None
    assert small["pipeline_bubble_fraction"] == 0.3 and small["pipeline_bubble_fraction_theory"] == 0.2
    assert base["median_step_seconds"] == pytest.approx(0.45)
    assert base["comm_bytes_per_step"] == 4 * MIB and base["comm_bytes_uncompressed_per_step"] == 8 * MIB
    # two ranks at 3.6 an hour are 0.002 a second; a million tokens take 1e6 / 400 = 2500 s
    assert fast["cost_per_million_tokens"] == pytest.approx(0.002 * 2500)
    assert fast["eval_loss"] == 1.5 and fast["mfu_causal"] is None
    assert fast["model_flops_per_second_per_rank"] == pytest.approx(1e9)


def test_losses_at_equal_tokens_and_times(folder: Path) -> None:
    """All runs have seen 2000 tokens; the shortest, fast, took 20 x 0.25 = 5 s, in which base-1 did 10 steps."""
    c = comparison(folder)
    assert (c.equal_tokens, c.equal_seconds) == (2000, 5.0)
    # tokens in (1800, 2000]: steps 19 and 20
    assert c.strategy("base").values["loss_at_equal_tokens"] == pytest.approx(2 + (1 / 19 + 1 / 20) / 2)
    # seconds in (4.5, 5]: step 10 of base-1 (5.0 s), step 12 of base-2 (4.8 s); their median
    assert c.strategy("base").values["loss_at_equal_seconds"] == pytest.approx(2 + (1 / 10 + 1 / 12) / 2)
    assert c.strategy("small").values["loss_at_equal_seconds"] == pytest.approx(2 + 1 / 5)
    assert learns_less(c, c.strategy("fast")) == pytest.approx((2.5 + 39 / 760) / (2 + 39 / 760) - 1)
    assert learns_less(c, c.strategy("small")) is None


def test_loss_at_takes_the_last_tenth_or_the_last_record() -> None:
    assert loss_at([80, 90, 91, 100, 110], [1, 2, 3, 5, 9], 100) == 4
    assert loss_at([20, 50, 200], [3.0, 1.0, 2.0], 100) == 1.0
    assert loss_at([200], [2.0], 100) is None


def test_front_of_throughput_and_memory(folder: Path) -> None:
    assert comparison(folder).front == {"base", "fast", "small"}  # faster ones need more
    points = {"a": (10.0, 5.0), "b": (10.0, 6.0), "c": (9.0, 5.0), "d": (12.0, 9.0), "e": (None, 1.0), "f": (10.0, 5.0)}
    assert pareto_front(points) == {"a", "d", "f"}


def test_small_arithmetic() -> None:
    assert middle([1.0, None]) is None and middle([]) is None and middle([3.0, 1.0, 2.0]) == 2
    assert math.isnan(middle([1.0, math.nan]) or 0)
    assert cost_per_million_tokens(None, 2, 10.0) is None and cost_per_million_tokens(1.0, 2, 0) is None
    ends, means = thinned(list(range(1, 2 * POINTS + 1)), [1.0, 3.0] * POINTS)
    assert (ends[:2], means[:2], len(ends)) == ([2, 4], [2.0, 2.0], POINTS)
    assert thinned([1, 2], [1.0, math.nan]) == ([1, 2], [1.0, None])


def test_what_local_steps_send_is_averaged_over_all_steps(place: Place) -> None:
    steps = [step(n, 0.5, 2.0, comm_bytes_per_step=800 if n % 4 == 0 else 0) for n in range(1, 9)]
    c = of_runs([made_up.write(place.folder / "r", records("r", steps))])
    assert c.strategy("r").values["comm_bytes_per_step"] == 200


def test_what_did_not_run_says_why(folder: Path) -> None:
    found = {n.name: n for n in comparison(folder).not_run}
    assert {name: n.state for name, n in found.items()} == {
        "small": "killed", "three": "refused", "oom": "out of memory", "later": "not yet run"}  # fmt: skip
    assert "3" in found["three"].reason and found["three"].log is None
    assert (found["oom"].reason, found["oom"].log) == ("repeat 1: CUDA out of memory", "logs/oom-1.log")
    assert found["later"].reason == "repeat 1, 2"


def test_sentences(folder: Path) -> None:
    c = comparison(folder)
    said = findings(c)
    assert said[0] == "Fastest: fast, 400 tokens/s (base, the baseline: 225 tokens/s, 1.78 times)."
    assert said[3] == "Lowest loss after the same 5.0 s: base, 2.0917 (the baseline)."
    assert any(s.startswith("Least memory on the worst rank: small, 100 MiB") for s in said)
    assert any(s.startswith("Cheapest: fast, 5 EUR per million tokens") for s in said)
    assert any("three (refused)" in s and "oom (out of memory)" in s for s in said)
    warned = " ".join(caveats(c))
    assert "22.2 % at the most (base)" in warned and "fast (24.4 % higher)" in warned
    assert "libraries" in warned and "no datasheet figure" in warned


def test_caveats_where_runs_are_not_alike(place: Place) -> None:
    steps = [step(n, 0.5, 2.0, skipped_steps=n // 2) for n in range(1, 5)]
    there = {"hardware": {"host": "other", "device": "a CPU", "cores": 1}, "parameters": 5, "git_commit": "def"}
    runs = [made_up.write(place.folder / "a", records("a", steps)),
            made_up.write(place.folder / "b", records("b", steps, **there))]  # fmt: skip
    warned = " ".join(caveats(of_runs(runs)))
    for words in ("Nothing was repeated", "different hosts: h, other", "different commits of disttrain",
                  "b (2 ranks on 1 cores)", "same model on the same data", "a gradient was no number: a, b"):  # fmt: skip
        assert words in warned


def test_devices_are_compared_where_all_have_one(place: Place) -> None:
    with_device = [
        step(n, 0.5, 2.0, peak_reserved_bytes_max=n * MIB, mfu_causal=0.4, mfu_full=0.5, hfu=0.6) for n in (1, 2)
    ]
    gpu = made_up.write(place.folder / "gpu", records("gpu", with_device, launcher="srun"))
    cpu = made_up.write(place.folder / "cpu", records("cpu", [step(n, 0.5, 2.0) for n in (1, 2)]))
    both = of_runs([gpu])
    assert both.on_device and both.strategies[0].values["memory_bytes"] == 2 * MIB
    assert both.strategies[0].values["hfu"] == pytest.approx(0.6) and "mfu" in [plot.key for plot in plots(both)]
    assert not of_runs([gpu, cpu]).on_device


def test_single_runs_are_grouped_by_name_and_config(place: Place) -> None:
    def run(folder: str, name: str, **config) -> Path:
        return made_up.write(place.folder / folder, records(name, [step(n, 0.5, 2.0) for n in (1, 2)], config=config))

    tensor = {"parallel": {"tensor": 2}}
    runs = [
        run("1", "x-1"),
        run("2", "x-2"),
        run("3", "x-3", **tensor),
        run("4", "alone-7"),
        run("5", "alone-7", **tensor),
    ]
    killed = made_up.write(place.folder / "6", [*records("k", [step(1, 1.0, 1.0)])[:-2]])
    c = of_runs([*runs, killed])
    assert [(s.name, len(s.group.runs)) for s in c.strategies] == [
        ("x", 2), ("x-3", 1), ("alone-7", 1), (str(place.folder / "5"), 1)]  # fmt: skip
    assert [s.group.settings for s in c.strategies] == [[], ["parallel.tensor=2"], [], ["parallel.tensor=2"]]
    assert [n.name for n in c.not_run] == ["k"]
    with pytest.raises(RefusedInput, match="none of these runs is done"):
        of_folders([killed, killed])
    with pytest.raises(RefusedInput, match="no such file"):
        of_folders([place.folder, killed])


def test_a_comparison_without_a_run_says_what_happened(place: Place) -> None:
    plan = place.plan({"a": None})
    save(plan.folder, Outcome("a", 1, "failed", "it broke", 1, 1.0, ["x"]))
    with pytest.raises(RefusedInput, match="it broke"):
        of_plan(plan)


def test_a_baseline_that_failed_is_replaced(folder: Path) -> None:
    (folder / "runs/base-1/summary.json").unlink()
    (folder / "runs/base-2/summary.json").unlink()
    assert comparison(folder).baseline == "fast"


class Page(HTMLParser):
    """Addresses, cells and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.inside: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.inside.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "data", "action", "poster", "srcset")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self.inside:
            self.scripts[-1] += data
        elif {"td", "th"} & set(self.inside):
            self.rows[-1][-1] += data


def test_the_page_needs_no_network_and_shows_every_strategy(folder: Path) -> None:
    text = html(comparison(folder))
    page = Page(text)
    assert page.addresses == ["#columns"]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in text and len(page.scripts) == 3
    assert len(re.findall(r"\* plotly\.js v", text)) == 1  # one copy
    c = comparison(folder)
    table = {row[0].removesuffix(" \u2605"): row for row in page.rows if len(row) == len(columns(c, TABLES[0])) + 1}
    assert list(table) == ["strategy", "base", "fast", "small"]
    assert table["fast"][2] == "400" and "The &lt;first&gt; one" in text
    named = [row[0] for row in page.rows]
    assert {"three", "oom", "later"} <= set(named)
    drawn = {plot["key"]: plot for plot in json.loads(page.scripts[0])}
    assert list(drawn) == ["front", "throughput", "loss_tokens", "loss_seconds", "communication", "bubble"]
    assert all(f'<div class="plot" id="{key}">' in text for key in drawn)
    lines = drawn["loss_tokens"]["data"]
    assert [line["name"] for line in lines] == ["base", "fast", "small"] and len(lines[0]["x"]) == 20
    colours = {line["name"]: line["line"]["color"] for line in lines}
    marks = {mark["name"]: mark["marker"]["color"] for mark in drawn["front"]["data"] if mark["mode"] != "lines"}
    assert marks == colours and len(set(colours.values())) == 3


def test_plots_are_what_plotly_draws(folder: Path) -> None:
    """plotly's own check of every key and value."""
    from plotly.graph_objects import Figure

    for plot in plots(comparison(folder)):
        Figure({"data": plot.data, "layout": plot.layout})


def test_markdown_and_csv(folder: Path) -> None:
    c = comparison(folder)
    text = markdown(c)
    assert "| base \u2605 | 2 | 225 | 200 | 250 | 1.00 | 450 ms | 300 MiB |" in text
    assert "| oom | out of memory | repeat 1: CUDA out of memory |" in text
    assert "| fast | - | `parallel.tensor=2` |" in text
    rows = {row["strategy"]: row for row in csv.DictReader(io.StringIO(strategies_csv(c)))}
    assert float(rows["fast"]["tokens_per_second"]) == 400 and rows["fast"]["mfu_causal"] == ""
    assert int(float(rows["fast"]["memory_bytes"])) == 505 * MIB and rows["small"]["pareto_front"] == "1"


def test_the_terminal_takes_100_columns(folder: Path) -> None:
    console = Console(width=100)
    with console.capture() as capture:
        show(comparison(folder), console)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if line.startswith("fast *"))
    assert row.split()[2:6] == ["400", "400", "400", "1.78"] and "\u2026" not in capture.get()
    assert any("three refused" in line for line in lines)


def test_the_report_can_be_made_again(folder: Path, tmp_path: Path) -> None:
    """From the folder alone, wherever it is moved to: the same bytes."""
    write(of_folders([folder]), folder)
    first = {name: (folder / name).read_bytes() for name in FILES}
    assert first["report.png"][:8] == b"\x89PNG\r\n\x1a\n" and len(first) == 5
    moved = folder.rename(tmp_path / "elsewhere").rename(tmp_path / "out2")
    moved = moved.rename(folder)
    for name in FILES:
        (moved / name).unlink()
    write(of_folders([moved]), moved)
    assert {name: (moved / name).read_bytes() for name in FILES} == first
