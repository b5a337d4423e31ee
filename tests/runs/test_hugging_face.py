"""Models from and to transformers: equal logits both ways, training from an imported one, and what is refused."""

import json
import resource
import shutil
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from disttrain import checkpoint, checkpoint_contents
from disttrain.config.problems import RefusedInput
from disttrain.data.tokenizer import byte_tokenizer_json
from disttrain.tasks import hugging_face
from disttrain.tasks.trained import load_trained
from tests.runs.conftest import Workplace

transformers = pytest.importorskip("transformers")
V = 261


def their_gpt(folder: Path, **values: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, **values
    )
    return saved(transformers.GPT2LMHeadModel(config), folder)


def their_bert(folder: Path, kind: str = "BertForPreTraining", **values: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V, max_position_embeddings=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, initializer_range=0.2, **values,
    )  # fmt: skip
    return saved(getattr(transformers, kind)(config), folder)


def saved(model: Any, folder: Path) -> Any:
    """Moved from where everything is 0 or 1, and in a folder with our byte tokenizer."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(byte_tokenizer_json())
    return model


TOKENS = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(1))


def our_logits(folder: Path) -> torch.Tensor:
    model = load_trained(folder).model
    with torch.no_grad():
        return model.forward_batch({"tokens": TOKENS}, None)[:, :, :V]  # pyright: ignore


def their_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def here(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setenv("HOME", str(workplace.folder))  # prepared tokens go there
    return workplace


def test_gpt_comes_trains_and_goes(here: Workplace) -> None:
    theirs = their_gpt(Path("theirs"))
    assert "written: ours" in here.run("import", "theirs", "ours").stdout
    torch.testing.assert_close(our_logits(Path("ours")), their_logits(theirs), rtol=1e-5, atol=1e-5)
    assert "good" in here.run("checkpoint", "verify", "ours").stdout
    here.run("export", "ours", "back")
    again = transformers.GPT2LMHeadModel.from_pretrained("back")
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in theirs.state_dict().items())

    words = ["run.name=tuned", "run.dir=runs", "train.steps=3", "train.global_batch_size=4", "precision=fp32",
             "data.corpus=text", "data.path=corpus", "data.sequence_length=32", "data.cache_dir=cache"]  # fmt: skip
    here.run("train", "ours/config.yaml", "--nproc", "2", "parallel.zero=2", *words)
    first = here.records("tuned", "step")[0]
    (event,) = [e for e in here.records("tuned", "event") if e["event"] == "weights_loaded"]
    assert "ours" in event["message"]
    here.run("train", "ours/config.yaml", *words, "run.name=alone", "train.steps=1")
    assert here.records("alone", "step")[0]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    here.run("export", "runs/tuned", "tuned")
    tuned = transformers.AutoModelForCausalLM.from_pretrained("tuned")
    torch.testing.assert_close(their_logits(tuned), our_logits(Path("runs/tuned")), rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained("tuned")
    ids = tokenizer("alpha beta", return_tensors="pt")
    text = tokenizer.decode(tuned.generate(**ids, max_new_tokens=5, do_sample=False)[0])
    assert text.startswith("alpha beta")


def test_bert_comes_and_goes(here: Workplace) -> None:
    theirs = their_bert(Path("theirs"))
    assert hugging_face.import_model(Path("theirs"), Path("ours")) == []
    hugging_face.export(Path("ours"), Path("back"))
    again = transformers.BertForPreTraining.from_pretrained("back")
    for name, weight in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_heads_that_lack_are_drawn_and_named(here: Workplace, kind: str) -> None:
    theirs = their_bert(Path("theirs"), kind)
    lacking = hugging_face.import_model(Path("theirs"), Path("ours"))
    assert "head.next_sentence.weight" in lacking
    assert ("head.pooler.weight" in lacking) == (kind == "BertForMaskedLM")
    found = checkpoint.read(Path("ours/checkpoints/step_00000000"))
    embedding = theirs.get_input_embeddings().weight
    assert torch.equal(found["model.embed.tokens.weight"], embedding)


def test_no_file_is_larger_than_it_may_be(here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """So one tensor, or that much, is what is in memory at a time."""
    theirs = their_gpt(Path("theirs"))
    monkeypatch.setattr(checkpoint_contents, "FILE_BYTES", 20_000)
    hugging_face.import_model(Path("theirs"), Path("ours"))
    hugging_face.export(Path("ours"), Path("back"))
    largest = max(weight.nbytes for weight in theirs.state_dict().values())
    for folder in (Path("ours/checkpoints/step_00000000"), Path("back")):
        files = list(folder.glob("*.safetensors"))
        assert len(files) > 3
        assert all(file.stat().st_size < max(20_000, largest) + 4_000 for file in files)
    again = transformers.GPT2LMHeadModel.from_pretrained("back")
    torch.testing.assert_close(their_logits(again), their_logits(theirs), rtol=0, atol=0)
    hugging_face.import_model(Path("back"), Path("once_more"))
    torch.testing.assert_close(our_logits(Path("once_more")), their_logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_model_streams_through_less_memory_than_it_has(here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """57 million parameters, 228 MB, in files of 16 MB; the largest tensor has 8 MB."""
    their_gpt(Path("small"))
    hugging_face.import_model(Path("small"), Path("small_ours"))
    hugging_face.export(Path("small_ours"), Path("small_back"))  # what is imported for that takes memory once
    config = transformers.GPT2Config(vocab_size=V, n_positions=32, n_embd=768, n_layer=8, n_head=4)
    model = saved(transformers.GPT2LMHeadModel(config), Path("theirs"))
    size = sum(parameter.nbytes for parameter in model.parameters())
    del model
    monkeypatch.setattr(checkpoint_contents, "FILE_BYTES", 16_000_000)
    assert grown_bytes(lambda: hugging_face.import_model(Path("theirs"), Path("ours"))) < size / 3
    assert grown_bytes(lambda: hugging_face.export(Path("ours"), Path("back"))) < size / 3


def grown_bytes(act: Callable[[], Any]) -> int:
    """By how much the memory of a process that does it grows at most."""
    context = get_context("fork")
    result = context.SimpleQueue()

    def child() -> None:
        before = psutil.Process().memory_info().rss
        act()
        result.put(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    process = context.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    return result.get()


def test_what_is_not_understood_is_refused(here: Workplace) -> None:
    def refused(because: str) -> None:
        with pytest.raises(RefusedInput, match=because):
            hugging_face.import_model(Path("theirs"), Path("ours"))
        assert not Path("ours").exists()
        assert not Path("ours.writing").exists()

    refused("config.json cannot be read")
    their_gpt(Path("theirs"), activation_function="relu", scale_attn_by_inverse_layer_idx=True)
    refused("activation_function=gelu_new.*scale_attn_by_inverse_layer_idx=False")
    their_gpt(Path("theirs"))
    config = Path("theirs/config.json")
    good = json.loads(config.read_text())
    config.write_text(json.dumps({**good, "model_type": "llama"}))
    refused("only GPT-2 and BERT")
    config.write_text(json.dumps({**good, "n_layer": 3}))
    refused("missing")
    config.write_text(json.dumps({**good, "n_embd": 40}))
    refused("shape")
    config.write_text(json.dumps({**good, "n_layer": "two"}))
    refused("no shape")
    config.write_text(json.dumps(good))
    weights = Path("theirs/model.safetensors")
    index = Path("theirs/model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../../elsewhere.safetensors"}}))
    refused("does not name the files of its folder")
    index.unlink()
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    refused("no safetensors file")
    weights.rename("theirs/pytorch_model.bin")
    refused("model.safetensors is missing")
    Path("ours").mkdir()
    with pytest.raises(RefusedInput, match="there already"):
        hugging_face.export(make_run(here), Path("ours"))


def make_run(here: Workplace) -> Path:
    here.run("train", "run.yaml", "train.steps=2")
    return Path("runs/run")


def test_weights_that_do_not_fit_are_refused(here: Workplace) -> None:
    run = make_run(here)
    words = ["run.name=next", f"checkpoint.weights={run}"]
    here.run("train", "run.yaml", *words, "train.steps=2")
    assert here.records("next", "step")[0]["step"] == 1
    other = [*words, "run.name=other", "model.vocab_size=261"]
    done = here.run("train", "run.yaml", *other, "model.hidden_size=16", code=2)
    assert "blocks.0.attn.out.bias has shape (32,) there and (16,) here" in " ".join(done.stderr.split())
    done = here.run("train", "run.yaml", "run.name=third", "checkpoint.weights=nowhere", code=2)
    assert "no good checkpoint" in done.stderr
    assert not (here.folder / "runs" / "other").exists()
    shutil.rmtree(run)
    here.run("train", "run.yaml", "run.name=next", "train.steps=3", f"checkpoint.weights={run}")  # it goes on
    assert [record["step"] for record in here.records("next", "step")] == [1, 2, 3]
    resumed = f"checkpoint.resume={here.folder}/runs/next/checkpoints/step_00000003"
    done = here.run("train", "run.yaml", "run.name=next", "train.steps=4", resumed, f"checkpoint.weights={run}", code=2)
    assert "no effect" in done.stderr
