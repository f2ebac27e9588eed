"""Measure students against the teacher of a pipeline, on the same prompts and noise."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..compatibility import check_compatible, student_config
from ..distill.cached import CachedTeacher, describe_teacher, fingerprint
from ..distill.checks import check_student
from ..distill.metrics import VelocityGap
from ..distill.pipeline import check_no_cache, check_pipeline_kwargs, images_per_prompt, teacher_of
from ..distill.prompts import load_prompts
from ..distill.samples import encoded_by, paint
from ..distill.states import evaluating
from ..distill.tracking import peak_memory_gib, reset_peak_memory
from ..encoder import SlimT5Encoder
from ..errors import EvaluateError
from ..files import write_whole
from .comparison import TEACHER, Comparison, Unit, png
from .distances import Distance, standard_distances
from .loaded import (
    Loaded,
    Students,
    loaded_students,
    named_students,
    size_of,
    teacher_in_slot,
)

Judge = Callable[[Image.Image, str], Mapping[str, float]]
_TIMED = 3  # of which the fastest counts


def compare(
    pipe: Any,
    students: Students = None,
    prompts: Any = None,
    *,
    seeds: Sequence[int] = (0,),
    pipeline_kwargs: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
    distances: Mapping[str, Distance] | None = None,
    tokens: bool = False,
    batch_size: int = 8,
    output_dir: str | os.PathLike[str] | None = None,
) -> Comparison:
    """Paint the same prompts from the same noise under the teacher and under each student, and
    measure what the students lose.

    For each prompt and seed: the velocity gap (see `velocity_gap`), how far the student's picture
    is from the teacher's, and what `judge` says of either. Of all prompts: the gap at each step,
    and whether the student tells prompts apart. Of each encoder: parameters, bytes, seconds to load
    and to encode.

    The teacher's walk is measured and painted in one go. A prompt then costs a student two walks
    (its picture; its predictions along the teacher's trajectory), and once for all one more for the
    empty prompt, which the gap is measured in.

    Args:
        pipe: a pipeline with a T5, that makes pictures. In one that was patched with
            `keep_teacher=True` the teacher is back for as long as this takes. To have T5-XXL and a
            student never in memory together, call this within `cached_teacher`.
        students: one, several, or a mapping of names to them: a `SlimT5Encoder` or another encoder
            for the slot, or the folder or Hub id of a student. None: the one that is in the
            pipeline.
        prompts: a list or a file, as for `train`; or a mapping of categories to them.
        seeds: of the noise; each prompt is painted from each.
        pipeline_kwargs: how the pipeline is called, as for `train`.
        judge: called as `judge(image, prompt)` with each picture (PIL, RGB); returns numbers by
            name, such as `{"right": True}` or a CLIP score. They are averaged.
        distances: of a picture from the teacher's, functions `distance(image, of_teacher)` by
            name. By default "psnr" and "ssim", for which torchmetrics must be installed.
        tokens: also the gap of the prompts' own tokens and of the padding apart, for two more walks
            of each student.
        batch_size: prompts that are painted together.
        output_dir: keep what is finished there, and start from it the next time; and save the
            result there. The folder of another comparison is refused.

    Returns:
        The `Comparison`. The pipeline and the students are as they were.

    Raises:
        EvaluateError: no students, prompts or seeds, or two of one name; the folder of another
            comparison; or torchmetrics is missing.
        NoT5SlotError, PatchError: the pipeline has no T5, or it wasn't kept.
        IncompatibleStudentError: a student has another vocabulary, or rows of another width.
        DistillError: as for `velocity_gap`; or the pipeline makes no pictures.
    """
    if distances is None:
        distances = standard_distances()
    texts, categories = _categorised(prompts)
    if not seeds or len(set(seeds)) < len(seeds):
        raise EvaluateError(f"seeds is {list(seeds)}; expected one or more, each once.")
    kwargs = dict(pipeline_kwargs or {})
    with teacher_in_slot(pipe) as guest:
        named = named_students(guest if students is None else students)
        check_pipeline_kwargs(pipe, kwargs)
        check_no_cache(pipe)
        if images_per_prompt(kwargs) > 1:
            raise EvaluateError("A prompt is painted once from each seed: pass seeds=(0, 1, ...).")
        for student in named.values():
            if isinstance(student, (str, os.PathLike, SlimT5Encoder)):
                check_compatible(student_config(student), pipe)
            if isinstance(student, nn.Module):
                check_student(pipe, student)
        with loaded_students(pipe, named) as loaded:
            facts = _facts(pipe, texts, kwargs, loaded, sorted(distances), judge, tokens)
            store = _Store(output_dir, facts)
            for seed in tqdm(seeds, desc="compare", unit="seed"):
                missing = [name for name in (TEACHER, *named) if not store.has(name, seed)]
                if missing:
                    measure = _Measure(pipe, texts, kwargs, seed, batch_size, distances, judge)
                    for name in missing:
                        if name == TEACHER:
                            store.add(*measure.teacher())
                        else:
                            store.add(*measure.student(name, loaded, tokens))
    units = [store.units[name, seed] for name in (TEACHER, *named) for seed in seeds]
    images = {(unit.encoder, unit.seed): store.images(unit) for unit in units}
    comparison = Comparison(texts, categories, units, images, facts)
    if output_dir is not None:
        comparison.save(output_dir)
    return comparison


class _Measure:
    """The measures of one seed."""

    def __init__(
        self,
        pipe: Any,
        prompts: list[str],
        kwargs: dict[str, Any],
        seed: int,
        batch_size: int,
        distances: Mapping[str, Distance],
        judge: Judge | None,
    ) -> None:
        self._pipe, self._prompts, self._kwargs = pipe, prompts, kwargs
        self._seed, self._batch_size = seed, batch_size
        self._distances, self._judge = distances, judge
        self._device = torch.device(pipe._execution_device)
        reset_peak_memory(self._device)
        self._gap = VelocityGap(
            pipe, prompts, pipeline_kwargs=kwargs, seed=seed, batch_size=batch_size, paint=True
        )
        self._teacher_costs = {"peak_memory_gib": self._peak()}

    def teacher(self) -> tuple[Unit, list[Image.Image]]:
        teacher: Any = teacher_of(self._pipe)
        costs: dict[str, float | None] = {}
        if not isinstance(teacher, CachedTeacher):
            costs = size_of(teacher) | {"encode_ms": self._encode_ms(teacher)} | self._teacher_costs
        prompts = [
            self._judged(*pair) for pair in zip(self._gap.images, self._prompts, strict=True)
        ]
        return Unit(TEACHER, self._seed, prompts, costs=costs), self._gap.images

    def student(self, name: str, loaded: Loaded, tokens: bool) -> tuple[Unit, list[Image.Image]]:
        student = loaded.students[name]
        reset_peak_memory(self._device)
        with evaluating(student):
            encode = encoded_by(student, self._pipe)
            images: list[Image.Image] = []
            starts = range(0, len(self._prompts), self._batch_size)
            for start in tqdm(starts, desc=f"paint under {name}", unit="batch", leave=False):
                batch = self._prompts[start : start + self._batch_size]
                images += paint(self._pipe, batch, self._kwargs, [self._seed] * len(batch), encode)
            peak = self._peak()
            table = self._gap.table(student)
            of_all = {
                "spread": self._gap.spread(student),
                "nearest_other": self._gap.nearest_other(student),
            }
            if tokens:
                real, padding = self._gap.of_tokens(student)
                of_all |= {"real_tokens": real, "padding": padding}
            encode_ms = self._encode_ms(student)
        prompts = []
        per_prompt = zip(
            table.distances.sum(1).tolist(), table.denominators.sum(1).tolist(),
            images, self._gap.images, self._prompts, strict=True,
        )  # fmt: skip
        for distance, denominator, image, of_teacher, prompt in per_prompt:
            apart = {key: float(far(image, of_teacher)) for key, far in self._distances.items()}
            values = {"distance": distance, "denominator": denominator}
            prompts.append(values | apart | self._judged(image, prompt))
        calls = torch.stack([table.distances.sum(0), table.denominators.sum(0)], 1).tolist()
        costs = loaded.costs[name] | {"encode_ms": encode_ms, "peak_memory_gib": peak}
        return Unit(name, self._seed, prompts, calls, of_all, costs), images

    def _judged(self, image: Image.Image, prompt: str) -> dict[str, float]:
        found = {} if self._judge is None else self._judge(image, prompt)
        return {key: float(value) for key, value in found.items()}

    def _encode_ms(self, encoder: nn.Module) -> float:
        """Milliseconds for a prompt, in the batch that is painted first."""
        seconds = []
        for _ in range(_TIMED):
            start = time.perf_counter()
            rows = self._gap.encode_first(encoder)
            rows.sum().item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        return min(seconds) / len(rows) * 1000

    def _peak(self) -> float | None:
        """Where the device counts it; a process' own memory never falls."""
        return None if self._device.type == "cpu" else peak_memory_gib(self._device)


class _Store:
    """What is finished: in memory, and in a folder if there is one."""

    def __init__(self, folder: str | os.PathLike[str] | None, facts: dict[str, Any]) -> None:
        self.units: dict[tuple[str, int], Unit] = {}
        self._images: dict[tuple[str, int], list[Image.Image]] = {}
        self._folder = None if folder is None else Path(folder) / "units"
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "facts.json"
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            different = [key for key in {**before, **facts} if before.get(key) != facts.get(key)]
            if different:
                raise EvaluateError(
                    f"{os.fspath(folder)!r} holds another comparison, with another "  # type: ignore[arg-type]
                    f"{', '.join(different)}. Pass another output_dir, or remove this one."
                )
        write_whole(file, json.dumps(facts, indent=1).encode())
        for path in sorted(self._folder.glob("*.unit.json")):
            unit = Unit(**json.loads(path.read_text(encoding="utf-8")))
            self.units[unit.encoder, unit.seed] = unit

    def has(self, encoder: str, seed: int) -> bool:
        return (encoder, seed) in self.units

    def add(self, unit: Unit, images: list[Image.Image]) -> None:
        key = unit.encoder, unit.seed
        self._images[key] = images
        if self._folder is not None:
            # Pictures first: a unit that is there is whole.
            for i, image in enumerate(images):
                write_whole(self._picture(unit, i), png(image))
            content = json.dumps(asdict(unit)).encode()
            write_whole(self._folder / f"{self._name(unit)}.unit.json", content)
        self.units[key] = unit

    def images(self, unit: Unit) -> list[Image.Image]:
        """The pictures of a unit."""
        key = unit.encoder, unit.seed
        if key not in self._images:
            self._images[key] = []
            for i in range(len(unit.prompts)):
                with Image.open(self._picture(unit, i)) as picture:
                    self._images[key].append(picture.copy())
        return self._images[key]

    def _name(self, unit: Unit) -> str:
        # Names are the user's, and may hold what a file's may not.
        digest = hashlib.sha256(unit.encoder.encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9-]+', '-', unit.encoder)}-{digest}-{unit.seed}"

    def _picture(self, unit: Unit, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name(unit)}-{index:04}.png"


# --- what was asked for ---


def _categorised(prompts: Any) -> tuple[list[str], list[str | None]]:
    """Prompts, each once, and the category of each."""
    if prompts is None:
        raise EvaluateError(
            "No prompts; expected a list, a file, or a mapping of categories to them."
        )
    if not isinstance(prompts, Mapping) or {"file", "dataset", "generator"} & prompts.keys():
        texts = load_prompts(prompts)
        return texts, [None] * len(texts)
    categories: dict[str, str | None] = {}
    for category, part in prompts.items():
        for text in load_prompts(part, f"prompts[{category!r}]"):
            if text in categories:
                raise EvaluateError(f"{text!r} is a prompt of two categories.")
            categories[text] = str(category)
    return list(categories), list(categories.values())


def _facts(
    pipe: Any,
    prompts: list[str],
    kwargs: dict[str, Any],
    loaded: Loaded,
    distances: list[str],
    judge: Judge | None,
    tokens: bool,
) -> dict[str, Any]:
    """What a comparison depends on, as plain values for JSON."""
    facts = {
        "pipeline": type(pipe).__name__,
        "pipeline_kwargs": kwargs,
        "teacher": describe_teacher(pipe),
        "students": {name: fingerprint(student) for name, student in loaded.students.items()},
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "distances": distances,
        "judge": getattr(judge, "__qualname__", None if judge is None else type(judge).__name__),
        "tokens": tokens,
        "device": torch.device(pipe._execution_device).type,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    return json.loads(json.dumps(facts, default=repr))
