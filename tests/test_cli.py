"""The command line: what a file may hold, what a dry run measures, and that a run is `train`."""

import importlib
import os
import shlex
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from diffusers import FluxPipeline
from helpers.training import assert_same
from safetensors.torch import load_file
from tiny import PROMPTS, call_kwargs, tiny_flux

import t5slim.cli
from t5slim.distill import DistillConfig
from t5slim.distill.__main__ import load_student, main, parse
from t5slim.distill.arguments import PipelineArguments

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
STUDENT = {
    "preset": "small", "vocab_size": 256, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1,
    "num_heads": 2, "project_out_dim": 32,
}  # fmt: skip

GIVEN = "pipeline: {name_or_path: none}\nprompts: none\noutput_dir: none\n"


@pytest.fixture
def file(flux_folder: Path, tmp_path: Path) -> str:
    """A small run."""
    content = {
        "pipeline": {"name_or_path": str(flux_folder)}, "student": STUDENT,
        "prompts": list(PROMPTS), "eval_prompts": PROMPTS[:2],
        "pipeline_kwargs": call_kwargs(tiny_flux()),
        "output_dir": str(tmp_path / "out"), "max_steps": 6, "batch_size": 2,
        "reservoir_size": 8, "eval_every": 3, "checkpoint_every": 2, "trackers": [],
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def launch(*command: str) -> str:
    """Run Python on the CPU, and return what it printed."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = (sys.executable, *command)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_values_mean_what_they_say(file: str) -> None:
    run, config, _ = parse(
        ["--config", file, "--max_steps", "1_000", "--learning_rate", "1e-4",
         "--guidance_scales", "[2.0, 3.5]", "--objective", "{velocity: 1, embedding: 10}",
         "--objective.embedding", "1e-1", "--pipeline.revision", "2024-01-02",
         "--pipeline.name_or_path", "other/flux", "--pipeline.dtype=bfloat16",
         "--student.d_ff", "64", "--eval_prompts", "null"]
    )  # fmt: skip
    assert (config.learning_rate, config.max_steps) == (1e-4, 1000)
    assert config.guidance_scales == (2.0, 3.5)
    assert config.objective == {"velocity": 1, "embedding": 0.1}
    expected = PipelineArguments("other/flux", revision="2024-01-02", dtype="bfloat16")
    assert run.pipeline == expected  # the revision isn't a date
    assert run.student == {**STUDENT, "d_ff": 64} and run.eval_prompts is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max_step=9", "unrecognized arguments: --max_step"),  # no abbreviations
        ("--pipeline.revison=x", "unrecognized arguments: --pipeline.revison=x"),
        ("--max_steps=many", "max_steps.*int.*many"),
        ("--pipeline.dtype=bf16", "dtype.*bfloat16.*bf16"),
        ("--pipeline.device=tpu:x", "ConfigError: .*device.*tpu"),
        ("--pipeline.quantization='{backend: x}'", "ConfigError: .*unexpected keyword.*'backend'"),
        ("--config=nowhere.yaml", "nowhere.yaml"),
        ("--pipeline_kwargs.hight=16", "may not hold 'hight'; expected, of FluxPipeline: "),
        ("--pipeline_kwargs=null --prompts=nowhere.txt", "'nowhere.txt' is no such file"),
        ("--eval_prompts='{generator: quality}'", "compositional or text_rendering"),
        ("--student.d_modle=8", "a student's config has no d_modle"),
        ("--student='{from_pretrained: nobody/nothing}'", "'nobody/nothing', neither"),
        ("--student='{preset: small, 1: 2}'", "keywords must be strings"),
        ("--student='{size: small}'", "'size': 'small'.; expected from_pretrained, from_t5 or"),
        ("--pipeline_kwargs='{.nan: 2}'", "may not hold nan; expected, of FluxPipeline: "),
        ("--pipeline.name_or_path=nobody/nothing", "HubAccessError: .*'nobody/nothing'"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    hub: Any, file: str, tmp_path: Path, monkeypatch: Any, arguments: str, message: str
) -> None:
    monkeypatch.setattr(PipelineArguments, "load", None)
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        main(["--config", file, *shlex.split(arguments)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("student: " + "[" * 100_000, "nesting depth|recurs"),
        ("student:\n" + "".join(" " * i + "a:\n" for i in range(1, 2000)), "nesting depth|recurs"),
        ("a: \xff", "utf-8"),
        ("{}", "required: pipeline.name_or_path, student, prompts, output_dir"),
        ("", "Unexpected config|required"),
        ("student: {preset: small}\nmax_steps: 0x" + "f" * 20_000, "Exceeds the limit"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path, start = tmp_path / "run.yaml", time.perf_counter()
    path.write_text(text if text in ("{}", "") else GIVEN + text, encoding="latin-1")
    with pytest.raises(SystemExit, match=f"(?s)ConfigError: .*({message})"):
        main(["--config", str(path)])
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxTransformer2DModel"])
def test_folders_of_no_pipeline(file: str, tmp_path: Path, name: str) -> None:
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{name}"}}')
    with pytest.raises(SystemExit, match=f"NoT5SlotError: .*{name}"):
        main(["--config", file, f"--pipeline.name_or_path={tmp_path}"])


def test_students_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["t5slim", "students"])
    t5slim.cli.main()
    head, *lines = capsys.readouterr().out.splitlines()
    for line, student in zip(lines, t5slim.students(), strict=True):  # aligned
        assert all(line[head.index(k) :].startswith(v) for k, v in student.items())


def test_long_lists_and_home_paths(flux_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flux").symlink_to(flux_folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    prompts = [f"prompt {i}" for i in range(15_000)]
    content = {"student": STUDENT, "prompts": prompts, "output_dir": "~/out"}
    content["pipeline"] = {"name_or_path": "~/flux"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    start = time.perf_counter()
    run, _, _ = parse(["--config", "~/run.yaml"])
    assert run.prompts == prompts and time.perf_counter() - start < 10
    assert run.pipeline.cls is FluxPipeline
    with pytest.raises(SystemExit, match="holds another run or model"):
        main(["--config", "~/run.yaml"])


def test_students_of_each_kind(flux_folder: Path, tmp_path: Path) -> None:
    shape = load_student(STUDENT, 0)
    student = t5slim.SlimT5Encoder(shape)
    student.save_pretrained(tmp_path)
    loaded = load_student({"from_pretrained": str(tmp_path)}, 0)
    assert all(map(torch.equal, loaded.parameters(), student.parameters()))
    source = {"from_t5": str(flux_folder), "subfolder": "text_encoder_2", "projection_dim": 24}
    one, same, other = (load_student(source, seed).final_projection[0].weight for seed in (3, 3, 4))
    assert len(one) == 24 and torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    _, config, _ = parse(["--config", str(path)])
    if path.stem == "flux_dev_paper":
        free = {"mixed_precision", "eval_every", "checkpoint_every"}
        given, paper = vars(config), vars(config.paper(batch_size=4))  # 4 x 8 processes
        assert {name for name in given if given[name] != paper[name]} == free


def test_a_dry_run_leaves_nothing(file: str, tmp_path: Path) -> None:
    # On CPUs accelerate needs MPI for more than one process, and starts one without it.
    accelerate = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    shown = launch("-m", *accelerate, "-m", "t5slim.distill", "--config", file, "--dry_run")
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert list(lines) == ["update", "run"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_denoiser_in_4_bits(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run for a card of 24 GB, on a CPU: a student learns as from the dequantized denoiser."""
    bnb = pytest.importorskip("bitsandbytes")
    # diffusers quantizes on GPUs only, and some CPUs have a kernel that passes no gradients.
    quantizer = diffusers.quantizers.bitsandbytes.BnB4BitDiffusersQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda _, device_map: device_map)
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    real, tiny = (yaml.safe_load(path.read_text()) for path in (CONFIGS[0], Path(file)))
    tiny["pipeline"] = real["pipeline"] | tiny["pipeline"]
    cache = {"teacher_cache": str(tmp_path / "cache"), "samples_every": 3, "warmup_steps": 0}
    Path(file).write_text(yaml.safe_dump(real | tiny | cache))
    main(["--config", file, "--dry_run"])
    main(["--config", file, "--max_steps", "6"])
    load = PipelineArguments.load

    def dequantized(*args: Any) -> Any:
        pipe = load(*args)
        layers = pipe.transformer.modules() if pipe.transformer else []
        for layer in [layer for layer in layers if isinstance(layer, bnb.nn.Linear4bit)]:
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            layer.forward = partial(torch.nn.functional.linear, weight=weight, bias=layer.bias)
            assert not pipe.text_encoder_2
        return pipe

    monkeypatch.setattr(PipelineArguments, "load", dequantized)
    main(["--config", file, "--gradient_checkpointing", "false", f"--output_dir={tmp_path}/dense"])
    torch.testing.assert_close(weights(tmp_path / "out"), weights(tmp_path / "dense"))


def test_a_run_is_saved_and_resumed(file: str, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--config", file, "--keep_checkpoints", "1", "--learning_rate", "1e-7"]
    main(arguments)
    printed = capsys.readouterr().out
    assert "student_samples" in printed and printed.isascii()
    out, saved = tmp_path / "out", str(tmp_path / "out" / "run.yaml")
    assert parse(["--config", saved]) == parse(arguments)
    assert yaml.safe_load(Path(saved).read_text())["learning_rate"] == 1e-7

    with pytest.raises(SystemExit, match="holds another run or model"):
        main(["--config", saved])
    before = weights(out)
    main(["--config", saved, "--resume", "true"])
    assert_same(weights(out), before)


def test_t5_and_denoiser_never_meet(file: str, tmp_path: Path, monkeypatch: Any) -> None:
    """With a teacher cache."""
    loaded: list[str] = []
    alive: list[weakref.ref[torch.nn.Module]] = []
    load = PipelineArguments.load

    def noted(*args: Any) -> Any:
        assert not [one for one in alive if one() is not None]
        pipe = load(*args)
        parts = [name for name in ("text_encoder_2", "transformer") if getattr(pipe, name)]
        loaded.append(" and ".join(parts))
        alive.extend(weakref.ref(getattr(pipe, name)) for name in parts)
        return pipe

    main(["--config", file, "--output_dir", str(tmp_path / "plain")])
    monkeypatch.setattr(PipelineArguments, "load", noted)
    cached = ["--config", file, "--teacher_cache", str(tmp_path / "cache")]
    main([*cached, "--dry_run"])
    assert loaded == ["", "text_encoder_2", "transformer"]
    alive.clear()
    assert not (tmp_path / "cache").exists()
    main(cached)
    assert loaded[3:] == ["", "text_encoder_2", "transformer"]
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "plain"))
    alive.clear()
    main([*cached, "--resume", "true"])
    assert loaded[6:] == ["", "transformer"]  # all is there


def test_two_processes_share_the_work(file: str, tmp_path: Path) -> None:
    alike = ["--ema_decay", "0.5", "--student.dropout_rate", "0.0"]
    command = ["distill", "--config", file, "--batch_size", "4", *alike]
    launch("-c", "import t5slim.cli; t5slim.cli.main()", *command, f"--output_dir={tmp_path}/one")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    cache = ["--teacher_cache", str(tmp_path / "cache")]
    shown = launch("-m", *torchrun, "-m", "t5slim.distill", "--config", file, *cache, *alike)
    assert shown.count("student_samples") == 1  # one of them prints
    torch.testing.assert_close(weights(tmp_path / "out"), weights(tmp_path / "one"))


def test_what_a_student_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs by hand: of T5-XXL's weights on a token, and of the updates of a run."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    monkeypatch.delitem(sys.modules, "sizes")  # that of the tests
    real_cost = importlib.import_module("real_cost")
    pixart = real_cost.PIPELINES["PixArt-Sigma, 512 px"]
    found = real_cost.cost(pixart)
    assert 2 * 4.6e9 * 300 < found.t5 < 2 * 4.9e9 * 300
    assert 1.9 < found.there_and_back / found.teacher < 2.2
    cost = real_cost.Cost(teacher=1.0, there_and_back=2.0, student=0.1, t5=10.0)
    paper = DistillConfig.paper(max_steps=100, batch_size=4)
    assert cost.of(paper, False, 50) == pytest.approx(100 * 4 * 3.1 + 50 * 10)
    assert cost.of(paper, True, 50) == pytest.approx(100 * 4 * 6.1 + 50 * 10)
    config = DistillConfig(max_steps=100, embedding_phase=0.6, velocity_every=4, reuse=2.0)
    assert real_cost.updates(config) == (90, 10)
    of_run = cost.of(config, True, 10**6)
    assert of_run == pytest.approx(16 * (10 * 2.5 + 100 * 0.1 + 100 * 10))
