"""Measurement of students against the teacher of a pipeline, on the same prompts and noise."""

from __future__ import annotations

import math
import os
import tempfile
import timeit
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..distill.cache import CachedTeacher
from ..distill.calls import call_encoder
from ..distill.metrics import VelocityGap, check_student
from ..distill.pipeline import (
    check_no_cache,
    check_pipeline_kwargs,
    encoded_by,
    evaluating,
    generate,
    images_per_prompt,
    teacher_of,
    tokenize,
)
from ..distill.prompts import load_prompts
from ..distill.report import peak_memory_gib, reset_peak_memory
from ..encoder import SlimT5Encoder
from ..errors import EvaluateError
from ..patch import check_fit, is_student, patch_pipeline, student_config, unpatch_pipeline
from ..slot import TextSlot, uncompiled
from .result import LABELS, SAMPLE_KEYS, TEACHER, Comparison

Judge = Callable[[Image.Image, str], Mapping[str, float]]
Distance = Callable[[Image.Image, Image.Image], float]
_RESERVED = {*LABELS, *SAMPLE_KEYS} - {"psnr", "ssim"}
_FORMS = {"file", "dataset", "generator", "mixture"}  # of prompts; other mappings have categories


def compare(
    pipe: Any,
    students: Any,
    prompts: Any,
    *,
    seeds: Sequence[int] = (0,),
    pipeline_kwargs: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
    distances: Mapping[str, Distance] | None = None,
    tokens: bool = False,
    batch_size: int = 8,
    output_dir: str | os.PathLike[str] | None = None,
) -> Comparison:
    """Generate the same prompts from the same noise under the teacher and under each student, and
    measure what the students lose.

    Args:
        pipe: a pipeline for images with a T5. In one that was patched with `keep_teacher=True` the
            teacher is back while this runs. To have T5-XXL and a student never in memory together,
            call this within `cached_teacher`.
        students: one, several, or a mapping of names to them: a `SlimT5Encoder` or another encoder
            for the slot, or the folder or Hub id of a student. None: the one in the pipeline.
        prompts: a list or a file, as for `train`; or a mapping of categories to them.
        seeds: seeds of the noise; each prompt is generated from each.
        pipeline_kwargs: arguments of the pipeline's call, as for `train`.
        judge: called as `judge(image, prompt)` with each image (PIL, RGB); returns numbers by name,
            such as a CLIP score, which are averaged over the images. A name that is left out, or
            NaN, says nothing about that image.
        distances: functions `distance(image, teacher_image)` by name. The default is "psnr" (dB)
            and "ssim", by torchmetrics. These and the judge are first tried on a blank image.
        tokens: also measure the gap of the prompts' own tokens and of the padding apart, for two
            more denoiser passes of each student.
        batch_size: prompts that are generated together.
        output_dir: folder for the result, see `Comparison.save`.

    Returns:
        The `Comparison`. The pipeline and the students are as they were.

    Raises:
        EvaluateError: no students, prompts or seeds, or two of one name; a judge or distance that
            returns no number, or uses another measure's name; no torchmetrics.
        NoT5SlotError, PatchError: the pipeline has no T5, or it wasn't kept.
        IncompatibleStudentError: a student has another vocabulary, or another output width.
        DistillError: as for `velocity_gap`; or the pipeline generates no images.
    """
    kwargs, slot = dict(pipeline_kwargs or {}), TextSlot(pipe)
    replacement = slot.encoder
    if students is None and is_student(replacement):
        students = replacement
    named, categories = check_request(students, prompts, seeds, output_dir)
    check_pipeline_kwargs(pipe, kwargs)
    check_no_cache(pipe)
    if images_per_prompt(kwargs) > 1:
        raise EvaluateError("A prompt is generated once from each seed: pass seeds=(0, 1, ...).")
    texts = list(categories)
    functions = _psnr_and_ssim() if distances is None else distances
    blank = Image.new("RGB", (kwargs.get("width") or 512, kwargs.get("height") or 512))
    _measures(blank, blank, texts[0], functions, judge)

    samples: list[dict[str, Any]] = []
    overall: dict[str, list[dict[str, float]]] = defaultdict(list)
    along: dict[str, list[Tensor]] = defaultdict(list)
    with ExitStack() as stack:  # undone in reverse order
        if is_student(replacement):
            stack.callback(replacement.train, replacement.training)
            unpatch_pipeline(pipe)
            stack.callback(patch_pipeline, pipe, replacement, keep_teacher=True)
        teacher: Any = teacher_of(pipe)
        device = torch.device(pipe._execution_device)
        encoders = {TEACHER: teacher}
        for name, student in named.items():
            if isinstance(student, nn.Module):
                check_student(pipe, uncompiled(student))
                stack.callback(student.to, next(student.parameters()).device)
            else:
                check_fit(student_config(student), slot)
                student = SlimT5Encoder.from_pretrained(student, dtype=teacher.dtype)
            encoders[name] = student.to(device)
        for encoder in encoders.values():
            stack.enter_context(evaluating(encoder))
        tokens_of_first, *_ = tokenize(pipe, texts[:batch_size], kwargs)
        for seed in tqdm(seeds, desc="compare", unit="seed"):
            reset_peak_memory(device)
            # The teacher's trajectory is measured and decoded in one pass.
            gap = VelocityGap(
                pipe, texts, pipeline_kwargs=kwargs, seed=seed, batch_size=batch_size, decode=True
            )
            for name, encoder in encoders.items():
                images, report, measured = gap.images, None, {}
                if encoder is not teacher:
                    report = gap.report(encoder, parts=tokens)
                    along[name].append(report.of_calls[~report.of_calls.isnan()])
                    measured = {
                        "own_tokens": report.real_tokens,
                        "padding": report.padding,
                        "spread": report.spread,
                    }
                    reset_peak_memory(device)
                    images, encode = [], encoded_by(encoder, pipe)
                    for i in range(0, len(texts), batch_size):
                        batch = texts[i : i + batch_size]
                        images += generate(pipe, batch, kwargs, [seed] * len(batch), encode)
                if not isinstance(encoder, CachedTeacher):  # which says nothing of T5's costs
                    measured |= _costs(device, tokens_of_first, encoder)
                overall[name].append({k: v for k, v in measured.items() if v is not None})
                for i, (text, category) in enumerate(categories.items()):
                    sample = {"encoder": name, "seed": seed, "prompt": text, "category": category}
                    sample |= {"image": images[i], "weight": 0.0}
                    other = None
                    if report is not None:
                        other = gap.images[i]
                        sample["weight"] = report.denominators[i].sum().item()
                        if sample["weight"] > 0:  # not of an empty prompt
                            sample["velocity_gap"] = report.of_prompts[i].item()
                    samples.append(sample | _measures(images[i], other, text, functions, judge))
    means = {
        name: {key: fmean(one[key] for one in by_seed) for key in by_seed[0]}
        for name, by_seed in overall.items()
    }
    trajectories = {name: torch.stack(gaps).mean(0).tolist() for name, gaps in along.items()}
    facts = {
        "pipeline": type(pipe).__name__,
        "pipeline_kwargs": kwargs,
        "seeds": list(seeds),
        "teacher": _place(teacher),
        "dtype": str(teacher.dtype),
        "device": str(device),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    comparison = Comparison(samples, means, trajectories, facts)
    if output_dir is not None:
        comparison.save(output_dir)
    return comparison


def check_request(
    students: Any, prompts: Any, seeds: Sequence[int], output_dir: Any
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Check what needs no pipeline; return students by name, and the prompts with categories."""
    named = students
    if not isinstance(students, Mapping):
        one = isinstance(students, (str, os.PathLike, nn.Module))
        given = [students] if one else list(students or ())
        named = {_place(student) or f"student {i}": student for i, student in enumerate(given, 1)}
        if len(named) < len(given):
            raise EvaluateError("Two students have one name: pass a mapping of names to students.")
    if not named or TEACHER in named:
        raise EvaluateError(f"Got students {[*named]}; expected one or more, none {TEACHER!r}.")
    parts = prompts
    if not isinstance(prompts, Mapping) or _FORMS & prompts.keys():
        parts = {None: prompts}
    pairs = [(text, category) for category, part in parts.items() for text in load_prompts(part)]
    if not pairs or len(dict(pairs)) < len(pairs):
        raise EvaluateError("Got no prompts, or one in two categories; expected each in one.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise EvaluateError(f"Got seeds {list(seeds)}; expected one or more, and each once.")
    if output_dir is not None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()  # fails in a folder that can't be written
    return dict(named), dict(pairs)


def _place(encoder: Any) -> str:
    """Folder or Hub id of an encoder, empty for one that was never saved."""
    if isinstance(encoder, nn.Module):
        return getattr(getattr(encoder, "config", None), "name_or_path", None) or ""
    return os.fspath(encoder)


def _costs(
    device: torch.device, tokens: tuple[Tensor, Tensor | None], encoder: nn.Module
) -> dict[str, float | None]:
    """Size, peak memory since its reset, and the time to encode a prompt, by a batch of them."""
    parameters = list(encoder.parameters())

    @torch.no_grad()
    def encode() -> None:
        call_encoder(encoder, *tokens).sum().item()  # which waits for the device

    encode()
    seconds = timeit.repeat(encode, number=1, repeat=3)  # the fastest of three counts
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights_mib": sum(parameter.nbytes for parameter in parameters) / 2**20,
        "encode_ms": min(seconds) / len(tokens[0]) * 1000,
        # On the CPU it is that of the process, which never falls.
        "peak_memory_gib": None if device.type == "cpu" else peak_memory_gib(device),
    }


def _measures(
    image: Image.Image,
    other: Image.Image | None,
    text: str,
    distances: Mapping[str, Distance],
    judge: Judge | None,
) -> dict[str, float]:
    """Distances to the teacher's image, if there is one, and scores of the judge, by name."""
    scores = {} if judge is None else judge(image, text)
    if not isinstance(scores, Mapping):
        raise EvaluateError(f"judge returned {scores!r}; expected a mapping of names to numbers.")
    measures: dict[str, Any] = {}
    if other is not None:
        measures = {name: distance(image, other) for name, distance in distances.items()}
    if taken := {*distances, *_RESERVED} & scores.keys() | _RESERVED & distances.keys():
        raise EvaluateError(f"{min(taken)!r} is the name of another measure. Pick another.")
    for name, value in (measures | dict(scores)).items():
        try:
            measures[name] = float(value)
        except (TypeError, ValueError) as error:
            raise EvaluateError(f"{name!r} is {value!r}; expected a number.") from error
    return {name: value for name, value in measures.items() if not math.isnan(value)}


def _psnr_and_ssim() -> dict[str, Distance]:
    """PSNR in dB (infinite for equal images) and SSIM (1 for equal images)."""
    try:
        import torchmetrics.functional.image as metrics
    except ImportError as error:
        raise EvaluateError(
            "PSNR and SSIM need torchmetrics: pip install 't5slim[evaluate]', or pass distances={}."
        ) from error

    def pixels(image: Image.Image) -> Tensor:  # (1, 3, H, W) from 0 to 1
        array: Any = VaeImageProcessor.pil_to_numpy(image.convert("RGB"))
        return VaeImageProcessor.numpy_to_pt(array)

    def distance(metric: Any) -> Distance:
        return lambda a, b: metric(pixels(a), pixels(b), data_range=1.0)

    return {
        "psnr": distance(metrics.peak_signal_noise_ratio),
        "ssim": distance(metrics.structural_similarity_index_measure),
    }
