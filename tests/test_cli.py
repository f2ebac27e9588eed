"""Runs from YAML files: what a file may say, what is planned of it, and that it is what happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tiny import PROMPTS, call_kwargs, tiny_flux

from t5slim import SlimT5Encoder
from t5slim.distill import DistillConfig, DistillRun, PromptSchedule
from t5slim.distill.__main__ import main
from t5slim.distill.prompts import prompt_source
from t5slim.distill.sources import PipelineSource, load_student
from t5slim.errors import ConfigError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
STUDENT = {
    "preset": "small", "vocab_size": 256, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1,
    "num_heads": 2, "project_out_dim": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_flux().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def content(pipeline: str, tmp_path: Path) -> dict[str, Any]:
    """What a file of a small run holds."""
    return {
        "pipeline": {"name_or_path": pipeline},
        "student": dict(STUDENT),
        "prompts": {"generator": "compositional"},
        "eval_prompts": PROMPTS[:2],
        "pipeline_kwargs": call_kwargs(tiny_flux()),
        "config": {
            "max_steps": 6, "batch_size": 2, "reservoir_walks": 8, "eval_every": 3,
            "checkpoint_every": 2, "trackers": [],
        },
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip


@pytest.fixture
def file(content: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


# --- what a file may say ---


def test_numbers_and_words_mean_what_they_say(file: str) -> None:
    run = DistillRun.load(
        file,
        ["config.learning_rate=1e-4", "config.mixed_precision=no", "config.max_seconds=null",
         "config.zero_pooled=true", "config.guidance_scales=[2, 3.5]", "resume=True",
         "config.objective={velocity: 1, embedding: {until: 3}}", "pipeline.revision=2024-01-02"],
    )  # fmt: skip
    config = run.config
    assert (config.learning_rate, config.mixed_precision, config.max_seconds) == (1e-4, "no", None)
    assert config.zero_pooled is run.resume is True
    assert config.guidance_scales == (2, 3.5)
    assert config.terms["embedding"].until == 3
    assert run.pipeline.revision == "2024-01-02"  # no date


def test_what_is_saved_is_read_as_the_same(file: str, tmp_path: Path) -> None:
    objective = "config.objective={velocity: 1, embedding: {until: 3}}"
    run = DistillRun.load(file, ["config.learning_rate=1e-7", objective])
    saved = tmp_path / "saved.yaml"
    saved.write_text(run.to_yaml())
    assert DistillRun.load(saved) == run
    assert yaml.safe_load(saved.read_text())["config"]["learning_rate"] == 1e-7  # for others, too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("promts=x", r"unknown key 'promts'. Did you mean 'prompts'\?"),
        ("config.max_step=9", r"config: unknown key 'max_step'. Did you mean 'max_steps'\?"),
        ("pipeline.revison=x", r"pipeline: unknown key 'revison'. Did you mean 'revision'\?"),
        (
            "student.d_modle=8",
            r"unknown key 'd_modle' in a student's config. Did you mean 'd_model'",
        ),
        ("config.max_steps=many", "config: max_steps is 'many'; expected an integer above 0"),
        ("config.trajectory_weights=3", "config: .*not iterable"),
        ("config=fast", "config is 'fast'; expected keys and values"),
        ("pipeline.dtype=bf16", "pipeline: dtype is 'bf16'; expected bfloat16, float16 or float32"),
        ("pipeline.dtype={vae: int8}", "dtype is 'int8'"),
        ("pipeline.offload=disk", "offload is 'disk'; expected model or sequential"),
        ("pipeline.local_files_only=no", "local_files_only is 'no'; expected true or false"),
        ("pipeline.name_or_path=7", "name_or_path is 7; expected text"),
        ("pipeline.quantization={backend: x}", "quantization: unknown key 'backend'"),
        ("pipeline={}", "pipeline: the key 'name_or_path' is missing"),
        ("student={from_t5: a, preset: base}", "expected one of the keys from_pretrained, from_t5"),
        ("student={from_t5: a, projection_dims: 3}", "Did you mean 'projection_dim'"),
        ("student=[]", "student is an empty list"),
        ("student={from_pretrained: 3}", "from_pretrained is 3; expected a folder or a Hub id"),
        ("eval_prompts={held_out: 0.1, number: 3}", "eval_prompts: unknown key 'number'"),
        ("prompts=null", "prompts is null"),
        ("prompts=3", "prompts is 3; expected a file, a list or a mapping"),
        ("pipeline_kwargs=[1]", r"pipeline_kwargs is \[1\]"),
        ("output_dir=null", "output_dir is None; expected the path of a folder"),
        ("resume=maybe", "resume is 'maybe'; expected true or false"),
        ("max_steps", "'max_steps'; expected key=value"),
        ("config.max_steps.x=3", "'x' leads nowhere in 6"),
        ("config.max_steps={", "The value of config.max_steps is no valid YAML"),
    ],
)
def test_mistakes_are_named(file: str, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillRun.load(file, [change])


def test_mistakes_of_the_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"run.yaml' can't be read"):
        DistillRun.load(path)
    path.write_text("output_dir: a\noutput_dir: b\n")
    with pytest.raises(ConfigError, match=r"found the key 'output_dir' twice\n.*line 1"):
        DistillRun.load(path)
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="holds a list; expected keys and values"):
        DistillRun.load(path)
    path.write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="no valid YAML"):
        DistillRun.load(path)


def test_students_of_each_kind(pipeline: str, tmp_path: Path) -> None:
    fresh = load_student(STUDENT, seed=3)
    again, other = load_student(STUDENT, seed=3), load_student(STUDENT, seed=4)
    assert torch.equal(fresh.final_projection[0].weight, again.final_projection[0].weight)
    assert not torch.equal(fresh.final_projection[0].weight, other.final_projection[0].weight)
    fresh.save_pretrained(tmp_path)
    loaded = load_student({"from_pretrained": str(tmp_path), "dtype": "bfloat16"}, seed=0)
    assert loaded.dtype == torch.bfloat16
    source = {"from_t5": pipeline, "subfolder": "text_encoder_2", "projection_dim": 24}
    assert load_student(source, seed=0).config.project_out_dim == 24


# --- the examples ---


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "captions.txt").write_text("a red circle\ntwo owls\n")
    run = DistillRun.load(path)
    prompts = prompt_source(run.prompts)
    if path.stem == "flux_dev_paper":
        assert run.config == DistillConfig.paper(max_steps=320_000, **_changed(run.config))
        assert prompts.fingerprint() == PromptSchedule.paper("captions.txt").fingerprint()
        assert run.config.batch_size * 8 == 32
        assert run.pipeline_kwargs["num_inference_steps"] == 20
        assert run.pipeline_kwargs["max_sequence_length"] == 77


def _changed(config: DistillConfig) -> dict[str, Any]:
    """What has no part in what is learned."""
    names = ("batch_size", "mixed_precision", "gradient_checkpointing", "eval_every",
             "checkpoint_every", "keep_checkpoints", "samples_every")  # fmt: skip
    return {name: getattr(config, name) for name in names}


# --- the command ---


def test_a_run_and_its_plan(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--config", file, "--dry-run"])
    assert "denoiser rows for the teacher" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]  # nothing is left behind

    plan = DistillRun.load(file).plan()
    main(["--config", file, "config.keep_checkpoints=1"])
    assert "velocity gap" in capsys.readouterr().out
    out = tmp_path / "out"
    entry = json.loads((out / "history.jsonl").read_text().splitlines()[-1])
    assert entry["step"] == plan.updates == 6
    assert (entry["teacher_rows"], entry["student_rows"]) == (plan.teacher_rows, plan.student_rows)
    (state,) = (out / "checkpoints").glob("*/state.safetensors")
    assert 0 < state.stat().st_size - plan.checkpoint_bytes < 0.3 * plan.checkpoint_bytes
    assert DistillRun.load(out / "run.yaml").config.keep_checkpoints == 1
    SlimT5Encoder.from_pretrained(out)

    with pytest.raises(SystemExit, match="holds another run or model"):
        main(["--config", file])
    with pytest.raises(SystemExit, match=r"learning_rate: then 0\.0005, now 0\.1"):
        main(["--config", file, "resume=true", "config.learning_rate=0.1"])
    assert "keep_checkpoints: 1" in (out / "run.yaml").read_text()  # as it was begun
    before = weights(out)
    main(["--config", file, "resume=true"])
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())


def test_mistakes_cost_nothing(
    hub: Any, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PipelineSource, "load", load)
    for change, message in {
        "pipeline_kwargs.hight=16": "'hight', which FluxPipeline doesn't take",
        "prompts=nowhere.txt": "prompts: 'nowhere.txt' is no such file",
        "eval_prompts={generator: compositional}": "eval_prompts: a GeneratedPrompts",
        "eval_prompts={held_out: 7}": "share is 7",
        "student={from_pretrained: nobody/nothing}": "'nobody/nothing' is neither",
        "pipeline.class_name=FluxPipelin": "diffusers has no pipeline class 'FluxPipelin'",
        "pipeline.class_name=StableDiffusionPipeline": "has no T5 text encoder",
        f"pipeline.name_or_path={tmp_path}": "holds no model_index.json",
        "pipeline.name_or_path=nobody/nothing": "'nobody/nothing' is neither",
        "prompts={schedule: [{updates: 9, prompts: [a]}, {updates: 9, prompts: [b]}]}":
            "begins after 9 updates, and the run has 6",
    }.items():  # fmt: skip
        with pytest.raises(SystemExit, match=message):
            main(["--config", file, change])
    assert not (tmp_path / "out").exists()


def test_a_run_that_never_began_leaves_nothing(file: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the student's rows have width 24"):
        main(["--config", file, "student.project_out_dim=24"])
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


# --- without T5 in memory ---


def test_with_a_cache_t5_and_denoiser_never_meet(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    alive: list[weakref.ref[torch.nn.Module]] = []
    load = PipelineSource.load

    def noted(*args: Any, **kwargs: Any) -> Any:
        assert not [one for one in alive if one() is not None]
        pipe = load(*args, **kwargs)
        parts = [name for name in ("text_encoder_2", "transformer") if getattr(pipe, name)]
        loaded.append(" and ".join(parts))
        alive.extend(weakref.ref(getattr(pipe, name)) for name in parts)
        return pipe

    main(["--config", file, f"output_dir={tmp_path / 'plain'}"])
    monkeypatch.setattr(PipelineSource, "load", noted)
    run = DistillRun.load(file, [f"teacher_cache={tmp_path / 'rows'}"])
    plan = run.plan()
    assert loaded == ["text_encoder_2", "transformer"]
    assert plan.cache and not (tmp_path / "rows").exists()
    assert plan.bytes < DistillRun.load(file).plan().bytes

    loaded.clear()
    alive.clear()
    run.train()
    # The denoiser says how many prompts there will be, T5 encodes them, the student is trained.
    assert loaded == ["transformer", "text_encoder_2", "transformer"]
    plain, cached = weights(tmp_path / "plain"), weights(tmp_path / "out")
    assert all(torch.equal(plain[name], cached[name]) for name in plain)
    rows = [path.stat().st_size for path in (tmp_path / "rows").glob("*.safetensors")]
    assert plan.cache.bytes == pytest.approx(sum(rows), rel=0.05)

    loaded.clear()
    alive.clear()
    DistillRun.load(file, [f"teacher_cache={tmp_path / 'rows'}", "resume=true"]).train()
    assert loaded == ["transformer"]
    message = "can't be continued with other settings.*config.seed: then 0, now 7"
    with pytest.raises(SystemExit, match=message):
        main(
            ["--config", file, f"teacher_cache={tmp_path / 'new'}", "resume=true", "config.seed=7"]
        )
    assert not (tmp_path / "new").exists()


# --- many processes ---


def test_two_processes_share_the_denoiser(
    file: str, content: dict[str, Any], tmp_path: Path
) -> None:
    alike = ["config.ema_decay=0.5", "student.dropout_rate=0.0"]
    main(["--config", file, "config.batch_size=4", f"output_dir={tmp_path / 'one'}", *alike])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "t5slim.distill", "--config", file, "pipeline.shard_denoiser=true", *alike,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("training time") == 1  # one of them speaks
    one, two = weights(tmp_path / "one"), weights(tmp_path / "out")
    for name in one:
        torch.testing.assert_close(one[name], two[name])
    gaps = [
        json.loads((tmp_path / f / "distillation.json").read_text())["result"]["gap"]
        for f in ("one", "out")
    ]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-4)
    assert DistillRun.load(tmp_path / "out" / "run.yaml").pipeline.shard_denoiser


def test_launches_that_make_no_sense(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="can only be spread over several processes"):
        main(["--config", file, "pipeline.shard_denoiser=true"])
    kind = property(lambda _: DistributedType.DEEPSPEED)
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", kind)
    with pytest.raises(SystemExit, match="launched with DEEPSPEED, which takes apart"):
        main(["--config", file])
