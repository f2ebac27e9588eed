"""What a run leaves: history, trackers, image grids, plot, metadata, card, and what it uploads."""

import io
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.hub import TOKEN
from helpers.training import assert_same, calls_of, contents, run, spawn, weights
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_student

from t5slim import DistillError, HubAccessError, SlimT5Encoder, patch_pipeline, unpatch_pipeline
from t5slim.distill import DistillResult, report
from t5slim.distill.report import image_grid

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPORTED: dict[str, Any] = {
    "max_steps": 6, "eval_every": 2, "eval_prompts": PROMPTS[4:], "samples_every": 4, "seed": 5,
}  # fmt: skip
ALWAYS = {
    "step", "loss", "learning_rate", "skipped", "seconds", "teacher_samples", "student_samples",
}  # fmt: skip
MEASURED = {"velocity_gap"} | {f"velocity_gap_{figure}" for figure in ("low", "high", "median")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, DistillResult]:
    """The pipeline and the result of a run that reports all that it can."""
    pipe = tiny_flux()
    pipe.transformer.register_to_config(
        _name_or_path=f"/home/me/.cache/models--someone--tiny-flux/snapshots/{COMMIT}/transformer"
    )
    pipe.text_encoder_2.config.name_or_path = "/home/me/secret"
    student = tiny_student(pipe, base_model="google/flan-t5-small", base_model_revision="abc123")
    out = tmp_path_factory.mktemp("runs") / "my-student"
    return pipe, run(pipe, student, output_dir=out, trackers=("tensorboard",), **REPORTED)


def test_history_and_trackers(finished: Any) -> None:
    _, result = finished
    last = result.history[-1]
    assert [entry["step"] for entry in result.history] == [2, 4, 6]
    assert last.keys() == ALWAYS | MEASURED
    assert (last["velocity_gap"], last["loss"]) == (result.gap, result.loss)
    assert (last["teacher_samples"], last["student_samples"]) == (24, 24)
    lines = (result.output_dir / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    events = EventAccumulator(str(result.output_dir / "logs" / "t5slim"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == (ALWAYS | MEASURED) - {"step"}
    shown = [(event.step, event.value) for event in events.Scalars("velocity_gap")]
    assert shown[-1] == (6, pytest.approx(result.gap))


def test_what_is_reported_changes_nothing_that_is_learned(finished: Any) -> None:
    plain = run(tiny_flux(), max_steps=6, seed=5)
    assert_same(weights(plain.student), weights(finished[1].student))
    assert plain.history[-1].keys() == ALWAYS


def test_samples_are_the_pipelines_own_images(finished: Any) -> None:
    pipe, result = finished
    files = sorted(result.output_dir.glob("samples-*"))
    assert [file.name for file in files] == ["samples-00000004.png", "samples-00000006.png"]

    def images() -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
        return pipe(PROMPTS[4:], generator=generators, **call_kwargs(pipe)).images

    columns = {"teacher": images()}
    patch_pipeline(pipe, result.student, keep_teacher=True)
    columns["student"] = images()
    unpatch_pipeline(pipe)
    assert columns["teacher"][0].tobytes() != columns["student"][0].tobytes()
    grids = [np.int16(image) for image in (Image.open(files[1]), image_grid(PROMPTS[4:], columns))]
    # They are generated one by one, and some kernels round otherwise than in a batch of two.
    assert np.abs(grids[0] - grids[1]).max() <= 1


def test_of_videos_there_are_no_samples(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="LTXPipeline makes no images"):
        run(TINY_PIPELINES["ltx"](), output_dir=tmp_path, **REPORTED)


def test_folder_and_result(finished: Any) -> None:
    _, result = finished
    out = result.output_dir
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "history.jsonl", "distillation.json", "checkpoints",
        "README.md", "run.png", "samples-00000004.png", "samples-00000006.png", "logs",
    }  # fmt: skip
    assert_same(weights(SlimT5Encoder.from_pretrained(out)), weights(result.student))
    facts = json.loads((out / "distillation.json").read_text())
    assert facts["identity"]["pipeline_class"] == "FluxPipeline"
    assert facts["config"]["max_steps"] == 6 and facts["result"]["gap"] == result.gap
    for text in (f"{result.gap:.4f} (95% interval ", "student_samples"):
        assert text in str(result)
    assert "SlimT5Encoder" not in repr(result) == str(result)
    assert "tensor" not in repr(result.report)
    with Image.open(out / "run.png") as plot:
        plot.load()
        assert plot.size == (1200, 450)


def test_card(finished: Any) -> None:
    pipe, result = finished
    file = result.output_dir / "README.md"
    card = ModelCard.load(file)
    assert card.data.base_model == "google/flan-t5-small" and "t5slim" in card.data.tags
    (measured,) = card.data.eval_results
    assert measured.metric_value == round(result.gap, 5) and measured.metric_type == "velocity-gap"
    assert measured.dataset_name == "2 held-out prompts" and card.data.license is None
    for text in (
        "flan-t5-small) at abc123", f"FluxPipeline of someone/tiny-flux at {COMMIT}",
        '"num_inference_steps": 3', '"sha256": ', f"{result.gap:.4f}", '"learning_rate": 0.005',
        '"diffusers": "0.', "![run.png](run.png)", "![samples-00000006.png](samples-00000006.png)",
    ):  # fmt: skip
        assert text in card.text, text
    assert "secret" not in card.text and str(file.parent) not in card.text
    file.write_text(file.read_text().replace("## Licence", "## My own words\n\n## Licence"))
    run(pipe, result.student, output_dir=file.parent, resume=True, **REPORTED)
    assert "## My own words" in file.read_text() and file.read_text().count("## Distillation") == 1


def test_the_licence_of_flux_dev_is_that_of_its_students(tmp_path: Path) -> None:
    pipe = tiny_flux()
    pipe.transformer.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    run(pipe, output_dir=tmp_path, max_steps=1)
    card = ModelCard.load(tmp_path / "README.md").data
    assert (card.license, card.license_name) == ("other", "flux-1-dev-non-commercial-license")


def test_side_jobs_that_fail_dont_cost_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for place, name in ((Accelerator, "log"), (report, "image_grid"), (ModelCard, "from_template")):
        monkeypatch.setattr(place, name, fail)
    result = run(tiny_flux(), output_dir=tmp_path, **REPORTED)
    for job in ("trackers", "image grid", "model card", "pip install 't5slim[train]'"):
        assert job in caplog.text
    assert_same(weights(SlimT5Encoder.from_pretrained(tmp_path)), weights(result.student))


def test_a_folder_with_obstacles_is_trained_in(tmp_path: Path, caplog: Any) -> None:
    """Somebody's own card, though it is no YAML; and a file where checkpoints go."""
    card = "---\ntags: [broken\n---\n# Mine"
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "checkpoints").touch()
    for _ in range(2):
        result = run(tiny_flux(), output_dir=tmp_path, resume=True, **REPORTED)
        assert "The last checkpoint failed" in caplog.text
        assert (tmp_path / "README.md").read_text() == card and len(result.history) == 3
    assert_same(weights(SlimT5Encoder.from_pretrained(tmp_path)), weights(result.student))
    assert "velocity_gap" in (tmp_path / "history.jsonl").read_text().splitlines()[-1]


def test_a_last_evaluation_that_fails_costs_nothing(tmp_path: Path, caplog: Any) -> None:
    student, old = tiny_student(tiny_flux()), tmp_path / "model.safetensors"
    student.register_forward_hook(lambda m, *_: 1 / 0 if old.exists() and not m.training else None)
    often = {"max_steps": 2, "eval_every": 1, "eval_prompts": PROMPTS[:1]}
    result = run(tiny_flux(), student, output_dir=tmp_path, **often)
    assert "The last evaluation failed: ZeroDivisionError" in caplog.text and result.gap is None
    assert_same(weights(SlimT5Encoder.from_pretrained(tmp_path)), weights(student))


def test_values_are_known_by_their_content_in_every_process(tmp_path: Path) -> None:
    contents(tmp_path / "here")
    spawn(contents, tmp_path / "there").join()  # which has other addresses, and orders of sets
    here, there = (json.loads((tmp_path / name).read_text()) for name in ("here", "there"))
    assert here == there and len({*map(json.dumps, here)}) == len(here)


@pytest.mark.parametrize(
    "value", [(i for i in "a"), threading.Lock(), torch.ones(1).to("meta"), lambda scale: scale]
)
def test_a_value_without_known_content_is_refused(value: Any) -> None:
    kwargs = call_kwargs(tiny_flux()) | {"joint_attention_kwargs": {"x": [value]}}
    with pytest.raises(DistillError, match="pipeline_kwargs: expected plain values"):
        run(tiny_flux(), pipeline_kwargs=kwargs)


def test_a_finished_run_is_uploaded(hub: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = run(tiny_flux(), output_dir=tmp_path / "out", push_to_hub="mine", **REPORTED)
    files = hub.repositories["me/mine"].files("main")
    assert files.keys() == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "run.png",
        "samples-00000006.png",
    }  # fmt: skip
    card = files["README.md"].decode()
    assert f"{result.gap:.4f}" in card and 'patch_pipeline(pipe, "me/mine")' in card
    Image.open(io.BytesIO(files["run.png"])).verify()
    loaded = SlimT5Encoder.from_pretrained("me/mine").parameters()
    assert all(map(torch.equal, loaded, result.student.parameters()))
    run(tiny_flux(), push_to_hub="me/other")  # without a folder
    assert "model.safetensors" in hub.repositories["me/other"].files("main")


def test_a_hub_that_refuses(hub: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Before the training, that is not begun; after it, the student is kept."""
    pipe, arguments = tiny_flux(), {"output_dir": tmp_path / "out", "push_to_hub": "me/mine"}
    calls = calls_of(pipe.transformer)
    with pytest.raises(HubAccessError, match=r"me/mine.*401"):
        run(pipe, **arguments)
    assert not calls and not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pipe.transformer.register_forward_hook(lambda *_: monkeypatch.setenv("HF_TOKEN", "hf_wrong"))
    with pytest.raises(HubAccessError, match=r"me/mine.*401"):
        run(pipe, **arguments)
    SlimT5Encoder.from_pretrained(tmp_path / "out")
    assert "## Distillation" in (tmp_path / "out" / "README.md").read_text()
