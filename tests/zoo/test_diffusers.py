from __future__ import annotations

import os

import pytest

from zoo import diffusers_tests


@pytest.mark.skipif(
    "DIFFUSERS_TESTS" not in os.environ,
    reason="for an hour; DIFFUSERS_TESTS=/path/to/a/checkout/of/diffusers pytest tests/zoo runs it",
)
def test_diffusers_own_tests_end_as_noted() -> None:
    assert diffusers_tests.main([]) == 0
