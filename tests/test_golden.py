"""Figures that no rebuild may move: losses and gaps of short runs, embeddings, latents, files.

Everything here goes through the public surface. Weights are filled by name and not by the order of
initialisation, and the student is a file of `golden/`, so that the figures depend neither on the
versions of diffusers and transformers nor on how a fresh student is initialised. Within a process
results are equal bit for bit; against the literals, which another machine wrote, to 3e-5.
"""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.pipelines import generate, quiet
from helpers.training import assert_same, spawn
from safetensors.torch import load_file
from shapes_world.generation import CALL, STUDENT, load_pipeline
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs

from t5slim import SlimT5Encoder, patch_pipeline
from t5slim.distill import DistillConfig, train, velocity_gap

CONFIG: dict[str, Any] = {
    "max_steps": 20, "batch_size": 4, "reservoir_size": 8, "prompt_dropout": 0.2, "warmup_steps": 0,
    "lr_schedule": "constant", "learning_rate": 5e-4, "ema_decay": 0.0, "eval_every": 1,
    "embedding_phase": 0.25, "velocity_every": 3,
}  # fmt: skip
GOLDEN = Path(__file__).parent / "golden"
PATCHED = GOLDEN / "patched_flux"  # saved by the code of 0.1.0.dev, before the rebuild
HELD_OUT = PROMPTS[4:]


def near(expected: Any) -> Any:
    return pytest.approx(expected, rel=3e-5)


def near_values(expected: list[float]) -> Any:
    """Single values of a tensor may be small beside the sums that they come from."""
    return pytest.approx(expected, rel=3e-5, abs=1e-6)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Weights that depend on names and shapes alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(values * (parameter.numel() / len(parameter)) ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * values)
            else:
                parameter.copy_(1 + 0.1 * values)


def golden_pipeline(name: str) -> Any:
    pipe = TINY_PIPELINES[name]()
    for seed, (part, module) in enumerate(sorted(pipe.components.items())):
        if isinstance(module, torch.nn.Module) and part != "vae":
            fill(module, seed)
    return pipe


def golden_student(**config: Any) -> SlimT5Encoder:
    return SlimT5Encoder.from_pretrained(PATCHED / "text_encoder_2", **config)


def run(
    pipe: Any, student: SlimT5Encoder | None = None, folder: Path | None = None, **changes: Any
) -> tuple[SlimT5Encoder, list[float]]:
    """The student of a short run, and the loss of each of its updates."""
    result = train(
        pipe, student or golden_student(), PROMPTS[:4], DistillConfig(**CONFIG | changes),
        pipeline_kwargs=call_kwargs(pipe), output_dir=folder, resume=folder is not None,
    )  # fmt: skip
    return result.student, [entry["loss"] for entry in result.history]


def gap(name: str, student: SlimT5Encoder) -> float:
    pipe = golden_pipeline(name)
    return velocity_gap(pipe, student, HELD_OUT, pipeline_kwargs=call_kwargs(pipe))


def figures(tensor: torch.Tensor) -> list[float]:
    """A few numbers that a changed tensor can't keep: two norms, and five of its values."""
    values = tensor.detach().double().flatten()
    some = values[torch.linspace(0, len(values) - 1, 5).long()]
    return [values.abs().sum().item(), values.square().sum().item(), *some.tolist()]


SCHEDULE = {k: getattr(DistillConfig(), k) for k in ("lr_schedule", "warmup_steps", "ema_decay")}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("flux", {}),  # guidance scales are drawn, and embedded
    "sd3": ("sd3", {}),  # classifier-free guidance
    "stable_audio": ("stable_audio", {}),  # through the pipeline: a learned layer behind T5
    "flux velocity": ("flux", {"objective": "velocity", "max_grad_norm": 1.0}),
    "flux embeddings": ("flux", {"objective": "embedding"}),
    "flux consecutive": (
        "flux",
        {"objective": "velocity", "reservoir_size": 0, "max_grad_norm": 1.0},
    ),
    # Depends on how the decay rises: min(0.999, (1 + update) / (10 + update)), from update 0.
    # May change in the commit that puts another formula in its place, and in no other.
    "flux ema": ("flux", {"ema_decay": 0.999}),
    # Depends on three formulas, and may change with them: warm-up, cosine, how EMA's decay rises.
    "flux schedule": ("flux", SCHEDULE | {"learning_rate": 0.008}),
}
FIGURES = json.loads((GOLDEN / "figures.json").read_text())
LOSSES, GAP_BEFORE, GAP_AFTER = (FIGURES[k] for k in ("losses", "gap_before", "gap_after"))
LOSSES["flux ema"] = LOSSES["flux"]  # an average of the weights, which they don't learn from


@pytest.mark.parametrize("case", CASES)
def test_losses_of_20_updates_and_the_gap_after_them(case: str) -> None:
    name, changes = CASES[case]
    student, losses = run(golden_pipeline(name), **changes)
    assert losses == near(LOSSES[case])
    assert gap(name, student) == near(GAP_AFTER[case])


@pytest.mark.parametrize("name", GAP_BEFORE)
def test_velocity_gap_of_the_untrained_student(name: str) -> None:
    assert gap(name, golden_student()) == near(GAP_BEFORE[name])


@pytest.mark.parametrize("name", ["flux", "sd3", "stable_audio"])
def test_a_run_comes_out_the_same_twice(name: str) -> None:
    (one, losses), (other, again) = (run(golden_pipeline(name)) for _ in range(2))
    assert losses == again
    assert_same(one.state_dict(), other.state_dict())


def test_losses_with_dropout() -> None:
    """Depends on how the student's dropout is seeded, and on torch's Bernoulli numbers."""
    _, losses = run(golden_pipeline("flux"), golden_student(dropout_rate=0.1))
    assert losses == near(LOSSES["flux dropout"])


CAPTIONS = [
    "a large triangle, filled, in cyan",
    "at the top a cyan circle and at the bottom a blue cross on a white background",
    'a young doctor complained about the train for hours. the yellow word "RL" on white',
]


def shapes_student() -> SlimT5Encoder:
    return SlimT5Encoder.from_pretrained(STUDENT, dtype=torch.float32)


def test_embeddings_of_the_committed_student() -> None:
    tokens = load_pipeline().tokenizer_2(
        CAPTIONS, padding="max_length", max_length=32, return_tensors="pt"
    )
    with torch.no_grad():
        one, other = (shapes_student()(tokens.input_ids)[0] for _ in range(2))
        masked = shapes_student()(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    assert one.shape == (3, 32, 256) and torch.equal(one, other)
    assert figures(one) == near_values(
        [11480.284, 14960.751, 1.3177241, -0.40513116, 1.1953607, 0.013530329, 0.071930028]
    )
    assert figures(masked) == near_values(
        [14135.339, 20016.559, 0.49335703, -0.15610297, 1.4330008, 0.40962493, 0.37356952]
    )


def test_velocity_gap_of_the_committed_student() -> None:
    measured = velocity_gap(
        load_pipeline().to("cpu"), shapes_student(), CAPTIONS, pipeline_kwargs=CALL
    )
    assert measured == near(0.011758501)


LATENTS = [281.30633, 487.17009, -1.8753961, -1.5878464, 0.33103204, -2.3701901, -0.26117826]


def patched_pipeline() -> Any:
    return patch_pipeline(golden_pipeline("flux"), golden_student())


def test_latents_of_a_patched_pipeline() -> None:
    one, other = generate(patched_pipeline()), generate(patched_pipeline())
    assert torch.equal(one, other)
    assert figures(one) == near_values(LATENTS)
    assert not torch.equal(one, generate(golden_pipeline("flux")))


def test_a_patched_pipeline_saved_before_the_rebuild_reloads(tmp_path: Path) -> None:
    golden_pipeline("flux").save_pretrained(tmp_path)  # what isn't T5's is large
    shutil.rmtree(tmp_path / "text_encoder_2")
    shutil.copytree(PATCHED, tmp_path, dirs_exist_ok=True)
    pipe = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(pipe.text_encoder_2) is SlimT5Encoder
    assert_same(pipe.text_encoder_2.state_dict(), golden_student().state_dict())
    # Not bit for bit: memory-mapped weights lie at other addresses, and BLAS sums by alignment.
    assert figures(generate(pipe)) == near_values(LATENTS)


def test_files_of_a_saved_patched_pipeline(tmp_path: Path) -> None:
    patched_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder_2"] == ["t5slim.encoder", "SlimT5Encoder"]
    slots, configs, tensors = [], [], []
    for folder in (tmp_path, PATCHED):
        slot = folder / "text_encoder_2"
        slots.append(sorted(path.name for path in slot.iterdir()))
        config = json.loads((slot / "config.json").read_text())
        configs.append({key: config[key] for key in config if key != "transformers_version"})
        tensors.append(load_file(slot / "model.safetensors"))
    assert slots[0] == slots[1] == ["config.json", "model.safetensors"]
    # Written since, as older readers want it where the output isn't 4096 wide.
    assert configs[0] == configs[1] | {"out_dim": 32}
    assert_same(*tensors)


def start(folder: Path, dies: bool = False) -> tuple[SlimT5Encoder, list[float], int]:
    """A run that goes on where it can: its student, its losses, and how many denoiser calls.

    If it `dies`, then in the third call after the first checkpoint.
    """
    torch.set_num_threads(1)
    pipe = golden_pipeline("flux")
    calls, after = [], []

    def count(*_: Any) -> None:
        calls.append(1)
        if dies and any(folder.glob("checkpoints/0*")):
            after.append(1)
            if len(after) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    pipe.transformer.register_forward_hook(count)
    # Without Fisher's information, for which a resumed run calls the denoiser again.
    objective = {"velocity": 1, "embedding": 1}
    changes: dict[str, Any] = {"ema_decay": 0.9, "checkpoint_every": 6, "objective": objective}
    student, losses = run(pipe, golden_student(dropout_rate=0.1), folder, **changes)
    return student, losses, len(calls)


def test_killed_and_resumed(tmp_path: Path) -> None:
    whole, losses, calls = start(tmp_path / "whole")
    folder = tmp_path / "killed"
    killed = spawn(start, folder, dies=True)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    resumed, others, fewer = start(folder)
    assert fewer < calls
    assert_same(resumed.state_dict(), whole.state_dict())
    assert losses == others and len(losses) == CONFIG["max_steps"]
