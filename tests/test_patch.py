"""patch_pipeline and unpatch_pipeline, on real pipelines, under every kind of offload."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
)
from helpers.pipelines import (
    OFFLOADS,
    generate,
    quiet,
    state,
    student_for,
    t5_of,
    tiny_sdxl,
)
from tiny import (
    PROMPTS,
    TINY_PIPELINES,
    call_kwargs,
    clip_encoder,
    t5_encoder,
    tiny_chroma,
    tiny_flux,
    tiny_pixart_sigma,
    tiny_student,
)
from zoo import CASES

import t5slim.hub
from t5slim import (
    CheckpointError,
    HubAccessError,
    IncompatibleStudentError,
    NoT5SlotError,
    PatchError,
    SlimT5Encoder,
    patch_pipeline,
    unpatch_pipeline,
)

pytestmark = pytest.mark.usefixtures("cpu_as_accelerator")


@pytest.mark.parametrize("family", TINY_PIPELINES)
def test_patch_and_unpatch(family):
    pipe = TINY_PIPELINES[family]()
    old = generate(pipe)
    student, before, teacher = tiny_student(pipe), state(pipe), t5_of(pipe)

    assert patch_pipeline(pipe, student, keep_teacher=True) is pipe
    assert t5_of(pipe) is student
    new = generate(pipe)
    assert new.isfinite().all() and not torch.equal(new, old)

    assert unpatch_pipeline(pipe) is pipe
    assert t5_of(pipe) is teacher
    assert state(pipe) == before
    assert torch.equal(generate(pipe), old)


# In PixArt's signature T5 comes first, so that diffusers asks it for the device of the pipeline.
@pytest.mark.parametrize("build", [tiny_flux, tiny_pixart_sigma])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload(build, offload):
    pipe = build()
    student, reference = tiny_student(pipe), generate(pipe)
    plain = generate(patch_pipeline(build(), tiny_student(pipe)))

    OFFLOADS[offload](pipe)
    before, teacher = state(pipe), t5_of(pipe)
    patch_pipeline(pipe, student, keep_teacher=True)
    for _ in range(2):  # maybe_free_model_hooks enables model offload again after each call
        assert torch.equal(generate(pipe), plain)
    assert not hasattr(teacher, "_hf_hook")
    kind = "_diffusers_hook" if offload.startswith("group") else "_hf_hook"
    assert any(hasattr(part, kind) for part in student.modules()) == (offload != "none")
    assert all(hook.model is not teacher for hook in getattr(pipe, "_all_hooks", []))

    unpatch_pipeline(pipe)
    assert state(pipe) == before
    assert torch.equal(generate(pipe), reference)
    assert torch.equal(generate(pipe), reference)
    for part in student.modules():
        assert not {"_hf_hook", "_diffusers_hook"} & vars(part).keys()
    assert all(parameter.device.type == "cpu" for parameter in student.parameters())


@pytest.mark.parametrize("offload", OFFLOADS)
def test_the_teacher_is_freed(offload):
    pipe = tiny_flux()
    student, teacher = tiny_student(pipe), weakref.ref(pipe.text_encoder_2)
    weights = weakref.ref(pipe.text_encoder_2.shared.weight)
    OFFLOADS[offload](pipe)
    generate(pipe)
    patch_pipeline(pipe, student)
    assert teacher() is None and weights() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["module", "folder"])
def test_dtype(tmp_path, dtype, kind):
    """As the teacher's. Under float16 `wo` stays in float32, wherever the student comes from."""
    pipe = tiny_flux()
    student = tiny_student(pipe).train()
    student.save_pretrained(tmp_path)
    pipe.text_encoder_2.to(dtype)
    patch_pipeline(pipe, student if kind == "module" else tmp_path)
    patched = pipe.text_encoder_2
    wo = patched.encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight
    assert wo.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert patched.dtype == patched(torch.tensor([[1, 2]]))[0].dtype == dtype
    assert not patched.training


def test_the_teacher_follows_a_pipeline_that_was_cast_while_patched():
    pipe = tiny_flux()
    patch_pipeline(pipe, tiny_student(pipe), keep_teacher=True)
    pipe.to(torch.bfloat16)
    unpatch_pipeline(pipe)
    assert pipe.text_encoder_2.dtype == torch.bfloat16
    assert generate(pipe).isfinite().all()


@pytest.mark.parametrize("offload", ["none", "model", "group by leaf"])
def test_a_pipeline_loaded_without_t5(flux_folder, offload):
    pipe = quiet(FluxPipeline.from_pretrained(flux_folder, text_encoder_2=None))
    OFFLOADS[offload](pipe)
    before, student = state(pipe), tiny_student(tiny_flux())
    patch_pipeline(pipe, student)
    assert pipe.config["text_encoder_2"] == ("t5slim.encoder", "SlimT5Encoder")
    unpatch_pipeline(pipe)
    assert pipe.text_encoder_2 is None
    assert state(pipe) == before
    patch_pipeline(pipe, student)
    torch.testing.assert_close(generate(pipe), expected(), **CLOSE)


# --- What is refused, and leaves the pipeline as it was ---------------------------------------


def truncated(folder: Path) -> Path:
    tiny_student(tiny_flux()).save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def plain_t5(folder: Path) -> Path:
    """Refused by its config, too: of a T5-XXL, the weights may be 40 GB."""
    t5_encoder().config.save_pretrained(folder)
    return folder


def of_another_width_and_without_weights(folder: Path) -> Path:
    """Its config is enough to refuse it."""
    student_for(tiny_flux(), project_out_dim=48).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return folder


WIDTH = r"embeddings have width 48, .*FluxPipeline takes 32.*projection_dim=32"
WORDS = r"vocabulary of 1,000, and tokenizer_2 of this FluxPipeline \(T5Tokenizer\) one of 256"
MISFIT = IncompatibleStudentError
REFUSED = {
    "width": (lambda _: student_for(tiny_flux(), project_out_dim=48), MISFIT, WIDTH),
    "vocabulary": (lambda _: student_for(tiny_flux(), vocab_size=1000), MISFIT, WORDS),
    "width, from its config": (of_another_width_and_without_weights, MISFIT, WIDTH),
    "a CLIP": (lambda _: clip_encoder(), MISFIT, "got CLIPTextModel.*from_t5"),
    "a T5": (lambda _: t5_encoder(48), MISFIT, WIDTH),
    "a folder of a T5": (plain_t5, MISFIT, "whose config.json has no project_out_dim"),
    "a number": (lambda _: 5, MISFIT, "got int"),
    "none published": (lambda _: None, MISFIT, "FluxPipeline, whose .* width 32"),
    "truncated": (truncated, CheckpointError, "a whole safetensors file"),
    "an empty folder": (lambda folder: folder, CheckpointError, "holds no config.json"),
    "no folder": (lambda folder: folder / "none", HubAccessError, "neither a folder"),
}  # fmt: skip


@pytest.mark.parametrize("offload", ["none", "model"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, offload, tmp_path):
    make, error, message = REFUSED[case]
    pipe = tiny_flux()
    student = make(tmp_path)
    OFFLOADS[offload](pipe)
    old, before = generate(pipe), state(pipe)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        patch_pipeline(pipe, student)
    assert state(pipe) == before
    assert torch.equal(generate(pipe), old)


class Words(torch.nn.Module):
    """An encoder that is no T5, and not even of transformers: a table of embeddings."""

    def __init__(self, width: int, **config: int) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(vocab_size=256, **config)
        self.table = torch.nn.Embedding(256, width)

    dtype = property(lambda self: self.table.weight.dtype)
    device = property(lambda self: self.table.weight.device)

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False):
        return (self.table(input_ids),)


@pytest.mark.parametrize("key", ["project_out_dim", "d_model"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_any_encoder_that_fits(key, offload):
    pipe = tiny_flux()
    OFFLOADS[offload](pipe)
    old, before = generate(pipe), state(pipe)
    with pytest.raises(IncompatibleStudentError, match="width 24"):
        patch_pipeline(pipe, Words(24, **{key: 24}))
    words = Words(32, **{key: 32}).train()
    patch_pipeline(pipe, words, keep_teacher=True)
    assert t5_of(pipe) is words and not words.training
    assert not torch.equal(generate(pipe), old)
    with pytest.raises(PatchError, match="already holds a student, Words"):
        patch_pipeline(pipe, tiny_student(tiny_flux()))
    unpatch_pipeline(pipe)
    assert state(pipe) == before
    assert torch.equal(generate(pipe), old)


def test_the_teacher_is_no_student():
    pipe = tiny_flux()
    with pytest.raises(IncompatibleStudentError, match="T5EncoderModel in text_encoder_2"):
        patch_pipeline(pipe, pipe.text_encoder_2)


def test_already_patched():
    pipe = tiny_flux()
    student = tiny_student(pipe)
    patch_pipeline(pipe, student, keep_teacher=True)
    before = state(pipe)
    for again in (student, tiny_student(tiny_flux(), seed=5), None):
        with pytest.raises(PatchError, match="text_encoder_2 of this FluxPipeline already"):
            patch_pipeline(pipe, again)
    assert state(pipe) == before
    unpatch_pipeline(pipe)


def test_no_t5():
    pipe = tiny_sdxl()
    before = state(pipe)
    for call in (patch_pipeline, unpatch_pipeline):
        with pytest.raises(NoT5SlotError, match=f"{type(pipe).__name__} has no T5"):
            call(pipe)
    assert state(pipe) == before


def big_tokenizer(tokens: int) -> transformers.T5TokenizerFast:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(f"▁{i}", -9.0) for i in range(tokens - 103)]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return transformers.T5TokenizerFast(vocab=vocab)


def test_vocabularies_of_t5_and_umt5():
    """T5's 32,100 tokens have 32,128 embeddings, and UMT5's 256,300 tokens 256,384."""
    pipe = CASES["WanPipeline"].pipe()
    t5_student = student_for(tiny_chroma(), vocab_size=32128)
    pipe.tokenizer = big_tokenizer(32100)
    patch_pipeline(pipe, t5_student, keep_teacher=True)
    unpatch_pipeline(pipe)
    pipe.tokenizer = big_tokenizer(256300)
    with pytest.raises(IncompatibleStudentError, match=r"32,128.*WanPipeline.*256,300.*UMT5"):
        patch_pipeline(pipe, t5_student)
    patch_pipeline(pipe, student_for(tiny_chroma(), vocab_size=256384))


@pytest.mark.parametrize("build", [tiny_chroma, CASES["WanPipeline"].pipe])
def test_the_default_is_for_flux_only(build):
    with pytest.raises(IncompatibleStudentError, match=r"no student is published for \w+Pipeline"):
        patch_pipeline(build())


def test_nothing_to_undo():
    """Also where a T5 was put back by hand, after which the pipeline can be patched again."""
    pipe = tiny_flux()
    patch_pipeline(pipe, tiny_student(pipe))
    for encoder in (None, t5_encoder()):
        pipe.register_modules(text_encoder_2=encoder)
        message = f"nothing to undo: text_encoder_2 .* holds {'T5Enc' if encoder else 'None'}"
        with pytest.raises(PatchError, match=message):
            unpatch_pipeline(pipe)
    patch_pipeline(pipe, tiny_student(pipe), keep_teacher=True)
    assert unpatch_pipeline(pipe).text_encoder_2 is encoder


def test_the_line_that_reloads_the_teacher(flux_folder):
    """It is in the error, and it works."""
    pipe = quiet(FluxPipeline.from_pretrained(flux_folder))
    old = generate(pipe)
    patch_pipeline(pipe, tiny_student(tiny_flux()))
    pipe.enable_model_cpu_offload(device="cpu")
    before = state(pipe)
    with pytest.raises(PatchError, match="keep_teacher=True") as error:
        unpatch_pipeline(pipe)
    assert state(pipe) == before
    line = str(error.value).splitlines()[-1]
    assert f"{str(flux_folder)!r}, subfolder='text_encoder_2', dtype=torch.float32" in line
    names = {"t5slim": t5slim, "transformers": transformers, "torch": torch, "pipe": pipe}
    exec(line.strip(), names)
    torch.testing.assert_close(generate(pipe), old)
    assert not hasattr(pipe, "_t5slim_patch")


def test_wrong_arguments(flux_folder):
    student = tiny_student(tiny_flux())
    with pytest.raises(TypeError, match=r"expected a diffusers pipeline.*got 'me/flux'"):
        patch_pipeline("me/flux")
    for args, kwargs in (
        ([tiny_flux(), student], {"student": student}),
        ([tiny_flux(), student], {"torch_dtype": torch.bfloat16}),
        ([FluxPipeline], {"student": student}),
        ([FluxPipeline, flux_folder], {"student": student, "keep_teacher": True}),
    ):
        with pytest.raises(TypeError, match=r"expected patch_pipeline\(pipe.*folder_or_hub_id"):
            patch_pipeline(*args, **kwargs)


# --- A class of pipelines ---------------------------------------------------------------------

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # memory-mapped weights are aligned otherwise


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
    return generate(patch_pipeline(pipe, tiny_student(pipe)))


@pytest.mark.parametrize("cls", [FluxPipeline, DiffusionPipeline, AutoPipelineForText2Image])
def test_from_a_folder(cls, folders):
    pipe = quiet(patch_pipeline(cls, folders / "flux", student=folders / "student"))
    assert type(pipe) is FluxPipeline
    torch.testing.assert_close(generate(pipe), expected(), **CLOSE)
    message = r"AutoModelForTextEncoding.*flux', subfolder='text_encoder_2'"
    with pytest.raises(PatchError, match=message):
        unpatch_pipeline(pipe)


EACH = {"transformer": torch.bfloat16, "text_encoder_2": torch.float32}


@pytest.mark.filterwarnings("ignore:.*torch_dtype")  # of diffusers, from 0.40 on
@pytest.mark.parametrize(
    ("kwargs", "dtype", "denoiser_dtype"),
    [
        ({}, torch.float32, torch.float32),
        ({"dtype": torch.float16}, torch.float16, torch.float16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16, torch.bfloat16),
        ({"dtype": {"default": torch.bfloat16}}, torch.bfloat16, torch.bfloat16),
        ({"dtype": EACH}, torch.float32, torch.bfloat16),
    ],
)
def test_dtype_of_a_class(kwargs, dtype, denoiser_dtype, folders):
    for student in (folders / "student", tiny_student(tiny_flux())):
        pipe = patch_pipeline(FluxPipeline, folders / "flux", student=student, **kwargs)
        assert pipe.text_encoder_2.dtype == dtype
        assert pipe.transformer.dtype == denoiser_dtype


def test_refused_before_the_pipeline_is_read(folders, tmp_path):
    """The folders hold a model_index.json and nothing else."""
    for name, pipe in {"sdxl": tiny_sdxl(), "flux": tiny_flux(), "chroma": tiny_chroma()}.items():
        pipe.save_config(tmp_path / name)
    student = folders / "student"
    broken = shutil.copytree(student, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"broken")
    clip, spread = tiny_flux().text_encoder, {"device_map": "balanced"}
    for cls, name, kwargs, error, message in (
        (StableDiffusionXLPipeline, "sdxl", {}, NoT5SlotError, "XLPipeline has no T5"),
        (DiffusionPipeline, "sdxl", {}, NoT5SlotError, "XLPipeline has no T5"),
        (DiffusionPipeline, "chroma", {"student": None}, MISFIT, "published for ChromaPipeline"),
        (FluxPipeline, "flux", spread, PatchError, "device_map='balanced'"),
        (FluxPipeline, "flux", {"student": clip}, MISFIT, "got CLIPTextModel"),
        (FluxPipeline, "flux", {"student": broken}, CheckpointError, "a whole safetensors file"),
    ):
        with pytest.raises(error, match=message):
            patch_pipeline(cls, tmp_path / name, **{"student": student} | kwargs)


# --- The Hub ----------------------------------------------------------------------------------


def test_t5_is_not_downloaded(hub, folders):
    """Nothing below text_encoder_2 is asked of the server, by the real client."""
    hub.add("me/flux", folders / "flux")
    hub.add("me/student", folders / "student", gated=True)
    with pytest.raises(HubAccessError, match="gated"):
        patch_pipeline(FluxPipeline, "me/flux", student="me/student")
    kwargs = {"student": "me/student", "token": "hf_right"}
    pipe = quiet(patch_pipeline(FluxPipeline, "me/flux", **kwargs))
    torch.testing.assert_close(generate(pipe), expected(), **CLOSE)
    assert not [request for request in hub.requests if "text_encoder_2" in request]
    for part in ("text_encoder", "transformer", "vae"):
        assert any(f"/{part}/" in request for request in hub.requests if "GET" in request)
    with pytest.raises(PatchError, match="'me/flux', subfolder='text_encoder_2'"):
        unpatch_pipeline(pipe)

    hub.requests.clear()
    patch_pipeline(FluxPipeline, "me/flux", student="me/student", local_files_only=True)
    with pytest.raises(HubAccessError, match=r"me/other.*offline mode"):
        patch_pipeline(FluxPipeline, "me/flux", student="me/other", local_files_only=True)
    assert hub.requests == []


def test_all_files_come_from_one_commit(hub, folders, monkeypatch):
    """The branch moves after model_index.json was read: to a commit without a pipeline.

    And diffusers would refuse the module of the student in this pipeline of the Hub.
    """
    repository = hub.add("me/patched", folders / "patched")
    first = repository.branches["main"]
    read = t5slim.hub.read_json

    def push_meanwhile(path):
        repository.commits["0" * 40] = {"model_index.json": b"{}"}
        repository.branches["main"] = "0" * 40
        return read(path)

    monkeypatch.setattr(t5slim.hub, "read_json", push_meanwhile)
    pipe = quiet(patch_pipeline(DiffusionPipeline, "me/patched"))
    torch.testing.assert_close(generate(pipe), expected(), **CLOSE)
    assert any(first in request for request in hub.requests)


def test_the_published_student_is_the_default(hub, tmp_path):
    """A FLUX.1 that takes a width of 4096, and a student in the place of the published one."""
    config = tiny_flux().transformer.config | {"joint_attention_dim": 4096}
    transformer = FluxTransformer2DModel.from_config(config).eval()
    tiny_flux().save_pretrained(tmp_path / "flux")
    transformer.save_pretrained(tmp_path / "flux" / "transformer")
    student = student_for(tiny_flux(), project_out_dim=4096)
    student.to(torch.bfloat16).save_pretrained(tmp_path / "student")
    hub.add("LifuWang/DistillT5", tmp_path / "student")

    by_class = quiet(patch_pipeline(FluxPipeline, tmp_path / "flux", dtype=torch.bfloat16))
    in_place = FluxPipeline.from_pretrained(tmp_path / "flux", text_encoder_2=None)
    patch_pipeline(quiet(in_place.to(torch.bfloat16)))
    for pipe in (by_class, in_place):
        assert pipe.text_encoder_2.config.name_or_path == "LifuWang/DistillT5"
        assert generate(pipe).isfinite().all()


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
    code = LOAD.replace("KWARGS", repr(call_kwargs(tiny_flux()) | {"prompt": PROMPTS[1]}))
    done = subprocess.run(
        [sys.executable, "-c", code, folders / "patched", tmp_path / "out"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout or re.search(r"t5slim\.encoder.*has not been imported", done.stdout)
    torch.testing.assert_close(torch.load(tmp_path / "out"), expected(), **CLOSE)


def test_in_this_process(folders, tmp_path):
    """Of a pipeline that was loaded with None in the slot, too."""
    pipe = FluxPipeline.from_pretrained(folders / "flux", text_encoder_2=None)
    patch_pipeline(quiet(pipe), tiny_student(tiny_flux()))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder_2"] == ["t5slim.encoder", "SlimT5Encoder"]
    for again in (
        quiet(DiffusionPipeline.from_pretrained(tmp_path)),
        quiet(patch_pipeline(DiffusionPipeline, tmp_path)),
    ):
        assert type(again.text_encoder_2) is SlimT5Encoder
        torch.testing.assert_close(generate(again), generate(pipe), **CLOSE)
        with pytest.raises(PatchError, match="already holds a student"):
            patch_pipeline(again)
        # The folder has no T5.
        with pytest.raises(PatchError, match="'<folder or Hub id>', subfolder='text_encoder_2'"):
            unpatch_pipeline(again)
