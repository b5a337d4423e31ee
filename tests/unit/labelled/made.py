"""Files as the official ones are laid out, written by hand, and a WordPiece vocabulary of a few words."""

from pathlib import Path

from disttrain.config.schema import DataConfig
from disttrain.data.tokenizer import Tokenizer, load_tokenizer_json
from disttrain.data.vocabulary import tokenizer_json
from disttrain.labelled.examples import Question

GLUE: dict[str, dict[str, str]] = {
    "cola": {
        "train.tsv": 'gj04\t1\t\tThe "sailors" rode.\ngj04\t0\t*\tThe box "was broken.\n',
        "dev.tsv": "gj04\t1\t\tBill sank.\n",
        "test.tsv": "index\tsentence\n0\tBill whistled.\n",
    },
    "sst2": {
        "train.tsv": "sentence\tlabel\nhide new secretions \t0\na charming journey \t1\n",
        "test.tsv": "index\tsentence\n0\tuneasy mishmash .\n",
    },
    "mrpc": {
        "train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA b.\tB a.\n0\t9\t10\tC.\tD.\n",
        "test.tsv": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tPCs\tComputers\n",
    },
    "qqp": {
        "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "1\t2\t3\tHow?\tWhy?\t0\n4\t5\t6\tcut in two\n7\t8\t9\tWho?\tWho is it?\t1\n",
        "test.tsv": "id\tquestion1\tquestion2\n0\tWhat?\tWhich?\n",
    },
    "stsb": {
        "train.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000\n"
        "1\tmain\tMSRvid\t2012\t4\tnone\tnone\tA man.\tA cat.\t0.250\n",
        "test.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\n"
        "0\tmain\tx\t2012\t1\tnone\tnone\tA girl.\tA boy.\n",
    },
    "mnli": {
        "train.tsv": "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t1\t1e\tfiction\tOne.\tTwo.\tneutral\tneutral\n1\t2\t2e\tfiction\tX.\tY.\tentailment\tcontradiction\n",
        "dev_matched.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tA\tB\tneutral\tentailment\n",
        "dev_mismatched.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tC\tD\tneutral\tneutral\n",
        "test_matched.tsv": "index\tsentence1\tsentence2\n0\tE\tF\n",
        "test_mismatched.tsv": "index\tsentence1\tsentence2\n0\tG\tH\n",
    },
    "qnli": {
        "train.tsv": "index\tquestion\tsentence\tlabel\n0\tWhen?\tIn 1990.\tentailment\n1\tWho?\tNo.\tnot_entailment\n",
        "test.tsv": "index\tquestion\tsentence\n0\tWhat?\tThat.\n",
    },
    "rte": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tNo weapons.\tWeapons.\tnot_entailment\n",
        "test.tsv": "index\tsentence1\tsentence2\n0\tMangla.\tShukla.\n",
    },
    "wnli": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\r\n0\tI stuck a pin.\tThe pin.\t1\r\n1\tA.\tB.\t0\r\n",
        "test.tsv": "index\tsentence1\tsentence2\r\n0\tMaude.\tDora.\r\n",
    },
}
"""Files of the nine GLUE sets, by set."""

CONLL = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
French JJ I-NP B-MISC
call NN I-NP O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER

-DOCSTART- -X- O O

BRUSSELS NNP I-NP I-LOC
1996-08-22 CD I-NP O
"""
"""CoNLL-2003's columns with its IOB1 tags."""

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "un", "##happy", "##ly", "dog",
         "who", "?", ".", "a", "b", "c", "d", "e", "f")  # fmt: skip
"""An uncased WordPiece vocabulary."""


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def wordpiece_json(folder: Path) -> bytes:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tokenizer_json(DataConfig(tokenizer="bert", tokenizer_path=str(folder), lowercase=True))


def wordpiece(folder: Path) -> Tokenizer:
    return load_tokenizer_json(wordpiece_json(folder), "made by hand")


def ids(text: str) -> list[int]:
    """Ids of subwords that are separated by spaces."""
    return [WORDS.index(word) for word in text.split()]


def question(
    context: str, answer: str | None = None, asked: str = "who ?", title: str = "t", id: str = "q"
) -> Question:
    answers = () if answer is None else ((answer, context.index(answer)),)
    return Question(id, title, asked, context, answers)
