import json
import time
import warnings

import numpy as np
import pytest

from disttrain.config.problems import RefusedInput
from disttrain.config.schema import DataConfig
from disttrain.data.cutting import pieces_of
from disttrain.data.tokenizer import byte_tokenizer, byte_tokenizer_json, load_tokenizer, load_tokenizer_json
from disttrain.data.vocabulary import tokenizer_json, train
from tests.unit.data.conftest import SHARED, make_text

TEXT = (
    make_text(20_000)
    + "It's   odd:\tx=1;\n\n\n  def f(a, b):\n    return 'naïve café' # 中文字 \U0001f600 don't\r\n end"
)


def from_transformers(name, folder, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        return getattr(transformers, name).from_pretrained(str(folder), **settings)


@pytest.fixture
def gpt2_folder(tmp_path):
    """GPT-2's vocabulary files, made from a small trained vocabulary; the specials' names are GPT-2's."""
    model = json.loads(train("bpe", [TEXT], 600, False))["model"]
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    (tmp_path / "gpt2" / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    return tmp_path / "gpt2"


@pytest.fixture
def bert_folder(tmp_path):
    vocabulary = json.loads(train("wordpiece", [TEXT], 700, False))["model"]["vocab"]
    (tmp_path / "bert").mkdir()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
    return tmp_path / "bert"


def load(**data):
    return load_tokenizer_json(tokenizer_json(DataConfig(**data)), "test")


def test_bytes_round_trip_and_ids():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int64 and ids.tolist() == list(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.end_of_text, tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask) == tuple(
        range(256, 261)
    )
    assert tokenizer.vocab_size == 261 and tokenizer.decode([72, 105, 256]) == "Hi<|endoftext|>"


def test_the_file_of_bytes_means_the_same_to_the_package_tokenizers(tmp_path):
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(byte_tokenizer_json().decode())
    assert library.encode(TEXT).ids == byte_tokenizer().encode(TEXT).tolist()
    assert library.decode(list(TEXT.encode())) == TEXT
    assert library.token_to_id("<|mask|>") == byte_tokenizer().mask
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer_json())
    assert load_tokenizer(tmp_path / "tokenizer.json").vocab_size == 261


def check_gpt2(folder, text):
    ours, theirs = load(tokenizer="gpt2", tokenizer_path=str(folder)), from_transformers("GPT2Tokenizer", folder)
    assert ours.encode(text).tolist() == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == len(theirs) and ours.end_of_text == theirs.eos_token_id
    return ours


def check_bert(folder, text, vocabulary, lowercase):
    path = str(folder / vocabulary)
    ours = load(tokenizer="bert", tokenizer_path=str(folder), lowercase=lowercase)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        theirs = transformers.BertTokenizer(path, do_lower_case=lowercase)
        if theirs.vocab_size != ours.vocab_size:  # newer versions take the vocabulary, not its path
            theirs = transformers.BertTokenizer(vocab=path, do_lower_case=lowercase)
    assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
    roles = ("pad", "cls", "sep", "mask")
    assert [ours.special_ids[r] for r in roles] == [getattr(theirs, f"{r}_token_id") for r in roles]
    assert ours.vocab_size == len(theirs)


def test_gpt2_files_equal_transformers(gpt2_folder):
    check_gpt2(gpt2_folder, TEXT)
    (gpt2_folder / "vocab.json").rename(gpt2_folder / "encoder.json")
    (gpt2_folder / "merges.txt").rename(gpt2_folder / "vocab.bpe")
    assert load(tokenizer="gpt2", tokenizer_path=str(gpt2_folder)).vocab_size == 600


def test_bert_files_equal_transformers(bert_folder):
    check_bert(bert_folder, TEXT, "vocab.txt", False)


def test_published_vocabularies_equal_transformers_on_real_text(tmp_path, gpt2_folder, bert_folder):
    """GPT-2's and BERT's published vocabularies where they are at hand; made ones otherwise."""
    text = TEXT
    if (book := SHARED / "gutenberg" / "alice.pg11.txt").exists():
        text += book.read_text()
    if (SHARED / "gpt2-bpe" / "encoder.json").exists():
        for ours, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
            (tmp_path / theirs).write_bytes((SHARED / "gpt2-bpe" / ours).read_bytes())
        assert check_gpt2(tmp_path, text).vocab_size == 50257
    else:
        check_gpt2(gpt2_folder, text)
    if (SHARED / "bert-vocab" / "bert-base-cased-vocab.txt").exists():
        check_bert(SHARED / "bert-vocab", text, "bert-base-cased-vocab.txt", False)
        check_bert(SHARED / "bert-vocab", text, "bert-base-uncased-vocab.txt", True)
    else:
        check_bert(bert_folder, text, "vocab.txt", False)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_training_twice_gives_the_same_file(kind):
    texts = [make_text(30_000, seed) for seed in range(3)]
    first = train(kind, texts, 400, False)
    assert all(train(kind, texts, 400, False) == first for _ in range(2))
    assert load_tokenizer_json(first, "test").vocab_size == 400


def test_trained_bpe_is_reversible_and_has_every_special_token():
    tokenizer = load_tokenizer_json(train("bpe", [make_text(5000)], 500, False), "test")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.vocab_size <= 500 and len(tokenizer.encode(TEXT)) < len(TEXT.encode())
    assert set(tokenizer.special_ids) == {"end_of_text", "pad", "cls", "sep", "mask"}


def test_wordpiece_lower_cases_when_asked():
    cased, lower = (load_tokenizer_json(train("wordpiece", [TEXT], 600, low), "test") for low in (False, True))
    assert lower.encode("NAÏVE").tolist() == lower.encode("naive").tolist()
    assert cased.encode("NAÏVE").tolist() != cased.encode("naive").tolist()
    assert lower.document_end == lower.sep and lower.end_of_text is None


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_cutting_a_text_does_not_change_its_tokens(kind):
    tokenizer = load_tokenizer_json(train(kind, [TEXT], 500, False), "test")
    text = make_text(40_000, seed=7)
    parts = [tokenizer.encode(p.data.decode()) for p in pieces_of(text.encode(), 700)]
    assert len(parts) > 50
    assert np.concatenate(parts).tolist() == tokenizer.encode(text).tolist()


def test_the_name_of_a_special_token_in_a_text_is_text():
    tokenizer = load_tokenizer_json(train("bpe", [TEXT], 400, False), "test")
    assert tokenizer.end_of_text not in tokenizer.encode("a <|endoftext|> b")


def test_a_folder_with_tokenizer_json_needs_no_hub(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(train("bpe", [TEXT], 400, False))
    expected = load_tokenizer(tmp_path / "tokenizer.json").encode(TEXT).tolist()
    for settings in ({"tokenizer": str(tmp_path)}, {"tokenizer": "gpt2", "tokenizer_path": str(tmp_path)},
                     {"tokenizer": "mine", "tokenizer_path": str(tmp_path / "tokenizer.json")}):  # fmt: skip
        assert load(**settings).encode(TEXT).tolist() == expected


def test_wrong_files_are_refused_with_what_is_wanted(tmp_path, bert_folder):
    (tmp_path / "bad").mkdir()
    with pytest.raises(RefusedInput, match=r"encoder.json and vocab.bpe"):
        load(tokenizer="gpt2", tokenizer_path=str(tmp_path / "bad"))
    with pytest.raises(RefusedInput, match=r"vocab.txt"):
        load(tokenizer="bert", tokenizer_path=str(tmp_path / "bad"))
    (tmp_path / "bad" / "tokenizer.json").write_text("{}")
    with pytest.raises(RefusedInput, match="not a tokenizer"):
        load(tokenizer="gpt2", tokenizer_path=str(tmp_path / "bad"))
    (tmp_path / "bad" / "vocab.json").write_text("nonsense")
    (tmp_path / "bad" / "merges.txt").write_text("nonsense")
    with pytest.raises(RefusedInput, match="cannot be read"):
        load(tokenizer="gpt2", tokenizer_path=str(tmp_path / "bad"))
    words = (bert_folder / "vocab.txt").read_text().lower().replace("[mask]", "[MASK]").replace("[cls]", "[CLS]")
    (bert_folder / "vocab.txt").write_text(words)
    with pytest.raises(RefusedInput, match=r"lacks \[PAD\], \[UNK\], \[SEP\]"):
        load(tokenizer="bert", tokenizer_path=str(bert_folder))


def test_an_uncased_vocabulary_wants_lowercase(bert_folder):
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (bert_folder / "vocab.txt").write_text("\n".join([*specials, "the", "a", "##s"]))
    with pytest.raises(RefusedInput, match="no capital letters"):
        load(tokenizer="bert", tokenizer_path=str(bert_folder))
    assert load(tokenizer="bert", tokenizer_path=str(bert_folder), lowercase=True).encode("THE").tolist() == [5]


def test_a_hub_name_is_taken_from_an_earlier_download_without_network(tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out; the name can only be found there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    stored = tmp_path / "models--some--thing"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(commit)
    (stored / "snapshots" / commit).mkdir(parents=True)
    (stored / "snapshots" / commit / "tokenizer.json").write_bytes(train("bpe", [TEXT], 400, False))
    assert load(tokenizer="some/thing").vocab_size == 400


def test_without_network_an_unknown_name_is_refused_at_once(monkeypatch):
    def unknown_host(*args):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown_host)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    start = time.monotonic()
    with pytest.raises(RefusedInput, match="no network"):
        load(tokenizer="no-such-thing")
    assert time.monotonic() - start < 5
