"""Patched pipelines with LoRA, compile, casting, quantisation, copies and modular pipelines."""

import copy
import pickle
import weakref

import diffusers
import pytest
import torch
import transformers
from diffusers import FluxImg2ImgPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.hooks import apply_layerwise_casting
from helpers.pipelines import flux_student, generate, patched_flux, quiet
from tiny import PROMPTS, call_kwargs, tiny_flux

from t5slim import SlimT5Encoder, patch_pipeline, unpatch_pipeline
from t5slim.distill import DistillConfig, capture, train, velocity_gap
from t5slim.errors import CheckpointError, DistillError, PatchError

# Inside of the libraries of quantisation, and on their way into a model; not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FLOAT8 = torch.float8_e4m3fn
# What T5 itself can't have in float8: transformers reads the dtype of `wo`, diffusers of `shared`.
T5_SKIP = ("shared", "embed_tokens", "wo", "norm")
KWARGS = call_kwargs(tiny_flux(), steps=2)


def dtypes(module) -> list[torch.dtype]:
    return [parameter.dtype for parameter in module.parameters()]


@pytest.fixture(scope="module")
def patched_latents():
    """Of a patched FLUX that nothing else was done to."""
    return generate(patched_flux())


@pytest.mark.parametrize("how", ["before", "in the slot", "module.compile"])
def test_a_compiled_student(how, patched_latents):
    pipe, student = tiny_flux(), flux_student()
    old, teacher = generate(pipe), pipe.text_encoder_2
    if how == "before":
        student = torch.compile(student, backend="eager")
        with pytest.raises(DistillError, match=r"is a OptimizedModule.*compiled in place"):
            train(pipe, student, PROMPTS)
    patch_pipeline(pipe, student, keep_teacher=True)
    assert pipe.config["text_encoder_2"] == ("t5slim.encoder", "SlimT5Encoder")
    if how == "in the slot":
        pipe.text_encoder_2 = torch.compile(student, backend="eager")
    elif how == "module.compile":
        student.compile(backend="eager")
    assert torch.equal(generate(pipe), patched_latents)
    with pytest.raises(PatchError, match="already"):
        patch_pipeline(pipe, flux_student())
    assert unpatch_pipeline(pipe).text_encoder_2 is teacher
    assert torch.equal(generate(pipe), old)


@pytest.mark.parametrize("how", ["module.compile", "torch.compile", "repeated blocks"])
def test_distillation_through_a_compiled_denoiser(how):
    """The same trajectories, map and targets."""
    pipe, kwargs = tiny_flux(), {"pipeline_kwargs": KWARGS}
    gap = velocity_gap(pipe, flux_student(), PROMPTS[:2], **kwargs)
    if how == "torch.compile":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    elif how == "module.compile":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer.compile_repeated_blocks(backend="eager")
    assert velocity_gap(pipe, flux_student(), PROMPTS[:2], **kwargs) == pytest.approx(gap, rel=1e-5)


@pytest.mark.parametrize("skip", [T5_SKIP, "auto"])
def test_layerwise_casting_of_t5(skip):
    """The student computes in the dtype that T5 computed in, not in the one it was stored in."""
    pipe = tiny_flux().to(torch.bfloat16)
    apply_layerwise_casting(pipe.text_encoder_2, FLOAT8, torch.bfloat16, skip)
    stored = dtypes(pipe.text_encoder_2)
    assert FLOAT8 in stored
    patch_pipeline(pipe, flux_student(), keep_teacher=True)
    assert {*dtypes(pipe.text_encoder_2)} == {torch.bfloat16}
    assert generate(pipe).isfinite().all()
    assert dtypes(unpatch_pipeline(pipe).text_encoder_2) == stored


@pytest.mark.parametrize("when", ["before", "after"])
def test_layerwise_casting_of_the_student(when):
    """Of its own, which it keeps: diffusers can't take it off."""
    pipe, student = tiny_flux().to(torch.bfloat16), flux_student().to(torch.bfloat16)
    old = generate(pipe)
    if when == "after":
        patch_pipeline(pipe, student, keep_teacher=True)
    apply_layerwise_casting(student, FLOAT8, torch.bfloat16, T5_SKIP)
    stored = dtypes(student)
    if when == "before":
        patch_pipeline(pipe, student, keep_teacher=True)
    assert dtypes(student) == stored and FLOAT8 in stored
    assert generate(pipe).isfinite().all()
    assert {*dtypes(unpatch_pipeline(pipe).text_encoder_2)} == {torch.bfloat16}
    assert torch.equal(generate(pipe), old)
    assert student(torch.tensor([[1, 2]]))[0].isfinite().all()


def test_cache(pipe):
    """Its repeated predictions are no targets. The hooks of group offload repeat nothing."""
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    message = r"transformer of this FluxPipeline has a cache \(fbc_.*disable_cache\(\)"
    for distil in (capture, lambda pipe, *args, **kw: train(pipe, flux_student(), *args, **kw)):
        with pytest.raises(DistillError, match=message):
            distil(pipe, PROMPTS[:2], pipeline_kwargs=KWARGS)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert capture(pipe, PROMPTS[:1], pipeline_kwargs=KWARGS).denoiser_calls


@pytest.mark.parametrize("cls", [FluxImg2ImgPipeline, diffusers.AutoPipelineForImage2Image])
def test_from_pipe_of_a_patched_pipeline(pipe, cls):
    """Each is patched and undone by itself."""
    teacher, unpatched = pipe.text_encoder_2, cls.from_pipe(pipe)
    patch_pipeline(pipe, flux_student(), keep_teacher=True)
    assert unpatched.text_encoder_2 is teacher
    other = cls.from_pipe(pipe)
    assert unpatch_pipeline(pipe).text_encoder_2 is teacher
    assert isinstance(other.text_encoder_2, SlimT5Encoder)
    with pytest.raises(PatchError, match="wasn't kept"):
        unpatch_pipeline(other)
    assert unpatch_pipeline(other, teacher).text_encoder_2 is teacher


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(pipe, duplicate, patched_latents):
    """A copy has its own student and teacher."""
    teacher, old = pipe.text_encoder_2, generate(pipe)
    twin = duplicate(patch_pipeline(pipe, flux_student(), keep_teacher=True))
    assert twin.text_encoder_2 is not pipe.text_encoder_2
    assert torch.equal(generate(twin), patched_latents)
    assert unpatch_pipeline(twin).text_encoder_2 is not teacher
    assert torch.equal(generate(twin), old)
    assert torch.equal(generate(pipe), patched_latents)


def modular_flux(**kwargs):
    pipe = diffusers.FluxAutoBlocks().init_pipeline(**kwargs)
    parts = {n: part for n, part in tiny_flux().components.items() if n in pipe.components}
    pipe.update_components(**parts)
    return pipe


def generate_modular(pipe):
    kwargs = {**KWARGS, "generator": torch.Generator().manual_seed(0)}
    return pipe(prompt=PROMPTS[1], output="latents", output_type="latent", **kwargs)


def test_modular_pipeline(tmp_path):
    pipe = modular_flux()
    before, old = (dict(pipe.config), dict(pipe._component_specs)), generate_modular(pipe)
    with pytest.raises(DistillError, match="is a modular pipeline"):
        capture(pipe, PROMPTS[:1])
    patch_pipeline(pipe, flux_student(), keep_teacher=True)
    new = generate_modular(pipe)
    assert not torch.equal(new, old)
    with pytest.raises(PatchError, match=r"pipe.update_components\(text_encoder_2=None\)"):
        patch_pipeline(pipe, flux_student())
    unpatch_pipeline(pipe)
    assert (dict(pipe.config), dict(pipe._component_specs)) == before
    assert torch.equal(generate_modular(pipe), old)

    patch_pipeline(pipe, flux_student())
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    again = diffusers.ModularPipeline.from_pretrained(str(tmp_path))
    again.load_components()
    torch.testing.assert_close(generate_modular(again), new)


def test_modular_pipeline_without_t5(flux_folder):
    pipe = diffusers.FluxAutoBlocks().init_pipeline(str(flux_folder))
    pipe.load_components(names=[n for n in pipe.component_names if n != "text_encoder_2"])
    patch_pipeline(pipe, flux_student())
    assert generate_modular(pipe).isfinite().all()
    pipe.update_components(text_encoder_2=None)  # the next student, as the error says
    patch_pipeline(pipe, flux_student())


@pytest.mark.parametrize("collection", [None, "flux"])
def test_components_manager(collection):
    """It holds the student, and T5 no more."""
    manager = diffusers.ComponentsManager()
    pipe = modular_flux(components_manager=manager, collection=collection)
    teacher = weakref.ref(pipe.text_encoder_2)
    patch_pipeline(pipe, flux_student())
    assert teacher() is None
    (held,) = (part for name, part in manager.components.items() if "text_encoder_2" in name)
    assert held is pipe.text_encoder_2


def test_lora_of_the_student(tmp_path):
    """Trained over a frozen student, saved, loaded, merged."""
    peft = pytest.importorskip("peft")
    pipe, student = tiny_flux(), flux_student()
    base = copy.deepcopy(student.state_dict())
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["q", "v", "wo"]))
    config = DistillConfig(max_steps=2, batch_size=2, objective="embedding", warmup_steps=0)
    assert train(pipe, student, PROMPTS, config, pipeline_kwargs=KWARGS)
    for name, weight in student.state_dict().items():
        frozen = base.get(name.replace(".base_layer", ""))
        assert weight.any() if frozen is None else torch.equal(weight, frozen), name

    new = generate(patch_pipeline(pipe, adapted))
    with pytest.raises(CheckpointError, match=r"LoRA alone.*merge_and_unload"):
        student.save_pretrained(tmp_path / "student")
    with pytest.raises(CheckpointError, match="has a LoRA in it"):
        train(tiny_flux(), student, PROMPTS, config, output_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = generate(patch_pipeline(tiny_flux(), tmp_path / "merged"))
    torch.testing.assert_close(merged, new, rtol=1e-4, atol=1e-4)


# The module to import, its config in diffusers and transformers, and the dtype to compute in.
LIBRARIES = {
    "torchao": ("torchao.quantization", "TorchAoConfig", {}, torch.bfloat16),
    "quanto": ("optimum.quanto", "QuantoConfig", {}, torch.float32),  # int8 by default
    "8 bits": ("bitsandbytes", "BitsAndBytesConfig", {"load_in_8bit": True}, torch.bfloat16),
    "4 bits": ("bitsandbytes", "BitsAndBytesConfig", {"load_in_4bit": True}, torch.float32),
}


def is_quantised(module) -> bool:
    return any(type(parameter) is not torch.nn.Parameter for parameter in module.parameters())


def load_flux(folder, dtype, **parts):
    pipe = quiet(FluxPipeline.from_pretrained(folder, dtype=dtype, **parts))
    return pipe.to("cuda") if torch.cuda.is_available() else pipe


def learns_and_undoes(pipe, dtype) -> None:
    """A student that is taught through the pipeline takes T5's place in it, and leaves it."""
    old, student = generate(pipe), flux_student().to(pipe.device)
    before = copy.deepcopy(student.state_dict())
    config = DistillConfig(max_steps=1, batch_size=2, objective="velocity", warmup_steps=0)
    train(pipe, student, PROMPTS[:2], config, pipeline_kwargs=KWARGS)
    assert not any(torch.equal(before[name], weight) for name, weight in student.named_parameters())
    patch_pipeline(pipe, student, keep_teacher=True)
    assert {*dtypes(student)} == {dtype}
    assert not torch.equal(generate(pipe), old)
    assert torch.equal(generate(unpatch_pipeline(pipe)), old)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("part", ["T5", "denoiser", "student"])
def test_quantised(name, part, flux_folder, tmp_path):
    """A student learns beside T5 and through a denoiser; one of 8 bits generates nearly as well."""
    module, config, arguments, dtype = LIBRARIES[name]
    library = pytest.importorskip(module)
    if name == "torchao":
        arguments = {"quant_type": library.Int8WeightOnlyConfig()}
    if part == "denoiser" and module == "bitsandbytes" and not torch.cuda.is_available():
        pytest.skip("diffusers quantises with bitsandbytes on a GPU only")
    config = getattr(diffusers if part == "denoiser" else transformers, config)
    kwargs = {"quantization_config": config(**arguments)}
    if part != "student":
        cls, slot = FluxTransformer2DModel, "transformer"
        if part == "T5":
            cls, slot = transformers.T5EncoderModel, "text_encoder_2"
        model = cls.from_pretrained(flux_folder, subfolder=slot, dtype=dtype, **kwargs)
        assert is_quantised(model)
        return learns_and_undoes(load_flux(flux_folder, dtype, **{slot: model}), dtype)

    flux_student().save_pretrained(tmp_path)
    student = SlimT5Encoder.from_pretrained(tmp_path, dtype=dtype, **kwargs)
    pipe, twin = load_flux(flux_folder, dtype), load_flux(flux_folder, dtype)
    old, full = generate(pipe).float(), generate(patch_pipeline(twin, flux_student())).float()
    new = generate(patch_pipeline(pipe, student)).float()
    assert is_quantised(student)
    assert 0 < (new - full).std() < 0.3 * (old - full).std()


def test_gguf_denoiser(flux_folder, tmp_path):
    """A file in 8 bits. (A T5 of a GGUF file is dequantised by transformers: one as any other.)"""
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "transformer.gguf"
    writer = gguf.GGUFWriter(file, "flux")
    for name, weight in tiny_flux().transformer.state_dict().items():
        kind = gguf.GGMLQuantizationType.F32
        if weight.ndim == 2 and weight.shape[1] % 32 == 0 and "embed" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    denoiser = FluxTransformer2DModel.from_single_file(
        str(file),
        config=str(flux_folder / "transformer"),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    assert torch.uint8 in dtypes(denoiser)
    learns_and_undoes(load_flux(flux_folder, torch.float32, transformer=denoiser), torch.float32)
