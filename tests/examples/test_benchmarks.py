"""The benchmarks' one command, at tiny sizes."""

import runpy
import sys


def test_the_document(tmp_path, monkeypatch):
    script, out = "examples/benchmarks/run.py", tmp_path / "results.md"
    options = "--only encoding --lengths 8 --batch-sizes 2 --dtypes bfloat16 --presets base"
    options += " --repeats 1 --xxl-repeats 0 --tiny"
    monkeypatch.setattr(sys, "argv", [script, "--out", str(out), *options.split()])
    monkeypatch.syspath_prepend("examples/benchmarks")
    runpy.run_path(script, run_name="__main__")
    rows = ["- Commit:", "| base | bfloat16 | 8 | 2 |", "left out: as asked", "Two processes"]
    assert all(row in out.read_text("utf-8") for row in rows)
