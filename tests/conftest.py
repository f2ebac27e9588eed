"""Keeps the tests off the network: the only Hub they can reach is the one in `helpers/hub.py`."""

import os
import socket
import sys
import tempfile

import pytest

# Before huggingface_hub is imported, which reads its settings once. Nothing listens on the port
# until a test asks for the `hub` fixture.
assert "huggingface_hub" not in sys.modules
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PORT = probe.getsockname()[1]
os.environ.update(
    HF_ENDPOINT=f"http://127.0.0.1:{PORT}",
    HF_HOME=tempfile.mkdtemp(prefix="t5slim-tests-"),
    HF_HUB_DISABLE_TELEMETRY="1",
    NO_PROXY="127.0.0.1",
    no_proxy="127.0.0.1",
)
if "PYTEST_XDIST_WORKER" in os.environ:
    # What is so small has no use for threads, and those of several processes wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
    os.environ.pop(name, None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty local Hub, an empty cache, and no pause between the client's retries: of 20 s."""
    from helpers.hub import LocalHub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("time.sleep", lambda _: None)
    with LocalHub(PORT) as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory):
    """A tiny FLUX, saved."""
    from tiny import tiny_flux

    folder = tmp_path_factory.mktemp("flux")
    tiny_flux().save_pretrained(folder)
    return folder


@pytest.fixture
def pipe():
    """A tiny FLUX."""
    from tiny import tiny_flux

    return tiny_flux()


@pytest.fixture
def cpu_as_accelerator(monkeypatch):
    """For offload: diffusers numbers its device, and a `cpu:0` isn't equal to a `cpu`."""
    import accelerate
    import torch

    real = accelerate.cpu_offload
    monkeypatch.setattr(
        accelerate,
        "cpu_offload",
        lambda model, device, **kwargs: real(model, torch.device(device.type), **kwargs),
    )
