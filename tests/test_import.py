"""`import t5slim` is light and silent, and makes students known to transformers and diffusers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import t5slim


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_import_is_light_and_silent():
    heavy = {"diffusers", "t5slim.distill", "t5slim.evaluate", "t5slim.patch"}
    assert run(f"import sys, t5slim; print({heavy} & set(sys.modules))") == "set()\n"


def test_import_leaves_logging_and_warnings_alone():
    code = """
import logging, warnings
from transformers import T5EncoderModel  # some of what it imports does change the filters
def state():
    root = logging.getLogger()
    return root.level, root.handlers, list(warnings.filters), logging.getLogger("t5slim").handlers
before = state()
import t5slim
print(state() == before)
"""
    assert run(code) == "True\n"


def test_import_registers_the_student():
    code = """
import sys, t5slim, transformers
config = transformers.AutoConfig.for_model("slim_t5", d_model=16, d_kv=4, d_ff=8, num_layers=1)
print(type(config).__name__, type(transformers.AutoModel.from_config(config)).__name__)
print(hasattr(sys.modules["t5slim.encoder"], "PreTrainedModel"))
"""
    assert run(code) == "SlimT5Config SlimT5Encoder\nTrue\n"


def test_every_public_name_exists():
    for name in t5slim.__all__:
        assert getattr(t5slim, name).__name__ == name
    assert set(t5slim.__all__) <= set(dir(t5slim))
    assert t5slim.distill.__name__ == "t5slim.distill"


def test_unknown_names_fail_as_in_any_module():
    with pytest.raises(AttributeError, match="module 't5slim' has no attribute 'patch_pipelin'"):
        t5slim.patch_pipelin  # noqa: B018


def test_errors_are_the_built_in_ones_too():
    for name in t5slim.__all__:
        if name.endswith("Error") and name != "T5SlimError":
            error = getattr(t5slim, name)
            assert issubclass(error, t5slim.T5SlimError)
            assert issubclass(error, OSError if name == "HubAccessError" else ValueError)
