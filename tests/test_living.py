"""A patched pipeline goes on working with what diffusers offers beside.

Where a plain `pipe.text_encoder_2 = student` would do something else, the test shows both. Where it
would do as well, the test's docstring says why. The table of it all is docs/living.md.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import weakref
from contextlib import suppress

import accelerate
import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PyramidAttentionBroadcastConfig,
)
from diffusers.hooks import apply_first_block_cache, apply_layerwise_casting
from test_patch import OFFLOADS, paint, state
from tiny import MAX_TOKENS, PROMPTS, TEXT_WIDTH, call_kwargs, tiny_flux, tiny_sd3, tiny_student

from t5slim import (
    AlreadyPatchedError,
    CheckpointError,
    DistillError,
    IncompatibleStudentError,
    PatchError,
    SlimT5Encoder,
    patch_pipeline,
    unpatch_pipeline,
)
from t5slim.distill import DistillConfig, capture, train, velocity_gap
from t5slim.slot import find_text_slot

FLOAT8 = torch.float8_e4m3fn
# What T5 itself can't have in float8: transformers reads the dtype of `wo`, diffusers of `shared`.
T5_SKIP = ("shared", "embed_tokens", "wo", "norm")


def student() -> SlimT5Encoder:
    return tiny_student(tiny_flux())


def assign(pipe, student) -> None:
    """What one would do without t5slim."""
    setattr(pipe, find_text_slot(pipe).name, student)


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny_flux().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def patched_latents():
    """Of a patched FLUX that nothing else was done to."""
    return paint(patch_pipeline(tiny_flux(), student()))


# --- Offload ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("cpu_as_accelerator")
@pytest.mark.parametrize("offload", [name for name in OFFLOADS if name != "none"])
def test_offload_after_patching(offload, patched_latents):
    """Plain assignment does as well: offload hooks what is in the pipeline when it comes."""
    pipe = patch_pipeline(tiny_flux(), student())
    OFFLOADS[offload](pipe)
    for _ in range(2):
        assert torch.equal(paint(pipe), patched_latents)
    with pytest.raises(AlreadyPatchedError):
        patch_pipeline(pipe, student())


@pytest.mark.usefixtures("cpu_as_accelerator")
def test_offload_before_patching():
    """Assigned, the student has no hook and never reaches the accelerator; T5 is kept in memory."""
    held, hooked = {}, {}
    for put in (patch_pipeline, assign):
        pipe = tiny_flux()
        pipe.enable_model_cpu_offload(device="cpu")
        teacher, guest = weakref.ref(pipe.text_encoder_2), student()
        put(pipe, guest)
        gc.collect()
        held[put], hooked[put] = teacher() is not None, hasattr(guest, "_hf_hook")
    assert hooked == {patch_pipeline: True, assign: False}
    assert held == {patch_pipeline: False, assign: True}


@pytest.mark.usefixtures("cpu_as_accelerator")
def test_offload_that_changes_while_patched(patched_latents):
    pipe = tiny_flux()
    pipe.enable_model_cpu_offload(device="cpu")
    patch_pipeline(pipe, student(), keep_teacher=True)
    pipe.remove_all_hooks()
    assert torch.equal(paint(pipe), patched_latents)
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert torch.equal(paint(pipe), patched_latents)
    pipe.remove_all_hooks()
    teacher = unpatch_pipeline(pipe).text_encoder_2
    assert not hasattr(teacher, "_hf_hook")
    assert torch.equal(paint(pipe), paint(tiny_flux()))


# --- device_map -------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map_of_one_device(device_map, flux_folder):
    """Where there is no accelerator, diffusers balances nothing. Plain assignment does as well."""
    if device_map == "balanced" and torch.accelerator.is_available():
        pytest.skip("is spread over the accelerators, and refused")
    pipe = FluxPipeline.from_pretrained(flux_folder, device_map=device_map)
    assert pipe.hf_device_map in ("cpu", None)
    pipe.set_progress_bar_config(disable=True)
    before = paint(pipe)
    patch_pipeline(pipe, student(), keep_teacher=True)
    assert not torch.equal(paint(pipe), before)
    assert torch.equal(paint(unpatch_pipeline(pipe)), before)


def test_device_map_of_several_devices(flux_folder):
    """Refused: diffusers itself refuses to move such a pipeline's parts.

    Assigned, the student is left without the hooks that the other parts have, and on the CPU.
    """
    pipe = tiny_flux()
    models = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    for model in models.values():  # as `from_pretrained(device_map="balanced")` does
        accelerate.dispatch_model(
            model, device_map={"": "cpu"}, main_device="cpu", force_hooks=True
        )
    pipe.hf_device_map = dict.fromkeys(models, "cpu")
    old, before = paint(pipe), state(pipe)
    with pytest.raises(PatchError, match=r"spreads the pipeline.*reset_device_map"):
        patch_pipeline(pipe, student())
    assert state(pipe) == before
    with pytest.raises(ValueError, match="device mapping strategy"):
        pipe.enable_model_cpu_offload(device="cpu")

    guest, teacher = student(), pipe.text_encoder_2
    assign(pipe, guest)
    assert not hasattr(guest, "_hf_hook")
    assign(pipe, teacher)

    pipe.reset_device_map()  # as the error says
    patch_pipeline(pipe, student(), keep_teacher=True)
    assert torch.equal(paint(unpatch_pipeline(pipe)), old)
    with pytest.raises(PatchError, match="Load it without device_map"):
        patch_pipeline(FluxPipeline, flux_folder, student=student(), device_map="balanced")


# --- torch.compile ----------------------------------------------------------------------------


def test_a_compiled_student(patched_latents):
    """Assigned, it runs as well; but there is nothing that could be undone."""
    pipe = tiny_flux()
    old, teacher = paint(pipe), pipe.text_encoder_2
    compiled = torch.compile(student(), backend="eager")
    patch_pipeline(pipe, compiled, keep_teacher=True)
    assert pipe.text_encoder_2 is compiled
    assert pipe.config["text_encoder_2"] == ("t5slim.encoder", "SlimT5Encoder")
    assert torch.equal(paint(pipe), patched_latents)
    with pytest.raises(AlreadyPatchedError):
        patch_pipeline(pipe, student())
    assert unpatch_pipeline(pipe).text_encoder_2 is teacher
    assert torch.equal(paint(pipe), old)

    assign(pipe, compiled)
    with pytest.raises(PatchError, match="wasn't kept"):
        unpatch_pipeline(pipe)


def test_a_student_that_is_compiled_in_the_slot(patched_latents):
    pipe = tiny_flux()
    teacher = pipe.text_encoder_2
    patch_pipeline(pipe, student(), keep_teacher=True)
    pipe.text_encoder_2 = torch.compile(pipe.text_encoder_2, backend="eager")
    assert torch.equal(paint(pipe), patched_latents)
    with pytest.raises(AlreadyPatchedError):
        patch_pipeline(pipe, student())
    assert unpatch_pipeline(pipe).text_encoder_2 is teacher

    patch_pipeline(pipe, student(), keep_teacher=True)
    pipe.text_encoder_2.compile(backend="eager")
    assert torch.equal(paint(pipe), patched_latents)
    assert unpatch_pipeline(pipe).text_encoder_2 is teacher


def test_a_compiled_teacher():
    pipe = tiny_flux()
    old = paint(pipe)
    pipe.text_encoder_2 = compiled = torch.compile(pipe.text_encoder_2, backend="eager")
    patch_pipeline(pipe, student(), keep_teacher=True)
    assert not torch.equal(paint(pipe), old)
    assert unpatch_pipeline(pipe).text_encoder_2 is compiled
    assert torch.equal(paint(pipe), old)


COMPILERS = {
    "module.compile": lambda pipe: pipe.transformer.compile(backend="eager"),
    "torch.compile": lambda pipe: setattr(
        pipe, "transformer", torch.compile(pipe.transformer, backend="eager")
    ),
    "repeated blocks": lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"),
}


@pytest.mark.parametrize("how", COMPILERS)
def test_distillation_through_a_compiled_denoiser(how):
    """The same walks, map and targets. With plain assignment there is no distillation."""
    pipe, kwargs = tiny_flux(), {"pipeline_kwargs": call_kwargs(tiny_flux(), steps=2)}
    gap = velocity_gap(pipe, student(), PROMPTS[:2], **kwargs)
    COMPILERS[how](pipe)
    assert velocity_gap(pipe, student(), PROMPTS[:2], **kwargs) == pytest.approx(gap, rel=1e-5)
    if how == "module.compile":
        guest, config = student(), DistillConfig(max_steps=1, batch_size=1, objective="velocity")
        before = copy.deepcopy(guest.state_dict())
        train(pipe, guest, PROMPTS[:1], config, **kwargs)
        assert not any(torch.equal(before[name], w) for name, w in guest.named_parameters())


def test_a_wrapped_student_is_compiled_in_place_for_training():
    with pytest.raises(DistillError, match=r"is a OptimizedModule.*student\.compile\(\)"):
        train(tiny_flux(), torch.compile(student()), PROMPTS)


# --- Layerwise casting ------------------------------------------------------------------------


def test_layerwise_casting_of_the_denoiser():
    """Assigned, the student stays in float32, and the denoiser refuses its rows."""
    pipe = tiny_flux().to(torch.bfloat16)
    pipe.transformer.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.bfloat16)
    old = paint(pipe)
    patch_pipeline(pipe, student(), keep_teacher=True)
    assert pipe.text_encoder_2.dtype == torch.bfloat16
    assert paint(pipe).isfinite().all()
    assert torch.equal(paint(unpatch_pipeline(pipe)), old)
    assign(pipe, student())
    with pytest.raises(RuntimeError, match="dtype"):
        paint(pipe)


@pytest.mark.parametrize("skip", [T5_SKIP, "auto"])
def test_layerwise_casting_of_t5(skip):
    """The student computes in the dtype that T5 computed in, not in the one it was stored in."""
    pipe = tiny_flux().to(torch.bfloat16)
    apply_layerwise_casting(pipe.text_encoder_2, FLOAT8, torch.bfloat16, skip)
    stored = [parameter.dtype for parameter in pipe.text_encoder_2.parameters()]
    assert FLOAT8 in stored
    if skip == T5_SKIP:
        old = paint(pipe)
    patch_pipeline(pipe, student(), keep_teacher=True)
    assert {p.dtype for p in pipe.text_encoder_2.parameters()} == {torch.bfloat16}
    assert paint(pipe).isfinite().all()
    unpatch_pipeline(pipe)
    assert [parameter.dtype for parameter in pipe.text_encoder_2.parameters()] == stored
    if skip == T5_SKIP:
        assert torch.equal(paint(pipe), old)


@pytest.mark.parametrize("when", ["before", "after"])
def test_layerwise_casting_of_the_student(when):
    """Of its own, which it keeps: diffusers can't take it off."""
    pipe, guest = tiny_flux().to(torch.bfloat16), student()
    old = paint(pipe)
    if when == "after":
        patch_pipeline(pipe, guest, keep_teacher=True)
    else:
        guest.to(torch.bfloat16)
    apply_layerwise_casting(guest, FLOAT8, torch.bfloat16, T5_SKIP)
    stored = [parameter.dtype for parameter in guest.parameters()]
    if when == "before":
        patch_pipeline(pipe, guest, keep_teacher=True)
    assert [parameter.dtype for parameter in guest.parameters()] == stored
    assert FLOAT8 in stored
    assert paint(pipe).isfinite().all()
    unpatch_pipeline(pipe)
    assert {p.dtype for p in pipe.text_encoder_2.parameters()} == {torch.bfloat16}
    assert torch.equal(paint(pipe), old)
    assert guest(torch.tensor([[1, 2]]))[0].isfinite().all()


# --- Textual inversion ------------------------------------------------------------------------


def test_textual_inversion():
    """Plain assignment does as well: the loader asks the module in the slot."""
    pipe = patch_pipeline(tiny_flux(), student())
    before, plain = paint(pipe, "a <cat>"), paint(pipe)
    width = pipe.text_encoder_2.config.d_model
    load = {"tokenizer": pipe.tokenizer_2, "text_encoder": pipe.text_encoder_2}
    with pytest.raises(ValueError, match="Loaded embeddings are of incorrect shape"):
        pipe.load_textual_inversion({"<cat>": torch.ones(1, TEXT_WIDTH)}, **load)  # as T5's
    pipe.load_textual_inversion({"<cat>": torch.ones(1, width)}, **load)
    number = pipe.tokenizer_2.convert_tokens_to_ids("<cat>")
    weight = pipe.text_encoder_2.get_input_embeddings().weight
    assert torch.equal(weight[number], torch.ones(width))
    assert not torch.equal(paint(pipe, "a <cat>"), before)
    assert torch.equal(paint(pipe), plain)
    pipe.unload_textual_inversion(tokens="<cat>", **load)
    assert torch.equal(paint(pipe, "a <cat>"), before)


def test_a_tokenizer_with_added_tokens_is_still_t5s():
    """Its 257 tokens would round up to another multiple of 128."""
    pipe = tiny_flux()
    pipe.tokenizer_2.add_tokens("<cat>")
    assert len(pipe.tokenizer_2) == 257
    patch_pipeline(pipe, student())
    assert paint(pipe).isfinite().all()
    pipe = tiny_flux()
    pipe.tokenizer_2.add_tokens("<cat>")
    with pytest.raises(IncompatibleStudentError, match="vocabulary of 512"):
        patch_pipeline(pipe, tiny_student(tiny_flux(), vocab_size=512))


# --- How a pipeline is called -----------------------------------------------------------------


def test_embeddings_by_hand():
    """In bfloat16, where an assigned student's float32 rows are refused."""
    pipe = patch_pipeline(tiny_flux().to(torch.bfloat16), student())
    with torch.no_grad():
        rows, pooled, _ = pipe.encode_prompt(PROMPTS[1], None, max_sequence_length=MAX_TOKENS)
    assert rows.dtype == torch.bfloat16
    by_hand = paint(pipe, None, prompt_embeds=rows, pooled_prompt_embeds=pooled)
    assert torch.equal(by_hand, paint(pipe))

    plain = tiny_flux().to(torch.bfloat16)
    assign(plain, student())
    rows, pooled, _ = plain.encode_prompt(PROMPTS[1], None, max_sequence_length=MAX_TOKENS)
    with pytest.raises(RuntimeError, match="dtype"):
        paint(plain, None, prompt_embeds=rows, pooled_prompt_embeds=pooled)


@pytest.mark.parametrize("build", [tiny_flux, tiny_sd3])
def test_several_images_of_a_prompt(build):
    """Plain assignment does as well: the pipeline repeats the rows that it got."""
    pipe = patch_pipeline(build(), tiny_student(build()))
    two = paint(pipe, num_images_per_prompt=2)
    one = paint(pipe)
    assert len(two) == 2 * len(one)
    torch.testing.assert_close(two[:1], one)  # the first noise of the same generator


def test_prompts_that_are_too_long():
    """Plain assignment does as well: the tokenizer cuts them, before the student sees them."""
    pipe = patch_pipeline(tiny_flux(), student())
    long = " ".join([PROMPTS[1], PROMPTS[3], "the end"])
    assert len(pipe.tokenizer_2(long, truncation=False).input_ids) > MAX_TOKENS
    ids = pipe.tokenizer_2(long, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        rows, _, _ = pipe.encode_prompt(long, None, max_sequence_length=MAX_TOKENS)
        assert rows.shape[1] == MAX_TOKENS
        assert torch.equal(rows, pipe.text_encoder_2(ids.input_ids)[0])


def test_ip_adapter():
    """Plain assignment does as well: an IP-Adapter lives in the denoiser."""
    inner, images = 32, 4
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    adapter = {
        "image_proj": {
            "proj.weight": random(images * TEXT_WIDTH, 8),
            "proj.bias": random(images * TEXT_WIDTH),
            "norm.weight": torch.ones(TEXT_WIDTH),
            "norm.bias": torch.zeros(TEXT_WIDTH),
        },
        "ip_adapter": {
            f"0.to_{which}_ip.{part}": random(inner, TEXT_WIDTH)
            if part == "weight"
            else random(inner)
            for which in "kv"
            for part in ("weight", "bias")
        },
    }
    image = random(1, 1, 8)
    pipe = tiny_flux()
    pipe.load_ip_adapter(adapter, "", image_encoder_pretrained_model_name_or_path=None)
    embeds = {"ip_adapter_image_embeds": [image], "negative_ip_adapter_image_embeds": [0 * image]}
    old = paint(pipe, **embeds)
    patch_pipeline(pipe, student(), keep_teacher=True)
    with_image = paint(pipe, **embeds)
    assert not torch.equal(with_image, old)
    assert not torch.equal(
        with_image, paint(pipe, **embeds | {"ip_adapter_image_embeds": [-image]})
    )
    unpatch_pipeline(pipe)
    assert torch.equal(paint(pipe, **embeds), old)


# --- Caches -----------------------------------------------------------------------------------


def pyramid(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: int(pipe._current_timestep or 0),
    )


CACHES = {
    "FirstBlockCacheConfig": lambda pipe: FirstBlockCacheConfig(threshold=10.0),
    "PyramidAttentionBroadcastConfig": pyramid,
    "TaylorSeerCacheConfig": lambda pipe: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, max_order=1
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_cache(name, patched_latents):
    """In use it works, also when plainly assigned. Its repeated answers are no targets."""
    pipe = tiny_flux()
    pipe.transformer.enable_cache(CACHES[name](pipe))
    kwargs = {"pipeline_kwargs": call_kwargs(pipe)}
    message = rf"transformer of this FluxPipeline has a cache \({name}\).*disable_cache\(\)"
    guest = student()
    for distil in (capture, lambda *args, **kw: velocity_gap(args[0], guest, args[1], **kw)):
        with pytest.raises(DistillError, match=message):
            distil(pipe, PROMPTS[:2], **kwargs)
    with pytest.raises(DistillError, match=message):
        train(pipe, guest, PROMPTS, **kwargs)

    patch_pipeline(pipe, guest)
    first = paint(pipe)
    assert not torch.equal(first, patched_latents)
    assert torch.equal(paint(pipe), first)
    pipe.transformer.disable_cache()
    assert torch.equal(paint(pipe), patched_latents)


def test_a_cache_that_was_applied_by_its_function():
    pipe = tiny_flux()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=10.0))
    with pytest.raises(DistillError, match=r"has a cache \(fbc_leader_block_hook\)"):
        capture(pipe, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe))


def test_group_offload_is_no_cache():
    """Its hooks carry nothing from one call to the next."""
    pipe = tiny_flux()
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert capture(pipe, PROMPTS[:1], pipeline_kwargs=call_kwargs(pipe)).denoiser_calls


# --- Pipelines that share components ----------------------------------------------------------


@pytest.mark.parametrize("cls", [FluxImg2ImgPipeline, AutoPipelineForImage2Image])
def test_from_pipe_of_a_patched_pipeline(cls):
    """Each is undone by itself. Plain assignment does as well, but for the undoing."""
    pipe = tiny_flux()
    old, teacher = paint(pipe), pipe.text_encoder_2
    patch_pipeline(pipe, student(), keep_teacher=True)
    other = cls.from_pipe(pipe)
    assert other.text_encoder_2 is pipe.text_encoder_2
    assert other.config["text_encoder_2"] == ("t5slim.encoder", "SlimT5Encoder")

    unpatch_pipeline(pipe)
    assert torch.equal(paint(pipe), old)
    assert isinstance(other.text_encoder_2, SlimT5Encoder)
    with pytest.raises(PatchError, match="wasn't kept"):
        unpatch_pipeline(other)
    assert unpatch_pipeline(other, teacher).text_encoder_2 is teacher


def test_from_pipe_before_patching():
    """T5 stays as long as the other pipeline has it. Plain assignment does as well."""
    pipe = tiny_flux()
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    teacher = weakref.ref(pipe.text_encoder_2)
    patch_pipeline(pipe, student())
    assert other.text_encoder_2 is teacher()
    assert other.config["text_encoder_2"] == ("transformers", "T5EncoderModel")
    patch_pipeline(other, student())
    assert teacher() is None


# --- Copies -----------------------------------------------------------------------------------


def pickled(pipe):
    return pickle.loads(pickle.dumps(pipe))


def saved_by_torch(pipe):
    file = io.BytesIO()
    torch.save(pipe, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_by_torch])
def test_copies(duplicate, patched_latents):
    """A copy has its own student and teacher. Plain assignment does as well, without undoing."""
    pipe = tiny_flux()
    old = paint(pipe)
    twin = duplicate(patch_pipeline(pipe, student(), keep_teacher=True))
    assert twin.text_encoder_2 is not pipe.text_encoder_2
    assert torch.equal(paint(twin), patched_latents)
    unpatch_pipeline(twin)
    assert torch.equal(paint(twin), old)
    assert twin.text_encoder_2 is not pipe._t5slim_patch.teacher
    assert torch.equal(paint(pipe), patched_latents)
    assert torch.equal(paint(unpatch_pipeline(pipe)), old)


# --- Modular pipelines ------------------------------------------------------------------------


def modular_flux(**kwargs):
    pipe = diffusers.FluxAutoBlocks().init_pipeline(**kwargs)
    parts = {n: part for n, part in tiny_flux().components.items() if n in pipe.components}
    pipe.update_components(**parts)
    return pipe


def paint_modular(pipe):
    return pipe(
        prompt=PROMPTS[1],
        generator=torch.Generator().manual_seed(0),
        output="latents",
        output_type="latent",
        **call_kwargs(tiny_flux()),
    )


def index_of(pipe):
    return dict(pipe.config), dict(pipe._component_specs)


def test_modular_pipeline(tmp_path):
    """Assigned, the student is saved as a T5EncoderModel, and isn't one when it is loaded again."""
    pipe = modular_flux()
    before, old = index_of(pipe), paint_modular(pipe)
    patch_pipeline(pipe, student(), keep_teacher=True)
    new = paint_modular(pipe)
    assert not torch.equal(new, old)
    with pytest.raises(AlreadyPatchedError, match=r"pipe.update_components\(text_encoder_2=None\)"):
        patch_pipeline(pipe, student())
    if "overwrite_modular_index" in inspect.signature(pipe.save_pretrained).parameters:
        # Before, diffusers saved an index, and no components.
        pipe.save_pretrained(tmp_path / "patched", overwrite_modular_index=True)
        again = diffusers.ModularPipeline.from_pretrained(tmp_path / "patched")
        again.load_components()
        torch.testing.assert_close(paint_modular(again), new)
    unpatch_pipeline(pipe)
    assert index_of(pipe) == before
    assert torch.equal(paint_modular(pipe), old)

    pipe.text_encoder_2 = student()
    assert pipe.config["text_encoder_2"][:2] == ("transformers", "T5EncoderModel")


def test_modular_pipeline_without_t5(flux_folder):
    pipe = diffusers.FluxAutoBlocks().init_pipeline(str(flux_folder))
    pipe.load_components(names=[n for n in pipe.component_names if n != "text_encoder_2"])
    before = index_of(pipe)
    patch_pipeline(pipe, student())
    assert paint_modular(pipe).isfinite().all()
    pipe.update_components(text_encoder_2=None)  # the next student, as the error says
    patch_pipeline(pipe, student())
    pipe = diffusers.FluxAutoBlocks().init_pipeline(str(flux_folder))
    patch_pipeline(pipe, student())
    assert unpatch_pipeline(pipe).text_encoder_2 is None
    assert index_of(pipe) == before or pipe.config["text_encoder_2"] == before[0]["text_encoder_2"]


@pytest.mark.skipif(
    not hasattr(diffusers.ModularPipeline, "unload_components"),
    reason="this diffusers can't take a component out of a components manager",
)
@pytest.mark.parametrize("collection", [None, "flux"])
def test_components_manager(collection):
    """It holds the student, and T5 no more: assigned, it would be the other way round."""
    manager = diffusers.ComponentsManager()
    pipe = modular_flux(components_manager=manager, collection=collection)
    teacher = weakref.ref(pipe.text_encoder_2)
    patch_pipeline(pipe, student())
    assert teacher() is None
    (held,) = (part for name, part in manager.components.items() if "text_encoder_2" in name)
    assert held is pipe.text_encoder_2


def test_what_modular_pipelines_are_refused():
    with pytest.raises(TypeError, match=r"class of modular pipelines.*load_components"):
        patch_pipeline(diffusers.FluxModularPipeline, "me/flux")
    with pytest.raises(DistillError, match="is a modular pipeline"):
        capture(modular_flux(), PROMPTS[:1])
    with pytest.raises(IncompatibleStudentError, match=r"FluxModularPipeline, whose .* width 32"):
        patch_pipeline(modular_flux())


# --- The rest ---------------------------------------------------------------------------------


def test_to_dtype(patched_latents):
    """Plain assignment does as well: `pipe.to` casts what is in the pipeline."""
    pipe = patch_pipeline(tiny_flux(), student(), keep_teacher=True)
    pipe.to(torch.bfloat16)
    assert pipe.text_encoder_2.dtype == torch.bfloat16
    assert paint(pipe).isfinite().all()
    # Back again, as noise drawn in bfloat16 is other noise in some versions; weights stay rounded.
    pipe.to(torch.float32)
    difference = paint(pipe) - patched_latents
    assert 0 < difference.abs().max() < 0.05 * patched_latents.abs().max()


def test_saved_and_loaded(flux_folder, tmp_path):
    """From an empty slot: assigned there, the student is lost, as its entry is [null, null]."""
    pipe = FluxPipeline.from_pretrained(flux_folder, text_encoder_2=None)
    pipe.set_progress_bar_config(disable=True)
    assign(pipe, student())
    assert pipe.config["text_encoder_2"] == (None, None)
    pipe.save_pretrained(tmp_path / "assigned")
    with pytest.raises(ValueError, match=r"expected \[.*'text_encoder_2'.* but only"):
        DiffusionPipeline.from_pretrained(tmp_path / "assigned")
    pipe.register_modules(text_encoder_2=None)
    patch_pipeline(pipe, student())
    pipe.save_pretrained(tmp_path / "patched")
    again = DiffusionPipeline.from_pretrained(tmp_path / "patched")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(paint(again), paint(pipe))


def test_attention_settings(patched_latents):
    """Plain assignment does as well: they are the denoiser's, and the student keeps its own."""
    pipe = patch_pipeline(tiny_flux(), student())
    implementation = pipe.text_encoder_2.config._attn_implementation
    pipe.enable_attention_slicing()
    pipe.disable_attention_slicing()
    pipe.transformer.set_attention_backend("native")
    with suppress(ModuleNotFoundError, ValueError):  # not installed, or no GPU
        pipe.enable_xformers_memory_efficient_attention()
    assert pipe.text_encoder_2.config._attn_implementation == implementation
    assert torch.equal(paint(pipe), patched_latents)
    pipe.remove_all_hooks()
    assert torch.equal(paint(pipe), patched_latents)


def test_distillation_of_what_was_loaded_from_a_path_object(flux_folder, tmp_path):
    """diffusers keeps the Path as it came, in the configs of which a run writes the names down."""
    denoiser = FluxTransformer2DModel.from_pretrained(flux_folder, subfolder="transformer")
    pipe = FluxPipeline.from_pretrained(flux_folder, transformer=denoiser)
    config = DistillConfig(max_steps=1, batch_size=1, objective="embedding")
    kwargs = {"pipeline_kwargs": call_kwargs(pipe), "output_dir": tmp_path / "run"}
    assert train(pipe, student(), PROMPTS[:1], config, **kwargs).steps == 1


# --- LoRA -------------------------------------------------------------------------------------


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.mark.parametrize("build", [tiny_flux, tiny_sd3])
def test_lora_of_the_denoiser(build, peft, tmp_path):
    """Plain assignment does as well: the loader has no business with T5."""
    donor = build()
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    donor.transformer.add_adapter(config)
    weights = peft.get_peft_model_state_dict(donor.transformer)
    type(donor).save_lora_weights(tmp_path, transformer_lora_layers=weights)

    pipe = build()
    old = paint(pipe)
    patch_pipeline(pipe, tiny_student(pipe), keep_teacher=True)
    plain = paint(pipe)
    pipe.load_lora_weights(tmp_path)
    loaded = paint(pipe)
    assert (loaded - plain).abs().max() > 1e-3
    pipe.fuse_lora()
    torch.testing.assert_close(paint(pipe), loaded, rtol=1e-4, atol=1e-5)
    pipe.unfuse_lora()
    unpatch_pipeline(pipe)
    patch_pipeline(pipe, tiny_student(pipe), keep_teacher=True)
    torch.testing.assert_close(paint(pipe), loaded, rtol=1e-4, atol=1e-5)
    pipe.unload_lora_weights()
    torch.testing.assert_close(paint(pipe), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(paint(unpatch_pipeline(pipe)), old, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_lora_of_the_student(peft, tmp_path):
    """Trained over a frozen student, saved, loaded, merged. Assigned, it would run as well."""
    pipe, guest = tiny_flux(), student()
    base = copy.deepcopy(guest.state_dict())
    adapted = peft.get_peft_model(guest, peft.LoraConfig(r=2, target_modules=["q", "v", "wo"]))
    config = DistillConfig(max_steps=2, batch_size=2, objective="embedding")
    result = train(pipe, guest, PROMPTS, config, pipeline_kwargs=call_kwargs(pipe))
    assert result.student is guest
    trained = {name: w for name, w in guest.state_dict().items() if "lora_" in name}
    assert all(w.any() for w in trained.values())
    for name, weight in guest.state_dict().items():
        if name not in trained:
            assert torch.equal(weight, base[name.replace(".base_layer", "")]), name

    patch_pipeline(pipe, guest, keep_teacher=True)
    new = paint(pipe)
    unpatch_pipeline(pipe)
    with pytest.raises(IncompatibleStudentError, match="got PeftModel"):
        patch_pipeline(pipe, adapted)
    with pytest.raises(CheckpointError, match=r"LoRA alone.*merge_and_unload"):
        guest.save_pretrained(tmp_path / "guest")
    with pytest.raises(CheckpointError, match="has a LoRA in it"):
        train(pipe, guest, PROMPTS, config, output_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())
    adapted.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(student(), tmp_path / "lora").merge_and_unload()
    patch_pipeline(pipe, again)
    torch.testing.assert_close(paint(pipe), new, rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "merged")
    merged = SlimT5Encoder.from_pretrained(tmp_path / "merged")
    pipe.register_modules(text_encoder_2=None)
    torch.testing.assert_close(paint(patch_pipeline(pipe, merged)), new, rtol=1e-4, atol=1e-4)
