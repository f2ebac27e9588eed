"""Students beside the teacher: measures, forms of the result, and what is left unchanged."""

from __future__ import annotations

import copy
import csv
import json
import math
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_ltx, tiny_student

import t5slim
from t5slim import EvaluateError, patch_pipeline
from t5slim.distill import VelocityGap, cache_teacher, cached_teacher
from t5slim.distill.pipeline import teacher_of
from t5slim.evaluate import Comparison, compare
from t5slim.evaluate.__main__ import main
from t5slim.slot import TextSlot


def brightness(image: Image.Image, prompt: str) -> dict[str, Any]:
    level = np.asarray(image).mean()
    return {"level": level} | ({"bright": level > 127} if "sign" in prompt else {})


def compared(pipe: Any, students: Any, **kwargs: Any) -> Comparison:
    return compare(pipe, students, PROMPTS[:4], pipeline_kwargs=call_kwargs(pipe), **kwargs)


def images(comparison: Comparison, encoder: str, seed: int = 0) -> list[np.ndarray]:
    found = [s for s in comparison.samples if (s["encoder"], s["seed"]) == (encoder, seed)]
    assert [sample["prompt"] for sample in found] == comparison.prompts
    return [np.asarray(sample["image"]) for sample in found]


# --- measures ---


@pytest.mark.parametrize("name", ["flux", "sd3", "chroma"])
def test_images_are_those_of_the_users_own_calls(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    student = tiny_student(pipe)
    seen = compared(pipe, {"mine": student}, seeds=(3, 4), batch_size=4)
    for encoder in ("teacher", "mine"):
        if encoder == "mine":
            patch_pipeline(pipe, student)
        for seed in (3, 4):
            generators = [torch.Generator().manual_seed(seed) for _ in PROMPTS[:4]]
            kwargs = call_kwargs(pipe) | {"output_type": "pil"}
            expected = pipe(PROMPTS[:4], generator=generators, **kwargs).images
            for one, other in zip(images(seen, encoder, seed), expected, strict=True):
                assert np.array_equal(one, other)


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart_sigma", "chroma"])
def test_a_gap_is_the_same_whole_and_in_parts(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    student, texts, kwargs = tiny_student(pipe), PROMPTS[:4], call_kwargs(pipe)
    prompts = {"shapes": PROMPTS[:2], "signs": PROMPTS[2:4]}
    settings: Any = {"pipeline_kwargs": kwargs, "tokens": True, "batch_size": 2}
    seen = compare(pipe, {"mine": student}, prompts, **settings)
    assert seen.prompts == texts and list(seen.overall) == ["teacher", "mine"]
    measure = VelocityGap(pipe, texts, pipeline_kwargs=kwargs, batch_size=2, decode=True)
    report = measure.report(student, parts=True)
    mean, overall = seen.mean("mine", "velocity_gap"), seen.overall["mine"]
    assert mean.value == pytest.approx(report.gap, rel=1e-6)
    assert overall["padding"] == pytest.approx(report.padding, rel=1e-6)
    assert overall["own_tokens"] == pytest.approx(report.real_tokens, rel=1e-6)
    assert overall["spread"] == pytest.approx(report.spread, rel=1e-6)

    gaps = {s["prompt"]: s["velocity_gap"] for s in seen.samples if s["encoder"] == "mine"}
    weights = dict(zip(texts, report.denominators.sum(1).tolist(), strict=True))
    for category, members in prompts.items():
        whole = sum(weights[p] for p in members)
        expected = sum(gaps[p] * weights[p] for p in members) / whole
        assert seen.mean("mine", "velocity_gap", category).value == pytest.approx(expected)
    assert mean.over_prompts == pytest.approx(np.std(list(gaps.values()), ddof=1))
    assert math.isnan(mean.over_seeds)
    along = report.of_calls
    assert seen.trajectories["mine"] == pytest.approx(along[~along.isnan()].tolist())
    for prompt in (PROMPTS[0], PROMPTS[3]):
        alone = VelocityGap(pipe, [prompt], pipeline_kwargs=kwargs, decode=True)(student)
        assert gaps[prompt] == pytest.approx(alone, rel=1e-3)


class Confused(torch.nn.Module):
    """A copy of the teacher that moves prompts a thousand times nearer to each other."""

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(teacher)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        embeddings = self.teacher(input_ids)[0]
        return (embeddings[:1] + 1e-3 * embeddings,)


def test_a_copy_of_the_teacher_loses_nothing_and_a_collapse_is_seen() -> None:
    pipe = tiny_flux()
    teacher, student = teacher_of(pipe), tiny_student(pipe)
    students = {"copy": copy.deepcopy(teacher), "mine": student, "confused": Confused(teacher)}
    seen = compared(pipe, students)
    assert seen.overall["confused"]["spread"] == pytest.approx(1e-3, rel=1e-2)
    gap, psnr, ssim = (seen.mean("copy", name).value for name in seen.measures)
    worse, lower, less = (seen.mean("mine", name).value for name in seen.measures)
    assert gap < 1e-8 < 1e-3 < worse and lower < 60 < psnr and less < ssim == pytest.approx(1)
    overall, teachers = seen.overall["copy"], seen.overall["teacher"]
    assert overall["spread"] == pytest.approx(1, rel=1e-4)
    assert teachers["parameters"] == overall["parameters"] > teachers["encode_ms"] > 0


def test_scores_are_averaged_over_the_images_they_are_known_of() -> None:
    pipe = tiny_flux()

    def judge(image: Image.Image, prompt: str) -> dict[str, Any]:
        return brightness(image, prompt) | {"odd": math.nan if "star" in prompt else math.inf}

    seen = compared(pipe, tiny_student(pipe), judge=judge, distances={}, seeds=(0, 1))
    assert list(seen.overall) == ["teacher", "student 1"]
    assert seen.measures == ["velocity_gap", "level", "odd", "bright"]
    for encoder in seen.overall:
        levels = [[image.mean() for image in images(seen, encoder, seed)] for seed in (0, 1)]
        mean = seen.mean(encoder, "level")
        assert mean.value == pytest.approx(np.mean(levels))
        assert mean.over_prompts == pytest.approx(np.std(np.mean(levels, 0), ddof=1))
        assert mean.over_seeds == pytest.approx(np.std(np.mean(levels, 1), ddof=1))
        signs = [i for i, prompt in enumerate(seen.prompts) if "sign" in prompt]
        right = np.mean([levels[s][i] > 127 for s in (0, 1) for i in signs])
        assert seen.mean(encoder, "bright").value == pytest.approx(right)
        assert seen.mean(encoder, "odd").value == math.inf


# --- what is left unchanged ---


def test_a_patched_pipeline_is_compared_with_its_own_teacher_and_stays_patched() -> None:
    pipe = tiny_flux()
    teacher, student = pipe.text_encoder_2, tiny_student(pipe)
    expected = compared(pipe, {"student 1": student}).mean("student 1", "velocity_gap")
    patch_pipeline(pipe, student, keep_teacher=True)
    student.train()
    seen = compared(pipe, None)
    assert seen.mean("student 1", "velocity_gap") == expected
    assert pipe.text_encoder_2 is student and pipe._t5slim_patch.original.module is teacher
    calls = iter([1, 1])  # it works on the blank image and on the first one
    with pytest.raises(StopIteration):
        compared(pipe, None, judge=lambda *_: {"x": next(calls)})
    assert pipe.text_encoder_2 is student and pipe._t5slim_patch.original.module is teacher
    assert student.training and not teacher.training
    gone = patch_pipeline(tiny_flux(), student)
    with pytest.raises(t5slim.PatchError, match="wasn't kept"):
        compared(gone, None)
    assert gone.text_encoder_2 is student


def test_without_t5_in_memory_the_numbers_are_the_same(tmp_path: Path) -> None:
    pipe = tiny_flux()
    student = tiny_student(pipe).train()
    whole = compared(pipe, {"mine": student})
    cache_teacher(pipe, PROMPTS[:4], tmp_path, pipeline_kwargs=call_kwargs(pipe))
    TextSlot(pipe).replace(None)
    with cached_teacher(pipe, tmp_path):
        seen = compared(pipe, {"mine": student})
    assert pipe.text_encoder_2 is None and student.training
    assert seen.to_dict()["samples"] == whole.to_dict()["samples"]
    assert seen.overall["teacher"] == {}


@pytest.mark.parametrize(
    ("students", "changes", "message"),
    [
        (None, {}, r"Got students \[\]; expected one or more"),
        ({"teacher": "x"}, {}, "none 'teacher'"),
        (["a/student", "a/student"], {}, "Two students have one name"),
        ("mine", {"seeds": ()}, r"Got seeds \[\]"),
        ("mine", {"seeds": (1, 1)}, "and each once"),
        ("mine", {"prompts": {}}, "Got no prompts"),
        ("mine", {"prompts": {"a": ["x"], "b": ["x"]}}, "or one in two categories"),
        ("mine", {"pipeline_kwargs": {"num_images_per_prompt": 2}}, "pass seeds="),
        ("mine", {"judge": lambda *_: 0.5}, "judge returned 0.5; expected a mapping"),
        ("mine", {"judge": lambda *_: {"x": "good"}}, "'x' is 'good'; expected a number"),
        ("mine", {"judge": lambda *_: {"psnr": 1}}, "'psnr' is the name of another measure"),
        ("mine", {"judge": lambda *_: {"d": 1}, "distances": {"d": lambda *_: 1}}, "'d' is the"),
        ("mine", {"distances": {"velocity_gap": lambda *_: 1}}, "'velocity_gap' is the name of"),
        ("mine", {"distances": {"far": lambda *_: None}}, "'far' is None; expected a number"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_expensive(
    students: Any, changes: dict[str, Any], message: str
) -> None:
    pipe = tiny_flux()
    pipe.transformer.forward = None  # whoever calls it, fails
    students = {"mine": tiny_student(pipe)} if students == "mine" else students
    with pytest.raises(EvaluateError, match=message):
        compare(pipe, students, changes.pop("prompts", PROMPTS[:2]), **changes)


def test_a_student_that_does_not_fit_and_a_pipeline_for_video_are_refused() -> None:
    pipe = tiny_flux()
    config = copy.deepcopy(tiny_student(pipe).config)
    config.project_out_dim += 1
    with pytest.raises(t5slim.IncompatibleStudentError, match="width"):
        compared(pipe, {"wide": t5slim.SlimT5Encoder(config)})
    with pytest.raises(t5slim.IncompatibleStudentError, match="got int"):
        compared(pipe, {"x": 3})
    with pytest.raises(t5slim.DistillError, match="VelocityGap measures"):
        compared(tiny_ltx(), tiny_student(tiny_ltx()))


def test_without_torchmetrics_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    pipe = tiny_flux()
    with pytest.raises(EvaluateError, match=r"pip install 't5slim\[evaluate\]'"):
        compared(pipe, tiny_student(pipe))


# --- forms of the result ---

EVIL = "<script>document.title = 'gone'</script> \"a sign\" & 'two'</td><img src=http://x.invalid/>"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    pipe = tiny_flux()
    names = ("first <b>", "second", "=1+1")
    students = {name: tiny_student(pipe, seed=seed) for seed, name in enumerate(names)}
    prompts = {"plain & simple": [*PROMPTS[:2], "=HYPERLINK()"], "evil": [EVIL, PROMPTS[2]]}
    folder = tmp_path_factory.mktemp("shown")
    kwargs: Any = {"pipeline_kwargs": call_kwargs(pipe), "seeds": (0, 1), "judge": brightness}
    return compare(pipe, students, prompts, **kwargs, output_dir=folder), folder


def test_files_hold_the_same_numbers(shown: tuple[Comparison, Path]) -> None:
    comparison, folder = shown
    content = json.loads((folder / "comparison.json").read_text(), parse_constant=pytest.fail)
    mean = comparison.mean("second", "velocity_gap")
    assert content["means"]["second"]["velocity_gap"]["value"] == mean.value
    assert len(content["samples"]) == 4 * 2 * 5
    assert content["samples"][-1].keys() > {"prompt", "velocity_gap", "ssim", "level", "bright"}
    with (folder / "comparison.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert not any(text.startswith(tuple("=+-@")) for line in lines for text in line.values())
    texts = [sample["prompt"].replace("=H", "'=H") for sample in comparison.samples]
    assert [line["prompt"] for line in lines] == texts
    expected = [s["velocity_gap"] for s in comparison.samples if s["encoder"] == "second"]
    assert [float(x["velocity_gap"]) for x in lines if x["encoder"] == "second"] == expected
    with Image.open(folder / "comparison.png") as grid:
        assert grid.size == comparison.image_grid().size
    table = str(comparison).splitlines()
    assert table[0].split() == ["teacher", "first", "<b>", "second", "=1+1"]
    (line,) = (line for line in table if line.startswith("velocity gap (0"))
    assert str(mean) in line and str(mean).startswith(f"{mean.value:.4g} ±")
    assert "<b>" not in comparison._repr_html_()


def test_the_page_holds_prompts_as_text_and_asks_for_nothing(
    shown: tuple[Comparison, Path],
) -> None:
    page = (shown[1] / "comparison.html").read_text()
    assert EVIL not in page and "first <b>" not in page and "<polyline" in page
    sources = re.findall(r'<(?:img|link|script|a|iframe)\b[^>]*?(?:src|href)="([^"]{0,20})', page)
    assert len(sources) == 4 * 2 * 5 and all(source.startswith("data:image/") for source in sources)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
def test_the_page_in_a_browser(shown: tuple[Comparison, Path], tmp_path: Path) -> None:
    """Images are seen, a click sorts, a prompt like a script is text, and 390 pixels are enough."""
    script = """<script>{
    const images = [...document.images];
    const seen = images.filter(image => image.complete && image.naturalWidth > 0).length;
    const head = [...document.querySelectorAll("#prompts thead th")]
      .find(head => head.firstChild.textContent.trim() === "second");
    const button = head.querySelector("button[data-measure=velocity_gap]");
    const values = () => [...document.querySelectorAll("#prompts tbody tr")].map(
      row => row.cells[head.cellIndex].querySelector("dd[data-measure=velocity_gap]").textContent);
    const before = values();
    button.click();
    const up = values();
    button.click();
    const texts = [...document.querySelectorAll("td.text")].map(cell => cell.textContent);
    const width = [document.documentElement.scrollWidth, innerWidth], { title } = document;
    parent.postMessage({seen, title, before, up, down: values(), texts, width}, "*");
    }</script>"""
    page = (shown[1] / "comparison.html").read_text().replace("</body>", script)
    framed = f"""<iframe width="390" height="800" srcdoc="{escape(page)}"></iframe><pre id="result">
    </pre><script>onmessage = event => {{
      document.getElementById("result").textContent = JSON.stringify(event.data);
    }}</script>"""
    (tmp_path / "page.html").write_text(f'<meta charset="utf-8"><body>{framed}')
    flags = ["--headless", "--no-sandbox", "--virtual-time-budget=10000", "--dump-dom"]
    profile, url = f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()
    command = [CHROMIUM, *flags, profile, url]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    (found,) = re.findall(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    result = json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert result["seen"] == 4 * 2 * 5 and result["title"].startswith("FluxPipeline")
    assert result["up"] == sorted(result["before"], key=float)
    assert result["down"] == sorted(result["before"], key=float, reverse=True)
    assert result["texts"].count(EVIL) == 2
    content, window = result["width"]
    assert content <= window == 390  # tables scroll, and the page doesn't


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_flux()
    pipe.save_pretrained(tmp_path / "pipe")
    for seed in (1, 2):
        tiny_student(pipe, seed=seed).save_pretrained(tmp_path / str(seed) / "student")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    monkeypatch.chdir(tmp_path)
    kwargs = [f"{key}={json.dumps(value)}" for key, value in call_kwargs(pipe).items()]
    arguments = "--pipeline pipe --students 1/student 2/student --prompts prompts.txt --out out"
    arguments = [*f"{arguments} --dtype float32 --device cpu".split(), *kwargs]
    with (tmp_path / "printed").open("w", encoding="ascii") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        main(arguments)
    printed = (tmp_path / "printed").read_text()
    assert printed.splitlines()[0].split() == ["teacher", "1/student", "2/student"]
    assert "weights in memory, MiB ?" in printed and (tmp_path / "out" / "comparison.html").exists()

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr("diffusers.DiffusionPipeline.from_pretrained")  # nothing gets that far
    for old, new, message in (
        ("prompts.txt", "none.txt", "DistillError: 'none.txt' is no such file"),
        ("2/student", "none/student", "HubAccessError: 'none/student'"),
        (kwargs[0], "hieght=8", "DistillError: pipeline_kwargs holds 'hieght'"),
        ("pipe", "none", "HubAccessError: 'none'"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([new if argument == old else argument for argument in arguments])
