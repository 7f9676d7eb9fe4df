import pytest

from models.elastic.plan import RowView, is_protected


@pytest.mark.parametrize(
    ("first", "last", "protected"),
    [(0, 0, []), (2, 0, [0, 1]), (0, 1, [4]), (1, 2, [0, 3, 4]), (9, 9, [0, 1, 2, 3, 4])],
)
def test_first_and_last_steps_are_protected(first: int, last: int, protected: list[int]) -> None:
    rows = [RowView(step, 5, 0, None, None, None, step + 1) for step in range(5)]
    assert [row.step for row in rows if is_protected(row, first, last)] == protected
