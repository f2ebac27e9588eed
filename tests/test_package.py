"""What the built package says of itself, and holds."""

import email
import re
import tarfile
import zipfile
from pathlib import Path

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = str(Path(__file__).parents[1])


def test_wheel_and_sdist(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(ROOT).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as content:
        assert {"t5slim/py.typed", "t5slim/evaluate/report.html"} <= {*content.namelist()}
        (name,) = (name for name in content.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(content.read(name))
    readme = str(metadata.get_payload())
    assert readme.startswith("# t5slim") and "](https://arxiv.org/abs/2503.19897)" in readme
    assert not re.findall(r"\]\((?!https?:|#)|(?:src|href)=\"(?!https?:|#)", readme)  # relative
    (sdist,) = SdistBuilder(ROOT).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert {"README.md", "tests/tiny.py", "examples/shapes_world/student/config.json"} <= names
