"""README.md and CHANGELOG.md as pages of the site, and its links into the repository.

These need an address, `Source` of `[project.urls]` in pyproject.toml: without it, they are text.
"""

import re
from pathlib import Path
from posixpath import join, normpath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
SOURCES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
PAGES = {source: f"docs/{page}" for page, source in SOURCES.items()}
FOUND = re.search(r'^Source = "(.*?)/?"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
BLOB = f"{FOUND[1]}/blob/main/" if FOUND else ""
# Code comes first: in it, `calls[0](x)` is no link.
LINK = re.compile(r"```.*?```|`[^`\n]*`|(!?)\[([^]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)", re.S)


def on_files(files, config):
    for page, source in SOURCES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))


def on_page_markdown(markdown, page, **_):
    def rewrite(match):
        bang, text, target, anchor = match.groups("")
        path = normpath(join("" if page.file.src_uri in SOURCES else "docs", target))
        path = PAGES.get(path, path)
        if not target:  # code
            return match[0]
        if path.startswith("docs/"):
            return f"{bang}[{text}]({path.removeprefix('docs/')}{anchor})"
        return f"{bang}[{text}]({BLOB}{path}{anchor})" if BLOB else text

    return LINK.sub(rewrite, markdown)


def on_page_content(html, **_):
    html = html.replace("::</p>", ":</p>")  # before the code of a docstring
    source = f"Source code in <a href='{BLOB}\\1'>\\1</a>"
    return re.sub(r"Source code in <code>(.*?)</code>", source, html) if BLOB else html
