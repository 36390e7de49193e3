"""The table of adapter types in docs/adapters.md says what the types declare, and how many parameters they train."""

import pytest

from docs.make_adapters import HEADER, MODELS, PAGE, PLACE, row
from irtune.config.declarations import adapter_kinds

pytestmark = pytest.mark.quick
COUNTED = ("ia3", "prompt")  # all of them take a minute


def cells(line: str) -> list[str]:
    return line.strip().strip("|").split(" | ")


def test_the_table_of_types_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    found = PLACE.search(page)
    assert found is not None and found[0].startswith(HEADER)
    rows = found[0].removeprefix(HEADER).splitlines()
    made = [row(name, MODELS if name in COUNTED else ()) for name in adapter_kinds()]
    assert len(rows) == len(made), "out of date; run: python docs/make_adapters.py"
    for there, here in zip(rows, made):
        pairs = list(zip(cells(there), cells(here), strict=True))
        assert all(one == other or other == "..." for one, other in pairs), f"{here} run: python docs/make_adapters.py"
        assert "..." not in there
