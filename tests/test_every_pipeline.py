"""Every pipeline class of diffusers with a T5: patched, captured, replayed, learned from.

What is measured here is the table of docs/pipelines.md; `python tests/zoo/table.py` writes it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_slot import every_pipeline_class
from zoo import CASES, NOT_COVERED
from zoo.facts import measure

from t5slim import NoT5SlotError
from t5slim.slot import find_text_slot

TABLE = Path(__file__).parents[1] / "docs" / "pipelines.md"
HERE = {name: case for name, case in CASES.items() if case.cls is not None}


@pytest.mark.parametrize("name", HERE)
def test_pipeline(name: str) -> None:
    case = CASES[name]
    facts = measure(case)
    assert facts.patched
    assert facts.route == case.route, facts.why
    assert case.why in facts.why
    if facts.route != "none":
        assert facts.calls
        assert facts.replayed
        assert facts.gradient > 0
    # The table of the docs is what was measured; to write it anew: python tests/zoo/table.py
    assert facts.row in TABLE.read_text(encoding="utf-8").splitlines()


def test_no_pipeline_is_left_out() -> None:
    with_t5 = set()
    for cls in every_pipeline_class():
        try:
            find_text_slot(cls)
        except NoT5SlotError:
            continue
        with_t5.add(cls.__name__)
    assert with_t5 <= CASES.keys() | NOT_COVERED.keys()
    assert not CASES.keys() & NOT_COVERED.keys()
    distilled = [case for case in HERE.values() if case.route != "none"]
    assert len(distilled) >= 40
