import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.data.cutting import SECTION_BYTES, Piece, cut_point, held_out_pieces, pieces_of, section_bytes
from disttrain.data.items import document_items, pieces, text_items
from tests.unit.data.conftest import make_text

TEXT = st.text(alphabet=st.sampled_from("ab é中😀\n\n  ."), min_size=1, max_size=400)


@settings(deadline=None)
@given(text=TEXT, longest=st.integers(1, 60), starts=st.booleans(), ends=st.booleans())
def test_pieces_join_to_the_document_and_never_split_a_character(text, longest, starts, ends):
    data = text.encode()
    found = list(pieces_of(data, longest, starts, ends))
    assert b"".join(piece.data for piece in found) == data
    for piece in found:
        assert piece.data.decode()
        assert len(piece.data) <= max(longest, 4)
    assert [p.starts_document for p in found] == [starts] + [False] * (len(found) - 1)
    assert [p.ends_document for p in found] == [False] * (len(found) - 1) + [ends]


def test_cuts_prefer_a_line_end_between_visible_characters():
    assert cut_point(b"aaaa bbbb\ncccc dd\n\neee", 19) == 10
    assert cut_point(b"aaaa bbbb\n\n ccccccc", 16) == 11
    assert cut_point(b"aaaa bbbb cccccccc", 14) == 9
    assert cut_point("ééééééé".encode(), 9) == 8


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 5000), min_size=200, max_size=600), number=st.integers(0, 1000),
       fraction=st.floats(0.01, 0.5))  # fmt: skip
def test_held_out_share_is_kept_to_one_piece_and_a_first_debt(sizes, number, fraction):
    found = [Piece(b"x" * size, True, True) for size in sizes]
    held = held_out_pieces(found, number, sum(sizes), fraction)
    share = sum(size for size, h in zip(sizes, held, strict=True) if h)
    assert abs(share - fraction * sum(sizes)) <= max(max(sizes), section_bytes(sum(sizes), fraction))


def test_held_out_share_evens_out_over_items():
    found = [Piece(b"x" * SECTION_BYTES, True, True)] * 128
    held = [sum(held_out_pieces(found, number, 128 * SECTION_BYTES, 0.05)) / 128 for number in range(200)]
    assert np.mean(held) == pytest.approx(0.05, abs=0.0005)


def test_pieces_at_an_items_edge_inside_a_document_are_trained_on():
    inside = [Piece(b"x" * 100, False, False)] * 10
    assert held_out_pieces(inside, 0, 1000, 0.5)[0] is False
    assert held_out_pieces(inside, 0, 1000, 0.5)[-1] is False
    assert any(held_out_pieces(inside, 0, 1000, 0.5))


@pytest.fixture
def small_items(monkeypatch):
    monkeypatch.setattr("disttrain.data.items.ITEM_BYTES", 1000)
    monkeypatch.setattr("disttrain.data.items._WINDOW", 64)


@pytest.mark.usefixtures("small_items")
@pytest.mark.parametrize("document", ["file", "line", "blank_line"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_items_hold_every_document_once_whatever_the_cuts(tmp_path, document, end):
    texts = [make_text(size, seed).replace("\n", end) for seed, size in enumerate([10, 300, 7000, 1500, 80, 2600])]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    items = text_items(sorted(tmp_path.iterdir()), document, "text", None, 0.0)
    assert [item.number for item in items] == list(range(len(items)))
    assert all(500 <= item.text_bytes <= 4000 for item in items[:-1])
    documents, text = [], b""
    for piece in (piece for item in items for piece in pieces(item)):
        assert piece.starts_document == (text == b"")
        text += piece.data
        if piece.ends_document:
            documents.append(text.decode())
            text = b""
    assert text == b""
    if document == "file":
        assert documents == texts
    elif document == "line":
        assert documents == [line for text in texts for line in text.split(end) if line.strip()]
    else:
        expected = [part.strip(end) for text in texts for part in text.split(end * 2)]
        assert documents == [part for part in expected if part]


@pytest.mark.usefixtures("small_items")
@settings(max_examples=40, deadline=None)
@given(lines=st.lists(st.integers(0, 500), min_size=1, max_size=60), limit=st.integers(1, 8000) | st.none())
def test_item_ranges_follow_one_another_and_honour_max_bytes(tmp_path_factory, lines, limit):
    path = tmp_path_factory.mktemp("lines") / "text.txt"
    path.write_text("".join("x" * line + "\n" for line in lines))
    items = text_items([path], "line", "text", limit, 0.0)
    at = 0
    for part in (part for item in items for part in item.ranges):
        assert part.start == at
        at = part.stop
    size = path.stat().st_size
    assert at == size if limit is None or limit >= size else limit <= at <= limit + 501


def test_max_bytes_cuts_a_file_at_a_line_end_and_ends_its_document(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_text(5000))
    (item,) = text_items([path], "file", "text", 2000, 0.0)
    found = pieces(item)
    assert 1500 < item.text_bytes <= 2000
    assert found[-1].ends_document and path.read_bytes().startswith(b"".join(p.data for p in found))


def test_streamed_documents_are_grouped_in_order_and_cut_at_max_bytes():
    texts = [make_text(300, seed) for seed in range(10)]
    (item,) = document_items(iter(texts), None, 0.0)
    assert [d.decode() for d in item.documents] == texts
    (item,) = document_items(iter(texts), 1000, 0.0)
    assert 900 <= item.text_bytes <= 1000
    assert "".join(texts).encode().startswith(b"".join(item.documents))


def test_max_bytes_of_a_stream_reads_no_further_than_needed():
    def endless():
        while True:
            yield "some text "

    assert sum(item.text_bytes for item in document_items(endless(), 106, 0.0)) == 104  # ten, and "some"
