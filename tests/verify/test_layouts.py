"""Names of layouts read back, matrices hold what is legal, and nothing else."""

import subprocess
import sys
from dataclasses import replace

import pytest

from disttrain.config.problems import RefusedInput
from disttrain.verify.layouts import Layout, parse, parse_list, refuse_illegal
from disttrain.verify.matrix import SMALL, enumerate_layouts, full_matrix, sample, small_matrix
from tests.verify.small import config_for


def test_a_name_says_everything() -> None:
    layout = Layout(
        world=16, tensor=2, sequence=True, pipeline=2, schedule="interleaved_1f1b", virtual_stages=3, context=2,
        context_method="ulysses", zero=2, replicate=2, offload=True, recompute="full", micro_batch=1, compile=True,
    )  # fmt: skip
    name = "tp2.sp.pp2-interleaved_1f1b-v3.cp2-ulysses.dp2.zero2.rep2.offload.full.mb1.compile on 16"
    assert layout.name == str(layout) == name
    assert parse(name) == layout
    assert parse(name.removesuffix(" on 16")) == layout
    assert Layout().name == "single on 1"
    assert parse("single") == Layout()
    assert parse("pp2").schedule == "1f1b"
    assert parse("zero2 on 4") == parse("dp4.zero2") == Layout(world=4, zero=2)


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_every_name_reads_back_and_every_layout_is_legal(family: str) -> None:
    config = config_for(family)
    layouts = full_matrix(config)
    assert len(layouts) > 300
    assert len({layout.name for layout in layouts}) == len(layouts)
    for layout in layouts:
        assert parse(layout.name) == layout
        assert not layout.problems(config)
        assert layout.world <= 8
    assert max(layout.world for layout in full_matrix(config, max_world=4)) == 4


def test_the_full_matrix_shows_every_feature_and_the_small_one_too() -> None:
    config = config_for()
    full, small = full_matrix(config), small_matrix(config)
    assert [layout.name for layout in small] == [parse(name).name for name in SMALL]
    assert {layout.schedule for layout in full} == {
        "gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"
    }  # fmt: skip
    assert {layout.context_method for layout in full} == {"ring", "ulysses"}
    assert {layout.offload for layout in full} == {False, True}
    for layouts in (full, small):
        assert {layout.zero for layout in layouts} == {0, 1, 2, 3}
        assert {layout.recompute for layout in layouts} == {"none", "selective", "full"}
        assert len({layout.micro_batch for layout in layouts}) >= 3
        assert any(layout.tensor == layout.pipeline == layout.data == 2 and layout.zero for layout in layouts)
        assert any(layout.replicate > 1 for layout in layouts)
        assert any(layout.sequence for layout in layouts)


def test_what_the_model_does_not_allow_is_left_out() -> None:
    config = config_for(**{"model.heads": 1, "model.layers": 2})
    layouts = full_matrix(config, max_world=4)
    assert layouts
    assert all(layout.tensor == 1 and layout.context_method == "ring" for layout in layouts)
    assert all(layout.pipeline <= 2 for layout in layouts)


def test_all_layouts_contain_the_matrices() -> None:
    config = config_for()
    everything = set(enumerate_layouts(config, max_world=4))
    assert set(full_matrix(config, max_world=4)) <= everything
    assert len(everything) > 1000


def test_a_sample_is_the_same_for_the_same_seed() -> None:
    layouts = full_matrix(config_for(), max_world=4)
    some = sample(layouts, 20, seed=1)
    assert len(set(some)) == 20
    assert some == sample(layouts, 20, seed=1) != sample(layouts, 20, seed=2)
    assert sorted(some, key=layouts.index) == some
    assert sample(layouts[:3], 20, seed=1) == layouts[:3]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tp2.zer1", "did you mean 'zero2'"),
        ("tp2 on 3", "the sizes make 2 ranks"),
        ("tp2.dp2 on 8", "the sizes make 4 ranks"),
        ("tp2 on many", "'many' is not a number"),
        ("", "is no part of a layout's name"),
    ],
)
def test_what_is_no_name_is_refused(name: str, said: str) -> None:
    with pytest.raises(RefusedInput) as refused:
        parse(name)
    (problem,) = refused.value.problems
    assert said in problem.message + problem.fix


def test_all_wrong_names_are_refused_at_once() -> None:
    assert parse_list("tp2 on 2, dp4") == [parse("tp2"), parse("dp4 on 4")]
    with pytest.raises(RefusedInput) as refused:
        parse_list("tp2,xx3,yy4")
    assert len(refused.value.problems) == 2


def test_an_illegal_layout_is_refused_with_the_reason() -> None:
    config = config_for()
    refuse_illegal(config, small_matrix(config))
    with pytest.raises(RefusedInput) as refused:
        refuse_illegal(config, [parse("tp3"), parse("pp2-nonsense"), replace(parse("tp2"), replicate=2)])
    texts = [f"{' '.join(p.settings)} {p.message}" for p in refused.value.problems]
    assert any("layout tp3 on 3" in t and "4 heads" in t for t in texts)
    assert any("nonsense" in t for t in texts)
    assert any("replicate" in t for t in texts)


@pytest.mark.parametrize("module", ["verify", "verify.layouts", "verify.matrix", "verify.batches"])
def test_names_need_no_torch(module: str) -> None:
    code = f"import sys, disttrain.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
