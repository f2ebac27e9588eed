"""A comparison as one page of HTML that needs nothing else, and asks no network for anything."""

from __future__ import annotations

import base64
import io
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from .comparison import Comparison

# Of a picture on the page. Small ones stay as they are, and are enlarged by the browser.
_MAX_SIDE, _PIXEL_ART = 384, 128
_COLORS = ("#0b6e99", "#c4502a", "#4f7d32", "#7a4e9e", "#8a6d1b", "#444444")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 260, 56, 36  # of the plot


def page(comparison: Comparison) -> str:
    """The whole page: summary, gap along the trajectory, and every prompt with its pictures."""
    head, *rows = comparison.rows()
    summary = [_row("th", head), *(_row("td", row, first="th") for row in rows)]
    facts = comparison.facts
    return Template(_PAGE).substitute(
        title=escape(f"{facts.get('pipeline', 'T5')}: {' | '.join(comparison.encoders)}"),
        summary="\n".join(summary),
        count=len(comparison.prompts),
        facts="\n".join(
            _row("td", [key, str(value)], first="th") for key, value in sorted(facts.items())
        ),
        plot=_plot({e: comparison.of_calls(e) for e in comparison.encoders[1:]}),
        prompts=_prompts(comparison),
    )


def _row(tag: str, cells: list[str], first: str | None = None) -> str:
    tags = [first or tag, *[tag] * (len(cells) - 1)]
    return (
        f"<tr>{''.join(f'<{t}>{escape(c)}</{t}>' for t, c in zip(tags, cells, strict=True))}</tr>"
    )


def _prompts(comparison: Comparison) -> str:
    """The table of all prompts; its numbers can be sorted by."""
    measures = comparison.measures
    columns: list[tuple[str, str]] = []  # (encoder, measure)
    values: dict[tuple[str, int, str, str], Any] = {}
    for record in comparison.records():
        for measure in measures:
            if measure in record:
                key = (record["encoder"], record["seed"], record["prompt"], measure)
                values[key] = record[measure]
                columns.append((record["encoder"], measure))
    columns = list(dict.fromkeys(columns))
    several = len(comparison.seeds) > 1
    labelled = any(category is not None for category in comparison.categories)
    head = ["prompt", *["category"] * labelled, *["seed"] * several]
    names = [*head, *comparison.encoders, *(f"{e}: {m}" for e, m in columns)]
    lines = [f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in names)}</tr></thead>"]
    for seed in comparison.seeds:
        for i, prompt in enumerate(comparison.prompts):
            cells = [f'<td class="text">{escape(prompt)}</td>']
            cells += [f"<td>{escape(comparison.categories[i] or '')}</td>"] * labelled
            cells += [f"<td>{seed}</td>"] * several
            for encoder in comparison.encoders:
                picture = comparison.images[encoder, seed][i]
                cells.append(f"<td>{_image(picture, f'{encoder}: {prompt}')}</td>")
            for encoder, measure in columns:
                value = values.get((encoder, seed, prompt, measure))
                cells.append("<td></td>" if value is None else f"<td>{float(value):.4g}</td>")
            lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join(lines)


def _image(picture: Image.Image, text: str) -> str:
    """Inline: lossless if it is tiny, a JPEG otherwise."""
    picture = picture.convert("RGB")
    tiny = max(picture.size) <= _PIXEL_ART
    if not tiny:
        picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
    content = io.BytesIO()
    kind = "png" if tiny else "jpeg"
    picture.save(content, kind, **({} if tiny else {"quality": 88}))
    data = base64.b64encode(content.getvalue()).decode()
    style = ' class="pixels"' if tiny else ""
    return f'<img{style} alt="{escape(text)}" src="data:image/{kind};base64,{data}">'


def _plot(gaps: dict[str, list[float]]) -> str:
    """The velocity gap along the trajectory, as SVG, a line for each student."""
    gaps = {name: line for name, line in gaps.items() if line}
    if not gaps:
        return ""
    top = max(max(line) for line in gaps.values()) * 1.05 or 1.0
    steps = max(map(len, gaps.values()))

    def x(step: int) -> float:
        return _LEFT + step * (_WIDTH - _LEFT - 12) / max(1, steps - 1)

    def y(gap: float) -> float:
        return 8 + (1 - gap / top) * (_HEIGHT - _BOTTOM - 8)

    parts = []
    for value in (0.0, top / 2, top):
        parts.append(
            f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2g}</text>'
        )
    labels = []
    for i, (name, line) in enumerate(gaps.items()):
        color = _COLORS[i % len(_COLORS)]
        points = " ".join(f"{x(step):.1f},{y(gap):.1f}" for step, gap in enumerate(line))
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{points}"/>')
        labels.append(f'<span style="color:{color}">&#9632; {escape(name)}</span>')
    parts.append(
        f'<text x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"step, from 1 to {steps}: from noise to picture</text>"
    )
    return (
        "<h2>Velocity gap along the trajectory</h2>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}">{"".join(parts)}</svg>'
        f"<p>{' '.join(labels)}</p>"
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
tr > :first-child { text-align: left; } th { font-weight: 600; }
#summary th, #facts th { white-space: pre; font-weight: 400; }
#summary tr:first-child th { font-weight: 600; }
#facts td { text-align: left; word-break: break-word; max-width: 50rem; }
#prompts thead th { position: sticky; top: 0; background: #fff; cursor: pointer; }
#prompts thead th[aria-sort=ascending]::after { content: " \\25b2"; }
#prompts thead th[aria-sort=descending]::after { content: " \\25bc"; }
td.text { min-width: 12rem; max-width: 20rem; white-space: pre-wrap; }
#prompts thead th { min-width: 6.5rem; max-width: 10rem; overflow-wrap: anywhere; }
img { max-width: 192px; display: block; margin-left: auto; }
img.pixels { width: 128px; image-rendering: pixelated; }
svg text { font: 12px system-ui, sans-serif; fill: #555; }
summary { cursor: pointer; margin-top: 1rem; }
</style>
</head>
<body>
<h1>$title</h1>
<table id="summary">
$summary
</table>
<p>&plusmn;: standard deviation over the $count prompts.</p>
$plot
<h2>Prompt by prompt</h2>
<p>A click on a heading sorts.</p>
<table id="prompts">
$prompts
</table>
<details><summary>How it was measured</summary>
<table id="facts">
$facts
</table>
</details>
<script>
const table = document.getElementById("prompts");
const heads = [...table.tHead.rows[0].cells];
heads.forEach((head, column) => head.addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const text = row => row.cells[column].textContent;
  const number = row => text(row) ? Number(text(row).replace("inf", "Infinity")) : -Infinity;
  const rows = [...table.tBodies[0].rows];
  const numbers = rows.every(row => !isNaN(number(row)));
  // `||`: the difference of two infinities is no number.
  rows.sort((a, b) => numbers ? number(a) - number(b) || 0 : text(a).localeCompare(text(b)));
  table.tBodies[0].append(...(down ? rows.reverse() : rows));
}));
</script>
</body>
</html>
"""
