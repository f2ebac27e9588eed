"""Students beside the teacher: measures, forms of the result, and what is left unchanged."""

import copy
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_ltx, tiny_student

import t5slim
from t5slim import patch_pipeline
from t5slim.distill import VelocityGap, cache_teacher, cached_teacher
from t5slim.distill.arguments import PipelineArguments
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
    found = comparison.samples.query("encoder == @encoder and seed == @seed")
    assert list(found["prompt"]) == PROMPTS[:4]
    return [np.asarray(image) for image in found["image"]]


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart_sigma", "chroma"])
def test_images_and_gaps_are_those_of_the_users_own_calls(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    student, texts, kwargs = tiny_student(pipe), PROMPTS[:4], call_kwargs(pipe)
    prompts = {"shapes": texts[:2], "signs": texts[2:]}
    settings: Any = {"pipeline_kwargs": kwargs, "batch_size": 4}
    seen = compare(pipe, {"mine": student}, prompts, seeds=(3, 4), **settings)
    report = VelocityGap(pipe, texts, seed=3, decode=True, **settings).report(student)
    first = seen.samples.query("encoder == 'mine' and seed == 3")
    gaps = first.set_index("prompt")["velocity_gap"]
    assert seen.means("seed")["velocity_gap"]["mine", 3] == pytest.approx(report.gap, rel=1e-6)
    assert gaps.tolist() == pytest.approx(report.of_prompts.tolist())
    for prompt in (texts[0], texts[3]):
        alone = VelocityGap(pipe, [prompt], seed=3, pipeline_kwargs=kwargs, decode=True)(student)
        assert gaps[prompt] == pytest.approx(alone, rel=1e-3)
    weights = report.denominators.sum(1)
    for category, members in (("shapes", slice(0, 2)), ("signs", slice(2, 4))):
        expected = np.average(gaps[members], weights=weights[members])
        part = seen.means("category", "seed")["velocity_gap"]["mine", category, 3]
        assert part == pytest.approx(expected)
    _, mine, _, again = seen.runs["gap_of_calls"]
    assert mine == pytest.approx(report.of_calls[~report.of_calls.isnan()].tolist())
    assert seen.trajectories == {"mine": pytest.approx(np.mean([mine, again], 0).tolist())}

    for encoder in ("teacher", "mine"):
        if encoder == "mine":
            patch_pipeline(pipe, student)
        for seed in (3, 4):
            generators = [torch.Generator().manual_seed(seed) for _ in texts]
            expected = pipe(texts, generator=generators, **kwargs | {"output_type": "pil"}).images
            for one, other in zip(images(seen, encoder, seed), expected, strict=True):
                assert np.array_equal(one, other)


def test_a_copy_of_the_teacher_loses_nothing(pipe: Any) -> None:
    seen = compared(pipe, {"copy": copy.deepcopy(teacher_of(pipe)), "mine": tiny_student(pipe)})
    gap, psnr, ssim = seen.means().loc["copy"]
    worse, lower, less = seen.means().loc["mine"]
    assert gap < 1e-8 < 1e-3 < worse and lower < 60 < psnr and less < ssim == pytest.approx(1)
    runs = seen.runs.set_index("encoder")
    assert runs["parameters"]["teacher"] == runs["parameters"]["copy"]
    assert runs["encode_ms"]["teacher"] > 0


def test_scores_are_averaged_over_the_images_they_are_known_of(pipe: Any) -> None:

    def judge(image: Image.Image, prompt: str) -> dict[str, Any]:
        return brightness(image, prompt) | {"odd": math.nan if "star" in prompt else math.inf}

    seen = compared(pipe, tiny_student(pipe), judge=judge, distances={}, seeds=(0, 1))
    assert seen.measures == ["velocity_gap", "level", "odd", "bright"]
    (line,) = (line for line in str(seen).splitlines() if line.startswith("level"))
    for encoder in ("teacher", "student 1"):
        means = seen.means().loc[encoder]
        levels = [[image.mean() for image in images(seen, encoder, seed)] for seed in (0, 1)]
        assert means["level"] == pytest.approx(np.mean(levels))
        assert seen.means("seed")["level"][encoder].tolist() == pytest.approx(np.mean(levels, 1))
        assert f"{np.mean(levels):.4g} ±{np.std(np.mean(levels, 0), ddof=1):.2g}" in line
        signs = [i for i, prompt in enumerate(PROMPTS[:4]) if "sign" in prompt]
        right = np.mean([levels[s][i] > 127 for s in (0, 1) for i in signs])
        assert means["bright"] == pytest.approx(right)
        assert means["odd"] == math.inf


@pytest.mark.parametrize("name", ["distance", "gap", "teacher", "gap_of_calls", "=1+1", "other"])
def test_no_name_of_the_users_changes_the_gap(pipe: Any, name: str) -> None:
    student = {"mine": tiny_student(pipe)}
    plain = compared(pipe, student)
    for measures in ({"distances": {name: lambda *_: 9}}, {"judge": lambda *_: {name: 9}}):
        seen = compared(pipe, student, **measures)
        assert seen.means()["velocity_gap"].equals(plain.means()["velocity_gap"])
        assert seen.trajectories == plain.trajectories
        assert seen.means()[name]["mine"] == 9


def test_a_patched_pipeline_is_compared_with_its_own_teacher_and_stays_patched() -> None:
    pipe = tiny_flux()
    teacher, student = pipe.text_encoder_2, tiny_student(pipe)
    expected = compared(pipe, {"student 1": student}).means()
    patch_pipeline(pipe, student, keep_teacher=True)
    student.train()
    pd.testing.assert_frame_equal(compared(pipe, None).means(), expected)
    assert pipe.text_encoder_2 is student and pipe._t5slim_original is teacher
    calls = iter([1, 1])  # it works on the blank image and on the first one
    with pytest.raises(t5slim.errors.ConfigError, match="StopIteration") as raised:
        compared(pipe, None, judge=lambda *_: {"x": next(calls)})
    assert isinstance(raised.value.__cause__, StopIteration)
    assert pipe.text_encoder_2 is student and pipe._t5slim_original is teacher
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
    pd.testing.assert_frame_equal(seen.samples, whole.samples)
    assert seen.runs["parameters"].isna().tolist() == [True, False]


@pytest.mark.parametrize(
    ("students", "changes", "message"),
    [
        (None, {}, r"Got students \[\]; expected one or more"),
        ({"teacher": "x"}, {}, "none 'teacher'"),
        (["a/student", "a/student"], {}, "Two students have one name"),
        ("wide", {}, "width 33"),
        (3, {}, "got int"),
        ("a\x1b[31m", {}, "is no name; expected one line of printable text"),
        ("mine", {"prompts": {"a\0": ["x"]}}, "is no name"),
        ("mine", {"seeds": 3}, "Got seeds 3; expected integers, as a list"),
        ("mine", {"batch_size": 0}, "batch_size is 0; expected a positive integer"),
        ("mine", {"output_dir": __file__}, "can't be made a folder: .*exists"),
        ("mine", {"seeds": [0, 2**70]}, r"Got seeds \[0, 1180591620717411303424\]; expected int"),
        ("mine", {"seeds": (1, 1)}, "and each once"),
        ("mine", {"prompts": {"a": ["x"], "b": ["x"]}}, "and each once"),
        ("mine", {"pipeline_kwargs": {"num_images_per_prompt": 2}}, "may not hold 'num_images"),
        ("mine", {"judge": lambda *_: {"x": "good"}}, "could not convert string to float: 'good'"),
        ("mine", {"judge": lambda image: {"x": 1}}, "takes 1 positional argument but 2 were given"),
        ("mine", {"judge": lambda *_: 0.5}, "Expected judge.image, prompt., which returns numbers"),
        ("mine", {"judge": lambda *_: {0: 1}}, "0 is no name"),
        ("mine", {"distances": ["psnr"]}, "distances such as"),
        ("mine", {"distances": {"d": lambda *_: torch.ones(2)}}, "A judge or distance failed"),
        ("mine", {"distances": {"prompt": lambda *_: 1}}, "'prompt' is the name of"),
        ("mine", {"judge": lambda *_: {"psnr": 1}}, "'psnr' is the name of another measure"),
        ("mine", {"judge": lambda *_: {"d": 1}, "distances": {"d": lambda *_: 1}}, "'d' is the"),
    ],
)
def test_refused_before_anything_expensive(students: Any, changes: Any, message: str) -> None:
    pipe = tiny_flux()
    pipe.transformer.forward = None  # whoever calls it, fails
    if isinstance(students, str):
        config = copy.deepcopy(tiny_student(pipe).config)
        config.project_out_dim += students == "wide"
        students = {students: t5slim.SlimT5Encoder(config)}
    with pytest.raises(t5slim.T5SlimError, match=message):
        compare(pipe, students, **{"prompts": PROMPTS[:2]} | changes)


def test_a_pipeline_for_video_is_refused() -> None:
    with pytest.raises(t5slim.DistillError, match="set decode=False"):
        compared(tiny_ltx(), tiny_student(tiny_ltx()))


def test_any_line_of_text_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, prompts = tiny_flux(), ["=a \x1b[31mred\x1b[0m <b>sign</b>", PROMPTS[0]]
    names = ("x" * 300, "../../a/b", "=1+1", "Größe ↑")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    students = {name: tiny_student(pipe, seed=seed) for seed, name in enumerate(names)}
    seen = compare(
        pipe, students, prompts, pipeline_kwargs=call_kwargs(pipe), output_dir="~/a/folder"
    )
    assert "\x1b" not in str(seen) and not set(names) - set(seen.samples["encoder"])
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert files == {f"a/folder/comparison.{ending}" for ending in ("json", "png", "html")}
    page = (tmp_path / "a" / "folder" / "comparison.html").read_text(encoding="utf-8")
    assert "<b>sign" not in page


EVIL = "<script>document.title = 'gone'</script> \"a sign\" & 'two'</td><img src=http://x.invalid/>"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    pipe = tiny_flux()
    names = ("first <b>", "second", "third")
    students = {name: tiny_student(pipe, seed=seed) for seed, name in enumerate(names)}
    prompts = {"plain & simple": PROMPTS[:3], "evil": [EVIL, PROMPTS[3]]}
    folder = tmp_path_factory.mktemp("shown")
    kwargs: Any = {"pipeline_kwargs": call_kwargs(pipe), "seeds": (0, 1), "judge": brightness}
    return compare(pipe, students, prompts, **kwargs, output_dir=folder), folder


def test_files_hold_the_same_numbers(shown: tuple[Comparison, Path]) -> None:
    comparison, folder = shown
    content = json.loads((folder / "comparison.json").read_text(), parse_constant=pytest.fail)
    gap = comparison.means()["velocity_gap"]["second"]
    assert content["means"]["second"]["velocity_gap"] == gap
    expected = comparison.samples.drop(columns="image").astype(object)
    assert content["samples"] == expected.where(expected.notna(), None).to_dict("records")
    assert len(content["samples"]) == 4 * 2 * 5
    with Image.open(folder / "comparison.png") as grid:
        assert grid.size == comparison.image_grid().size
    assert all(part in comparison._repr_html_() for part in ("<th>↳ evil</th>", "over 5 prompts"))
    table = str(comparison).splitlines()
    assert table[0].split() == ["encoder", "teacher", "first", "<b>", "second", "third"]
    (line,) = (i for i, line in enumerate(table) if line.startswith("velocity gap (0"))
    assert f" {gap:.4g} ±" in table[line]
    evil = comparison.means("category")["velocity_gap"]["second", "evil"]
    assert table[line + 2].startswith("  evil ") and f" {evil:.4g} ±" in table[line + 2]


def test_the_page_holds_text_and_asks_for_nothing(shown: tuple[Comparison, Path]) -> None:
    page = (shown[1] / "comparison.html").read_text()
    assert EVIL not in page and "first <b>" not in page and "<polyline" in page
    sources = re.findall(r'<(?:img|link|script|a|iframe)\b[^>]*?(?:src|href)="([^"]{0,20})', page)
    assert len(sources) == 4 * 2 * 5 and all(source.startswith("data:image/") for source in sources)
    assert "default-src 'none'" in page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
def test_the_page_in_a_browser(shown: tuple[Comparison, Path], tmp_path: Path) -> None:
    """Images are seen, a click sorts, a prompt like a script is text, and 390 pixels are enough."""
    script = """<script>{
    const all = selector => [...document.querySelectorAll(selector)];
    const texts = selector => all(selector).map(cell => cell.textContent);
    const head = all("#prompts thead th").find(th => th.firstChild.textContent.trim() === "second");
    head.querySelector("button[data-measure=velocity_gap]").click();
    parent.document.title = JSON.stringify({
      title: document.title, width: document.documentElement.scrollWidth,
      seen: all("img").filter(image => image.complete && image.naturalWidth > 0).length,
      texts: texts("td.text"),
      gaps: texts(`#prompts td:nth-child(${head.cellIndex + 1}) dd[data-measure=velocity_gap]`),
    });
    }</script>"""
    page = (shown[1] / "comparison.html").read_text().replace("</body>", script)
    framed = f'<meta charset="utf-8"><iframe width="390" height="800" srcdoc="{escape(page)}">'
    (tmp_path / "page.html").write_text(framed)
    flags = ["--headless", "--no-sandbox", "--virtual-time-budget=10000", "--dump-dom"]
    profile, url = f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()
    command = [CHROMIUM, *flags, profile, url]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    (found,) = re.findall(r"<title>(.*?)</title>", dom[: dom.index("<iframe")], re.DOTALL)
    result = json.loads(unescape(found))
    assert result["seen"] == 4 * 2 * 5 and result["title"].startswith("FluxPipeline")
    assert result["gaps"] == sorted(result["gaps"], key=float) and len(result["gaps"]) == 2 * 5
    assert result["texts"].count(EVIL) == 2
    assert result["width"] <= 390  # tables scroll, and the page doesn't


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_from_the_command_line(
    hub: Any, flux_folder: Path, tmp_path: Path, monkeypatch: Any, encoding: str
) -> None:
    pipe = tiny_flux()
    for seed in (1, 2):
        tiny_student(pipe, seed=seed).save_pretrained(tmp_path / str(seed) / "student")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    monkeypatch.chdir(tmp_path)
    options = ["--seeds=[3]", f"--pipeline_kwargs={call_kwargs(pipe)}", "--output_dir=out"]
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)  # which doesn't have every character
    monkeypatch.setattr(sys, "stdout", terminal)
    main([str(flux_folder), "1/student", "2/student", "prompts.txt", *options])
    terminal.flush()
    printed = terminal.buffer.getvalue().decode(encoding)
    assert printed.splitlines()[0].split() == ["encoder", "teacher", "1/student", "2/student"]
    shown = "weights in memory, MiB ↓".encode(encoding, "replace").decode(encoding)
    assert shown in printed and (tmp_path / "out" / "comparison.html").exists()

    monkeypatch.delattr("diffusers.DiffusionPipeline.from_pretrained")  # nothing gets that far
    for given, message in (
        ("1/student none.txt", "DistillError: 'none.txt' is no such file"),
        ("none/student prompts.txt", "HubAccessError: .*'none/student'"),
        ("1/student", "ConfigError: .*required: prompts"),
        ("1/student prompts.txt --pipeline_kwargs.hieght=8", "DistillError: .*may.*hold 'hieght'"),
        ("1/student prompts.txt --batch_sise=2", "ConfigError: .*batch_sise"),
    ):
        with pytest.raises(SystemExit, match=f"(?s){message}"):
            main([str(flux_folder), *options, *given.split()])


@pytest.mark.parametrize("card", [24, 12])
def test_real_pictures(flux_folder: Path, tmp_path: Path, monkeypatch: Any, card: int) -> None:
    """The commands of examples/prompts, with a tiny pipeline in the place of FLUX.1-dev's."""
    monkeypatch.chdir(Path(__file__).parents[1])
    page, load = Path("examples/prompts/README.md").read_text(), PipelineArguments.load
    commands = re.findall(r"^t5slim compare (.*?) --output_dir", page, re.DOTALL | re.MULTILINE)
    _, _, *rest = shlex.split(commands[card == 12].replace("\\\n", ""))

    def load_plain(given: PipelineArguments) -> Any:  # float32, and no bitsandbytes, for CPUs
        assert (given.dtype, given.offload) == ("bfloat16", "model")
        assert bool(given.quantization) == (card == 12)
        return load(replace(given, dtype="float32", quantization=None))

    monkeypatch.setattr(PipelineArguments, "load", load_plain)
    tiny_student(tiny_flux()).save_pretrained(tmp_path / "student")
    rest += ["--pipeline_kwargs", str(call_kwargs(tiny_flux(), steps=1)), "--batch_size=8"]
    rest += ["--pipeline.device=cpu", "--output_dir", str(tmp_path)]
    main([str(flux_folder), str(tmp_path / "student"), *rest])
    samples = json.loads((tmp_path / "comparison.json").read_text())["samples"]
    found = Counter(sample["category"] for sample in samples if sample["encoder"] == "teacher")
    assert found == {"image-quality": 8, "semantic-understanding": 8, "text-rendering": 8}
