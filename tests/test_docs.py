"""The claims of the documentation: messages, links, names of tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
    *sorted((ROOT / "examples").glob("*/*.ipynb")),
]
# Of diffusers, transformers and torch, and what has no message.
OTHERS = re.compile(
    r"^t5slim\.encoder is not one|^Pipeline … expected|_execution_device|^mat1 and mat2|^'NoneType'"
    r"|^The following part|^Token indices|^Loaded embeddings|^You are trying|^It seems like"
    r"|^Expected all tensors|^CUDA out of memory|^expected m1 and m2"
)


def literal_text(node: ast.AST) -> str:
    """The strings in an expression, `…` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.FormattedValue):
        return "…"
    return "".join(literal_text(child) for child in ast.iter_child_nodes(node))


@pytest.fixture(scope="module")
def messages() -> str:
    """All strings of t5slim, the parts of each joined as Python joins them."""
    trees = [ast.parse(path.read_text()) for path in sorted((ROOT / "t5slim").rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return "\n".join(
        literal_text(node) for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr))
    )


HEADINGS = [
    heading for heading in re.findall(r"^### `(.*?)`", PAGE, re.M) if not OTHERS.search(heading)
]


@pytest.mark.parametrize("heading", HEADINGS)
def test_messages_of_ours_are_raised(heading, messages):
    parts = [re.escape(part.strip()) for part in heading.split("…") if part.strip()]
    assert re.search(".*".join(parts), messages), heading


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """To files, and to headings of pages; and so do pages named in a notebook or a comment."""
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)]*))?\)", text):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)", path.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]
    if page.name == "log.md":  # old entries name what there was
        return
    for name in re.findall(r"\b(?:docs|examples|tests)/[\w/-]+\.\w+", text):
        assert (ROOT / name).exists(), name


def test_every_line_of_the_table_names_its_tests():
    page = (ROOT / "docs" / "compatibility.md").read_text()
    lines = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", page, re.M)
    assert [int(number) for number, _ in lines] == list(range(1, 13))
    known = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for _, tests in lines:
        names = re.findall(r"`(test_\w+)`", tests)
        assert names
        for name in names:
            assert f"def {name}(" in known, name
