"""patch_pipeline and unpatch_pipeline, on real pipelines, under every kind of offload."""

from __future__ import annotations

import gc
import json
import re
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from test_slot import tiny_flux2, tiny_sdxl, tiny_wan
from tiny import (
    PROMPTS,
    TINY_PIPELINES,
    call_kwargs,
    t5_encoder,
    tiny_chroma,
    tiny_flux,
    tiny_pixart_sigma,
    tiny_student,
)

import t5slim
from t5slim import (
    AlreadyPatchedError,
    CheckpointError,
    ConfigError,
    HubAccessError,
    IncompatibleStudentError,
    NoT5SlotError,
    PatchError,
    SlimT5Config,
    SlimT5Encoder,
    patch_pipeline,
    unpatch_pipeline,
)
from t5slim.slot import find_text_slot

GROUP = {"onload_device": "cpu", "offload_type": "leaf_level"}
BLOCKS = {"onload_device": "cpu", "offload_type": "block_level", "num_blocks_per_group": 1}
OFFLOADS = {
    "none": lambda pipe: None,
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "group by leaf": lambda pipe: pipe.enable_group_offload(**GROUP),
    "group by block": lambda pipe: pipe.enable_group_offload(**BLOCKS),
}


pytestmark = pytest.mark.usefixtures("cpu_as_accelerator")


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny_flux().save_pretrained(folder)
    return folder


def paint(pipe, prompt=PROMPTS[1], **kwargs) -> torch.Tensor:
    """The final latents: all that a text encoder can change."""
    kwargs = call_kwargs(pipe) | {"output_type": "latent", "return_dict": True} | kwargs
    output = pipe(prompt, generator=torch.Generator().manual_seed(0), **kwargs)
    return next(iter(output.values()))


def student_for(pipe, **config) -> SlimT5Encoder:
    """A student of other sizes than `pipe` needs."""
    sizes = tiny_student(pipe).config.to_dict() | config
    return SlimT5Encoder(SlimT5Config.from_dict(sizes)).eval()


def state(pipe) -> tuple:
    """Everything that a failed patch, or a patch and its undoing, must leave as it was."""
    modules = {name: part for name, part in pipe.components.items() if part is not None}
    return (
        {name: id(part) for name, part in pipe.components.items()},
        dict(pipe.config),
        {key for key in vars(pipe) if key != "_progress_bar_config"},
        {
            name: (part.dtype, part.device, type(getattr(part, "_hf_hook", None)), part.training)
            for name, part in modules.items()
            if isinstance(part, torch.nn.Module)
        },
        len(getattr(pipe, "_all_hooks", [])),
    )


def t5_of(pipe) -> torch.nn.Module:
    return getattr(pipe, find_text_slot(pipe).name)


@pytest.mark.parametrize("family", TINY_PIPELINES)
def test_patch_and_unpatch(family):
    pipe = TINY_PIPELINES[family]()
    old = paint(pipe)
    student, before, teacher = tiny_student(pipe), state(pipe), t5_of(pipe)

    assert patch_pipeline(pipe, student, keep_teacher=True) is pipe
    assert t5_of(pipe) is student
    new = paint(pipe)
    assert new.isfinite().all()
    assert not torch.equal(new, old)

    assert unpatch_pipeline(pipe) is pipe
    assert t5_of(pipe) is teacher
    assert state(pipe) == before
    assert torch.equal(paint(pipe), old)


def test_the_student_reads_the_prompt_in_the_place_of_t5():
    """The denoiser gets the student's rows, to the bit."""
    pipe = tiny_flux()
    student = tiny_student(pipe)
    patch_pipeline(pipe, student)
    kwargs = {"padding": "max_length", "max_length": 12, "return_tensors": "pt"}
    ids = pipe.tokenizer_2(PROMPTS[0], **kwargs).input_ids
    with torch.no_grad():
        embeds, _, _ = pipe.encode_prompt(PROMPTS[0], None, max_sequence_length=12)
        assert torch.equal(embeds, student(ids)[0])


# In PixArt's signature T5 comes first, so that diffusers asks it for the device of the pipeline.
@pytest.mark.parametrize("build", [tiny_flux, tiny_pixart_sigma])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload(build, offload):
    pipe = build()
    student, reference = tiny_student(pipe), paint(pipe)
    plain = paint(patch_pipeline(build(), tiny_student(pipe)))

    OFFLOADS[offload](pipe)
    before, teacher = state(pipe), t5_of(pipe)
    patch_pipeline(pipe, student, keep_teacher=True)
    for _ in range(2):  # maybe_free_model_hooks enables model offload again after each call
        assert torch.equal(paint(pipe), plain)
    assert not hasattr(teacher, "_hf_hook")
    kind = "_diffusers_hook" if offload.startswith("group") else "_hf_hook"
    assert any(hasattr(part, kind) for part in student.modules()) == (offload != "none")
    assert all(hook.model is not teacher for hook in getattr(pipe, "_all_hooks", []))

    unpatch_pipeline(pipe)
    assert state(pipe) == before
    assert torch.equal(paint(pipe), reference)
    assert torch.equal(paint(pipe), reference)
    for part in student.modules():
        assert not {"_hf_hook", "_diffusers_hook"} & vars(part).keys()
    assert all(parameter.device.type == "cpu" for parameter in student.parameters())


@pytest.mark.parametrize("offload", OFFLOADS)
def test_the_teacher_is_freed(offload):
    pipe = tiny_flux()
    student, teacher = tiny_student(pipe), weakref.ref(pipe.text_encoder_2)
    weights = weakref.ref(pipe.text_encoder_2.shared.weight)
    OFFLOADS[offload](pipe)
    paint(pipe)
    patch_pipeline(pipe, student)
    assert teacher() is None
    assert weights() is None


def test_the_teacher_is_kept():
    pipe = tiny_flux()
    student, teacher = tiny_student(pipe), weakref.ref(pipe.text_encoder_2)
    patch_pipeline(pipe, student, keep_teacher=True)
    gc.collect()
    assert teacher() is not None
    unpatch_pipeline(pipe)
    del pipe
    gc.collect()
    assert teacher() is None


def test_another_pipeline_of_the_same_components_keeps_its_teacher():
    pipe = tiny_flux()
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    patch_pipeline(pipe, tiny_student(pipe))
    assert isinstance(other.text_encoder_2, transformers.T5EncoderModel)

    patched = FluxImg2ImgPipeline.from_pipe(pipe)
    assert patched.text_encoder_2 is pipe.text_encoder_2
    with pytest.raises(PatchError, match="wasn't kept"):
        unpatch_pipeline(patched)


def test_dtype(tmp_path):
    """As the teacher's. Under float16 `wo` stays in float32, wherever the student comes from."""
    tiny_student(tiny_flux()).save_pretrained(tmp_path / "student")
    for dtype in (torch.bfloat16, torch.float16):
        for student in (tiny_student(tiny_flux()).train(), tmp_path / "student"):
            pipe = tiny_flux()
            pipe.text_encoder_2.to(dtype)
            patch_pipeline(pipe, student)
            patched = pipe.text_encoder_2
            assert patched.dtype == dtype
            wo = patched.encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight
            assert wo.dtype == (torch.float32 if dtype == torch.float16 else dtype)
            assert patched(torch.tensor([[1, 2]]))[0].dtype == dtype
            assert not patched.training


def test_a_bfloat16_pipeline_runs():
    pipe = tiny_flux().to(torch.bfloat16)
    patch_pipeline(pipe, tiny_student(pipe))
    assert paint(pipe).isfinite().all()


def test_the_teacher_follows_a_pipeline_that_was_cast_while_patched():
    pipe = tiny_flux()
    patch_pipeline(pipe, tiny_student(pipe), keep_teacher=True)
    pipe.to(torch.bfloat16)
    unpatch_pipeline(pipe)
    assert pipe.text_encoder_2.dtype == torch.bfloat16
    assert paint(pipe).isfinite().all()


@pytest.mark.parametrize("offload", ["none", "model", "group by leaf"])
def test_a_pipeline_loaded_without_t5(flux_folder, tmp_path, offload):
    pipe = FluxPipeline.from_pretrained(flux_folder, text_encoder_2=None)
    pipe.set_progress_bar_config(disable=True)
    OFFLOADS[offload](pipe)
    before, student = state(pipe), tiny_student(tiny_flux())
    patch_pipeline(pipe, student)
    assert pipe.config["text_encoder_2"] == ("t5slim.encoder", "SlimT5Encoder")
    unpatch_pipeline(pipe)
    assert pipe.text_encoder_2 is None
    assert state(pipe) == before

    patch_pipeline(pipe, student)
    same = patch_pipeline(tiny_flux(), tiny_student(tiny_flux()))
    torch.testing.assert_close(paint(pipe), paint(same), rtol=1e-5, atol=1e-5)


def test_the_next_student_without_the_teacher():
    """As the error of a second patch says."""
    pipe = patch_pipeline(tiny_flux(), tiny_student(tiny_flux(), seed=1))
    first = paint(pipe)
    pipe.register_modules(text_encoder_2=None)
    patch_pipeline(pipe, tiny_student(tiny_flux(), seed=2))
    assert not torch.equal(paint(pipe), first)
    with pytest.raises(AlreadyPatchedError):
        patch_pipeline(pipe, tiny_student(tiny_flux(), seed=1))


def test_a_teacher_put_back_by_hand_is_a_pipeline_to_patch():
    pipe = tiny_flux()
    patch_pipeline(pipe, tiny_student(pipe))
    pipe.register_modules(text_encoder_2=t5_encoder())
    with pytest.raises(
        PatchError, match=r"nothing to undo: text_encoder_2 .* holds T5EncoderModel"
    ):
        unpatch_pipeline(pipe)
    patch_pipeline(pipe, tiny_student(pipe), keep_teacher=True)
    unpatch_pipeline(pipe)


# --- What is refused, and leaves the pipeline as it was ---------------------------------------


def truncated(folder: Path) -> Path:
    tiny_student(tiny_flux()).save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def with_nan(folder: Path) -> Path:
    student = tiny_student(tiny_flux())
    student.final_projection[0].weight.data[0, 0] = torch.nan
    student.save_pretrained(folder)
    return folder


def with_unknown_key(folder: Path) -> Path:
    tiny_student(tiny_flux()).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"projekt_out_dim": 32}
    (folder / "config.json").write_text(json.dumps(config))
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


WIDTH = r"rows have width 48 \(config.project_out_dim\).*FluxPipeline takes 32.*projection_dim=32"
WORDS = r"vocabulary of 1,000, and tokenizer_2 of this FluxPipeline \(T5Tokenizer\) one of 256"
MISFIT = IncompatibleStudentError
REFUSED = {
    "width": (lambda _: student_for(tiny_flux(), project_out_dim=48), MISFIT, WIDTH),
    "vocabulary": (lambda _: student_for(tiny_flux(), vocab_size=1000), MISFIT, WORDS),
    "width, from its config": (of_another_width_and_without_weights, MISFIT, WIDTH),
    "a T5": (lambda _: t5_encoder(), MISFIT, "got T5EncoderModel.*from_t5"),
    "a folder of a T5": (plain_t5, MISFIT, "isn't a student: its config"),
    "a number": (lambda _: 5, MISFIT, "got int"),
    "none published": (lambda _: None, MISFIT, "FluxPipeline, whose .* width 32"),
    "truncated": (truncated, CheckpointError, "isn't a whole safetensors file"),
    "NaN": (with_nan, CheckpointError, "NaN or infinity in final_projection.0.weight"),
    "unknown key": (with_unknown_key, ConfigError, "'projekt_out_dim'.*'project_out_dim'"),
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
    old, before = paint(pipe), state(pipe)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        patch_pipeline(pipe, student)
    assert state(pipe) == before
    assert torch.equal(paint(pipe), old)


def test_the_pipelines_own_teacher_is_no_student():
    pipe = tiny_flux()
    with pytest.raises(IncompatibleStudentError, match="got T5EncoderModel"):
        patch_pipeline(pipe, pipe.text_encoder_2)


def test_already_patched():
    pipe = tiny_flux()
    student = tiny_student(pipe)
    patch_pipeline(pipe, student, keep_teacher=True)
    old, before = paint(pipe), state(pipe)
    for again in (student, tiny_student(tiny_flux(), seed=5), None):
        with pytest.raises(
            AlreadyPatchedError, match="text_encoder_2 of this FluxPipeline already"
        ):
            patch_pipeline(pipe, again)
    assert state(pipe) == before
    assert torch.equal(paint(pipe), old)
    unpatch_pipeline(pipe)


@pytest.mark.parametrize("build", [tiny_sdxl, tiny_flux2])
def test_no_t5(build):
    pipe = build()
    before = state(pipe)
    for call in (patch_pipeline, unpatch_pipeline):
        with pytest.raises(NoT5SlotError, match=f"{type(pipe).__name__} has no T5"):
            call(pipe)
    assert state(pipe) == before


def big_tokenizer(tokens: int) -> transformers.T5TokenizerFast:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(f"▁{i}", -9.0) for i in range(tokens - 103)]
    return transformers.T5TokenizerFast(
        vocab=vocab + [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    )


def test_vocabularies_of_t5_and_umt5():
    """T5's 32,100 tokens and 32,128 rows belong together, UMT5's 256,300 tokens have other rows."""
    pipe = tiny_wan()
    t5_student = student_for(tiny_chroma(), vocab_size=32128)
    pipe.tokenizer = big_tokenizer(32100)
    patch_pipeline(pipe, t5_student, keep_teacher=True)
    unpatch_pipeline(pipe)
    pipe.tokenizer = big_tokenizer(256300)
    before = state(pipe)
    with pytest.raises(IncompatibleStudentError, match=r"32,128.*WanPipeline.*256,300.*UMT5"):
        patch_pipeline(pipe, t5_student)
    assert state(pipe) == before
    patch_pipeline(pipe, student_for(tiny_chroma(), vocab_size=256384))


def test_the_default_is_for_flux_only():
    with pytest.raises(
        IncompatibleStudentError, match="no student is published for ChromaPipeline"
    ):
        patch_pipeline(tiny_chroma())
    with pytest.raises(IncompatibleStudentError, match="no student is published for WanPipeline"):
        patch_pipeline(tiny_wan())


def test_a_pipeline_spread_by_device_map():
    pipe = tiny_flux()
    pipe.hf_device_map = {"transformer": 0, "text_encoder_2": "cpu"}
    before = state(pipe)
    with pytest.raises(PatchError, match=r"spreads the pipeline.*reset_device_map\(\)"):
        patch_pipeline(pipe, tiny_student(tiny_flux()))
    assert state(pipe) == before
    pipe.reset_device_map()
    patch_pipeline(pipe, tiny_student(tiny_flux()))


def test_nothing_to_undo():
    pipe = tiny_flux()
    with pytest.raises(
        PatchError, match=r"nothing to undo: text_encoder_2 .* holds T5EncoderModel"
    ):
        unpatch_pipeline(pipe)
    pipe.register_modules(text_encoder_2=None)
    with pytest.raises(PatchError, match=r"nothing to undo: text_encoder_2 .* holds None"):
        unpatch_pipeline(pipe)


def test_the_line_that_reloads_the_teacher(flux_folder):
    """It is in the error, and it works."""
    pipe = FluxPipeline.from_pretrained(flux_folder)
    pipe.set_progress_bar_config(disable=True)
    old = paint(pipe)
    patch_pipeline(pipe, tiny_student(tiny_flux()))
    pipe.enable_model_cpu_offload(device="cpu")
    before = state(pipe)
    with pytest.raises(PatchError, match="keep_teacher=True") as error:
        unpatch_pipeline(pipe)
    assert state(pipe) == before
    line = str(error.value).splitlines()[-1]
    assert f"{str(flux_folder)!r}, subfolder='text_encoder_2', dtype=torch.float32" in line
    exec(
        line.strip(), {"t5slim": t5slim, "transformers": transformers, "torch": torch, "pipe": pipe}
    )
    torch.testing.assert_close(paint(pipe), old)
    assert not hasattr(pipe, "_t5slim_patch")


def test_the_line_that_reloads_a_teacher_from_elsewhere(flux_folder, tmp_path):
    t5_encoder().save_pretrained(tmp_path / "my-t5")
    teacher = transformers.T5EncoderModel.from_pretrained(tmp_path / "my-t5")
    pipe = FluxPipeline.from_pretrained(flux_folder, text_encoder_2=teacher)
    patch_pipeline(pipe, tiny_student(tiny_flux()))
    with pytest.raises(
        PatchError, match=re.escape(f"from_pretrained({str(tmp_path / 'my-t5')!r}, ")
    ):
        unpatch_pipeline(pipe)


def test_wrong_arguments(flux_folder):
    student = tiny_student(tiny_flux())
    with pytest.raises(TypeError, match=r"expected a diffusers pipeline.*got 'me/flux'"):
        patch_pipeline("me/flux")
    with pytest.raises(TypeError, match="two students"):
        patch_pipeline(tiny_flux(), student, student=student)
    with pytest.raises(TypeError, match="doesn't take torch_dtype"):
        patch_pipeline(tiny_flux(), student, torch_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"patch_pipeline\(FluxPipeline, ...\).*folder or Hub id"):
        patch_pipeline(FluxPipeline, student=student)
    with pytest.raises(TypeError, match="loads no T5 that could be kept"):
        patch_pipeline(FluxPipeline, flux_folder, student=student, keep_teacher=True)
