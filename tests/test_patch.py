"""patch_pipeline and unpatch_pipeline, on real pipelines, under every kind of offload."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FluxKontextPipeline,
    FluxModularPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from helpers.pipelines import (
    OFFLOADS,
    flux_student,
    generate,
    hooks_of,
    interrupted,
    patched_flux,
    quiet,
    state,
    state_of,
    t5_of,
    tiny_sdxl,
)
from tiny import (
    TEXT_WIDTH,
    clip_encoder,
    component,
    t5_encoder,
    tiny,
    tiny_chroma,
    tiny_flux,
    tiny_pixart_sigma,
    tiny_sd3,
    tiny_student,
)

from t5slim import (
    CheckpointError,
    ConfigError,
    HubAccessError,
    IncompatibleStudentError,
    NoT5SlotError,
    PatchError,
    SlimT5Encoder,
    patch_pipeline,
    unpatch_pipeline,
)
from t5slim.slot import TextSlot

pytestmark = pytest.mark.usefixtures("cpu_as_accelerator")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # memory-mapped weights are aligned otherwise
MISFIT = IncompatibleStudentError


class Words(torch.nn.Module):
    """An encoder that is no T5, and not even of transformers: a table of embeddings."""

    def __init__(self, width: int = TEXT_WIDTH) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(vocab_size=256, project_out_dim=width)
        self.table = torch.nn.Embedding(256, width)
        torch.nn.init.constant_(self.table.weight, 0.5)

    dtype = property(lambda self: self.table.weight.dtype)
    device = property(lambda self: self.table.weight.device)

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False):
        return (self.table(input_ids),)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize(
    ("build", "make"),
    [
        (tiny_flux, tiny_student),
        (tiny_flux, lambda _: Words()),
        # In its signature T5 comes first, so that diffusers asks it for the pipeline's device.
        (tiny_pixart_sigma, tiny_student),
    ],
    ids=["FLUX", "FLUX with another encoder", "PixArt"],
)
def test_patch_and_unpatch(build, make, offload):
    pipe = build()
    student, reference = make(pipe).train(), generate(pipe)
    plain = generate(patch_pipeline(build(), make(pipe)))
    assert plain.isfinite().all() and not torch.equal(plain, reference)

    OFFLOADS[offload](pipe)
    before, teacher = state(pipe), t5_of(pipe)
    assert patch_pipeline(pipe, student, keep_teacher=True) is pipe
    assert t5_of(pipe) is student and not student.training
    for _ in range(2):  # maybe_free_model_hooks enables model offload again after each call
        assert torch.equal(generate(pipe), plain)
    assert not hasattr(teacher, "_hf_hook")
    assert bool(hooks_of(student)) == (offload != "none")
    assert all(hook.model is not teacher for hook in getattr(pipe, "_all_hooks", []))

    assert unpatch_pipeline(pipe) is pipe
    assert t5_of(pipe) is teacher and state(pipe) == before
    for _ in range(2):
        assert torch.equal(generate(pipe), reference)
    assert not hooks_of(student)
    assert all(parameter.device.type == "cpu" for parameter in student.parameters())


@pytest.mark.parametrize("offload", OFFLOADS)
def test_the_teacher_is_freed(pipe, offload):
    student, teacher = tiny_student(pipe), weakref.ref(pipe.text_encoder_2)
    weights = weakref.ref(pipe.text_encoder_2.shared.weight)
    OFFLOADS[offload](pipe)
    generate(pipe)
    patch_pipeline(pipe, student)
    assert teacher() is None and weights() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["module", "folder"])
def test_dtype(pipe, tmp_path, dtype, kind):
    """As the teacher's. Under float16 `wo` stays in float32, wherever the student comes from."""
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
    pipe = patched_flux(keep_teacher=True).to(torch.bfloat16)
    assert unpatch_pipeline(pipe).text_encoder_2.dtype == torch.bfloat16
    assert generate(pipe).isfinite().all()


@pytest.mark.parametrize("part", ["", "final_projection"])
def test_float8_student(part):
    """Wholly or in part: nothing computes in it, so it is cast as other weights are."""
    student = flux_student()
    student.get_submodule(part).to(torch.float8_e4m3fn)
    pipe = patch_pipeline(tiny_flux().to(torch.bfloat16), student)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert generate(pipe).isfinite().all()


@pytest.mark.parametrize(
    ("made", "offload"), [("pipeline", "none"), *product(["student", "patch"], OFFLOADS)]
)
def test_inference_mode(made, offload):
    """What was made in it, or patched in it, works under offload, and a student can still learn."""
    with torch.inference_mode(made == "pipeline"):
        pipe = tiny_flux().to(torch.bfloat16)
    with torch.inference_mode(made == "student"):
        student = flux_student()
    old, new = generate(pipe), generate(patched_flux().to(torch.bfloat16))
    OFFLOADS[offload](pipe)
    with torch.inference_mode(made == "patch"):
        patch_pipeline(pipe, student, keep_teacher=True)
    assert torch.equal(generate(pipe), new)
    assert torch.equal(generate(unpatch_pipeline(pipe)), old)
    student(torch.tensor([[1, 2]]))[0].sum().backward()


def test_two_pipelines_that_share_a_t5(pipe):
    """Also if the other one has it on the meta device, under an offload of its own."""
    other, old = FluxPipeline(**pipe.components), generate(pipe)
    quiet(other).enable_sequential_cpu_offload(device="cpu")
    student = flux_student()
    patched = generate(patch_pipeline(pipe, student, keep_teacher=True))
    assert torch.equal(patched, generate(patched_flux()))
    assert torch.equal(generate(other), old)
    with pytest.raises(CheckpointError, match=r"T5EncoderModel has no weights.*remove_all_hooks"):
        unpatch_pipeline(pipe)
    other.remove_all_hooks()
    assert torch.equal(generate(unpatch_pipeline(pipe)), old)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("offload", OFFLOADS)
def test_interrupted(offload):
    """At any point, a Ctrl-C leaves the pipeline as it was before, or as it is afterwards."""
    pipe, student = tiny_flux().to(torch.bfloat16), flux_student().train()
    teacher, old = t5_of(pipe), generate(pipe)
    OFFLOADS[offload](pipe)

    def patch():
        patch_pipeline(pipe, student, keep_teacher=True)

    def unpatch():
        unpatch_pipeline(pipe)

    for change, undo, incoming in ((patch, unpatch, student), (unpatch, patch, teacher)):
        calls = interrupted(change)
        undo()
        if incoming is student:  # the one that `patch` takes from now on
            student = incoming = flux_student().train()
        for nth in range(1, calls, 1 + calls // 60):
            before, source = (state(pipe), state_of(incoming)), t5_of(pipe)
            assert interrupted(change, nth) >= nth
            if t5_of(pipe) is incoming:  # in a generator's end, Python ignores it
                undo()
            else:
                assert (state(pipe), state_of(incoming)) == before and t5_of(pipe) is source, nth
        change()
        new = generate(pipe)
        assert torch.equal(new, old) == (incoming is teacher)


@pytest.mark.parametrize("offload", ["none", "model", "group by leaf"])
def test_a_pipeline_loaded_without_t5(flux_folder, offload):
    pipe = quiet(FluxPipeline.from_pretrained(flux_folder, text_encoder_2=None))
    OFFLOADS[offload](pipe)
    before = state(pipe)
    patch_pipeline(pipe, flux_student())
    assert pipe.config["text_encoder_2"] == ("t5slim.encoder", "SlimT5Encoder")
    assert unpatch_pipeline(pipe).text_encoder_2 is None
    assert state(pipe) == before
    patch_pipeline(pipe, flux_student())
    torch.testing.assert_close(generate(pipe), generate(patched_flux()), **CLOSE)


def truncated(folder: Path) -> Path:
    flux_student().save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def config_of(encoder: torch.nn.Module, folder: Path) -> Path:
    """Enough to refuse it: of a T5-XXL, the weights may be 40 GB."""
    encoder.config.save_pretrained(folder)
    return folder


WIDTH = r"embeddings have width 48, .*FluxPipeline takes 32.*projection_dim of"
WORDS = r"vocabulary of 1,000, and the tokenizer of text_encoder_2 of this FluxPipeline one of 256"
REFUSED = {
    "width": (lambda _: flux_student(project_out_dim=48), MISFIT, WIDTH),
    "width of another encoder": (lambda _: Words(48), MISFIT, WIDTH),
    "vocabulary": (lambda _: flux_student(vocab_size=1000), MISFIT, WORDS),
    "config": (lambda to: config_of(flux_student(project_out_dim=48), to), MISFIT, WIDTH),
    "a T5": (lambda _: t5_encoder(), MISFIT, "got T5EncoderModel.*from_t5"),
    "T5's config": (lambda to: config_of(t5_encoder(), to), MISFIT, "json has no project_out_dim"),
    "a number": (lambda _: 5, MISFIT, "got int"),
    "truncated": (truncated, CheckpointError, "If it isn't whole"),
    "meta": (lambda _: flux_student().to("meta"), CheckpointError, "SlimT5Encoder has no weights"),
}


@pytest.mark.parametrize("offload", ["none", "model"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(pipe, case, offload, tmp_path):
    make, error, message = REFUSED[case]
    student = make(tmp_path)
    OFFLOADS[offload](pipe)
    old, before = generate(pipe), state(pipe)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        patch_pipeline(pipe, student)
    assert state(pipe) == before
    assert torch.equal(generate(pipe), old)


def spread():
    """As `from_pretrained(device_map="balanced")` leaves it; diffusers doesn't move its parts."""
    pipe = tiny_flux()
    pipe.hf_device_map = {"transformer": "cpu", "vae": "cpu"}
    return pipe


def put_back(encoder):
    """A pipeline that was patched, and got its T5 or nothing back by hand."""
    pipe = patched_flux(keep_teacher=True)
    pipe.register_modules(text_encoder_2=encoder)
    return pipe


def repatched():
    return patch_pipeline(put_back(t5_encoder()), flux_student())


NOTHING = "nothing to undo: text_encoder_2 of this FluxPipeline holds"
STATES = {
    "patched": (patched_flux, patch_pipeline, PatchError, "text_encoder_2 of this FluxPipeline al"),
    "not kept": (patched_flux, unpatch_pipeline, PatchError, "AutoModelForText.*='text_encoder_2'"),
    "kept before": (repatched, unpatch_pipeline, PatchError, "wasn't kept"),
    "SDXL": (tiny_sdxl, patch_pipeline, NoT5SlotError, "StableDiffusionXLPipeline has no T5"),
    "never": (tiny_flux, unpatch_pipeline, PatchError, f"{NOTHING} T5EncoderModel"),
    "none": (lambda: put_back(None), unpatch_pipeline, PatchError, f"{NOTHING} None"),
    "spread": (spread, patch_pipeline, PatchError, "spreads the pipeline.*reset_device_map"),
    "no default": (tiny_chroma, patch_pipeline, MISFIT, "no student .*Chroma.*/DistillT5,"),
}


@pytest.mark.parametrize("case", STATES)
def test_states(case):
    build, call, error, message = STATES[case]
    pipe = build()
    before = state(pipe)
    with pytest.raises(error, match=message):
        call(pipe)
    assert state(pipe) == before


WRONG_WORDS = component(transformers.T5EncoderModel, vocab_size=1000)


@pytest.mark.parametrize("teacher", ["me/flux", 5, clip_encoder(), t5_encoder(48), WRONG_WORDS])
def test_what_is_no_t5_of_this_pipeline_is_not_put_back(teacher):
    pipe = patched_flux(keep_teacher=True)
    before = state(pipe)
    message = f"takes a T5 of width 32; got {type(teacher).__name__}|T5EncoderModel has .* 1,000"
    with pytest.raises(PatchError, match=message):
        unpatch_pipeline(pipe, teacher)
    with pytest.raises(CheckpointError, match="T5EncoderModel has no weights"):
        unpatch_pipeline(pipe, t5_encoder().to("meta"))
    assert state(pipe) == before


@pytest.mark.parametrize(
    ("build", "name"),
    [(tiny_flux, "tokenizer_2"), (tiny_sd3, "tokenizer_3"), (tiny_chroma, "tokenizer")],
)
def test_a_pipeline_without_the_tokenizer_of_its_t5(build, name, tmp_path):
    """Refused with the line that loads it, here run; T5 itself needn't be there."""
    build().save_pretrained(tmp_path)
    student = tiny_student(build())
    pipe = build(**{name: None})
    pipe.register_modules(**{TextSlot(pipe).name: None})
    before = state(pipe)
    with pytest.raises(PatchError, match="lacks its tokenizer") as refused:
        patch_pipeline(pipe, student)
    assert state(pipe) == before
    line = str(refused.value).split("To load it: ")[1].rstrip(".")
    exec(line.replace("<folder or Hub id>", "tmp_path"), globals() | locals())
    assert generate(patch_pipeline(pipe, student)).isfinite().all()


@pytest.mark.parametrize(
    ("size", "added", "fits"),
    [(129, 0, True), (128, 0, False), (257, 0, False), (256, 1, True), (384, 1, True)],
)
def test_vocabulary(pipe, size, added, fits):
    """256 tokens, rounded up; a textual inversion may add some, and enlarge the embeddings."""
    pipe.tokenizer_2.add_tokens([f"<{i}>" for i in range(added)])
    with nullcontext() if fits else pytest.raises(MISFIT, match=f"vocabulary of {size}"):
        patch_pipeline(pipe, flux_student(vocab_size=size))


def test_a_published_student_says_what_it_was_distilled_through(caplog):
    student = flux_student()
    student.config.name_or_path = "LifuWang/DistillT5"
    # FLUX.1-dev, of which nothing is said; FLUX.1-schnell; FLUX.1-Kontext-dev.
    for cls, guided in ((FluxPipeline, True), (FluxPipeline, False), (FluxKontextPipeline, True)):
        patch_pipeline(pipe=tiny(cls, transformer={"guidance_embeds": guided}), student=student)
    for message, name in zip(caplog.messages, ("FluxPipeline", "FluxKontext"), strict=True):
        assert f"was distilled through FLUX.1-dev: check it in this {name}" in message


def test_wrong_arguments(flux_folder):
    student = flux_student()
    for args, kwargs in (
        ([tiny_flux(), student], {"student": student}),
        ([tiny_flux(), student], {"torch_dtype": torch.bfloat16}),
        ([FluxPipeline], {"student": student}),
        ([FluxPipeline, flux_folder], {"student": student, "keep_teacher": True}),
    ):
        with pytest.raises(TypeError, match=r"expected patch_pipeline\(pipe.*folder_or_hub_id"):
            patch_pipeline(*args, **kwargs)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved pipeline, whose T5 can't be read, a student for it, and a patched pipeline."""
    root = tmp_path_factory.mktemp("folders")
    tiny_flux().save_pretrained(root / "flux")
    (root / "flux" / "text_encoder_2" / "model.safetensors").write_bytes(b"never read")
    flux_student().save_pretrained(root / "student")
    patched_flux().save_pretrained(root / "patched")
    for name, pipe in {"sdxl": tiny_sdxl(), "flux": tiny_flux(), "chroma": tiny_chroma()}.items():
        pipe.save_config(root / "index only" / name)
    truncated(root / "truncated")
    return root


@pytest.mark.parametrize("cls", [FluxPipeline, DiffusionPipeline, AutoPipelineForText2Image])
def test_from_a_folder(cls, folders):
    pipe = quiet(patch_pipeline(cls, folders / "flux", student=folders / "student"))
    assert type(pipe) is FluxPipeline
    torch.testing.assert_close(generate(pipe), generate(patched_flux()), **CLOSE)
    with pytest.raises(PatchError, match="wasn't kept"):
        unpatch_pipeline(pipe)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "given",
    ["bfloat16", torch.float16, {"text_encoder_2": "torch.float16", "default": "float32"}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["module", "folder"])
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
def test_dtype_of_a_class(key, given, kind, folders):
    student = flux_student() if kind == "module" else folders / "student"
    pipe = patch_pipeline(FluxPipeline, folders / "flux", student=student, **{key: given})
    expected = torch.bfloat16 if given == "bfloat16" else torch.float16
    others = torch.float32 if isinstance(given, dict) else expected
    assert (pipe.text_encoder_2.dtype, pipe.transformer.dtype) == (expected, others)
    assert others != expected or generate(quiet(pipe)).isfinite().all()


@pytest.mark.parametrize("saved", ["model", "model.bf16"])
def test_variant(saved, tmp_path):
    """Also of the student in a patched pipeline, as far as it has one; diffusers loads it, too."""
    pipe = patched_flux().to(torch.bfloat16)
    pipe.save_pretrained(tmp_path, variant="bf16")
    folder = tmp_path / "text_encoder_2"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.bf16.safetensors"}
    (folder / "model.bf16.safetensors").rename(folder / f"{saved}.safetensors")
    kwargs = {"variant": "bf16", "dtype": torch.bfloat16}
    for again in (
        patch_pipeline(FluxPipeline, tmp_path, **kwargs),
        DiffusionPipeline.from_pretrained(tmp_path, **kwargs),
    ):
        assert type(again.text_encoder_2) is SlimT5Encoder
        torch.testing.assert_close(generate(quiet(again)), generate(quiet(pipe)))


# The whole file, or its changed values; None takes one away.
DAMAGES = {
    "not JSON": ("{", "isn't valid JSON"),
    "no class": ({"_class_name": None}, "is a None: no pipeline"),
    "a model": ({"_class_name": "AutoencoderKL"}, "is a 'AutoencoderKL': no pipeline"),
    "a custom class": ({"_class_name": ["a", "B"]}, r"is a \['a', 'B'\]: no pipeline"),
    "a slot of a number": ({"text_encoder_2": 5}, "can't be loaded: TypeError"),
    "code": ({"vae": ["os", "system"]}, "can't be loaded: .*system"),
    "a part is missing": ({"vae": None}, "can't be loaded: .*'vae'"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_model_index(case, folders, tmp_path):
    damage, message = DAMAGES[case]
    shutil.copytree(folders / "flux", tmp_path / "flux")
    file = tmp_path / "flux" / "model_index.json"
    if isinstance(damage, dict):
        values = json.loads(file.read_text()) | damage
        damage = json.dumps({key: value for key, value in values.items() if value is not None})
    file.write_text(damage)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        patch_pipeline(DiffusionPipeline, tmp_path / "flux", student=folders / "student")


def test_pickles_are_not_opened(folders, tmp_path):
    """Neither of the denoiser; its T5's aren't even looked for."""
    pipe, kwargs = tiny_flux(), {"student": folders / "student"}
    pipe.save_pretrained(tmp_path)
    pipe.transformer.save_pretrained(tmp_path / "transformer", safe_serialization=False)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(HubAccessError, match=r"no file named diffusion_pytorch_model.safetensors"):
        patch_pipeline(FluxPipeline, tmp_path, **kwargs)
    pipe = patch_pipeline(FluxPipeline, tmp_path, **kwargs, use_safetensors=None)
    assert generate(quiet(pipe)).isfinite().all()


def test_sources(folders, monkeypatch):
    """A path is never called a connection; `~` is a home."""
    student = folders / "student"
    monkeypatch.setenv("HOME", str(folders))
    assert patch_pipeline(FluxPipeline, "~/flux", student=student)
    for source in ("missing folder", "~/missing", "", folders / "flux" / "model_index.json"):
        with pytest.raises((HubAccessError, CheckpointError)) as refused:
            patch_pipeline(FluxPipeline, source, student=student)
        assert os.path.expanduser(source) in str(refused.value)
        assert not re.search("internet|connection", str(refused.value))


@pytest.mark.parametrize(
    ("cls", "name", "student", "kwargs", "error", "message"),
    [
        (DiffusionPipeline, "sdxl", "student", {}, NoT5SlotError, "XLPipeline has no T5"),
        (DiffusionPipeline, "chroma", None, {}, MISFIT, "published for .* ChromaPipeline"),
        (FluxPipeline, "flux", "student", {"device_map": "balanced"}, PatchError, "='balanced'"),
        (FluxPipeline, "flux", "truncated", {}, CheckpointError, "If it isn't whole"),
        (FluxPipeline, "flux", "student", {"dtype": "bf17"}, PatchError, "got dtype='bf17'"),
        (FluxPipeline, "flux", "student", {"dtype": {"vae": 16}}, PatchError, "'vae': 16"),
        (FluxPipeline, "flux", "student", {"variant": "no"}, CheckpointError, "variant=no"),
        (FluxModularPipeline, "flux", "student", {}, NoT5SlotError, "got FluxModularPipeline"),
    ],
)
def test_refused_before_the_pipeline_is_read(folders, cls, name, student, kwargs, error, message):
    """The folders hold a model_index.json and nothing else."""
    student = student and folders / student
    with pytest.raises(error, match=message):
        patch_pipeline(cls, folders / "index only" / name, student=student, **kwargs)


def test_t5_is_not_downloaded(hub, folders):
    """Nothing below text_encoder_2 is requested from the server, by the real client."""
    hub.add("me/flux", folders / "flux")
    hub.add("me/student", folders / "student", gated=True)
    with pytest.raises(HubAccessError, match="gated"):
        patch_pipeline(FluxPipeline, "me/flux", student="me/student")
    kwargs = {"student": "me/student", "token": "hf_right"}
    pipe = quiet(patch_pipeline(FluxPipeline, "me/flux", **kwargs))
    torch.testing.assert_close(generate(pipe), generate(patched_flux()), **CLOSE)
    assert not [request for request in hub.requests if "text_encoder_2" in request]
    for part in ("text_encoder", "transformer", "vae"):
        assert any(f"/{part}/" in request for request in hub.requests if "GET" in request)

    hub.requests.clear()
    patch_pipeline(FluxPipeline, "me/flux", student="me/student", local_files_only=True)
    with pytest.raises(HubAccessError, match=r"me/other.*outgoing traffic has been disabled"):
        patch_pipeline(FluxPipeline, "me/flux", student="me/other", local_files_only=True)
    assert hub.requests == []


def test_all_files_come_from_one_commit(hub, folders):
    """The branch moves as model_index.json is read: to a commit without a pipeline.

    And diffusers would refuse the module of the student in this pipeline of the Hub.
    """
    repository = hub.add("me/patched", folders / "patched")
    first = repository.branches["main"]

    def push_meanwhile():
        repository.commits["0" * 40] = {"model_index.json": b"{}"}
        repository.branches["main"] = "0" * 40

    hub.fault, hub.faulty = push_meanwhile, "GET .*/model_index.json"
    pipe = quiet(patch_pipeline(DiffusionPipeline, "me/patched"))
    torch.testing.assert_close(generate(pipe), generate(patched_flux()), **CLOSE)
    assert any(first in request for request in hub.requests)


def test_the_published_student_is_the_default(hub, tmp_path):
    """A FLUX.1 that takes a width of 4096, and a student in the place of the published one."""
    config = tiny_flux().transformer.config | {"joint_attention_dim": 4096}
    transformer = FluxTransformer2DModel.from_config(config).eval()
    tiny_flux().save_pretrained(tmp_path / "flux")
    transformer.save_pretrained(tmp_path / "flux" / "transformer")
    student = flux_student(project_out_dim=4096)
    student.to(torch.bfloat16).save_pretrained(tmp_path / "student")
    hub.add("LifuWang/DistillT5", tmp_path / "student")

    by_class = quiet(patch_pipeline(FluxPipeline, tmp_path / "flux", dtype=torch.bfloat16))
    in_place = FluxPipeline.from_pretrained(tmp_path / "flux", text_encoder_2=None)
    patch_pipeline(quiet(in_place.to(torch.bfloat16)))
    for pipe in (by_class, in_place):
        assert pipe.text_encoder_2.config.name_or_path == "LifuWang/DistillT5"
        assert generate(pipe).isfinite().all()
    with pytest.raises(MISFIT, match=r"have width 4096, .*takes 32"):
        patch_pipeline(tiny_flux())


LOAD = """
import sys
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
import t5slim
print(type(DiffusionPipeline.from_pretrained(sys.argv[1]).text_encoder_2))
"""


def test_in_a_new_process(folders):
    """It has to import t5slim, as diffusers says, and nothing else."""
    command = [sys.executable, "-c", LOAD, folders / "patched"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    message = r"t5slim\.encoder.*has not been imported.*<class 't5slim.encoder.SlimT5Encoder'>"
    assert re.search(message, done.stdout, re.DOTALL)


def test_in_this_process(folders, tmp_path):
    """Of a pipeline that was loaded with None in the slot, too."""
    pipe = FluxPipeline.from_pretrained(folders / "flux", text_encoder_2=None)
    patch_pipeline(quiet(pipe), flux_student())
    pipe.save_pretrained(tmp_path)
    for again in (
        quiet(DiffusionPipeline.from_pretrained(tmp_path)),
        quiet(patch_pipeline(DiffusionPipeline, tmp_path)),
    ):
        assert type(again.text_encoder_2) is SlimT5Encoder
        torch.testing.assert_close(generate(again), generate(pipe), **CLOSE)
