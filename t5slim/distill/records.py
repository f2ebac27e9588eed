"""The files that a run leaves in its folder, beside its checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..encoder import SlimT5Encoder
from ..errors import DistillError
from .config import DistillConfig
from .prompts import PromptList, PromptSource

CHECKPOINTS = "checkpoints"
HISTORY_FILE = "history.jsonl"
METADATA_FILE = "distillation.json"
# What doesn't change the weights that a run comes to, and so may differ when it is continued. The
# batch may be cut in other ways, as its product counts.
_FREE = frozenset(
    ["eval_every", "checkpoint_every", "keep_checkpoints", "max_skipped_updates", "batch_size",
     "gradient_accumulation_steps"]
)  # fmt: skip


def run_facts(
    pipe: Any,
    students: Sequence[SlimT5Encoder],
    config: DistillConfig,
    pipeline_kwargs: dict[str, Any],
    prompts: PromptSource,
    eval_prompts: list[str] | None,
    processes: int,
) -> dict[str, Any]:
    """What a reader of the checkpoint, or its model card, needs to know of its making.

    Plain values, as JSON gives them back.
    """
    packages = ("t5slim", "torch", "diffusers", "transformers", "accelerate")
    batch = config.batch_size * config.gradient_accumulation_steps * processes
    facts = {
        "pipeline": type(pipe).__name__,
        "pipeline_name_or_path": pipe.config.get("_name_or_path"),
        "students": [student.config.to_diff_dict() for student in students],
        "config": config.to_dict(),
        "prompts_per_update": batch,
        "pipeline_kwargs": pipeline_kwargs,
        "prompts": _prompt_facts(prompts),
        "eval_prompts": None if eval_prompts is None else _prompt_facts(PromptList(eval_prompts)),
        "versions": {name: _version(name) for name in packages},
    }
    return json.loads(json.dumps(facts, default=str))


def check_same_run(folder: Path, facts: dict[str, Any]) -> None:
    """Refuse to go on with a run that was another one.

    Raises:
        DistillError: the folder holds a run with other settings (the message says which), or
            something else than a run.
    """
    path = folder / METADATA_FILE
    if not path.exists():
        check_output_dir(folder)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        then, now = _what_counts(before), _what_counts(facts)
    except (ValueError, KeyError, TypeError) as error:
        raise DistillError(f"{path} is damaged ({error}): this run can't be continued.") from error
    differences = [
        f"{name}: then {_short(then.get(name))}, now {_short(now.get(name))}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if differences:
        raise DistillError(
            f"The run in {str(folder)!r} can't be continued with other settings. They differ in "
            + "; ".join(differences)
            + ". Pass what the run was started with, or another output_dir."
        )


def check_output_dir(folder: Path) -> None:
    """Refuse a folder that holds another run, or a model."""
    if folder.exists() and not folder.is_dir():
        raise DistillError(f"output_dir is {str(folder)!r}, which is a file; expected a folder.")
    for pattern in (METADATA_FILE, HISTORY_FILE, "config.json", "*.safetensors"):
        for found in folder.glob(pattern):
            raise DistillError(
                f"output_dir {str(folder)!r} holds another run or model ({found.name}). Pass "
                "resume=True to go on with it, a new folder, or remove that one."
            )


class Records:
    """What is written of one student; with `folder` None, nothing."""

    def __init__(self, folder: Path | None, facts: dict[str, Any]) -> None:
        self._folder = folder
        self._facts = facts
        self._write_metadata({})

    def add(self, entry: dict[str, Any], outcome: dict[str, Any]) -> None:
        """Note an evaluation."""
        if self._folder is None:
            return
        with open(self._folder / HISTORY_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._write_metadata(outcome)

    def resume_history(self, step: int) -> list[dict[str, Any]]:
        """The evaluations up to a checkpoint; what came after it is forgotten."""
        if self._folder is None:
            return []
        path = self._folder / HISTORY_FILE
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # cut short as the run was killed
                break
            if entry["step"] <= step:
                kept.append(entry)
        _write(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        return kept

    def save_student(self, student: SlimT5Encoder) -> None:
        """Write the student, as `SlimT5Encoder.from_pretrained` reads it."""
        if self._folder is not None:
            student.save_pretrained(self._folder)

    def _write_metadata(self, outcome: dict[str, Any]) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            content = {**self._facts, "result": outcome}
            _write(self._folder / METADATA_FILE, json.dumps(content, indent=2) + "\n")


def _prompt_facts(prompts: PromptSource) -> dict[str, Any]:
    return {**prompts.facts(), "sha256": prompts.fingerprint()}


def _what_counts(facts: dict[str, Any]) -> dict[str, Any]:
    flat = {name: facts[name] for name in _COMPARED}
    flat |= {f"config.{k}": v for k, v in facts["config"].items() if k not in _FREE}
    for i, student in enumerate(facts["students"]):
        flat |= {f"student {i}: {k}": v for k, v in student.items() if not k.startswith("_")}
    return flat


_COMPARED = ("pipeline", "prompts_per_update", "pipeline_kwargs", "prompts", "eval_prompts")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else text[:97] + "..."


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return None
