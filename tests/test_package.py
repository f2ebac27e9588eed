"""The built package: what its metadata say, and what its archives hold."""

from __future__ import annotations

import re
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = str(Path(__file__).parents[1])


def test_wheel(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(ROOT).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        message = message_from_bytes(content.read(metadata))
    assert {name.split("/")[0] for name in names} == {"t5slim", metadata.split("/")[0]}
    for name in ("py.typed", "model_card.md", "evaluate/report.html", "distill/words.txt"):
        assert f"t5slim/{name}" in names
    assert message["Author"] == "The t5slim authors"
    assert message.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2503.19897"]
    readme = message.get_payload()
    assert isinstance(readme, str) and readme.startswith("# t5slim")
    # Relative links lead nowhere from an index of packages.
    assert not re.findall(r"\]\((?!https?:|#)[^)]*\)|(?:src|href)=\"(?!https?:|#)[^\"]*", readme)
    assert "](https://arxiv.org/abs/2503.19897)" in readme


def test_sdist_has_what_its_tests_need(tmp_path: Path) -> None:
    (sdist,) = SdistBuilder(ROOT).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    needed = ["tests/golden/figures.json", "examples/shapes_world/student/model.safetensors"]
    assert {*needed, "README.md", "CHANGELOG.md", ".ci/run", "docs/index.md"} <= names
