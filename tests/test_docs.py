"""The claims of the documentation: code and output, messages, links, names, requirements."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from joint import joint
from shapes_world import generation as world

import t5slim.cli
from t5slim.distill import DistillConfig
from t5slim.distill.prompts import PromptSource

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for pattern in (
        "README.md",
        "CHANGELOG.md",
        "docs/*.md",
        "examples/*/README.md",
        "examples/*/*.ipynb",
    )
    for path in sorted(ROOT.glob(pattern))
}
OTHERS = re.compile(  # of diffusers, transformers and torch, or without a message
    r"t5slim\.encoder is|Pipeline … |.*_execution_device|mat1 |'None|The following|Expected "
    r"|It seems|CUDA |expected m1 "
)
BLOCK = re.compile(r"^```(\w+).*\n((?s:.*?))^```$", re.M)
BLOCKS = {page: BLOCK.findall(text) for page, text in PAGES.items() if page != "docs/log.md"}
NOT_RUN = {"init_device_mesh": "needs torchrun, with which test_distributed.py runs it"}
# They make an environment, run this file, log in, or need gradio.
COMMANDS_NOT_RUN = {"pip", "python3", ".", "pytest", "hf", "examples/app/app.py"}
SMALLER = {
    r"\b(512|1024)\b": "64",
    "4096": "256",
    r"max_steps=[\d_]+": "max_steps=2",
    r"(num_inference_steps\W+)20": r"\g<1>2",
    r'pipe\(("[^"]+")\)': r"pipe(\1, **kwargs)",
    "bfloat16": "float32",
    '"cuda"': '"cpu"',
    r"offload\(\)": 'offload(device="cpu")',
    'output_dir="': 'output_dir="new-',
    ", quantization_config=nf4": "",
}


@pytest.fixture
def names(hub, tmp_path, monkeypatch, cpu_as_accelerator):
    """Variables that code blocks read, beside files and models of the miniature world."""
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    Path("my-student").symlink_to(world.STUDENT)
    shutil.copy("examples/configs/shapes_world.yaml", "run.yaml")
    texts = [f"a {name} circle" for name in ("red", "blue", "green", "black", "white", "yellow")]
    for file in ("prompts.txt", "captions.txt", "held-out.txt", "somebody/captions/texts.csv"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("\n".join(["caption", *texts]))
    hub.add("black-forest-labs/FLUX.1-dev", world.PIPELINE)
    hub.add("LifuWang/DistillT5", world.STUDENT)
    hub.add("google/flan-t5-base", world.SMALL_T5)
    pipe, student = world.load_pipeline(), t5slim.SlimT5Encoder.from_pretrained("my-student")
    config, call = DistillConfig(max_steps=2), world.CALL | {"num_inference_steps": 2}
    learner = joint.Learner(student, config, student.device)
    return vars(joint) | vars(world) | {
        "t5slim": t5slim, "pipe": pipe, "pipes": [pipe], "kwargs": call, "pipeline_kwargs": [call],
        "config": config, "student": student, "learner": learner, "learners": [learner],
        "prompts": texts[:4], "held_out": texts[4:], "folder": str(world.PIPELINE),
    }  # fmt: skip


def commands(code):
    """The words of each command; of a launcher, those of what it launches."""
    code = re.sub(r"\\\n|(?m:^\w+=\S+ |^(accelerate launch|torchrun).* -m (?=t5slim))", "", code)
    lines = re.split(r"\n|&&", code.replace("t5slim.distill", "t5slim distill"))
    words = [shlex.split(line, comments=True) for line in lines]
    return [each for each in words if each and COMMANDS_NOT_RUN.isdisjoint(each[:2])]


def run(words, monkeypatch):
    """Run a command of t5slim, or a script, in this process."""
    monkeypatch.setattr(sys, "argv", words if words[0] == "t5slim" else words[1:])
    if words[0] == "t5slim":
        return t5slim.cli.main()
    monkeypatch.delitem(sys.modules, "measuring", raising=False)  # two examples have one
    monkeypatch.syspath_prepend(Path(words[1]).parent)
    runpy.run_path(words[1], run_name="__main__")


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_code(page, names, monkeypatch, capsys):
    """Python runs, in one namespace; commands are parsed: examples have tests of their own."""
    defaults = [2 if value == 20_000 else value for value in DistillConfig.__init__.__defaults__]
    monkeypatch.setattr(DistillConfig.__init__, "__defaults__", tuple(defaults))  # max_steps
    for language, code in BLOCKS[page]:
        assert language in ("python", "yaml", "bash", "text", "bibtex")
        for large, small in SMALLER.items():
            code = re.sub(large, small, code)
        if language == "python":
            compiled = compile(code, page, "exec")
            if not any(word in code for word in NOT_RUN):
                exec(compiled, names)
        elif language == "yaml":
            Path("run.yaml").write_text(code)
            assert PromptSource(yaml.safe_load(code)["prompts"]).all()
        elif language == "bash":
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)
            for words in commands(code):
                with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
                    run([*words, "--none"], patch)
                errors = f"{end.value} {capsys.readouterr().err}"
                assert re.search("nrecognized arguments: --none", errors), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "code, output",
    [
        (code, output)
        for blocks in BLOCKS.values()
        for (_, code), (language, output) in pairwise(blocks)
        if language == "text"
    ],
)
def test_output(code, output, names, monkeypatch, capsys):
    """Its numbers are right, but for time and memory."""
    run(commands(code)[-1], monkeypatch)
    number, texts, numbers = r"\d[\d,]*(?:\.\d+)?", [], []
    for text in (capsys.readouterr().out, output):
        texts.append(re.sub(number, "#", text).split())
        lines = [x for x in text.splitlines() if not re.search(r"\bms\b|\d s\b|\d:\d\d|GiB", x)]
        numbers.append([float(n.replace(",", "")) for n in re.findall(number, "\n".join(lines))])
    assert texts[0] == texts[1]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05)


def test_messages_of_ours_are_raised():
    code = "".join(path.read_text() for path in (ROOT / "t5slim").rglob("*.py"))
    strings = re.sub(r'"\s*f?"', "", code)  # joined, as Python joins them
    headings = re.findall(r"^### `(.*?)`", PAGES["docs/troubleshooting.md"], re.M)
    ours = [heading for heading in headings if not OTHERS.match(heading)]
    patterns = [re.sub(r"(\\ )*…(\\ )*", ".*", re.escape(heading)) for heading in ours]
    assert ours and not [each for each in patterns if not re.search(each, strings)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """To files, and to headings of pages; and so do pages named in a notebook or a comment."""
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)]*))?\)", PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)", path.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]
    if page != "docs/log.md":  # whose old entries name what there was
        for name in re.findall(r"\b(?:docs|examples|tests)/[\w/-]+\.\w+", PAGES[page]):
            assert (ROOT / name).exists(), name


def test_every_line_of_the_table_names_its_tests():
    lines = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", PAGES["docs/compatibility.md"], re.M)
    assert [int(number) for number, _ in lines] == list(range(1, 13))
    known = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for _, tests in lines:
        names = re.findall(r"`(test_\w+)`", tests)
        assert names and all(f"def {name}(" in known for name in names), names


def test_the_reference_has_every_exported_name():
    listed = set(re.findall(r"^::: (.*)$", PAGES["docs/api.md"], re.M))
    for module in (t5slim, t5slim.distill, t5slim.evaluate):
        assert {f"{module.__name__}.{name}" for name in module.__all__} <= listed


def test_requirements_are_those_of_the_package():
    package = (ROOT / "pyproject.toml").read_text()
    required = dict(re.findall(r'\b(?:requires-)?([\w-]+)(?: = ")?>=([\d.]+)"', package))
    stated = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|$", PAGES["docs/install.md"].lower(), re.M)
    assert len(stated) == 6 and dict(stated).items() <= required.items()


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium here")
def test_no_page_asks_a_third_party(tmp_path):
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".mkdocs.yml", "-d"]
    subprocess.run([*mkdocs, tmp_path], check=True, cwd=ROOT)
    pages = [f"<iframe src='{page}'></iframe>" for page in tmp_path.rglob("*.html")]
    (tmp_path / "all.html").write_text("".join(pages))
    chromium = ["chromium", "--headless", "--no-sandbox", f"--user-data-dir={tmp_path}/profile"]
    chromium += [f"--log-net-log={tmp_path}/log.json", "--virtual-time-budget=5000", "--dump-dom"]
    subprocess.run([*chromium, tmp_path / "all.html"], check=True, timeout=900)
    asked = r'"initiator":"(?!not an origin).*"url":"(http[^"]*)'  # by pages, not by Chromium
    assert len(pages) > 15 and re.findall(asked, (tmp_path / "log.json").read_text()) == []
