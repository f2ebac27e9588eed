"""Code blocks of README.md, docs/ and examples/ run, and print what stands below them.

The models that they name are the miniature world's. Commands without output below them are only
parsed: the examples have tests of their own.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, FluxPipeline
from joint import joint
from shapes_world import generation as world

import t5slim.cli
from t5slim.distill import DistillConfig
from t5slim.distill.prompts import PromptSource

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("examples/*/README.md")]
BLOCKS = {
    str(page.relative_to(ROOT)): re.findall(r"^```(\w+).*\n((?s:.*?))^```$", page.read_text(), re.M)
    for page in sorted(PAGES)
    if page.name != "log.md"
}
NOT_RUN = {
    "bitsandbytes": "needs a GPU",
    "init_device_mesh": "needs torchrun, with which test_distributed.py runs it",
}
NOT_PARSED = {
    **dict.fromkeys(("pip", "python3", "."), "makes an environment, as .ci/run does"),
    "pytest": "runs this",
    "hf": "asks for a token",
}
SMALLER = {
    "4096": "256",
    r"\b(512|1024)\b": "64",
    r"max_steps=[\d_]+": "max_steps=2",
    r"(num_inference_steps\W+)20": r"\g<1>2",
    r'pipe\(("[^"]+")\)': r"pipe(\1, **kwargs)",
    "bfloat16": "float32",
    '"cuda"': '"cpu"',
    r"offload\(\)": 'offload(device="cpu")',
    'output_dir="': 'output_dir="new-',
}


@pytest.fixture
def names(hub: Any, tmp_path: Path, monkeypatch: Any, cpu_as_accelerator: Any) -> dict[str, Any]:
    """Variables, files and models that blocks name."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    Path("my-student").symlink_to(world.STUDENT)
    Path("run.yaml").write_bytes((ROOT / "examples/configs/shapes_world.yaml").read_bytes())
    for file in ("prompts.txt", "captions.txt", "held-out.txt", "somebody/captions/texts.txt"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("\n".join(world.captions(8, held_out=False)[1]))
    hub.add("black-forest-labs/FLUX.1-dev", world.PIPELINE)
    hub.add("LifuWang/DistillT5", world.STUDENT)
    hub.add("google/flan-t5-base", world.SMALL_T5)
    pipe, student = world.load_pipeline(), t5slim.SlimT5Encoder.from_pretrained("my-student")
    config, call = DistillConfig(max_steps=2), world.CALL | {"num_inference_steps": 2}
    learner = joint.Learner(student, config, torch.device("cpu"))
    return vars(joint) | {
        "t5slim": t5slim, "FluxPipeline": FluxPipeline, "DiffusionPipeline": DiffusionPipeline,
        "pipe": pipe, "pipes": [pipe], "kwargs": call, "pipeline_kwargs": [call], "config": config,
        "student": student, "learner": learner, "learners": [learner],
        "folder": str(world.PIPELINE), "prompts": ["a red circle"], "held_out": ["a blue cross"],
    }  # fmt: skip


def commands(code: str) -> list[list[str]]:
    """The words of each command; of a launcher, those of what it launches."""
    code = re.sub(r"\\\n|(?m:^\w+=\S+ |^(accelerate launch|torchrun).* -m (?=t5slim))", "", code)
    lines = re.split(r"\n|&&", code.replace("t5slim.distill", "t5slim distill"))
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str], monkeypatch: Any) -> None:
    """Run a command of t5slim, or a script, in this process."""
    if words[0] == "t5slim":
        monkeypatch.setattr(sys, "argv", words)
        return t5slim.cli.main()
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.delitem(sys.modules, "measuring", raising=False)  # two examples have one
    monkeypatch.syspath_prepend(Path(words[1]).parent)
    runpy.run_path(words[1], run_name="__main__")


class Parsed(BaseException):
    """A command's arguments are valid."""


def parse(words: list[str], monkeypatch: Any) -> None:
    """Run a command until its arguments are parsed."""
    parser = {"t5slim": jsonargparse, "python": argparse}[words[0]].ArgumentParser
    real = parser.parse_args

    def parse_args(*args: Any) -> None:
        raise Parsed(real(*args))

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(parser, "parse_args", parse_args)
        run(words, patch)


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_blocks(page: str, names: dict[str, Any], monkeypatch: Any) -> None:
    """In their order and one namespace; run files first, which stand below their commands."""
    monkeypatch.syspath_prepend((ROOT / page).parent)
    monkeypatch.delitem(sys.modules, "lens", raising=False)
    steps = {20_000: 2}  # of DistillConfig
    defaults = [steps.get(value, value) for value in DistillConfig.__init__.__defaults__]
    monkeypatch.setattr(DistillConfig.__init__, "__defaults__", tuple(defaults))
    for language, code in sorted(BLOCKS[page], key=lambda block: block[0] != "yaml"):
        for large, small in SMALLER.items():
            code = re.sub(large, small, code)
        if language == "python":
            compiled = compile(code, page, "exec")
            if not any(word in code for word in NOT_RUN):
                exec(compiled, names)
        elif language == "yaml":
            Path("run.yaml").write_text(code)
            assert PromptSource(yaml.safe_load(code)["prompts"]).all()
            files = ["--config", "examples/configs/shapes_world.yaml", "--config", "run.yaml"]
            parse(["t5slim", "distill", *files], monkeypatch)
        elif language == "bash":
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)
            for words in commands(code):
                if words[0] not in NOT_PARSED:
                    parse(words, monkeypatch)
        else:
            assert language in ("text", "bibtex")


def facts(text: str) -> tuple[list[str], list[float]]:
    """Text without its numbers, and the numbers, but for time and memory."""
    number = r"\d[\d,]*(?:\.\d+)?"
    lines = [" ".join(line.split()) for line in text.strip().splitlines()]
    same = [line for line in lines if not re.search(r"\bms\b|\d s\b|\d:\d\d|GiB", line)]
    found = re.findall(number, "\n".join(same))
    return [re.sub(number, "#", line) for line in lines], [float(n.replace(",", "")) for n in found]


@pytest.mark.parametrize(
    "code, output",
    [
        pytest.param(code, output, id=page, marks=[] if "--dry_run" in code else pytest.mark.slow)
        for page, blocks in BLOCKS.items()
        for (_, code), (language, output) in pairwise(blocks)
        if language == "text"
    ],
)
def test_output(code: str, output: str, names: Any, monkeypatch: Any, capsys: Any) -> None:
    run(commands(code)[-1], monkeypatch)
    (text, numbers), (expected, values) = facts(capsys.readouterr().out), facts(output)
    assert text == expected
    assert numbers == pytest.approx(values, rel=0.05)
