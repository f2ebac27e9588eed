"""A Hub that fails, through the real client: the error says so, or the weights are the right ones.

Nothing is lost by it: the pipeline and the repository are as they were, and the next try succeeds.
"""

import pytest
import torch
from diffusers import FluxPipeline
from helpers.hub import TOKEN
from helpers.pipelines import flux_student, state
from helpers.students import TINY, make_student
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from tiny import tiny_flux
from transformers import T5Config, T5EncoderModel

from t5slim import HubAccessError, SlimT5Encoder, T5SlimError, patch_pipeline

load = SlimT5Encoder.from_pretrained
STATUSES = [400, 401, 403, 404, 408, 409, 429, 500, 502, 503, 504]
BROKEN = ["close", "reset", "stall", "redirect loop", "redirect to nowhere"]
LIES = ["body cut", "body reset", "body stall", "more than its length", "half", "empty", "html"]
LIES += ["null", "bare", "another etag", "moves"]
# Of each operation, requests that a fault befalls. Each of its faults is a case.
TARGETS = {
    "load": ["HEAD .*/config.json", "GET .*/model.safetensors"],
    "from_t5": ["/config.json"],
    "patch": ["HEAD .*/model.safetensors"],
    "class": ["HEAD .*/model_index.json", "GET .*/transformer/.*safetensors"],
    "push": ["POST .*/create", "HEAD .*/README.md", "POST .*/commit/"],
}
# Fewer, as each loads a pipeline twice, in a second.
OF_A_PIPELINE = [401, 403, 404, 429, 500, 503, "close", "reset", "redirect loop", "body cut"]
OF_A_PIPELINE += ["body reset", "half", "empty", "html", "moves"]
CASES = [
    (operation, target, fault)
    for operation, targets in TARGETS.items()
    for target in targets
    for fault in (OF_A_PIPELINE if operation == "class" else STATUSES + BROKEN + LIES)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    tiny_flux().save_pretrained(root / "flux")
    for name, student in {"student": flux_student(), "next": flux_student(seed=2)}.items():
        student.save_pretrained(root / name)
    T5EncoderModel(T5Config(**TINY)).save_pretrained(root / "t5")
    make_student(0).save_pretrained(root / "pushed")
    make_student(1).save_pretrained(root / "to push")
    (root / "pushed" / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    return root


@pytest.fixture
def impatient(monkeypatch):
    """The client waits for 0.1 s, not 10, for an answer."""

    def set_timeout(seconds: float | None) -> None:
        set_client_factory(default_client_factory)
        get_session().timeout = seconds
        for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
            monkeypatch.setattr(constants, name, seconds or 10)

    yield set_timeout
    set_timeout(None)


def same(model, folder, cls=SlimT5Encoder):
    """Bitwise the weights of a folder."""
    expected = cls.from_pretrained(folder).state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def run(operation, pipe, folders, **kwargs):
    if operation == "push":
        return load(folders / "to push").push_to_hub("me/pushed", token=TOKEN)
    if operation == "load":
        return load("me/student", **kwargs)
    if operation == "from_t5":
        return SlimT5Encoder.from_t5("me/t5", 24, **kwargs)
    if operation == "class":
        return patch_pipeline(FluxPipeline, "me/flux", student="me/student", **kwargs)
    student = load("me/student", **kwargs) if kwargs else "me/student"
    return patch_pipeline(pipe, student)


@pytest.mark.parametrize(("operation", "target", "fault"), CASES)
def test_fault(hub, folders, impatient, operation, target, fault):
    for name in ("flux", "student", "t5", "pushed"):
        hub.add(f"me/{name}", folders / name)
    repository = hub.repositories["me/pushed"]
    pipe = tiny_flux() if operation == "patch" else None
    before, old = pipe and state(pipe), dict(repository.files("main"))

    def right(result, student=folders / "student"):
        if operation == "push":
            new = hub.repositories["me/pushed"].files("main")
            assert new["README.md"] == old["README.md"] and new != old
            return same(load("me/pushed"), folders / "to push")
        if operation == "from_t5":
            return same(result.encoder, folders / "t5", T5EncoderModel)
        return same(getattr(result, "text_encoder_2", result), student)

    hub.fault = (lambda: hub.add("me/student", folders / "next")) if fault == "moves" else fault
    hub.faulty = target
    if "stall" in str(fault):
        impatient(0.1)
    try:
        result = run(operation, pipe, folders)
    except T5SlimError as error:
        result = None
        if isinstance(fault, int) and (fault == 429 or fault >= 500):
            assert str(fault) in str(error)
        assert fault != "moves"
        assert isinstance(error, HubAccessError) or "force_download=True" in str(error)
        assert operation != "patch" or state(pipe) == before
        assert operation != "push" or repository.files("main") == old
    else:
        # The client asks on, if it may not make a repository that is there.
        assert fault not in STATUSES + BROKEN[:4] or target.endswith("/create")
        assert right(result) or (fault == "moves" and right(result, folders / "next"))
    assert hub.struck
    hub.fault = None
    impatient(None)
    if result is None:
        again = {} if operation == "push" else {"force_download": True}
        assert right(run(operation, pipe, folders, **again))


@pytest.mark.parametrize("operation", TARGETS)
def test_nothing_listens(hub, folders, operation):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(HubAccessError, match=r"me/(student|t5|flux|pushed).*Connect"):
        run(operation, tiny_flux(), folders)
