"""Students on the Hub, with the real client against a local server."""

from __future__ import annotations

import re

import pytest
import torch
from hub import TOKEN
from huggingface_hub import ModelCard, constants
from transformers import T5Config, T5ForConditionalGeneration

from t5slim import CheckpointError, ConfigError, HubAccessError, SlimT5Config, SlimT5Encoder

TINY = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 2}
IDS = torch.arange(10).view(2, 5)


def make_student(seed: int = 0) -> SlimT5Encoder:
    torch.manual_seed(seed)
    return SlimT5Encoder(SlimT5Config(**TINY, project_out_dim=24)).eval()


def rows(student: SlimT5Encoder) -> torch.Tensor:
    with torch.no_grad():
        return student(IDS)[0]


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


def test_download(hub, published):
    student = SlimT5Encoder.from_pretrained("me/student")
    torch.testing.assert_close(rows(student), rows(published["main"]))
    assert student.config.name_or_path == "me/student"


def test_revision_and_subfolder(hub, published):
    for kwargs, name in (({"revision": "next"}, "next"), ({"subfolder": "small"}, "small")):
        student = SlimT5Encoder.from_pretrained("me/student", **kwargs)
        torch.testing.assert_close(rows(student), rows(published[name]))


def test_a_second_load_asks_once_and_downloads_nothing(hub, published):
    SlimT5Encoder.from_pretrained("me/student")
    hub.requests.clear()
    SlimT5Encoder.from_pretrained("me/student")
    assert hub.requests == ["HEAD /me/student/resolve/main/config.json"]


def test_config_and_weights_come_from_one_commit(hub, published, monkeypatch):
    """The branch moves after config.json was downloaded."""
    original = make_student(0)
    check = SlimT5Config.from_dict

    def push_meanwhile(*args, **kwargs):
        repository = hub.repositories["me/student"]
        repository.branches["main"] = repository.branches["next"]
        return check(*args, **kwargs)

    monkeypatch.setattr(SlimT5Config, "from_dict", push_meanwhile)
    torch.testing.assert_close(rows(SlimT5Encoder.from_pretrained("me/student")), rows(original))


def test_local_files_only(hub, published):
    with pytest.raises(HubAccessError, match=r"isn't in the cache.*local_files_only"):
        SlimT5Encoder.from_pretrained("me/student", local_files_only=True)
    assert hub.requests == []
    SlimT5Encoder.from_pretrained("me/student")
    hub.requests.clear()
    student = SlimT5Encoder.from_pretrained("me/student", local_files_only=True)
    torch.testing.assert_close(rows(student), rows(published["main"]))
    assert hub.requests == []


def test_cache_dir(hub, published, tmp_path):
    SlimT5Encoder.from_pretrained("me/student", cache_dir=tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").rglob("model.safetensors"))
    with pytest.raises(HubAccessError):
        SlimT5Encoder.from_pretrained("me/student", local_files_only=True)


def test_unreachable(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's retries: 20 s in all
    message = r"config.json of 'me/student'.*can't be reached|client has been closed"  # before 1.27
    with pytest.raises(HubAccessError, match=message):
        SlimT5Encoder.from_pretrained("me/student")
    with pytest.raises(HubAccessError, match="me/student"):
        SlimT5Encoder.from_pretrained("me/student", force_download=True)


def test_unreachable_but_cached(hub, published):
    SlimT5Encoder.from_pretrained("me/student")
    hub.shutdown()
    hub.server_close()
    student = SlimT5Encoder.from_pretrained("me/student")
    torch.testing.assert_close(rows(student), rows(published["main"]))


def test_no_such_repository_or_revision(hub, published):
    with pytest.raises(HubAccessError, match=r"'me/stduent' is neither a folder.* nor found at"):
        SlimT5Encoder.from_pretrained("me/stduent")
    with pytest.raises(HubAccessError, match="no revision 'v9'"):
        SlimT5Encoder.from_pretrained("me/student", revision="v9")
    with pytest.raises(HubAccessError, match="neither a folder on this machine nor a Hub id"):
        SlimT5Encoder.from_pretrained("./not/a/folder")
    with pytest.raises(CheckpointError, match=r"'me/student/large' holds no config.json"):
        SlimT5Encoder.from_pretrained("me/student", subfolder="large")


@pytest.mark.parametrize(
    "kind, message", [("gated", "is gated: ask for access"), ("private", "token=")]
)
def test_gated_and_private(hub, tmp_path, kind, message):
    student = make_student()
    student.save_pretrained(tmp_path / "s")
    hub.add("me/closed", tmp_path / "s", **{kind: True})
    with pytest.raises(HubAccessError, match=message):
        SlimT5Encoder.from_pretrained("me/closed")
    loaded = SlimT5Encoder.from_pretrained("me/closed", token=TOKEN)
    torch.testing.assert_close(rows(loaded), rows(student))


def test_pickles_are_never_downloaded(hub, published, tmp_path):
    for i, name in enumerate(("pytorch_model.bin", "pytorch_model.bin.index.json")):
        folder = tmp_path / name
        published["main"].save_pretrained(folder)
        (folder / "model.safetensors").rename(folder / name)
        hub.add(f"me/pickle-{i}", folder)
        with pytest.raises(CheckpointError, match=r"only pickled weights.*safetensors only"):
            SlimT5Encoder.from_pretrained(f"me/pickle-{i}")
    assert not [request for request in hub.requests if re.match("GET .*pytorch_model", request)]


def test_a_bad_config_is_refused_before_the_weights_are_downloaded(hub, tmp_path):
    make_student().save_pretrained(tmp_path / "s")
    config = (tmp_path / "s" / "config.json").read_text()
    (tmp_path / "s" / "config.json").write_text(config.replace("project_out_dim", "projectout_dim"))
    hub.add("me/bad", tmp_path / "s")
    with pytest.raises(ConfigError, match=r"'projectout_dim'.*Did you mean 'project_out_dim'"):
        SlimT5Encoder.from_pretrained("me/bad")
    assert not [request for request in hub.requests if "safetensors" in request]


def test_from_t5_records_its_origin(hub, tmp_path):
    T5ForConditionalGeneration(T5Config(**TINY)).save_pretrained(tmp_path / "t5")
    hub.add("google/tiny-t5", tmp_path / "t5")
    assert SlimT5Encoder.from_t5("google/tiny-t5", 24).config.base_model == "google/tiny-t5"
    with pytest.raises(HubAccessError, match="'google/tiny-t6'"):
        SlimT5Encoder.from_t5("google/tiny-t6")


def test_push_to_hub(hub):
    student = make_student()
    student.config.base_model = "google/flan-t5-base"
    url = student.push_to_hub("me/new", token=TOKEN)
    assert url.startswith(f"{constants.ENDPOINT}/me/new/")
    assert hub.repositories["me/new"].files("main").keys() == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
    }
    torch.testing.assert_close(rows(SlimT5Encoder.from_pretrained("me/new")), rows(student))
    card = ModelCard.load("me/new")
    assert card.data.library_name == "t5slim"
    assert card.data.base_model == "google/flan-t5-base"
    assert "width 16, vocabulary 40" in card.text
    assert 't5slim.patch_pipeline(pipe, "me/new")' in card.text


def test_push_to_a_branch(hub):
    make_student().push_to_hub("me/new", token=TOKEN, revision="experiment")
    files = hub.repositories["me/new"].files
    assert "model.safetensors" in files("experiment")
    assert "model.safetensors" not in files("main")


def test_save_pretrained_can_push(hub, tmp_path):
    make_student().save_pretrained(tmp_path / "named", push_to_hub=True, token=TOKEN)
    assert "model.safetensors" in hub.repositories["me/named"].files("main")


def test_push_keeps_the_card_that_is_there(hub):
    student = make_student()
    student.push_to_hub("me/new", token=TOKEN)
    card = b"---\nlicense: mit\ntags:\n- mine\n---\n\n# My own words\n"
    hub.repositories["me/new"].commit({"README.md": card})
    student.push_to_hub("me/new", token=TOKEN, tags=["flux"])
    card = ModelCard.load("me/new")
    assert card.text.strip() == "# My own words"
    assert card.data.license == "mit"
    assert card.data.tags == ["mine", "t5slim", "t5", "text-to-image", "diffusers", "flux"]
