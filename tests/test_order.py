"""The order in which `make test` hands out files."""

from typing import Any

from tests.conftest import LONGEST, TESTS, pytest_collection_modifyitems


class Found:
    """What the order looks at of a test."""

    def __init__(self, name: str) -> None:
        self.path = TESTS / name


def test_every_long_file_is_there() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []
    assert len(set(LONGEST)) == len(LONGEST)


def test_long_files_come_first_and_the_others_stay_in_order() -> None:
    names = ["test_a.py", LONGEST[1], "test_c.py", LONGEST[0], "test_b.py", LONGEST[1]]
    items: list[Any] = [Found(name) for name in names]
    pytest_collection_modifyitems(items)
    order = [str(item.path.relative_to(TESTS)) for item in items]
    assert order == [LONGEST[0], LONGEST[1], LONGEST[1], "test_a.py", "test_c.py", "test_b.py"]
