"""What a run tells: the gap's report, scalars and trackers, pictures, summary, plot, model card."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import TOKEN
from huggingface_hub import ModelCard
from PIL import Image
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_student
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput

from t5slim import HubAccessError, SlimT5Encoder
from t5slim.distill import DistillConfig, VelocityGap, loop, report, train
from t5slim.distill.pipeline import teacher_of
from t5slim.distill.samples import Samples, side_by_side
from t5slim.distill.tracking import CLOCK_SCALARS, SCALARS
from t5slim.errors import ConfigError, DistillError

CONFIG: dict[str, Any] = {
    "max_steps": 6, "batch_size": 4, "reservoir_walks": 8, "warmup_steps": 2, "ema_decay": 0.9,
    "learning_rate": 5e-3, "eval_every": 2, "trackers": (),
    "objective": "velocity",
}  # fmt: skip


def config(**changes: Any) -> DistillConfig:
    return DistillConfig(**CONFIG | changes)


def run(pipe: Any, out: Path | None, student: Any = None, **arguments: Any) -> Any:
    """A short run with held-out prompts."""
    settings = {k: arguments.pop(k) for k in list(arguments) if k in DistillConfig.__annotations__}
    return train(
        pipe, student or tiny_student(pipe), PROMPTS[:4], config(**settings),
        pipeline_kwargs=call_kwargs(pipe), eval_prompts=PROMPTS[4:], output_dir=out, **arguments,
    )  # fmt: skip


# --- the gap's report ----------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    """The teacher, with its rows changed: `change(rows, ids)`."""

    def __init__(self, teacher: torch.nn.Module, change: Any) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(teacher)
        self.change = change

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> BaseModelOutput:
        rows = self.teacher(input_ids, attention_mask)[0]
        return BaseModelOutput(last_hidden_state=self.change(rows, input_ids))


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart_sigma", "stable_audio"])
def test_report_tells_where_a_gap_comes_from(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    measure = VelocityGap(pipe, PROMPTS[:4], pipeline_kwargs=call_kwargs(pipe), batch_size=3)
    teacher = teacher_of(pipe)

    def wrong_where(wanted: bool) -> Encoder:
        return Encoder(
            teacher,
            lambda rows, ids: torch.where(((ids != 0) == wanted)[..., None], rows + 1.0, rows),
        )

    perfect = measure.report(copy.deepcopy(teacher), parts=True)
    assert perfect.gap < 1e-8 and perfect.spread == pytest.approx(1.0, rel=1e-5)
    assert perfect.real_tokens is not None and perfect.real_tokens < 1e-8
    words = measure.report(wrong_where(True), parts=True)
    padding = measure.report(wrong_where(False), parts=True)
    assert words.real_tokens == pytest.approx(words.gap) and words.gap > 0.001
    assert words.padding is not None and words.padding < 1e-8
    assert padding.padding == pytest.approx(padding.gap, abs=1e-8)
    assert padding.real_tokens is not None and padding.real_tokens < 1e-8
    # Pipelines without a mask (FLUX.1, SD3) read the padding; PixArt and StableAudio don't.
    assert (padding.gap > 0.001) == (name in ("flux", "sd3"))

    student = tiny_student(pipe).train()
    whole = measure.report(student)
    assert whole.real_tokens is None and whole.padding is None and student.training
    assert whole.gap == measure(student)
    assert all(third is not None and third > 0 for third in whole.thirds)
    lowest, highest = min(whole.thirds), max(whole.thirds)  # type: ignore[type-var]
    assert lowest < whole.gap < highest  # a mean of them


def test_spread_is_0_if_all_prompts_are_told_the_same() -> None:
    for name in ("flux", "pixart_sigma"):
        pipe = TINY_PIPELINES[name]()
        teacher = teacher_of(pipe)
        measure = VelocityGap(pipe, PROMPTS[:4], pipeline_kwargs=call_kwargs(pipe))
        said = torch.randn(1, 12, 32)
        collapsed = Encoder(teacher, lambda rows, ids, said=said: said.expand_as(rows))
        assert measure.report(collapsed).spread == pytest.approx(0.0, abs=1e-6)
        halved = Encoder(teacher, lambda rows, ids: rows / 2 + 3)
        assert measure.report(halved).spread == pytest.approx(0.5, rel=1e-5)
    alone = VelocityGap(pipe, PROMPTS[:1], pipeline_kwargs=call_kwargs(pipe))
    assert alone.report(tiny_student(pipe)).spread is None


def test_a_third_without_a_step_has_no_gap() -> None:
    pipe = tiny_flux()
    measure = VelocityGap(pipe, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe, steps=1))
    found = measure.report(tiny_student(pipe))
    assert found.thirds == (found.gap, None, None)


# --- scalars -------------------------------------------------------------------------------------


def test_history_holds_named_scalars(tmp_path: Path) -> None:
    pipe = tiny_flux()
    result = run(pipe, tmp_path / "run")
    first, *_, last = result.history
    apart = {"velocity_gap_real_tokens", "velocity_gap_padding"}
    assert last.keys() == {"step", *SCALARS} and first.keys() == {"step", *SCALARS} - apart
    assert last["velocity_gap"] == result.gap and last["velocity_gap_raw"] == result.raw_gap
    assert first["velocity_gap"] != first["velocity_gap_raw"]
    assert 0 < last["grad_norm_mean"] <= last["grad_norm_max"]
    assert 0.05 < last["peak_memory_gib"] < 64
    before = result.history[-2]
    seconds = last["seconds"] - before["seconds"]
    assert last["prompts_per_second"] == pytest.approx(2 * 4 / seconds)
    rows = sum(last[k] - before[k] for k in ("teacher_rows", "student_rows"))
    assert last["denoiser_rows_per_second"] == pytest.approx(rows / seconds)
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history


def test_gradient_norms_are_those_of_the_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def note(*args: Any) -> torch.Tensor:
        norms.append(clip(*args).item())
        return torch.tensor(norms[-1])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note)
    result = run(tiny_flux(), None)
    for i, entry in enumerate(result.history):
        pair = norms[2 * i : 2 * i + 2]
        assert entry["grad_norm_mean"] == pytest.approx(sum(pair) / 2)
        assert entry["grad_norm_max"] == pytest.approx(max(pair))


def test_a_resumed_run_tells_the_same(tmp_path: Path) -> None:
    """Evaluations lie 4 updates apart and checkpoints 3: what was gathered between is kept."""
    arguments: Any = {
        "eval_every": 4, "checkpoint_every": 3, "keep_checkpoints": 9, "max_steps": 12,
        "samples_every": 5, "sample_prompts": 2, "resume": True,
    }  # fmt: skip
    whole = run(tiny_flux(), tmp_path / "a", **arguments)
    run(tiny_flux(), tmp_path / "b", **arguments)
    for name in ("00000009", "00000012"):
        (tmp_path / "b" / "checkpoints" / name / "state.json").write_text("damaged")
    again = run(tiny_flux(), tmp_path / "b", **arguments)

    def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in e.items() if k not in CLOCK_SCALARS} for e in history]

    assert timeless(again.history) == timeless(whole.history) and len(whole.history) == 3
    assert again.report == whole.report
    sheets = [
        {path.name: path.read_bytes() for path in (tmp_path / run_ / "samples").iterdir()}
        for run_ in "ab"
    ]
    assert sheets[0] == sheets[1] and sorted(sheets[0]) == [
        "00000005.png", "00000010.png", "00000012.png",
    ]  # fmt: skip


def test_what_is_told_changes_nothing_that_is_learned(tmp_path: Path) -> None:
    plain = train(
        tiny_flux(), tiny_student(tiny_flux()), PROMPTS[:4], config(eval_every=6),
        pipeline_kwargs=call_kwargs(tiny_flux()),
    )  # fmt: skip
    told = run(tiny_flux(), tmp_path / "run", eval_every=1, samples_every=2)
    for a, b in zip(plain.student.parameters(), told.student.parameters(), strict=True):
        assert torch.equal(a, b)


# --- progress ------------------------------------------------------------------------------------


def test_the_bars_eta_is_true_to_max_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts to the update that the time will suffice for, at the average speed so far."""
    totals: list[int] = []

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            assert self.smoothing == 0  # the ETA is the rest at the average speed
            totals.append(self.total)
            return super().update(n)

    monkeypatch.setattr(loop, "tqdm", Bar)
    result = train(
        tiny_flux(), tiny_student(tiny_flux()), PROMPTS[:4],
        config(max_steps=10**6, max_seconds=1.0, eval_every=1),
        pipeline_kwargs=call_kwargs(tiny_flux()),
    )  # fmt: skip
    seconds = [entry["seconds"] for entry in result.history]
    expected = [max(n, round(n * 1.0 / s)) for n, s in enumerate(seconds, start=1)]
    assert totals == expected and totals[-1] == result.steps


def test_the_bar_shows_the_loss_before_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            shown.append(self.postfix)
            return super().update(n)

    monkeypatch.setattr(loop, "tqdm", Bar)
    run(tiny_flux(), None, eval_every=100, max_steps=3)
    assert len(shown) == 3 and float(shown[0].removeprefix("loss=")) > 0
    assert "gap=" in shown[2]


# --- trackers ------------------------------------------------------------------------------------


def tensorboard_of(folder: Path) -> Any:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "t5slim"))
    events.Reload()
    return events


def test_tensorboard_by_default(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pipe = tiny_flux()
    students = [tiny_student(pipe, d_model=w) for w in (8, 16)]
    results = run(pipe, tmp_path, students, trackers=None, samples_every=6, sample_prompts=1)
    events = tensorboard_of(tmp_path)
    names = set(events.Tags()["scalars"])
    assert names == {f"{group}/{k}/student-{i}" for k, group in SCALARS.items() for i in (0, 1)}
    for i, result in enumerate(results):
        shown = events.Scalars(f"lower_is_better/velocity_gap/student-{i}")
        assert [event.step for event in shown] == [2, 4, 6]
        expected = [entry["velocity_gap"] for entry in result.history]
        assert [event.value for event in shown] == pytest.approx(expected)
        (picture,) = events.Images(f"samples/student-{i}")
        saved = Image.open(tmp_path / f"student-{i}" / "samples" / "00000006.png")
        assert (picture.width, picture.height, picture.step) == (*saved.size, 6)


def test_tensorboard_forgets_what_a_resumed_run_makes_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    arguments: Any = {
        "trackers": ("tensorboard",), "resume": True, "checkpoint_every": 3, "keep_checkpoints": 9,
    }  # fmt: skip
    run(tiny_flux(), tmp_path, **arguments)
    (tmp_path / "checkpoints" / "00000006" / "state.json").write_text("damaged")
    run(tiny_flux(), tmp_path, **arguments)
    shown = tensorboard_of(tmp_path).Scalars("lower_is_better/loss")
    assert [event.step for event in shown] == [2, 4, 6]


def test_no_tracker_is_started_where_there_is_no_folder() -> None:
    assert len(run(tiny_flux(), None, trackers=None).history) == 3


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"trackers": ("tensorbord",)}, ConfigError, "'tensorbord'.*expected names among"),
        ({"trackers": "mlflow"}, DistillError, "isn't installed: pip install mlflow"),
        ({"samples_every": -1}, ConfigError, "at least 0"),
        ({"samples_every": 2, "out": None}, DistillError, "needs eval_prompts.* output_dir"),
        ({"push_to_hub": True, "out": None}, DistillError, "pass push_to_hub='owner/name'"),
    ],
)
def test_bad_settings_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    pipe = tiny_flux()
    out = changes.pop("out", tmp_path / "run")
    with pytest.raises(error, match=message):
        run(pipe, out, **changes)
    assert not (tmp_path / "run").exists()


# --- sample pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "sd3", "chroma", "pixart_sigma"])
def test_samples_are_the_pipelines_own_pictures(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    kwargs = call_kwargs(pipe)
    before = dict(pipe.components)
    samples = Samples(pipe, PROMPTS[:2], kwargs, seed=5)
    student = tiny_student(pipe).train()
    sheet = samples.sheet(student)
    assert sheet.mode == "RGB" and student.training and dict(pipe.components) == before
    assert samples.sheet(student).tobytes() == sheet.tobytes()
    for i, prompt in enumerate(PROMPTS[:2]):
        generator = [torch.Generator().manual_seed(5 + i)]
        picture = pipe([prompt], generator=generator, **kwargs).images[0]
        assert picture.tobytes() == samples._teacher[i].tobytes()
    teacher = samples.sheet(copy.deepcopy(teacher_of(pipe)))
    left, right = (teacher.crop((x, 0, x + 192, teacher.height)) for x in (12, 216))
    words = 2 * 28  # of the header and the first prompt
    assert left.crop((0, words, 192, 200)).tobytes() == right.crop((0, words, 192, 200)).tobytes()
    assert (
        sheet.crop((216, words, 408, 200)).tobytes() != sheet.crop((12, words, 204, 200)).tobytes()
    )


def test_sheets_hold_pictures_of_any_size() -> None:
    for side, expected in ((16, 192), (64, 192), (300, 300), (1024, 512)):
        picture = Image.new("RGB", (side, side // 2), "red")
        sheet = side_by_side(["word " * 60, "x"], {"a": [picture] * 2, "b": [picture] * 2})
        assert sheet.width == 12 + 2 * (expected + 12)
        assert sum(n for n, colour in sheet.getcolors(10**6) if colour == (255, 0, 0)) == (
            4 * expected * (expected // 2)
        )


@pytest.mark.parametrize("name", ["ltx", "stable_audio"])
def test_of_videos_and_sounds_there_are_no_samples(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(TINY_PIPELINES[name](), tmp_path, samples_every=2, max_steps=2)
    assert "makes no pictures: there will be no samples" in caplog.text
    assert not (tmp_path / "samples").exists()


def test_samples_of_a_pipeline_without_a_decoder(tmp_path: Path) -> None:
    pipe = tiny_flux()
    pipe.register_modules(vae=None)
    with pytest.raises(DistillError, match="vae is None: load the pipeline with it"):
        run(pipe, tmp_path, samples_every=2)
    assert not list(tmp_path.iterdir())


# --- what is left at the end ---------------------------------------------------------------------


def test_summary_plot_and_card(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pipe = tiny_flux()
    pipe.register_to_config(_name_or_path="someone/tiny-flux")
    commit = "0123456789abcdef0123456789abcdef01234567"
    pipe.transformer.register_to_config(
        _name_or_path=f"/home/me/.cache/models--someone--tiny-flux/snapshots/{commit}/transformer"
    )
    pipe.text_encoder_2.config.name_or_path = "/home/me/secret"
    student = tiny_student(pipe, base_model="google/flan-t5-small", base_model_revision="abc123")
    out = tmp_path / "my-student"
    result = run(pipe, out, student, samples_every=3)
    table = str(result)
    for text in (
        f"{result.gap:.4f}",
        "last weights",
        "third",
        "padding",
        "spread",
        "GiB",
        str(out),
    ):
        assert text in table
    assert "SlimT5Encoder" not in repr(result)

    with Image.open(out / "run.png") as plot:
        plot.load()
        assert plot.size == (1500, 700)
    assert (out / "samples.png").read_bytes() == (out / "samples" / "00000006.png").read_bytes()
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "google/flan-t5-small" and "t5slim" in card.data.tags
    facts = json.loads((out / "distillation.json").read_text())
    for text in (
        "flan-t5-small) at abc123", f"tiny-flux) at {commit}", "FluxPipeline",
        "num_inference_steps=3",
        facts["prompts"]["sha256"], facts["eval_prompts"]["sha256"], f"{result.gap:.4f}",
        '"learning_rate": 0.005', "diffusers 0.", "![The course of the run](run.png)",
        "![The teacher and the student](samples.png)", "non-commercial", 'pipe, "my-student"',
    ):  # fmt: skip
        assert text in card.text, text
    assert "secret" not in card.text and str(tmp_path) not in card.text
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def test_words_in_the_card_stay(tmp_path: Path) -> None:
    run(tiny_flux(), tmp_path, max_steps=4)
    file = tmp_path / "README.md"
    file.write_text(file.read_text().replace("## Licence", "## My own words\n\n## Licence"))
    (tmp_path / "checkpoints" / "00000004" / "state.json").write_text("damaged")
    before = file.read_text()
    result = run(tiny_flux(), tmp_path, max_steps=4, resume=True)
    after = file.read_text()
    assert "## My own words" in after and f"{result.gap:.4f}" in after
    assert after.count("## Distillation") == before.count("## Distillation") == 1


def test_without_matplotlib_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not report.plot_run([{"step": 1, "loss": 1.0}], tmp_path / "run.png")
    assert "pip install 't5slim[train]'" in caplog.text and not list(tmp_path.iterdir())


def test_a_finished_run_is_pushed(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pipe = tiny_flux()
    result = run(pipe, tmp_path / "mine", push_to_hub=True, samples_every=6)
    files = hub.repositories["me/mine"].files("main")
    assert files.keys() == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "run.png", "samples.png",
    }  # fmt: skip
    assert f"{result.gap:.4f}" in files["README.md"].decode()
    assert 'patch_pipeline(pipe, "me/mine")' in files["README.md"].decode()
    Image.open(io.BytesIO(files["run.png"])).verify()
    loaded = SlimT5Encoder.from_pretrained("me/mine")
    for a, b in zip(loaded.parameters(), result.student.parameters(), strict=True):
        torch.testing.assert_close(a, b)

    students = [tiny_student(pipe, d_model=w) for w in (8, 16)]
    series = run(pipe, None, students, push_to_hub="me/mine")
    for i, one in enumerate(series):
        text = hub.repositories[f"me/mine-{i}"].files("main")["README.md"].decode()
        assert f"{one.gap:.4f}" in text


def test_pushing_is_refused_before_the_training(hub: Any, tmp_path: Path) -> None:
    pipe = tiny_flux()
    calls: list[Any] = []
    pipe.transformer.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(HubAccessError, match=r"'me/mine' can't be made.*hf auth login"):
        run(pipe, tmp_path / "mine", push_to_hub="me/mine")
    assert not calls and not (tmp_path / "mine").exists()


def test_a_push_that_fails_says_where_the_student_is(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pipe = tiny_flux()
    updates = iter(range(10**6))

    def log_out(*_: Any) -> None:
        if next(updates) == 5:
            monkeypatch.setenv("HF_TOKEN", "hf_wrong")

    pipe.transformer.register_forward_hook(log_out)
    with pytest.raises(DistillError, match=r"trained, but couldn't.*hf upload me/mine .*/mine \. "):
        run(pipe, tmp_path / "mine", push_to_hub=True)
    SlimT5Encoder.from_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").exists()
