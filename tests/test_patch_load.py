"""Pipelines loaded as patched ones, from a folder or the Hub, and patched ones saved and loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
)
from test_patch import paint
from test_slot import tiny_sdxl
from tiny import PROMPTS, call_kwargs, tiny_chroma, tiny_flux, tiny_student

from t5slim import (
    AlreadyPatchedError,
    CheckpointError,
    HubAccessError,
    IncompatibleStudentError,
    NoT5SlotError,
    PatchError,
    SlimT5Encoder,
    patch_pipeline,
    students,
    unpatch_pipeline,
)

CLOSE = {
    "rtol": 1e-5,
    "atol": 1e-5,
}  # weights that safetensors maps into memory are aligned otherwise


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved pipeline, whose T5 can't be read, and a student for it."""
    root = tmp_path_factory.mktemp("folders")
    tiny_flux().save_pretrained(root / "flux")
    (root / "flux" / "text_encoder_2" / "model.safetensors").write_bytes(b"never read")
    tiny_student(tiny_flux()).save_pretrained(root / "student")
    patched = tiny_flux()
    patch_pipeline(patched, tiny_student(patched))
    patched.save_pretrained(root / "patched")
    return root


def expected() -> torch.Tensor:
    pipe = tiny_flux()
    return paint(patch_pipeline(pipe, tiny_student(pipe)))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("cls", [FluxPipeline, DiffusionPipeline, AutoPipelineForText2Image])
def test_from_a_folder(cls, folders):
    pipe = quiet(patch_pipeline(cls, folders / "flux", student=folders / "student"))
    assert type(pipe) is FluxPipeline
    torch.testing.assert_close(paint(pipe), expected(), **CLOSE)
    with pytest.raises(
        PatchError, match=r"AutoModelForTextEncoding.*flux', subfolder='text_encoder_2'"
    ):
        unpatch_pipeline(pipe)


@pytest.mark.parametrize(
    ("kwargs", "dtype", "denoiser_dtype"),
    [
        ({}, torch.float32, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16, torch.float16),
        ({"dtype": {"default": torch.bfloat16}}, torch.bfloat16, torch.bfloat16),
        (
            {"dtype": {"transformer": torch.bfloat16, "text_encoder_2": torch.float32}},
            torch.float32,
            torch.bfloat16,
        ),
    ],
)
def test_dtype(kwargs, dtype, denoiser_dtype, folders):
    for student in (folders / "student", tiny_student(tiny_flux())):
        pipe = patch_pipeline(FluxPipeline, folders / "flux", student=student, **kwargs)
        assert pipe.text_encoder_2.dtype == dtype
        assert pipe.transformer.dtype == denoiser_dtype


@pytest.mark.filterwarnings("ignore:.*torch_dtype")  # of diffusers, from 0.40 on
def test_the_old_name_of_dtype(folders):
    pipe = patch_pipeline(
        FluxPipeline, folders / "flux", student=folders / "student", torch_dtype=torch.bfloat16
    )
    assert pipe.text_encoder_2.dtype == pipe.transformer.dtype == torch.bfloat16


def test_a_patched_folder_brings_its_student(folders):
    pipe = quiet(patch_pipeline(DiffusionPipeline, folders / "patched", dtype=torch.float32))
    torch.testing.assert_close(paint(pipe), expected(), **CLOSE)
    with pytest.raises(PatchError, match="'<folder or Hub id>', subfolder='text_encoder_2'"):
        unpatch_pipeline(pipe)  # the folder has no T5


def test_refused_before_the_pipeline_is_read(folders, tmp_path):
    """The folders hold a model_index.json and nothing else."""
    for name, pipe in {"sdxl": tiny_sdxl(), "flux": tiny_flux(), "chroma": tiny_chroma()}.items():
        pipe.save_config(tmp_path / name)
    student = folders / "student"
    for cls in (StableDiffusionXLPipeline, DiffusionPipeline):
        with pytest.raises(NoT5SlotError, match="StableDiffusionXLPipeline has no T5"):
            patch_pipeline(cls, tmp_path / "sdxl", student=student)
    with pytest.raises(IncompatibleStudentError, match="published for ChromaPipeline"):
        patch_pipeline(DiffusionPipeline, tmp_path / "chroma")
    with pytest.raises(PatchError, match="device_map='balanced'"):
        patch_pipeline(FluxPipeline, tmp_path / "flux", student=student, device_map="balanced")
    with pytest.raises(IncompatibleStudentError, match="got T5EncoderModel"):
        patch_pipeline(FluxPipeline, tmp_path / "flux", student=tiny_flux().text_encoder_2)
    broken = shutil.copytree(student, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="isn't a whole safetensors file"):
        patch_pipeline(FluxPipeline, tmp_path / "flux", student=broken)


# --- The Hub ----------------------------------------------------------------------------------


def test_t5_is_not_downloaded(hub, folders):
    """Nothing below text_encoder_2 is asked of the server, by the real client."""
    hub.add("me/flux", folders / "flux")
    hub.add("me/student", folders / "student")
    pipe = quiet(patch_pipeline(FluxPipeline, "me/flux", student="me/student"))
    torch.testing.assert_close(paint(pipe), expected(), **CLOSE)
    assert not [request for request in hub.requests if "text_encoder_2" in request]
    for part in ("text_encoder", "transformer", "vae"):
        assert any(f"/{part}/" in request for request in hub.requests if "GET" in request)
    with pytest.raises(PatchError, match="'me/flux', subfolder='text_encoder_2'"):
        unpatch_pipeline(pipe)

    hub.requests.clear()
    patch_pipeline(FluxPipeline, "me/flux", student="me/student", local_files_only=True)
    assert hub.requests == []


def test_offline_holds_for_the_student(hub, folders):
    hub.add("me/student", folders / "student")
    with pytest.raises(HubAccessError, match=r"me/student.*offline mode"):
        patch_pipeline(FluxPipeline, folders / "flux", student="me/student", local_files_only=True)
    assert hub.requests == []


def test_a_gated_student(hub, folders):
    hub.add("me/student", folders / "student", gated=True)
    with pytest.raises(HubAccessError, match="gated"):
        patch_pipeline(tiny_flux(), "me/student")
    with pytest.raises(HubAccessError, match="gated"):
        patch_pipeline(FluxPipeline, folders / "flux", student="me/student")
    patch_pipeline(FluxPipeline, folders / "flux", student="me/student", token="hf_right")


def test_the_published_student_is_the_default(hub, tmp_path):
    """A FLUX.1 that reads rows of width 4096, and a student in the place of the published one."""
    config = tiny_flux().transformer.config | {"joint_attention_dim": 4096}
    transformer = FluxTransformer2DModel.from_config(config).eval()
    tiny_flux().save_pretrained(tmp_path / "flux")
    transformer.save_pretrained(tmp_path / "flux" / "transformer")
    sizes = tiny_student(tiny_flux()).config.to_dict() | {"project_out_dim": 4096}
    student = SlimT5Encoder(SlimT5Encoder.config_class.from_dict(sizes))
    student.to(torch.bfloat16).save_pretrained(tmp_path / "student")
    hub.add("LifuWang/DistillT5", tmp_path / "student")

    by_class = quiet(patch_pipeline(FluxPipeline, tmp_path / "flux", dtype=torch.bfloat16))
    in_place = FluxPipeline.from_pretrained(tmp_path / "flux", text_encoder_2=None)
    patch_pipeline(quiet(in_place.to(torch.bfloat16)))
    for pipe in (by_class, in_place):
        assert pipe.text_encoder_2.config.name_or_path == "LifuWang/DistillT5"
        assert paint(pipe).isfinite().all()


def test_what_is_said_of_the_published_students():
    for student in students():
        with torch.device("meta"):
            size = student.architecture.removeprefix("T5-")
            built = SlimT5Encoder(SlimT5Encoder.config_class.preset(size))
        assert built.num_parameters() == student.parameters
    assert len({student.repo_id for student in students()}) == 2


def test_a_patched_pipeline_on_the_hub(hub, folders):
    """diffusers refuses it, and patch_pipeline loads it."""
    hub.add("me/patched", folders / "patched")
    pipe = quiet(patch_pipeline(DiffusionPipeline, "me/patched"))
    torch.testing.assert_close(paint(pipe), expected(), **CLOSE)


# --- Saved and loaded -------------------------------------------------------------------------

LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
import t5slim
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
kwargs = KWARGS
latents = pipe(generator=torch.Generator().manual_seed(0), output_type="latent", **kwargs).images
torch.save(latents, sys.argv[2])
"""


def test_in_a_new_process(folders, tmp_path):
    """It has to import t5slim, and nothing else; diffusers says so, or (before 0.42) does so."""
    kwargs = call_kwargs(tiny_flux()) | {"prompt": PROMPTS[1]}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LOAD.replace("KWARGS", repr(kwargs)),
            folders / "patched",
            tmp_path / "out",
        ],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout:
        assert "t5slim.encoder" in done.stdout
        assert "has not been imported" in done.stdout
    torch.testing.assert_close(torch.load(tmp_path / "out"), expected(), **CLOSE)


def test_in_this_process(folders, tmp_path):
    """Of a pipeline that was loaded with None in the slot, too."""
    pipe = FluxPipeline.from_pretrained(folders / "flux", text_encoder_2=None)
    patch_pipeline(quiet(pipe), tiny_student(tiny_flux()))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder_2"] == ["t5slim.encoder", "SlimT5Encoder"]
    again = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(paint(again), paint(pipe), **CLOSE)
    with pytest.raises(AlreadyPatchedError):
        patch_pipeline(again)
    with pytest.raises(PatchError, match="'<folder or Hub id>', subfolder='text_encoder_2'"):
        unpatch_pipeline(again)
