"""Students beside the teacher: what is measured, what is shown, and what is left alone."""

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
from tiny import (
    PROMPTS,
    TINY_PIPELINES,
    call_kwargs,
    t5_encoder,
    tiny_flux,
    tiny_ltx,
    tiny_sd3,
    tiny_student,
    umt5_encoder,
)

from t5slim import (
    DistillError,
    EvaluateError,
    IncompatibleStudentError,
    PatchError,
    SlimT5Encoder,
    patch_pipeline,
)
from t5slim.distill import VelocityGap, cache_teacher, cached_teacher, free_teacher
from t5slim.distill.cached import CachedTeacher
from t5slim.distill.pipeline import teacher_of
from t5slim.evaluate import Comparison, compare, lens
from t5slim.evaluate.__main__ import main
from t5slim.evaluate.distances import standard_distances
from t5slim.evaluate.layers import rows_after
from t5slim.slot import find_text_slot


def brightness(image: Image.Image, prompt: str) -> dict[str, Any]:
    found = {"bright": np.asarray(image).mean() > 127, "level": np.asarray(image).mean()}
    return found if "sign" in prompt else {"level": found["level"]}


def compared(pipe: Any, students: Any, **kwargs: Any) -> Comparison:
    return compare(pipe, students, PROMPTS[:4], pipeline_kwargs=call_kwargs(pipe), **kwargs)


# --- what is measured ---


@pytest.mark.parametrize("name", ["flux", "sd3", "chroma"])
def test_pictures_are_those_of_the_users_own_calls(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    student = tiny_student(pipe)
    seen = compared(pipe, {"mine": student}, seeds=(3, 4), batch_size=4)

    def painted(seed: int) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for _ in PROMPTS[:4]]
        kwargs = call_kwargs(pipe) | {"output_type": "pil"}
        return pipe(PROMPTS[:4], generator=generators, **kwargs).images

    expected = {("teacher", seed): painted(seed) for seed in (3, 4)}
    patch_pipeline(pipe, student)
    expected |= {("mine", seed): painted(seed) for seed in (3, 4)}
    assert seen.images.keys() == expected.keys()
    for key, pictures in expected.items():
        for one, other in zip(seen.images[key], pictures, strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart_sigma", "chroma"])
def test_a_gap_is_the_same_whole_and_in_parts(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    student = tiny_student(pipe)
    prompts = {"shapes": PROMPTS[:2], "signs": PROMPTS[2:4]}
    kwargs = call_kwargs(pipe)
    seen = compare(
        pipe, {"mine": student}, prompts, pipeline_kwargs=kwargs, tokens=True, batch_size=2
    )
    texts = PROMPTS[:4]
    assert seen.prompts == texts and seen.encoders == ["teacher", "mine"]
    measure = VelocityGap(pipe, texts, pipeline_kwargs=kwargs, batch_size=2, paint=True)
    report, table = measure.report(student, parts=True), measure.table(student)
    mean = seen.mean("mine", "velocity_gap")
    assert mean is not None and mean.value == pytest.approx(report.gap, rel=1e-6)
    of_all = seen.of_all("mine")
    assert of_all["padding"] == pytest.approx(report.padding, rel=1e-6)
    assert of_all["real_tokens"] == pytest.approx(report.real_tokens, rel=1e-6)
    assert of_all["spread"] == pytest.approx(report.spread, rel=1e-6)

    gaps = {record["prompt"]: record["velocity_gap"] for record in seen.records()[4:]}
    weights = dict(zip(texts, table.denominators.sum(1).tolist(), strict=True))
    for category, members in (("shapes", PROMPTS[:2]), ("signs", PROMPTS[2:4])):
        whole = sum(weights[p] for p in members)
        expected = sum(gaps[p] * weights[p] for p in members) / whole
        part = seen.mean("mine", "velocity_gap", category)
        assert part is not None and part.value == pytest.approx(expected)
    assert mean.over_prompts == pytest.approx(np.std(list(gaps.values()), ddof=1))
    assert math.isnan(mean.over_seeds)
    along = table.of_calls
    assert seen.of_calls("mine") == pytest.approx(along[~along.isnan()].tolist())
    for prompt in (PROMPTS[0], PROMPTS[3]):
        alone = VelocityGap(pipe, [prompt], pipeline_kwargs=kwargs, paint=True)(student)
        assert gaps[prompt] == pytest.approx(alone, rel=1e-3)


def test_a_copy_of_the_teacher_loses_nothing() -> None:
    pipe = tiny_flux()
    seen = compared(pipe, {"copy": copy.deepcopy(teacher_of(pipe)), "mine": tiny_student(pipe)})
    (gap, worse), (ssim, less) = (
        [seen.mean(name, measure) for name in ("copy", "mine")]
        for measure in ("velocity_gap", "ssim")
    )
    assert gap.value < 1e-8 < 1e-3 < worse.value and less.value < ssim.value == pytest.approx(1)
    assert seen.mean("copy", "psnr").value > 60 > seen.mean("mine", "psnr").value
    assert seen.of_all("copy")["nearest_other"] == pytest.approx(1, rel=1e-4)
    assert seen.of_all("copy")["spread"] == pytest.approx(1, rel=1e-4)
    costs = seen.of_all("teacher")
    assert costs["parameters"] == seen.of_all("copy")["parameters"] > costs["encode_ms"] > 0


def test_two_prompts_that_a_student_confuses_are_near_each_other() -> None:
    class Confused(torch.nn.Module):
        def __init__(self, encoder: Any) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor) -> Any:
            rows = self.encoder(input_ids)[0]
            return (rows if len(rows) == 1 else rows[:1] + 1e-3 * rows,)

    pipe = tiny_flux()
    measure = VelocityGap(pipe, PROMPTS[:4], pipeline_kwargs=call_kwargs(pipe))
    nearest = measure.nearest_other(Confused(copy.deepcopy(teacher_of(pipe))))
    assert nearest == pytest.approx(1e-3, rel=1e-2)
    assert (
        VelocityGap(pipe, PROMPTS[:1], pipeline_kwargs=call_kwargs(pipe)).nearest_other(
            tiny_student(pipe)
        )
        is None
    )


def test_distances_are_those_of_the_books() -> None:
    one, other = (
        np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8) for seed in (0, 1)
    )
    measured = {
        name: distance(Image.fromarray(one), Image.fromarray(other))
        for name, distance in standard_distances().items()
    }
    error = np.square(one / 255 - other / 255).mean()
    assert measured["psnr"] == pytest.approx(-10 * math.log10(error), rel=1e-5)
    assert abs(measured["ssim"]) < 0.1  # noise against noise


def test_what_a_judge_says_is_averaged_over_the_prompts_it_speaks_of() -> None:
    pipe = tiny_flux()
    seen = compared(pipe, tiny_student(pipe), judge=brightness, distances={}, seeds=(0, 1))
    assert seen.encoders == ["teacher", "student 1"] and seen.measures[1:] == ["level", "bright"]
    for encoder in seen.encoders:
        levels = [[np.asarray(i).mean() for i in seen.images[encoder, s]] for s in (0, 1)]
        mean = seen.mean(encoder, "level")
        assert mean.value == pytest.approx(np.mean(levels))
        assert mean.over_prompts == pytest.approx(np.std(np.mean(levels, 0), ddof=1))
        assert mean.over_seeds == pytest.approx(np.std(np.mean(levels, 1), ddof=1))
        signs = [i for i, prompt in enumerate(seen.prompts) if "sign" in prompt]
        right = np.mean([levels[s][i] > 127 for s in (0, 1) for i in signs])
        assert seen.mean(encoder, "bright").value == pytest.approx(right)


# --- what is left alone ---


def test_a_patched_pipeline_is_compared_with_its_own_teacher_and_stays_patched() -> None:
    pipe = tiny_flux()
    teacher, student = pipe.text_encoder_2, tiny_student(pipe)
    expected = compared(pipe, {"student 1": student}).mean("student 1", "velocity_gap")
    patch_pipeline(pipe, student, keep_teacher=True)
    seen = compared(pipe, None)
    assert seen.mean("student 1", "velocity_gap") == expected
    assert pipe.text_encoder_2 is student and pipe._t5slim_patch.teacher is teacher

    def fails(*_: Any) -> dict[str, float]:
        raise RuntimeError("the judge is out")

    with pytest.raises(RuntimeError, match="judge is out"):
        compared(pipe, None, judge=fails)
    assert pipe.text_encoder_2 is student and pipe._t5slim_patch.teacher is teacher
    gone = patch_pipeline(tiny_flux(), student)
    with pytest.raises(PatchError, match="wasn't kept"):
        compared(gone, None)
    assert gone.text_encoder_2 is student


def test_without_t5_in_memory_the_numbers_are_the_same(tmp_path: Path) -> None:
    pipe = tiny_flux()
    student = tiny_student(pipe).train()
    whole = compared(pipe, {"mine": student})
    cache_teacher(pipe, PROMPTS[:4], tmp_path, pipeline_kwargs=call_kwargs(pipe))
    free_teacher(pipe)
    with cached_teacher(pipe, tmp_path):
        seen = compared(pipe, {"mine": student})
        assert isinstance(pipe.text_encoder_2, CachedTeacher)
    assert pipe.text_encoder_2 is None and student.training
    assert seen.records() == whole.records()
    assert "parameters" not in seen.of_all("teacher")


def test_an_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    pipe = tiny_sd3()
    students = {"a/b: c": tiny_student(pipe, seed=1), "other": tiny_student(pipe, seed=2)}
    calls: list[str] = []

    def judge(image: Image.Image, prompt: str) -> dict[str, float]:
        calls.append(prompt)
        if len(calls) == 10:  # in the second student
            raise KeyboardInterrupt
        return {"level": np.asarray(image).mean()}

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compared(pipe, students, judge=judge, output_dir=folder)
    assert not (folder / "comparison.html").exists()
    assert len(list(folder.glob("units/*.unit.json"))) == 2
    seen = compared(pipe, students, judge=judge, output_dir=folder)
    assert calls[10:] == PROMPTS[:4]  # what was finished is not judged again
    calls[:] = [""] * 20
    again = compared(pipe, students, judge=judge)
    assert again.records() == seen.records()
    for key in again.images:
        for one, other in zip(again.images[key], seen.images[key], strict=True):
            assert np.array_equal(one, other)
    message = "another students. Pass another output_dir"
    with pytest.raises(EvaluateError, match=message):
        compared(
            pipe, students | {"other": tiny_student(pipe, seed=3)}, judge=judge, output_dir=folder
        )
    with pytest.raises(EvaluateError, match="another tokens"):
        compared(pipe, students, judge=judge, tokens=True, output_dir=folder)
    assert compared(pipe, students, judge=judge, output_dir=folder).records() == seen.records()


@pytest.mark.parametrize(
    ("students", "changes", "message"),
    [
        (None, {}, "none is in the pipeline"),
        ([], {}, "none is given"),
        ({"teacher": "x"}, {}, "called 'teacher'"),
        (["a/student", "a/student"], {}, "Several students are called a/student"),
        ({"x": 3}, {}, "'x' is a int; expected an encoder"),
        ("mine", {"seeds": ()}, r"seeds is \[\]"),
        ("mine", {"seeds": (1, 1)}, "each once"),
        ("mine", {"prompts": None}, "No prompts"),
        ("mine", {"prompts": {"a": ["x"], "b": ["x"]}}, "'x' is a prompt of two categories"),
        ("mine", {"pipeline_kwargs": {"num_images_per_prompt": 2}}, "pass seeds="),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_painted(
    students: Any, changes: dict[str, Any], message: str
) -> None:
    pipe = tiny_flux()
    pipe.transformer.forward = None  # whoever calls it, fails
    students = {"mine": tiny_student(pipe)} if students == "mine" else students
    prompts = changes.pop("prompts", PROMPTS[:2])
    with pytest.raises(EvaluateError, match=message):
        compare(pipe, students, prompts, **changes)
    other = copy.deepcopy(tiny_student(pipe).config)
    other.project_out_dim += 1
    with pytest.raises(IncompatibleStudentError, match="rows have width"):
        compare(pipe, {"wide": SlimT5Encoder(other)}, PROMPTS[:2])


def test_a_pipeline_for_video_is_refused() -> None:
    pipe = tiny_ltx()
    with pytest.raises(DistillError, match=r"0 pictures of 1 prompts.*VelocityGap measures"):
        kwargs = call_kwargs(pipe)
        compare(pipe, tiny_student(pipe), PROMPTS[:2], pipeline_kwargs=kwargs, batch_size=1)


def test_without_torchmetrics_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    with pytest.raises(EvaluateError, match=r"pip install 't5slim\[evaluate\]'"):
        compared(tiny_flux(), None)


# --- the layers of an encoder ---


@pytest.mark.parametrize("name", ["flux", "sd3", "chroma"])
def test_the_last_layer_paints_what_the_whole_encoder_does(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    student = tiny_student(pipe, num_layers=3)
    kwargs = call_kwargs(pipe)
    seen = lens(pipe, PROMPTS[1], {"mine": student}, seed=5, pipeline_kwargs=kwargs)
    assert seen.layers == {"teacher": [0, 1, 2], "mine": [0, 1, 2, 3]}
    for encoder in ("teacher", "mine"):
        if encoder == "mine":
            patch_pipeline(pipe, student, keep_teacher=True)
        generator = torch.Generator().manual_seed(5)
        image = pipe(PROMPTS[1], generator=generator, **kwargs | {"output_type": "pil"}).images[0]
        assert np.array_equal(seen.images[encoder][-1], image)
        assert not np.array_equal(seen.images[encoder][0], image)
    columns = seen.sheet().width / seen.images["mine"][0].width
    assert columns > 4
    # Of a patched pipeline, its own student; and the layers that are asked for.
    own = lens(pipe, PROMPTS[1], layers=(0, 3, -1), seed=5, pipeline_kwargs=kwargs)
    assert own.layers == {"teacher": [0, 2], "student 1": [0, 3, 3]}
    assert np.array_equal(own.images["student 1"][0], seen.images["mine"][0])
    assert getattr(pipe, find_text_slot(pipe).name) is student


@pytest.mark.parametrize("encoder_type", ["t5", "umt5"])
def test_rows_after_a_layer(encoder_type: str) -> None:
    teacher = (t5_encoder if encoder_type == "t5" else umt5_encoder)().eval()
    student = tiny_student(tiny_flux(), num_layers=2, encoder_type=encoder_type)
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    for encoder in (teacher, student):
        stack = encoder.encoder.encoder if encoder is student else encoder.encoder
        projection = encoder.final_projection if encoder is student else torch.nn.Identity()
        with torch.no_grad():
            words = projection(stack.final_layer_norm(stack.embed_tokens(ids)))
            whole = encoder(ids, attention_mask=mask)[0]
            kept = stack.block
            stack.block = kept[:1]
            first = encoder(ids, attention_mask=mask)[0]
            stack.block = kept
        assert torch.equal(rows_after(encoder, 0, ids, mask), words)
        assert torch.equal(rows_after(encoder, 1, ids, mask), first)
        assert torch.equal(rows_after(encoder, 2, ids, mask), whole)


def test_a_lens_says_what_it_cannot_look_into() -> None:
    pipe = tiny_flux()
    with pytest.raises(EvaluateError, match=r"layers is \[9\]; a T5EncoderModel has 0 to 2"):
        lens(pipe, PROMPTS[0], layers=[9])
    with pytest.raises(EvaluateError, match="A Linear has no layers of a T5"):
        lens(pipe, PROMPTS[0], {"x": torch.nn.Linear(2, 2)})
    with pytest.raises(EvaluateError, match="makes no pictures"):
        lens(tiny_ltx(), PROMPTS[0], layers=[0], pipeline_kwargs=call_kwargs(tiny_ltx()))


# --- what is shown ---

EVIL = "<script>document.title = 'gone'</script> \"a sign\" & 'two'</td><img src=http://x.invalid/>"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    pipe = tiny_flux()
    students = {"first <b>": tiny_student(pipe, seed=1), "second": tiny_student(pipe, seed=2)}
    prompts = {"plain & simple": PROMPTS[:2], "evil": [EVIL, PROMPTS[2]]}
    folder = tmp_path_factory.mktemp("shown")
    comparison = compare(
        pipe, students, prompts, pipeline_kwargs=call_kwargs(pipe), seeds=(0, 1),
        judge=brightness, output_dir=folder,
    )  # fmt: skip
    return comparison, folder


def test_files_hold_the_same_numbers(shown: tuple[Comparison, Path]) -> None:
    comparison, folder = shown

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "comparison.json").read_text()
    content = json.loads(text, parse_constant=refuse)
    mean = comparison.mean("second", "velocity_gap")
    assert mean is not None
    assert content["means"]["second"]["velocity_gap"]["value"] == mean.value
    assert len(content["prompt_by_prompt"]) == 3 * 2 * 4
    with (folder / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    records = comparison.records()
    assert [row["prompt"] for row in rows] == [record["prompt"] for record in records]
    of_second = [r["velocity_gap"] for r in records if r["encoder"] == "second"]
    assert [float(r["velocity_gap"]) for r in rows if r["encoder"] == "second"] == of_second
    with Image.open(folder / "comparison.png") as sheet:
        assert sheet.size == comparison.sheet().size
    lines = str(comparison).splitlines()
    assert lines[0].split() == ["teacher", "first", "<b>", "second"]
    (line,) = (line for line in lines if line.startswith("velocity gap (0"))
    assert line.endswith(str(mean)) and str(mean).startswith(f"{mean.value:.4g} ±")
    assert "<b>" not in comparison._repr_html_()


def test_the_page_holds_prompts_as_text_and_asks_for_nothing(
    shown: tuple[Comparison, Path],
) -> None:
    page = (shown[1] / "comparison.html").read_text()
    assert page.count(escape(EVIL)) == 2 + 6  # cells, and what its pictures are called
    assert EVIL not in page and "first <b>" not in page
    sources = re.findall(r'<(?:img|link|script|a|iframe)\b[^>]*?(?:src|href)="([^"]{0,20})', page)
    assert len(sources) == 3 * 2 * 4 and all(source.startswith("data:image/") for source in sources)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
def test_the_page_in_a_browser(shown: tuple[Comparison, Path], tmp_path: Path) -> None:
    """Pictures can be seen, a click sorts, and the prompt that looks like a script is text."""
    script = """<script>{
    const images = [...document.images];
    const seen = images.filter(image => image.complete && image.naturalWidth > 0).length;
    const heads = [...document.querySelectorAll("#prompts thead th")];
    const column = heads.findIndex(head => head.textContent === "second: velocity_gap");
    const values = () => [...document.querySelectorAll("#prompts tbody tr")]
      .map(row => row.cells[column].textContent);
    const before = values();
    heads[column].click();
    const up = values();
    heads[column].click();
    const texts = [...document.querySelectorAll("td.text")].map(cell => cell.textContent);
    const result = {seen, title: document.title, before, up, down: values(), texts};
    const out = document.createElement("pre");
    out.id = "result"; out.textContent = JSON.stringify(result);
    document.body.append(out);
    }</script>"""
    page = tmp_path / "page.html"
    page.write_text((shown[1] / "comparison.html").read_text().replace("</body>", script))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    (found,) = re.findall(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    result = json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert result["seen"] == 3 * 2 * 4 and result["title"].startswith("FluxPipeline")
    numbers = [float(value) for value in result["before"]]
    assert [float(value) for value in result["up"]] == sorted(numbers)
    assert [float(value) for value in result["down"]] == sorted(numbers, reverse=True)
    assert result["texts"].count(EVIL) == 2


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_flux()
    pipe.save_pretrained(tmp_path / "pipe")
    for seed in (1, 2):
        tiny_student(pipe, seed=seed).save_pretrained(tmp_path / str(seed) / "student")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    monkeypatch.chdir(tmp_path)
    kwargs = [f"{key}={json.dumps(value)}" for key, value in call_kwargs(pipe).items()]
    arguments = [
        "--pipeline", "pipe", "--students", "1/student", "2/student", "--prompts", "prompts.txt",
        "--out", "out", "--dtype", "float32", "--device", "cpu", *kwargs,
    ]  # fmt: skip
    main(arguments)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["teacher", "1/student", "2/student"]
    assert "weights on disk" in printed and (tmp_path / "out" / "comparison.html").exists()
    with pytest.raises(SystemExit, match="another students"):
        main([*arguments[:3], *arguments[4:]])

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("t5slim.evaluate.__main__.compare", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 130
    assert "goes on with what is finished in out" in capsys.readouterr().err
