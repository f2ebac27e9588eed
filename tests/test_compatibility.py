"""Patched pipelines with LoRA, compile, offload, quantisation, copies and modular pipelines."""

from __future__ import annotations

import copy
import inspect
import pickle
import weakref

import accelerate
import diffusers
import pytest
import torch
import transformers
from diffusers import (
    AutoPipelineForImage2Image,
    FirstBlockCacheConfig,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
)
from diffusers.hooks import apply_layerwise_casting
from helpers.pipelines import generate, quiet, state
from tiny import MAX_TOKENS, PROMPTS, call_kwargs, tiny_flux, tiny_student

from t5slim import (
    CheckpointError,
    DistillError,
    IncompatibleStudentError,
    PatchError,
    SlimT5Encoder,
    patch_pipeline,
    unpatch_pipeline,
)
from t5slim.distill import DistillConfig, capture, train, velocity_gap

# Inside of the libraries of quantisation, and on their way into a model; not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FLOAT8 = torch.float8_e4m3fn
# What T5 itself can't have in float8: transformers reads the dtype of `wo`, diffusers of `shared`.
T5_SKIP = ("shared", "embed_tokens", "wo", "norm")


def student() -> SlimT5Encoder:
    return tiny_student(tiny_flux())


def dtypes(module) -> list[torch.dtype]:
    return [parameter.dtype for parameter in module.parameters()]


def learns(pipe, **kwargs) -> SlimT5Encoder:
    """A student, taught through this pipeline for one update."""
    learner = student().to(pipe.device)
    before = copy.deepcopy(learner.state_dict())
    config = DistillConfig(max_steps=1, batch_size=2, objective="velocity", warmup_steps=0)
    train(pipe, learner, PROMPTS[:2], config, pipeline_kwargs=call_kwargs(pipe, steps=2), **kwargs)
    assert not any(torch.equal(before[name], weight) for name, weight in learner.named_parameters())
    return learner


@pytest.fixture(scope="module")
def patched_latents():
    """Of a patched FLUX that nothing else was done to."""
    return generate(patch_pipeline(tiny_flux(), student()))


@pytest.mark.usefixtures("cpu_as_accelerator")
def test_offload_that_changes_while_patched(patched_latents):
    pipe = tiny_flux()
    pipe.enable_model_cpu_offload(device="cpu")
    patch_pipeline(pipe, student(), keep_teacher=True)
    pipe.remove_all_hooks()
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert torch.equal(generate(pipe), patched_latents)
    pipe.remove_all_hooks()
    assert not hasattr(unpatch_pipeline(pipe).text_encoder_2, "_hf_hook")
    assert torch.equal(generate(pipe), generate(tiny_flux()))


def test_device_map_of_several_devices():
    """Refused: diffusers itself refuses to move such a pipeline's parts."""
    pipe = tiny_flux()
    models = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    whole = {"device_map": {"": "cpu"}, "main_device": "cpu", "force_hooks": True}
    for model in models.values():  # as `from_pretrained(device_map="balanced")` does
        accelerate.dispatch_model(model, **whole)
    pipe.hf_device_map = dict.fromkeys(models, "cpu")
    old, before = generate(pipe), state(pipe)
    with pytest.raises(PatchError, match=r"spreads the pipeline.*reset_device_map"):
        patch_pipeline(pipe, student())
    assert state(pipe) == before
    pipe.reset_device_map()  # as the error says
    patch_pipeline(pipe, student(), keep_teacher=True)
    assert torch.equal(generate(unpatch_pipeline(pipe)), old)


# --- torch.compile ----------------------------------------------------------------------------


def test_a_compiled_student(patched_latents):
    pipe = tiny_flux()
    old, teacher = generate(pipe), pipe.text_encoder_2
    compiled = torch.compile(student(), backend="eager")
    patch_pipeline(pipe, compiled, keep_teacher=True)
    assert pipe.text_encoder_2 is compiled
    assert pipe.config["text_encoder_2"] == ("t5slim.encoder", "SlimT5Encoder")
    assert torch.equal(generate(pipe), patched_latents)
    with pytest.raises(PatchError):
        patch_pipeline(pipe, student())
    assert unpatch_pipeline(pipe).text_encoder_2 is teacher
    assert torch.equal(generate(pipe), old)
    with pytest.raises(DistillError, match=r"is a OptimizedModule.*student\.compile\(\)"):
        train(pipe, compiled, PROMPTS)


@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_a_student_that_is_compiled_in_the_slot(how, patched_latents):
    pipe = tiny_flux()
    teacher = pipe.text_encoder_2
    patch_pipeline(pipe, student(), keep_teacher=True)
    if how == "torch.compile":
        pipe.text_encoder_2 = torch.compile(pipe.text_encoder_2, backend="eager")
    else:
        pipe.text_encoder_2.compile(backend="eager")
    assert torch.equal(generate(pipe), patched_latents)
    with pytest.raises(PatchError):
        patch_pipeline(pipe, student())
    assert unpatch_pipeline(pipe).text_encoder_2 is teacher


def wrap(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


COMPILERS = {
    "module.compile": lambda pipe: pipe.transformer.compile(backend="eager"),
    "torch.compile": wrap,
    "repeated blocks": lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"),
}


@pytest.mark.parametrize("how", COMPILERS)
def test_distillation_through_a_compiled_denoiser(how):
    """The same trajectories, map and targets."""
    pipe, kwargs = tiny_flux(), {"pipeline_kwargs": call_kwargs(tiny_flux(), steps=2)}
    gap = velocity_gap(pipe, student(), PROMPTS[:2], **kwargs)
    COMPILERS[how](pipe)
    assert velocity_gap(pipe, student(), PROMPTS[:2], **kwargs) == pytest.approx(gap, rel=1e-5)
    if how == "module.compile":
        learns(pipe)


# --- Layerwise casting ------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [T5_SKIP, "auto"])
def test_layerwise_casting_of_t5(skip):
    """The student computes in the dtype that T5 computed in, not in the one it was stored in."""
    pipe = tiny_flux().to(torch.bfloat16)
    apply_layerwise_casting(pipe.text_encoder_2, FLOAT8, torch.bfloat16, skip)
    stored = dtypes(pipe.text_encoder_2)
    assert FLOAT8 in stored
    patch_pipeline(pipe, student(), keep_teacher=True)
    assert {*dtypes(pipe.text_encoder_2)} == {torch.bfloat16}
    assert generate(pipe).isfinite().all()
    assert dtypes(unpatch_pipeline(pipe).text_encoder_2) == stored


@pytest.mark.parametrize("when", ["before", "after"])
def test_layerwise_casting_of_the_student(when):
    """Of its own, which it keeps: diffusers can't take it off."""
    pipe, learner = tiny_flux().to(torch.bfloat16), student().to(torch.bfloat16)
    old = generate(pipe)
    if when == "after":
        patch_pipeline(pipe, learner, keep_teacher=True)
    apply_layerwise_casting(learner, FLOAT8, torch.bfloat16, T5_SKIP)
    stored = dtypes(learner)
    if when == "before":
        patch_pipeline(pipe, learner, keep_teacher=True)
    assert dtypes(learner) == stored and FLOAT8 in stored
    assert generate(pipe).isfinite().all()
    assert {*dtypes(unpatch_pipeline(pipe).text_encoder_2)} == {torch.bfloat16}
    assert torch.equal(generate(pipe), old)
    assert learner(torch.tensor([[1, 2]]))[0].isfinite().all()


# --- Textual inversion, embeddings by hand, caches --------------------------------------------


def test_a_tokenizer_with_added_tokens_is_still_t5s():
    """Its 257 tokens would round up to another multiple of 128."""
    pipe = tiny_flux()
    pipe.tokenizer_2.add_tokens("<cat>")
    with pytest.raises(IncompatibleStudentError, match="vocabulary of 512"):
        patch_pipeline(pipe, tiny_student(tiny_flux(), vocab_size=512))
    patch_pipeline(pipe, student())


def test_embeddings_by_hand():
    """The student's, to the bit; in bfloat16, where those of an assigned one are refused."""
    pipe = patch_pipeline(tiny_flux().to(torch.bfloat16), student())
    kwargs = {"padding": "max_length", "max_length": MAX_TOKENS, "return_tensors": "pt"}
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(PROMPTS[1], None, max_sequence_length=MAX_TOKENS)
        ids = pipe.tokenizer_2(PROMPTS[1], **kwargs).input_ids
        assert torch.equal(embeds, pipe.text_encoder_2(ids)[0])
    by_hand = generate(pipe, None, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    assert torch.equal(by_hand, generate(pipe))


def test_cache():
    """Its repeated predictions are no targets."""
    pipe = tiny_flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    message = r"transformer of this FluxPipeline has a cache \(First\w+\).*disable_cache\(\)"
    for distil in (capture, lambda pipe, *args, **kw: train(pipe, student(), *args, **kw)):
        with pytest.raises(DistillError, match=message):
            distil(pipe, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe))


def test_group_offload_is_no_cache():
    """Its hooks carry nothing from one call to the next."""
    pipe = tiny_flux()
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert capture(pipe, PROMPTS[:1], pipeline_kwargs=call_kwargs(pipe)).denoiser_calls


# --- Pipelines that share components, and copies ----------------------------------------------


@pytest.mark.parametrize("cls", [FluxImg2ImgPipeline, AutoPipelineForImage2Image])
def test_from_pipe_of_a_patched_pipeline(cls):
    """Each is patched and undone by itself."""
    pipe = tiny_flux()
    teacher, unpatched = pipe.text_encoder_2, cls.from_pipe(pipe)
    patch_pipeline(pipe, student(), keep_teacher=True)
    assert unpatched.text_encoder_2 is teacher
    other = cls.from_pipe(pipe)
    assert unpatch_pipeline(pipe).text_encoder_2 is teacher
    assert isinstance(other.text_encoder_2, SlimT5Encoder)
    with pytest.raises(PatchError, match="wasn't kept"):
        unpatch_pipeline(other)
    assert unpatch_pipeline(other, teacher).text_encoder_2 is teacher


def pickled(pipe):
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies(duplicate, patched_latents):
    """A copy has its own student and teacher."""
    pipe = tiny_flux()
    teacher, old = pipe.text_encoder_2, generate(pipe)
    twin = duplicate(patch_pipeline(pipe, student(), keep_teacher=True))
    assert twin.text_encoder_2 is not pipe.text_encoder_2
    assert torch.equal(generate(twin), patched_latents)
    assert unpatch_pipeline(twin).text_encoder_2 is not teacher
    assert torch.equal(generate(twin), old)
    assert torch.equal(generate(pipe), patched_latents)


# --- Modular pipelines ------------------------------------------------------------------------


def modular_flux(**kwargs):
    pipe = diffusers.FluxAutoBlocks().init_pipeline(**kwargs)
    parts = {n: part for n, part in tiny_flux().components.items() if n in pipe.components}
    pipe.update_components(**parts)
    return pipe


def generate_modular(pipe):
    kwargs = call_kwargs(tiny_flux()) | {"generator": torch.Generator().manual_seed(0)}
    return pipe(prompt=PROMPTS[1], output="latents", output_type="latent", **kwargs)


def index_of(pipe):
    return dict(pipe.config), dict(pipe._component_specs)


def test_modular_pipeline(tmp_path):
    pipe = modular_flux()
    before, old = index_of(pipe), generate_modular(pipe)
    patch_pipeline(pipe, student(), keep_teacher=True)
    new = generate_modular(pipe)
    assert not torch.equal(new, old)
    with pytest.raises(PatchError, match=r"pipe.update_components\(text_encoder_2=None\)"):
        patch_pipeline(pipe, student())
    if "overwrite_modular_index" in inspect.signature(pipe.save_pretrained).parameters:
        # Before, diffusers saved an index, and no components.
        pipe.save_pretrained(tmp_path / "patched", overwrite_modular_index=True)
        again = diffusers.ModularPipeline.from_pretrained(tmp_path / "patched")
        again.load_components()
        torch.testing.assert_close(generate_modular(again), new)
    unpatch_pipeline(pipe)
    assert index_of(pipe) == before
    assert torch.equal(generate_modular(pipe), old)


def test_modular_pipeline_without_t5(flux_folder):
    pipe = diffusers.FluxAutoBlocks().init_pipeline(str(flux_folder))
    pipe.load_components(names=[n for n in pipe.component_names if n != "text_encoder_2"])
    entry = pipe.config["text_encoder_2"]
    patch_pipeline(pipe, student())
    assert generate_modular(pipe).isfinite().all()
    assert unpatch_pipeline(pipe).text_encoder_2 is None
    assert pipe.config["text_encoder_2"] == entry
    patch_pipeline(pipe, student())
    pipe.update_components(text_encoder_2=None)  # the next student, as the error says
    patch_pipeline(pipe, student())


@pytest.mark.skipif(
    not hasattr(diffusers.ModularPipeline, "unload_components"),
    reason="this diffusers can't take a component out of a components manager",
)
@pytest.mark.parametrize("collection", [None, "flux"])
def test_components_manager(collection):
    """It holds the student, and T5 no more."""
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


# --- LoRA -------------------------------------------------------------------------------------


def test_lora_of_the_student(tmp_path):
    """Trained over a frozen student, saved, loaded, merged."""
    peft = pytest.importorskip("peft")
    pipe, learner = tiny_flux(), student()
    base = copy.deepcopy(learner.state_dict())
    adapted = peft.get_peft_model(learner, peft.LoraConfig(r=2, target_modules=["q", "v", "wo"]))
    config = DistillConfig(max_steps=2, batch_size=2, objective="embedding", warmup_steps=0)
    assert train(pipe, learner, PROMPTS, config, pipeline_kwargs=call_kwargs(pipe))
    for name, weight in learner.state_dict().items():
        frozen = base.get(name.replace(".base_layer", ""))
        assert weight.any() if frozen is None else torch.equal(weight, frozen), name

    new = generate(patch_pipeline(pipe, adapted))
    with pytest.raises(CheckpointError, match=r"LoRA alone.*merge_and_unload"):
        learner.save_pretrained(tmp_path / "learner")
    with pytest.raises(CheckpointError, match="has a LoRA in it"):
        train(tiny_flux(), learner, PROMPTS, config, output_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    pipe.register_modules(text_encoder_2=None)
    merged = generate(patch_pipeline(pipe, tmp_path / "merged"))
    torch.testing.assert_close(merged, new, rtol=1e-4, atol=1e-4)


# --- Quantisation -----------------------------------------------------------------------------


def torchao(library):
    from torchao.quantization import Int8WeightOnlyConfig

    return library.TorchAoConfig(Int8WeightOnlyConfig())


def quanto(library):
    return library.QuantoConfig(
        **{"weights" if library is transformers else "weights_dtype": "int8"}
    )


def eight_bit(library):
    return library.BitsAndBytesConfig(load_in_8bit=True)


def four_bit(library):
    return library.BitsAndBytesConfig(load_in_4bit=True)


# Of diffusers or transformers: how to quantise, what to import, and the dtype to compute in.
LIBRARIES = {
    "torchao": (torchao, "torchao", torch.bfloat16),
    "quanto": (quanto, "optimum.quanto", torch.float32),
    "8 bits": (eight_bit, "bitsandbytes", torch.bfloat16),
    "4 bits": (four_bit, "bitsandbytes", torch.float32),
}


@pytest.fixture(params=LIBRARIES)
def quantise(request):
    """Call with a library and get the arguments that load one of its models quantised."""
    config, module, dtype = LIBRARIES[request.param]
    pytest.importorskip(module)

    def arguments(library):
        if library is diffusers and module == "bitsandbytes" and not torch.cuda.is_available():
            pytest.skip("diffusers quantises with bitsandbytes on a GPU only")
        name = "dtype" if library is transformers else "torch_dtype"
        return {"quantization_config": config(library), name: dtype}

    arguments.dtype = dtype
    return arguments


def load(folder, dtype, **parts):
    pipe = quiet(FluxPipeline.from_pretrained(folder, torch_dtype=dtype, **parts))
    return pipe.to("cuda") if torch.cuda.is_available() else pipe


def kinds(module) -> list[type]:
    return [type(parameter) for parameter in module.parameters()]


def equal(one, other):
    if hasattr(one, "dequantize") and type(one) not in (torch.Tensor, torch.nn.Parameter):
        one, other = one.dequantize(), other.dequantize()
    return torch.equal(one, other)


def learns_and_undoes(pipe, dtype) -> None:
    """A student that was taught through the pipeline takes T5's place in it, and leaves it."""
    old, learner = generate(pipe), learns(pipe)
    patch_pipeline(pipe, learner, keep_teacher=True)
    assert {*dtypes(learner)} == {dtype}
    assert not torch.equal(generate(pipe), old)
    assert torch.equal(generate(unpatch_pipeline(pipe)), old)


def test_quantised_t5(quantise, flux_folder):
    """Given back bit for bit."""
    cls, kwargs = transformers.T5EncoderModel, quantise(transformers)
    teacher = cls.from_pretrained(flux_folder, subfolder="text_encoder_2", **kwargs)
    assert {*kinds(teacher)} - {torch.nn.Parameter}
    before = copy.deepcopy(teacher.state_dict())
    pipe = load(flux_folder, quantise.dtype, text_encoder_2=teacher)
    learns_and_undoes(pipe, quantise.dtype)
    after = pipe.text_encoder_2.state_dict()
    assert before.keys() == after.keys()
    assert all(equal(before[key], after[key]) for key in before)


def test_quantised_denoiser(quantise, flux_folder):
    """The gradient reaches the student through it."""
    cls, kwargs = FluxTransformer2DModel, quantise(diffusers)
    denoiser = cls.from_pretrained(flux_folder, subfolder="transformer", **kwargs)
    assert {*kinds(denoiser)} - {torch.nn.Parameter}
    pipe = load(flux_folder, quantise.dtype, transformer=denoiser)
    learns_and_undoes(pipe, quantise.dtype)


def test_quantised_student(quantise, flux_folder, tmp_path):
    """Loaded quantised, it generates nearly what it does in full."""
    student().save_pretrained(tmp_path)
    learner = SlimT5Encoder.from_pretrained(tmp_path, **quantise(transformers))
    before = kinds(learner)
    assert {*before} - {torch.nn.Parameter}
    full = generate(patch_pipeline(load(flux_folder, quantise.dtype), student())).float()
    pipe = load(flux_folder, quantise.dtype)
    old = generate(pipe)
    patch_pipeline(pipe, learner, keep_teacher=True)
    assert kinds(learner) == before
    error = generate(pipe).float() - full
    assert 0 < error.std() < 0.3 * (old.float() - full).std()
    assert torch.equal(generate(unpatch_pipeline(pipe)), old)


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
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    assert torch.uint8 in dtypes(denoiser)
    learns_and_undoes(load(flux_folder, torch.float32, transformer=denoiser), torch.float32)
