"""The files that a run leaves in its folder, beside its checkpoints."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import uuid
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from .. import model_card
from ..encoder import SlimT5Encoder
from ..errors import DistillError, HubAccessError
from ..files import write_whole
from .config import DistillConfig
from .pipeline import DENOISERS, teacher_of
from .prompts import PromptList, PromptSource
from .report import describe_run, plot_run
from .result import DistillResult

CHECKPOINTS = "checkpoints"
HISTORY_FILE = "history.jsonl"
METADATA_FILE = "distillation.json"
PLOT_FILE = "run.png"
LAST_SAMPLES_FILE = "samples.png"
SAMPLES = "samples"
# What doesn't change the weights that a run comes to, and so may differ when it is continued. The
# batch may be cut in other ways, as its product counts.
_FREE = frozenset(
    ["eval_every", "samples_every", "sample_prompts", "trackers", "checkpoint_every",
     "keep_checkpoints", "max_skipped_updates", "batch_size", "gradient_accumulation_steps"]
)  # fmt: skip


def run_facts(
    pipes: Sequence[Any],
    students: Sequence[SlimT5Encoder],
    config: DistillConfig,
    kwargs_of: Sequence[dict[str, Any]],
    prompts: PromptSource,
    eval_prompts: list[str] | None,
    processes: int,
) -> dict[str, Any]:
    """What a reader of the checkpoint, or its model card, needs to know of its making.

    Plain values, as JSON gives them back.
    """
    packages = ("t5slim", "torch", "diffusers", "transformers", "accelerate")
    batch = config.batch_size * config.gradient_accumulation_steps * processes
    device = torch.device(pipes[0]._execution_device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    facts = {
        "run_id": uuid.uuid4().hex[:8],
        "pipelines": [_pipeline_facts(p, k) for p, k in zip(pipes, kwargs_of, strict=True)],
        "students": [student.config.to_diff_dict() for student in students],
        "config": config.to_dict(),
        "prompts_per_update": batch,
        "prompts": _prompt_facts(prompts),
        "eval_prompts": None if eval_prompts is None else _prompt_facts(PromptList(eval_prompts)),
        "versions": {name: _version(name) for name in packages},
        "hardware": f"{processes} x {hardware} ({device.type})",
    }
    return json.loads(json.dumps(facts, default=str))


def check_same_run(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Refuse to go on with a run that was another one.

    Returns:
        The facts, with the id of the run that goes on.

    Raises:
        DistillError: the folder holds a run with other settings (the message says which), or
            something else than a run.
    """
    path = folder / METADATA_FILE
    if not path.exists():
        check_output_dir(folder)
        return facts
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        then, now = _what_counts(before), _what_counts(facts)
        run_id = before["run_id"]
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
    return facts | {"run_id": run_id}


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


def repository_names(push_to_hub: bool | str, folder: Path | None, students: int) -> list[str]:
    """The repository of each student.

    Raises:
        DistillError: there is no folder to name them after.
    """
    if push_to_hub is False:
        return []
    if push_to_hub is True and folder is None:
        raise DistillError(
            "push_to_hub=True names the repository after output_dir, and there is none: pass "
            "push_to_hub='owner/name'."
        )
    name = folder.resolve().name if folder is not None and push_to_hub is True else push_to_hub
    return [f"{name}-{i}" if students > 1 else str(name) for i in range(students)]


def make_repositories(names: list[str]) -> list[str]:
    """Make them where needed: rather now than after a week of training.

    Returns:
        Their names, with the owner.

    Raises:
        HubAccessError: that failed.
    """
    made = []
    for name in names:
        try:
            made.append(HfApi().create_repo(name, exist_ok=True).repo_id)
        except Exception as error:  # whatever it is of the client's or the network's
            raise HubAccessError(
                f"push_to_hub: {name!r} can't be made or written on the Hub. Log in with "
                f"`hf auth login`, with a token that may write. {error}"
            ) from error
    return made


class Records:
    """What is written of one student; with `folder` None, nothing."""

    def __init__(self, folder: Path | None, facts: dict[str, Any]) -> None:
        self._folder = folder
        self._facts = facts
        self._write_metadata({})

    def add(self, result: DistillResult) -> None:
        """Note an evaluation."""
        if self._folder is not None:
            self._write_history(result.history)
            self._write_metadata(result.facts())

    def resume_history(self, step: int) -> list[dict[str, Any]]:
        """The evaluations up to a checkpoint; what came after it is forgotten."""
        if self._folder is None:
            return []
        path = self._folder / HISTORY_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        entries = map(json.loads, lines)
        kept = [entry for entry in entries if entry["step"] <= step]
        self._write_history(kept)
        return kept

    def add_samples(self, sheet: Image.Image, step: int) -> None:
        """Keep a sheet of sample pictures."""
        if self._folder is not None:
            path = self._folder / SAMPLES / f"{step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            content = io.BytesIO()
            sheet.save(content, format="png")
            write_whole(path, content.getvalue())

    def save_student(self, student: SlimT5Encoder) -> None:
        """Write the student, as `SlimT5Encoder.from_pretrained` reads it."""
        if self._folder is not None:
            student.save_pretrained(self._folder)

    def finish(self, result: DistillResult) -> None:
        """Write the student, a plot, and a model card, in which words that were there stay."""
        if self._folder is None:
            return
        self.save_student(result.student)
        self._write_metadata(result.facts())
        plot_run(result.history, self._folder / PLOT_FILE)
        if sheets := sorted((self._folder / SAMPLES).glob("*.png")):
            write_whole(self._folder / LAST_SAMPLES_FILE, sheets[-1].read_bytes())
        path = self._folder / "README.md"
        card = ModelCard.load(path) if path.exists() else None
        name = self._folder.resolve().name
        card = model_card.write_facts(card, result.student, name, self._notes(result))
        write_whole(path, str(card).encode())

    def push(self, result: DistillResult, repo_id: str) -> None:
        """Upload the student to the Hub, with the facts and pictures of its model card.

        Raises:
            DistillError: that failed; the student is still where it was saved.
        """
        try:
            result.student.push_to_hub(
                repo_id, notes=self._notes(result), files=list(self._pictures().values())
            )
        except Exception as error:  # whatever it is of the client's or the network's
            again = f"student.push_to_hub({repo_id!r})"
            if self._folder is not None:
                again = f"hf upload {repo_id} {self._folder} . --exclude 'checkpoints/*' 'logs/*'"
            raise DistillError(
                f"The student is trained, but couldn't be uploaded. To try again: {again}\n{error}"
            ) from error

    def _notes(self, result: DistillResult) -> str:
        return describe_run(self._facts, result, {n: p.name for n, p in self._pictures().items()})

    def _pictures(self) -> dict[str, Path]:
        """Those of the model card that there are, by what they show."""
        if self._folder is None:
            return {}
        files = {
            "The course of the run": self._folder / PLOT_FILE,
            "The teacher and the student": self._folder / LAST_SAMPLES_FILE,
        }
        return {name: path for name, path in files.items() if path.exists()}

    def _write_history(self, entries: list[dict[str, Any]]) -> None:
        if self._folder is not None:
            lines = (json.dumps(entry) + "\n" for entry in entries)
            write_whole(self._folder / HISTORY_FILE, "".join(lines).encode())

    def _write_metadata(self, outcome: dict[str, Any]) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            content = {**self._facts, "result": outcome}
            write_whole(
                self._folder / METADATA_FILE, (json.dumps(content, indent=2) + "\n").encode()
            )


def _pipeline_facts(pipe: Any, pipeline_kwargs: dict[str, Any]) -> dict[str, Any]:
    teacher: Any = teacher_of(pipe)
    denoisers = (getattr(pipe, name, None) for name in DENOISERS)
    denoiser: Any = next((d for d in denoisers if d is not None), pipe)
    home = pipe.config.get("_name_or_path")
    return {
        "pipeline": type(pipe).__name__,
        "pipeline_name_or_path": None if home is None else os.fspath(home),
        "pipeline_source": _source(denoiser.config.get("_name_or_path")),
        "teacher": type(teacher).__name__,
        "teacher_source": _source(teacher.config.name_or_path),
        "pipeline_kwargs": pipeline_kwargs,
    }


def _prompt_facts(prompts: PromptSource) -> dict[str, Any]:
    return {**prompts.facts(), "sha256": prompts.fingerprint()}


def _what_counts(facts: dict[str, Any]) -> dict[str, Any]:
    flat = {name: facts[name] for name in _COMPARED}
    flat |= {f"config.{k}": v for k, v in facts["config"].items() if k not in _FREE}
    for i, pipeline in enumerate(facts["pipelines"]):
        number = f" {i}" if len(facts["pipelines"]) > 1 else ""
        flat |= {f"{k}{number}": pipeline[k] for k in ("pipeline", "pipeline_kwargs")}
    for i, student in enumerate(facts["students"]):
        flat |= {f"student {i}: {k}": v for k, v in student.items() if not k.startswith("_")}
    return flat


_COMPARED = ("prompts_per_update", "prompts", "eval_prompts")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else text[:97] + "..."


def _source(name_or_path: str | os.PathLike[str] | None) -> dict[str, str | None]:
    """Hub id and commit of what was loaded from there; a folder is nobody's business."""
    path = os.fspath(name_or_path or "").replace(os.sep, "/")
    if found := re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})", path):
        return {"name": found[1].replace("--", "/"), "revision": found[2]}
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.exists(path)
    return {"name": path if is_id else None, "revision": None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return None
