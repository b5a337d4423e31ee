import random

import pytest

from disttrain.labelled.tags import Chunk, chunks, to_bioes, to_iob1, to_iob2


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-X I-X O", [(0, 2, "X")]),
        ("I-X I-X B-X", [(0, 2, "X"), (2, 3, "X")]),
        ("O I-X I-Y", [(1, 2, "X"), (2, 3, "Y")]),
        ("B-X I-Y", [(0, 1, "X"), (1, 2, "Y")]),
        ("S-X I-X E-X", [(0, 1, "X"), (1, 3, "X")]),
        ("B-X E-X E-X S-Y", [(0, 2, "X"), (2, 3, "X"), (3, 4, "Y")]),
        ("B-creative-work I-creative-work", [(0, 2, "creative-work")]),
    ],
)
def test_chunks_of_regular_and_stray_tags(tags, expected):
    assert chunks(tags.split()) == [Chunk(*one) for one in expected]


def test_a_schemes_tags_by_hand():
    lines = ("B-X I-X B-X O B-Y B-X I-X I-X", "I-X I-X B-X O I-Y I-X I-X I-X", "B-X E-X S-X O S-Y B-X I-X E-X")
    iob2, iob1, bioes = (line.split() for line in lines)
    assert to_iob1(iob2) == iob1 and to_bioes(iob2) == bioes
    assert to_iob2(to_iob1(iob2)) == iob2 == to_iob2(to_bioes(iob2))


def test_every_scheme_keeps_the_chunks():
    rng = random.Random(1)
    for _ in range(300):
        tags = [rng.choice(["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in "XY")]) for _ in range(8)]
        for change in (to_iob1, to_iob2, to_bioes):
            assert chunks(change(tags)) == chunks(tags)


@pytest.mark.parametrize("tag", ["", "B", "B-", "X-PER", "PER"])
def test_what_is_no_tag(tag):
    with pytest.raises(ValueError, match="is no tag"):
        chunks([tag])
