"""Every fault of the table in docs/faults.md, struck once: it is noticed in time, by what the page says, and the run ends
with the exit code, and gives what the page says."""

import pytest

from tests.components import need
from tests.faults.cases import CASES
from tests.faults.job import EVERY
from tests.faults.place import Place
from tests.faults.table import ELSEWHERE, PAGE, documented


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", CASES)
def test_a_fault_ends_as_the_page_says(fault: str, place: Place) -> None:
    case = CASES[fault]
    if case.needs_root:
        need("namespaces")
    row = case.strike(place, f"hit_{list(CASES).index(fault)}")
    assert (row.noticed, str(row.exit_code), row.gave) == documented(PAGE.read_text())[fault]
    assert row.seconds is None or row.seconds < case.bound_s
    assert row.again is None or row.again <= 3 * EVERY


def test_the_page_has_every_fault() -> None:
    assert list(documented(PAGE.read_text()))[2:] == [*CASES, *ELSEWHERE]
