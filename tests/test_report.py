"""What a run leaves: history, trackers, image grids, plot, metadata, card, and what it uploads."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub import TOKEN
from helpers.training import calls_of, history_of, resumable, run, weights
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_student

from t5slim import HubAccessError, SlimT5Encoder, patch_pipeline
from t5slim.distill.report import image_grid
from t5slim.errors import DistillError

ALWAYS = {
    "step", "loss", "learning_rate", "skipped", "seconds", "teacher_samples", "student_samples",
    "peak_memory_gib", "grad_norm_mean", "grad_norm_max", "prompts_per_second",
}  # fmt: skip
MEASURED = {
    "velocity_gap", "velocity_gap_without_ema", "velocity_gap_first_third",
    "velocity_gap_middle_third", "velocity_gap_last_third", "embedding_spread",
}  # fmt: skip
IN_THE_END = {"velocity_gap_real_tokens", "velocity_gap_padding"}


def reported(pipe: Any, out: Path | None, student: Any = None, **changes: Any) -> Any:
    """A short run with held-out prompts."""
    settings = {"max_steps": 6, "eval_every": 2, "eval_prompts": PROMPTS[4:], "output_dir": out}
    return run(pipe, student, **settings | changes)


# --- history -------------------------------------------------------------------------------------


def test_history(tmp_path: Path) -> None:
    result = reported(tiny_flux(), tmp_path)
    first, before, last = result.history
    assert [entry["step"] for entry in result.history] == [2, 4, 6]
    assert first.keys() == ALWAYS | MEASURED and last.keys() == ALWAYS | MEASURED | IN_THE_END
    assert last["velocity_gap"] == result.gap != result.gap_without_ema
    assert last["velocity_gap_without_ema"] == result.gap_without_ema
    assert last["loss"] == result.loss and last["seconds"] == result.seconds
    assert 0 < last["grad_norm_mean"] <= last["grad_norm_max"]
    assert 0.05 < last["peak_memory_gib"] < 64
    assert (last["teacher_samples"], last["student_samples"]) == (24, 24)
    seconds = last["seconds"] - before["seconds"]
    assert last["prompts_per_second"] == pytest.approx(2 * 4 / seconds)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert reported(tiny_flux(), None, eval_prompts=None).history[-1].keys() == ALWAYS


def test_what_is_reported_changes_nothing_that_is_learned(tmp_path: Path) -> None:
    plain = run(tiny_flux(), max_steps=4)
    full = reported(tiny_flux(), tmp_path, max_steps=4, eval_every=1, samples_every=2)
    for one, other in zip(plain.student.parameters(), full.student.parameters(), strict=True):
        assert torch.equal(one, other)


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "logs" / "t5slim"))
    events.Reload()
    return events


def test_tensorboard_is_the_default_tracker(tmp_path: Path) -> None:
    result = reported(tiny_flux(), tmp_path, trackers=None, samples_every=6)
    events = events_of(tmp_path)
    assert set(events.Tags()["scalars"]) == (ALWAYS | MEASURED | IN_THE_END) - {"step"}
    shown = events.Scalars("velocity_gap")
    assert [event.step for event in shown] == [2, 4, 6]
    expected = [entry["velocity_gap"] for entry in result.history]
    assert [event.value for event in shown] == pytest.approx(expected)
    (image,) = events.Images("samples")
    saved = Image.open(tmp_path / "samples" / "00000006.png")
    assert (image.width, image.height, image.step) == (*saved.size, 6)
    assert reported(tiny_flux(), None, trackers=None).steps == 6  # nowhere to write


@pytest.mark.parametrize("lost", [1, 2], ids=["the last checkpoint", "all checkpoints"])
def test_tensorboard_forgets_what_a_resumed_run_makes_again(lost: int, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "trackers": ("tensorboard",), "checkpoint_every": 3, "max_steps": 6, "eval_every": 2,
    }  # fmt: skip
    resumable(tmp_path, **changes)
    for name in ("00000006", "00000003")[:lost]:
        (tmp_path / "checkpoints" / name / "state.json").write_text("damaged")
    resumable(tmp_path, **changes)
    assert [event.step for event in events_of(tmp_path).Scalars("loss")] == [2, 4, 6]
    assert [entry["step"] for entry in history_of(tmp_path)] == [2, 4, 6]


# --- image grids ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "pixart_sigma"])
def test_samples_are_the_pipelines_own_images(name: str, tmp_path: Path) -> None:
    pipe = TINY_PIPELINES[name]()
    before = dict(pipe.components)
    kwargs = call_kwargs(pipe)
    student = reported(
        pipe, tmp_path, samples_every=4, seed=5, ema_decay=0.0, pipeline_kwargs=kwargs
    ).student
    assert dict(pipe.components) == before
    assert [p.name for p in sorted((tmp_path / "samples").iterdir())] == [
        "00000004.png", "00000006.png",
    ]  # fmt: skip

    def images() -> list[Image.Image]:
        return [
            pipe([prompt], generator=torch.Generator().manual_seed(5 + i), **kwargs).images[0]
            for i, prompt in enumerate(PROMPTS[4:])
        ]

    columns = {"teacher": images()}
    patch_pipeline(pipe, student)
    columns["student, update 6"] = images()
    expected = image_grid(PROMPTS[4:], columns)
    for file in ("samples/00000006.png", "samples.png"):
        assert Image.open(tmp_path / file).tobytes() == expected.tobytes()
    assert columns["teacher"][0].tobytes() != columns["student, update 6"][0].tobytes()


def test_of_videos_there_are_no_samples(tmp_path: Path) -> None:
    reported(TINY_PIPELINES["ltx"](), tmp_path, samples_every=2, max_steps=2)
    assert not (tmp_path / "samples").exists()


# --- in the end ----------------------------------------------------------------------------------


def test_folder_table_plot_and_card(tmp_path: Path) -> None:
    pipe = tiny_flux()
    commit = "0123456789abcdef0123456789abcdef01234567"
    pipe.transformer.register_to_config(
        _name_or_path=f"/home/me/.cache/models--someone--tiny-flux/snapshots/{commit}/transformer"
    )
    pipe.text_encoder_2.config.name_or_path = "/home/me/secret"
    student = tiny_student(pipe, base_model="google/flan-t5-small", base_model_revision="abc123")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([PROMPTS[0] + "  ", "", *PROMPTS[1:4]]) + "\n")
    out = tmp_path / "runs" / "my-student"
    result = reported(pipe, out, student, prompts=prompts, samples_every=3)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "history.jsonl", "distillation.json", "checkpoints",
        "README.md", "run.png", "samples.png", "samples",
    }  # fmt: skip
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    loaded = weights(SlimT5Encoder.from_pretrained(out))
    assert all(torch.equal(loaded[name], t) for name, t in student.state_dict().items())
    facts = json.loads((out / "distillation.json").read_text())
    assert facts["pipeline_class"] == "FluxPipeline" and facts["prompts"]["prompts"] == 4
    assert facts["config"]["max_steps"] == 6 and facts["result"]["gap"] == result.gap
    for text in (f"{result.gap:.4f}", "without EMA", "third", "spread", "GiB", str(out)):
        assert text in str(result)
    assert "SlimT5Encoder" not in repr(result)
    with Image.open(out / "run.png") as plot:
        plot.load()
        assert plot.size == (1500, 700)
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "google/flan-t5-small" and "t5slim" in card.data.tags
    for text in (
        "flan-t5-small) at abc123", f"FluxPipeline of someone/tiny-flux at {commit}",
        "num_inference_steps=3", facts["prompts"]["sha256"], facts["eval_prompts"]["sha256"],
        f"{result.gap:.4f}", '"learning_rate": 0.005', "diffusers 0.", "![run.png](run.png)",
        "![samples.png](samples.png)",
    ):  # fmt: skip
        assert text in card.text, text
    assert "secret" not in card.text and str(tmp_path) not in card.text


def test_text_that_was_added_to_the_card_stays(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"output_dir": tmp_path, "resume": True}
    run(tiny_flux(), **arguments)
    file = tmp_path / "README.md"
    file.write_text(file.read_text().replace("## Licence", "## My own words\n\n## Licence"))
    run(tiny_flux(), **arguments)
    assert "## My own words" in file.read_text() and file.read_text().count("## Distillation") == 1


def test_a_card_that_cant_be_written_doesnt_lose_the_student(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.png").mkdir()
    assert run(tiny_flux(), output_dir=tmp_path).steps == 3
    assert "The plot of the run" in caplog.text and "failed" in caplog.text
    SlimT5Encoder.from_pretrained(tmp_path)


def test_a_finished_run_is_uploaded(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = reported(tiny_flux(), tmp_path / "mine", push_to_hub=True, samples_every=6)
    files = hub.repositories["me/mine"].files("main")
    assert files.keys() == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "run.png", "samples.png",
    }  # fmt: skip
    card = files["README.md"].decode()
    assert f"{result.gap:.4f}" in card and 'patch_pipeline(pipe, "me/mine")' in card
    Image.open(io.BytesIO(files["run.png"])).verify()
    loaded = SlimT5Encoder.from_pretrained("me/mine").parameters()
    assert all(map(torch.equal, loaded, result.student.parameters()))
    run(tiny_flux(), push_to_hub="me/other")  # without a folder
    assert "model.safetensors" in hub.repositories["me/other"].files("main")


def test_a_hub_that_refuses_is_noticed_before_the_training(hub: Any, tmp_path: Path) -> None:
    pipe = tiny_flux()
    calls = calls_of(pipe.transformer)
    with pytest.raises(HubAccessError, match=r"me/mine.*hf auth login"):
        run(pipe, output_dir=tmp_path / "mine", push_to_hub="me/mine")
    assert not calls and not (tmp_path / "mine").exists()


def test_an_upload_that_fails_keeps_the_student(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pipe = tiny_flux()
    pipe.transformer.register_forward_hook(lambda *_: monkeypatch.setenv("HF_TOKEN", "hf_wrong"))
    with pytest.raises(DistillError, match=r"trained, but couldn't.*hf upload me/mine .*/mine \. "):
        run(pipe, output_dir=tmp_path / "mine", push_to_hub=True)
    SlimT5Encoder.from_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").exists()
