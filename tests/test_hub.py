"""Students on the Hub, with the real client against a local server."""

import json
import re

import pytest
import torch
from helpers.hub import TOKEN
from helpers.students import TINY, close, make_student
from huggingface_hub import ModelCard, constants
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from t5slim import CheckpointError, ConfigError, HubAccessError, SlimT5Encoder
from t5slim.hub import hub_errors

load = SlimT5Encoder.from_pretrained


@pytest.fixture
def published(hub, tmp_path):
    """`me/student`, with another student on the branch `next` and in the folder `small/`."""
    students = {"main": make_student(0), "next": make_student(1), "small": make_student(2)}
    for name, student in students.items():
        student.save_pretrained(tmp_path / name)
    hub.add("me/student", tmp_path / "main")
    hub.add("me/student", tmp_path / "next", branch="next")
    hub.add("me/student", tmp_path / "small", prefix="small/")
    PreTrainedModel.save_pretrained(students["main"], tmp_path / "shards", max_shard_size="5KB")
    hub.add("me/shards", tmp_path / "shards")
    for kind in ("gated", "private"):
        hub.add(f"me/{kind}", tmp_path / "main", **{kind: True})
    return students


@pytest.mark.parametrize(
    ("name", "kwargs", "student"),
    [
        ("me/student", {}, "main"),
        ("me/student", {"revision": "next"}, "next"),
        ("me/student", {"subfolder": "small"}, "small"),
        ("me/shards", {"subfolder": None, "revision": None}, "main"),
        ("me/gated", {"token": TOKEN}, "main"),
        ("me/private", {"token": TOKEN}, "main"),
    ],
)
def test_load(published, name, kwargs, student):
    loaded = load(name, **kwargs)
    assert loaded.config.name_or_path == name and close(loaded, published[student])


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("me/stduent", {}, HubAccessError, "'me/stduent', neither as a folder .*nor at http://"),
        ("me/student", {"revision": "v9"}, HubAccessError, "(?s)'me/student'.*Revision Not Found"),
        ("./not/a/folder", {}, HubAccessError, "neither as a folder .*Repo id"),
        ("me/student", {"subfolder": "large"}, CheckpointError, "'me/student/large' holds no conf"),
        ("me/gated", {}, HubAccessError, "(?s)Cannot access gated repo"),
        ("me/private", {}, HubAccessError, "private or gated repo, make sure you"),
    ],
)
def test_not_there(published, name, kwargs, error, message):
    with pytest.raises(error, match=message):
        load(name, **kwargs)


def test_requests(hub, published, tmp_path):
    """One per load of what is cached; none offline, even if something is missing."""
    with pytest.raises(HubAccessError, match="outgoing traffic has been disabled"):
        load("me/student", local_files_only=True)
    assert hub.requests == []
    load("me/shards")
    load("me/student")
    hub.requests.clear()
    load("me/student")
    assert hub.requests == ["HEAD /me/student/resolve/main/config.json"]
    hub.requests.clear()
    for name in ("me/student", "me/shards"):
        assert close(load(name, local_files_only=True), published["main"])
    assert hub.requests == []
    load("me/student", force_download=True)
    assert len([one for one in hub.requests if re.match("GET .*model.safetensors", one)]) == 1
    load("me/student", cache_dir=tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").rglob("model.safetensors"))
    hub.shutdown()
    hub.server_close()
    for name in ("me/student", "me/shards"):
        assert close(load(name), published["main"])


def test_errors_that_are_not_the_hubs_pass():
    ours = (ValueError, RuntimeError, ConfigError)
    for error in (*ours, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt):
        with pytest.raises(error, match="mine"), hub_errors("me/student"):
            raise error("mine")
    with pytest.raises(HubAccessError, match="Connection reset"), hub_errors("me/student"):
        raise ConnectionResetError("Connection reset by peer")


def test_messages_say_what_happened(hub, published, tmp_path):
    """Also of an answer that the client stumbles over; and a local path isn't one of the Hub."""
    faults = {429: "429 Too Many Requests", 503: "503 Service Un", "reset": "ReadError: .*reset by"}
    faults |= {"redirect loop": "Exceeded .*redirects", "redirect to nowhere": "ConnectError"}
    hub.faulty = "GET|/create"
    for hub.fault, message in faults.items():
        with pytest.raises(HubAccessError, match=message) as caught:
            load("me/student")
        assert "check your connection" not in str(caught.value)
    hub.fault = "null"
    with pytest.raises(HubAccessError, match=r"me/student.*TypeError"):
        make_student().push_to_hub("me/student", token=TOKEN)
    with pytest.raises(HubAccessError) as caught, hub_errors(str(tmp_path)):
        (tmp_path / "missing").read_text()
    assert "folder on this machine" not in str(caught.value)


def test_an_adapter_in_the_repository(hub, published):
    """transformers would load the weights of what it names, be it another repository."""
    hub.repositories["me/student"].commit(
        {"adapter_config.json": b'{"base_model_name_or_path": "me/private"}'}
    )
    assert close(load("me/student"), published["main"])
    assert not [request for request in hub.requests if "private" in request]


def test_what_is_never_downloaded(hub, tmp_path):
    """Pickles; and the weights of a student with a bad config."""
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors"):
        make_student().save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").rename(tmp_path / name / name)
        hub.add(f"me/{name.split('.')[-1]}", tmp_path / name)
    config = json.loads((tmp_path / name / "config.json").read_text()) | {"d_ff": 0}
    hub.repositories["me/safetensors"].commit({"config.json": json.dumps(config).encode()})
    for name, error, message in (
        ("me/bin", CheckpointError, "Pickled weights"),
        ("me/json", CheckpointError, "Pickled weights"),
        ("me/safetensors", ConfigError, "d_ff"),
    ):
        with pytest.raises(error, match=message):
            load(name)
    assert not [one for one in hub.requests if re.match("GET .*/(pytorch_)?model", one)]


def test_from_t5_records_its_origin(hub, tmp_path):
    T5ForConditionalGeneration(T5Config(**TINY)).save_pretrained(tmp_path / "t5")
    commit = hub.add("google/tiny-t5", tmp_path / "t5").branches["main"]
    config = SlimT5Encoder.from_t5("google/tiny-t5", 24).config
    assert (config.base_model, config.base_model_revision) == ("google/tiny-t5", commit)


def test_push_to_hub(hub, tmp_path):
    """With a card where there is none; what somebody wrote stays."""
    student = make_student()
    student.config.base_model = "google/flan-t5-base"
    url = student.push_to_hub("me/new", token=TOKEN, metadata={"license": "apache-2.0"})
    assert url.startswith(f"{constants.ENDPOINT}/me/new/")
    names = {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert hub.repositories["me/new"].files("main").keys() == names
    assert close(load("me/new"), student)
    card = ModelCard.load("me/new")
    assert (card.data.library_name, card.data.license) == ("t5slim", "apache-2.0")
    assert card.data.base_model == "google/flan-t5-base"
    assert "width 16, vocabulary 40" in card.text
    assert 't5slim.patch_pipeline(pipe, "me/new")' in card.text

    card = b"---\nlicense: mit\ntags:\n- mine\n---\n\n# My own words\n"
    hub.repositories["me/new"].commit({"README.md": card})
    (tmp_path / "plot.png").write_bytes(b"plot")
    student.push_to_hub("me/new", token=TOKEN, files=[tmp_path / "plot.png"])
    assert hub.repositories["me/new"].files("main").keys() == names | {"plot.png"}
    card = ModelCard.load("me/new")
    assert card.text.strip() == "# My own words" and card.data.license == "mit"
    assert card.data.tags == ["mine"]
    student.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/saved", token=TOKEN)
    assert hub.repositories["me/saved"].files("main").keys() == names

    before = dict(hub.repositories["me/new"].files("main"))
    student.final_projection.to("meta")
    with pytest.raises(CheckpointError, match=r"no weights \(it is on the meta device\)"):
        student.push_to_hub("me/new", token=TOKEN)
    assert hub.repositories["me/new"].files("main") == before
