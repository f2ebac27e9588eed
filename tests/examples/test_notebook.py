"""The notebook in examples/distill/: it runs, and is committed with its outputs."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "distill" / "distill.ipynb"


def shown(notebook: nbformat.NotebookNode) -> tuple[str, int]:
    """All text among the outputs of its cells, and the number of images."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.text for output in outputs if output.output_type == "stream"]
    return "".join(texts), sum("image/png" in output.get("data", ()) for output in outputs)


@pytest.mark.slow
def test_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPDATES", "8")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.execute(notebook, cwd=str(NOTEBOOK.parent), timeout=600, kernel_name="python3")
    text, images = shown(notebook)
    for part in ("teacher_samples", "student: True"):
        assert part in text
    assert images == 2


def test_notebook_is_committed_with_its_images() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # run once, from the top
    text, images = shown(notebook)
    assert images == 2
    assert min(map(float, re.findall(r"gap\b.*?(\d+\.\d+)", text))) < 0.2
    assert not re.search(r"(^|[\s'\"])(/\w|[A-Z]:\\)|Warning", text)  # no paths of a machine
    assert NOTEBOOK.stat().st_size < 500_000
