"""The notebook in examples/: it runs, and is committed with what it showed."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "distill.ipynb"


def shown(notebook: nbformat.NotebookNode) -> tuple[str, int]:
    """All text that its cells have put out, and the number of pictures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.text for output in outputs if output.output_type == "stream"]
    return "".join(texts), sum("image/png" in output.get("data", ()) for output in outputs)


def test_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPDATES", "8")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
    text, pictures = shown(notebook)
    for part in ("denoiser rows for the teacher", "gap before:", "velocity gap", "student: True"):
        assert part in text
    assert pictures == 2


def test_notebook_is_committed_with_its_pictures() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # run once, from the top
    text, pictures = shown(notebook)
    assert pictures == 2
    assert float(re.search(r"velocity gap .*?(\d\.\d+)", text)[1]) < 0.2
    assert not re.search(r"(^|[\s'\"])(/\w|[A-Z]:\\)|Warning", text)  # no paths of a machine
    assert NOTEBOOK.stat().st_size < 500_000
