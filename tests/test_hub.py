"""Students on the Hub, with the real client against a local server."""

from __future__ import annotations

import re

import pytest
from diffusers import FluxPipeline
from helpers.hub import TOKEN
from helpers.students import TINY, close, make_student
from huggingface_hub import ModelCard, constants
from transformers import T5Config, T5ForConditionalGeneration

from t5slim import (
    CheckpointError,
    ConfigError,
    HubAccessError,
    SlimT5Config,
    SlimT5Encoder,
    patch_pipeline,
)
from t5slim.hub import hub_errors, update_model_card

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
    return students


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's retries: 20 s in all


def test_revision_and_subfolder(hub, published):
    assert load("me/student").config.name_or_path == "me/student"
    assert close(load("me/student"), published["main"])
    for kwargs, name in (({"revision": "next"}, "next"), ({"subfolder": "small"}, "small")):
        assert close(load("me/student", **kwargs), published[name])


def test_what_is_asked_of_the_hub(hub, published, tmp_path):
    with pytest.raises(HubAccessError, match=r"isn't in the cache.*local_files_only"):
        load("me/student", local_files_only=True)
    assert hub.requests == []
    load("me/student")
    hub.requests.clear()
    load("me/student")
    assert hub.requests == ["HEAD /me/student/resolve/main/config.json"]
    hub.requests.clear()
    assert close(load("me/student", local_files_only=True), published["main"])
    assert hub.requests == []
    load("me/student", cache_dir=tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").rglob("model.safetensors"))
    hub.shutdown()
    hub.server_close()
    assert close(load("me/student"), published["main"])


def test_config_and_weights_come_from_one_commit(hub, published, monkeypatch):
    """The branch moves after config.json was downloaded."""
    check = SlimT5Config.from_dict

    def push_meanwhile(*args, **kwargs):
        repository = hub.repositories["me/student"]
        repository.branches["main"] = repository.branches["next"]
        return check(*args, **kwargs)

    monkeypatch.setattr(SlimT5Config, "from_dict", push_meanwhile)
    assert close(load("me/student"), published["main"])


ACCESSES = {
    "from_pretrained": lambda: load("me/student"),
    "from_pretrained, forced": lambda: load("me/student", force_download=True),
    "from_t5": lambda: SlimT5Encoder.from_t5("me/student"),
    "push_to_hub": lambda: make_student().push_to_hub("me/student", token=TOKEN),
    "patch_pipeline": lambda: patch_pipeline(FluxPipeline, "me/student"),
}


@pytest.mark.parametrize("access", ACCESSES)
def test_unreachable(access, monkeypatch, tmp_path, no_waiting):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubAccessError, match=r"me/student|client has been closed"):  # before 1.27
        ACCESSES[access]()


@pytest.mark.parametrize(
    "status, message",
    [(401, "hf auth login"), (403, "hf auth login"), (429, "too many requests"), (503, "later")],
)
def test_answers_of_a_hub_that_refuses(hub, published, no_waiting, status, message):
    hub.status = status
    for access in ACCESSES.values():
        with pytest.raises(HubAccessError, match=message):
            access()


def test_errors_that_are_not_the_hubs_pass():
    for error in (ValueError("mine"), RuntimeError("mine"), ConfigError("mine")):
        with pytest.raises(type(error), match="mine"), hub_errors("me/student"):
            raise error
    with pytest.raises(HubAccessError, match="Connection reset"), hub_errors("me/student"):
        raise ConnectionResetError("Connection reset by peer")


@pytest.mark.parametrize(
    "name, kwargs, error, message",
    [
        ("me/stduent", {}, HubAccessError, r"'me/stduent' is neither a folder.* nor found at"),
        ("me/student", {"revision": "v9"}, HubAccessError, "'me/student' has no such revision"),
        ("./not/a/folder", {}, HubAccessError, "neither a folder on this machine nor a Hub id"),
        ("me/student", {"subfolder": "large"}, CheckpointError, "'me/student/large' holds no conf"),
    ],
)
def test_not_there(hub, published, name, kwargs, error, message):
    with pytest.raises(error, match=message):
        load(name, **kwargs)


@pytest.mark.parametrize(
    "kind, message", [("gated", "is gated: ask for access"), ("private", "token=")]
)
def test_gated_and_private(hub, tmp_path, kind, message):
    make_student().save_pretrained(tmp_path / "s")
    hub.add("me/closed", tmp_path / "s", **{kind: True})
    with pytest.raises(HubAccessError, match=message):
        load("me/closed")
    assert close(load("me/closed", token=TOKEN), make_student())


def test_what_is_never_downloaded(hub, tmp_path):
    """Pickles; and the weights of a student with a bad config."""
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        make_student().save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").rename(tmp_path / name / name)
        hub.add(f"me/{name}", tmp_path / name)
        with pytest.raises(CheckpointError, match="Pickled weights"):
            load(f"me/{name}")
    assert not [
        request for request in hub.requests if re.match("GET .*main/pytorch_model", request)
    ]

    make_student().save_pretrained(tmp_path / "s")
    config = (tmp_path / "s" / "config.json").read_text()
    (tmp_path / "s" / "config.json").write_text(config.replace("project_out_dim", "projectout_dim"))
    hub.add("me/bad", tmp_path / "s")
    with pytest.raises(ConfigError, match="'projectout_dim'"):
        load("me/bad")
    assert not [request for request in hub.requests if "bad/resolve/main/model" in request]


def test_from_t5_records_its_origin(hub, tmp_path):
    T5ForConditionalGeneration(T5Config(**TINY)).save_pretrained(tmp_path / "t5")
    commit = hub.add("google/tiny-t5", tmp_path / "t5").branches["main"]
    config = SlimT5Encoder.from_t5("google/tiny-t5", 24).config
    assert (config.base_model, config.base_model_revision) == ("google/tiny-t5", commit)


def test_push_to_hub(hub, tmp_path):
    student = make_student()
    student.config.base_model = "google/flan-t5-base"
    url = student.push_to_hub("me/new", token=TOKEN)
    assert url.startswith(f"{constants.ENDPOINT}/me/new/")
    files = hub.repositories["me/new"].files
    names = {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert files("main").keys() == names
    assert close(load("me/new"), student)
    card = ModelCard.load("me/new")
    assert card.data.library_name == "t5slim"
    assert card.data.base_model == "google/flan-t5-base"
    assert "width 16, vocabulary 40" in card.text
    assert 't5slim.patch_pipeline(pipe, "me/new")' in card.text

    (tmp_path / "plot.png").write_bytes(b"plot")
    student.push_to_hub("me/new", token=TOKEN, revision="experiment", files=[tmp_path / "plot.png"])
    assert files("experiment").keys() == names | {"plot.png"} and files("main").keys() == names
    student.save_pretrained(tmp_path / "named", push_to_hub=True, token=TOKEN)
    assert "model.safetensors" in hub.repositories["me/named"].files("main")


def test_push_keeps_the_card_that_is_there(hub, no_waiting):
    student = make_student()
    student.push_to_hub("me/new", token=TOKEN)
    card = b"---\nlicense: mit\ntags:\n- mine\n---\n\n# My own words\n"
    hub.repositories["me/new"].commit({"README.md": card})
    student.push_to_hub("me/new", token=TOKEN, tags=["flux"])
    card = ModelCard.load("me/new")
    assert card.text.strip() == "# My own words"
    assert card.data.license == "mit"
    assert card.data.tags == ["mine", "t5slim", "t5", "text-to-image", "diffusers", "flux"]
    hub.broken_file = "README.md"  # not finding out isn't the same as there being none
    with pytest.raises(HubAccessError, match="503"):
        student.push_to_hub("me/new", token=TOKEN)
    assert b"My own words" in hub.repositories["me/new"].files("main")["README.md"]


def test_facts_of_a_card_are_replaced_and_words_around_them_stay():
    student = make_student()
    card = update_model_card(None, student, "me/new", "Trained for 10 updates.")
    card.text = card.text.replace("## Use", "My own words.\n\n## Use")
    card = update_model_card(card, student, "me/new", "Trained for 20 updates {{ of a kind }}.")
    assert "My own words." in card.text and "10 updates" not in card.text
    assert "20 updates {{ of a kind }}" in card.text and "made from | not recorded" in card.text
