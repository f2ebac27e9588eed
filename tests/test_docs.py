"""The claims of the documentation: messages, links, names of tests."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import t5slim

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
    *sorted((ROOT / "examples").glob("*/*.ipynb")),
]
# Of diffusers, transformers and torch, and what has no message.
OTHERS = re.compile(
    r"^t5slim\.encoder is not one|^Pipeline … expected|_execution_device|^mat1 and mat2|^'NoneType'"
    r"|^The following part|^Expected types|^It seems like"
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


def test_the_reference_has_every_exported_name():
    listed = re.findall(r"^::: (.*)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    for module in (t5slim, t5slim.distill, t5slim.evaluate):
        assert {f"{module.__name__}.{name}" for name in module.__all__} <= set(listed)


def test_requirements_are_those_of_the_package():
    rows = re.findall(r"^\| ([\w-]+) \| (\d[\d.]*) \|$", (ROOT / "docs" / "install.md").read_text(), re.M)
    package = (ROOT / "pyproject.toml").read_text().lower()
    assert len(rows) == 6
    for name, least in rows:
        assert re.search(rf'\b{name.lower()}(" ?)?( = ")?>={re.escape(least)}"', package), name


@pytest.mark.parametrize("address", ["", "https://example.org/t5slim/blob/main/"])
def test_links_out_of_the_site(address):
    """They lead to the repository, once it has an address."""
    rewrite = runpy.run_path(str(ROOT / ".ci" / "mkdocs_hooks.py"))["on_page_markdown"]
    rewrite.__globals__["BLOB"] = address
    text = "[a](docs/using.md#b), [`c`](examples/lens/README.md#d), `calls[0](x)`, [e](https://f.org)"
    found = rewrite(text, SimpleNamespace(file=SimpleNamespace(src_uri="index.md")))
    outside = f"[`c`]({address}examples/lens/README.md#d)" if address else "`c`"
    assert found == f"[a](using.md#b), {outside}, `calls[0](x)`, [e](https://f.org)"


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium here")
def test_no_page_asks_a_third_party(tmp_path):
    site, log = tmp_path / "site", tmp_path / "log.json"
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".mkdocs.yml", "-d", site]
    subprocess.run(mkdocs, check=True, cwd=ROOT)
    handler = partial(SimpleHTTPRequestHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        chromium = ["chromium", "--headless", "--no-sandbox", "--virtual-time-budget=10000"]
        chromium += [f"--user-data-dir={tmp_path}", f"--log-net-log={log}", "--dump-dom"]
        for page in site.rglob("*.html"):
            command = [*chromium, f"{address}{page.relative_to(site)}"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            urls = set(re.findall(r'"url":"(\w+://[^"]*)', log.read_text()))
            assert urls and all(url.startswith(address) for url in urls), page
        server.shutdown()
