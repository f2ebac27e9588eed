"""Prompts from lists, files, data sets and generators, and mixtures of them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from t5slim.distill import GeneratedPrompts, PromptMixture, split_held_out
from t5slim.distill.prompts import (
    PromptList,
    PromptSource,
    compositional,
    hash_position,
    load_prompts,
    prompt_source,
    text_rendering,
)
from t5slim.errors import DistillError, HubAccessError

PROMPTS = ["a red circle", 'a sign that says "hi", in rain', "ein großer Bär 🐻", "猫"]


def draw(source: PromptSource, count: int, seed: int = 0, start: int = 0) -> list[str]:
    return [source.prompt(index, seed) for index in range(start, start + count)]


def numbered(count: int, name: str = "prompt") -> list[str]:
    return [f"{name} {number}" for number in range(count)]


OBJECTS = [json.dumps({"id": i, "text": prompt}) for i, prompt in enumerate(PROMPTS)]
QUOTED = ['"{}"'.format(prompt.replace('"', '""')) for prompt in PROMPTS]
FILES = {
    "lines.txt": "\n".join(PROMPTS).encode(),
    "crlf.TXT": "\r\n".join([*PROMPTS, ""]).encode(),
    "byte-order-mark": "\n".join(PROMPTS).encode("utf-8-sig"),
    "objects.json": f"[{', '.join(OBJECTS)}]".encode(),
    "strings.json": json.dumps(PROMPTS).encode(),
    "lines.jsonl": "\n".join(OBJECTS).encode(),
    "a [1]*.csv": "\n1,".join(["id,Caption", *QUOTED]).encode(),
    "tab.tsv": "\n1\t".join(["id\tcaption", *QUOTED]).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_kind(name: str, tmp_path: Path) -> None:
    (tmp_path / "a 1.csv").write_text("prompt\nof another file\n")
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert load_prompts(path) == load_prompts({"file": str(path)}) == PROMPTS
    assert prompt_source(path).fingerprint() == prompt_source(PROMPTS).fingerprint()


def test_blank_lines_repetitions_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    lines = "  a cat\n\n \t\na dog \r\na cat\nform\x0cfeed\nline\u2028separator\n"
    path.write_bytes(lines.encode())
    prompts = ["a cat", "a dog", "form\x0cfeed", "line\u2028separator"]
    assert load_prompts(path) == load_prompts(["a cat\n", "", "a dog\n", *prompts]) == prompts


def test_a_column_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    path.write_text('prompt,caption,url\n"one, two",three,x\n"a\nb",c,y\n')
    assert load_prompts({"file": str(path), "column": "caption"}) == ["three", "c"]
    with pytest.raises(
        DistillError, match=r"two\.csv: the columns are .*, or its name as `column`"
    ):
        load_prompts(path)
    with pytest.raises(DistillError, match=r"'url'.; expected Prompt"):
        load_prompts({"file": path, "column": "Prompt"})


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "latin 1": ("a.txt", "ok\nBär\n".encode("latin-1"), r"a\.txt, prompt 2: 'B\\udce4r\\n'; expec"),
    "utf-16": ("a.txt", "ok\n".encode("utf-16"), r"a\.txt, prompt 1: .* expected text, in UTF-8"),
    "NUL": ("a.txt", b"a\nb\0c\n", r"a\.txt, prompt 2: .* expected text, in UTF-8 and without"),
    "comma": ("a.csv", b"prompt\na\nb, c\n", r"a\.csv: .* 1 fields in line 3, saw 2"),
    "commas": ("a.csv", b"prompt\na, b\nc, d\n", r"a\.csv: .*, commas in quotes"),
    "no header": ("a.csv", b"a cat\na dog\n", r"columns are .'a cat'.; expected one called prompt"),
    "broken": ("a.parquet", b"PAR1 and so on", r"a\.parquet: Parquet magic bytes"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_errors_name_the_file_and_the_place(case: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DistillError, match=message):
        load_prompts(tmp_path / name)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in ("a red circle", "a\0b", "a" * 5000, tmp_path):
        with pytest.raises(DistillError, match="is no such file; expected a list of prompts"):
            load_prompts(path)


def test_a_data_set_is_streamed(tmp_path: Path) -> None:
    lines = [json.dumps({"caption": text, "width": 3}) for text in [*PROMPTS, *PROMPTS, None, " "]]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    folder = str(tmp_path)
    assert load_prompts({"dataset": folder, "column": "caption"}) == PROMPTS
    assert load_prompts({"dataset": folder, "limit": 2}) == PROMPTS[:2]
    with pytest.raises(DistillError, match="Bad split: test"):
        load_prompts({"dataset": folder, "split": "test"})


def test_a_data_set_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(HubAccessError, match=r"'some/body' .*Offline"):
        prompt_source({"dataset": "some/body"})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DistillError, match=r'pip install "t5slim\[prompts\]"'):
        prompt_source({"dataset": "some/body"})


def test_each_prompt_once_in_an_epoch() -> None:
    prompts = numbered(50)
    source = PromptList(prompts)
    epochs = [draw(source, 50, start=50 * epoch) for epoch in range(3)]
    assert all(sorted(epoch) == sorted(prompts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [prompts, *epochs]}) == 4
    assert draw(source, 50, seed=1) != epochs[0]


def sources() -> dict[str, PromptSource]:
    lists = PromptList(numbered(70)), PromptList(numbered(30, "caption"))
    parts = [(lists[0], 0.5), (lists[1], 3), (GeneratedPrompts(text_rendering), 1)]
    return {
        "list": lists[0],
        "compositional": GeneratedPrompts("compositional"),
        "text_rendering": GeneratedPrompts("text_rendering"),
        "finite": GeneratedPrompts("compositional", count=200),
        "mixture": PromptMixture(parts),
        "mixture of mixtures": PromptMixture([(PromptMixture(parts), 1), (PROMPTS, 1)]),
    }


@pytest.mark.parametrize("name", sources())
def test_a_draw_depends_on_no_other(name: str) -> None:
    in_order = draw(sources()[name], 2500, seed=3)
    source = sources()[name]
    for index in random.Random(0).sample(range(2500), 300):
        assert source.prompt(index, 3) == in_order[index]
    assert in_order != draw(source, 2500, seed=4)


def report() -> list[Any]:
    lines = []
    for source in sources().values():
        rest, held_out = split_held_out(source, share=0.2, count=5)
        lines.append([source.fingerprint(), rest.facts(), held_out, draw(rest, 20, start=990)])
    return lines


def test_every_process_draws_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from test_prompts import report; print(report())"],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{report()}\n"


GOLDEN = {
    "compositional": [
        "a sock on top of a turtle",
        "65ce686e86a600fcae53358facffba981bc30ffc597d61924b14f7419b6aa5a0",
    ],
    "text_rendering": [
        'a serious librarian holding a card that says "TRUE" on a stage',
        "bfb8e31f6e5f7f49ecc12e97b8401f054de7f1e8fa8795129af4329a98d92052",
    ],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_generators_have_not_changed(name: str) -> None:
    """Else a run that is resumed with this version would go on with other prompts."""
    source = prompt_source({"generator": name})
    assert [source.prompt(0), source.facts()["sha256"]] == GOLDEN[name]


def test_a_number_of_generated_prompts() -> None:
    source = prompt_source({"generator": "compositional", "count": 100})
    prompts = source.all()
    assert 90 < len(prompts) <= 100
    assert prompts == load_prompts(GeneratedPrompts(compositional, 100))
    assert set(draw(source, 100, seed=1)) == set(draw(source, 100, start=100)) == set(prompts)
    assert draw(source, 100) != draw(source, 100, start=100)
    assert prompts[0] in draw(GeneratedPrompts("compositional"), 100)
    with pytest.raises(DistillError, match=r"'compositional'.* has no end; expected a `count`"):
        load_prompts(GeneratedPrompts("compositional"))
    with pytest.raises(DistillError, match="has no end"):
        load_prompts(PromptMixture([(GeneratedPrompts("compositional"), 1), (source, 1)]))
    assert load_prompts(PromptMixture([(source, 1), (PROMPTS, 1)])) == [*prompts, *PROMPTS]


def test_a_generator_of_ones_own() -> None:
    def shapes(rng: random.Random) -> str:
        return f" a {rng.choice(['red', 'yellow'])} circle \n"

    source = GeneratedPrompts(shapes)
    assert set(draw(source, 20)) == {"a red circle", "a yellow circle"}
    assert source.facts()["criterion"] == "shapes"
    assert source.fingerprint() != GeneratedPrompts(compositional).fingerprint()
    rest, held_out = split_held_out(source, share=0.5, count=5)
    assert held_out == ["a yellow circle"] and set(draw(rest, 20)) == {"a red circle"}
    with pytest.raises(DistillError, match="1000 successive prompts are blank or held out"):
        split_held_out(source, share=0.999)[0].prompt(0)
    for broken in ("a\0b", "\ud800", None):
        with pytest.raises(DistillError, match=r"prompt 7: .*; expected text, in UTF-8"):
            GeneratedPrompts(lambda _, text=broken: text).prompt(7)


def test_a_mixture_draws_from_each_part_by_its_weight() -> None:
    parts = {name: numbered(size, name) for name, size in (("a", 40), ("b", 90), ("c", 7))}
    mixture = PromptMixture([(parts["a"], 5), (parts["b"], 3), (parts["c"], 2)])
    drawn = draw(mixture, 4000, seed=5)
    names = Counter(prompt.split()[0] for prompt in drawn)
    # Within four standard deviations of independent draws.
    assert abs(names["a"] - 2000) < 128 and abs(names["b"] - 1200) < 116
    for start in range(0, 4000 - 90, 90):  # within an epoch, no prompt of a list twice
        own = [prompt for prompt in drawn[start : start + 90] if prompt.startswith("b")]
        assert len(own) == len(set(own))
    # The choices of a mixture within a mixture are its own.
    nested = draw(PromptMixture([(mixture, 1), (["d"], 1)]), 4000)
    assert abs(sum(prompt.startswith("a") for prompt in nested) - 1000) < 110


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_are_above_zero(weight: float) -> None:
    with pytest.raises(
        DistillError, match=r"Got weights \[1, .*\]; expected one or more, all above"
    ):
        PromptMixture([(PROMPTS, 1), (PROMPTS, weight)])


def test_as_in_a_yaml_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(numbered(9)))
    form = [
        {"weight": 2, "prompts": str(tmp_path / "a.txt")},
        {"weight": 1, "prompts": {"generator": "compositional"}},
    ]
    made = PromptMixture([(numbered(9), 2), (GeneratedPrompts("compositional"), 1)])
    assert prompt_source({"mixture": form}).fingerprint() == made.fingerprint()
    assert prompt_source(made) is made


TABLE = type("Table", (), {"columns": ("caption", "url")})
WRONG: dict[str, tuple[Any, str]] = {
    "no kind": ({"path": "a.txt"}, r"\{'path': 'a\.txt'\}: .*; expected \{file, column\}, "),
    "two kinds": ({"file": "a", "dataset": "b"}, "unexpected keyword argument 'dataset'"),
    "criterion": ({"generator": "quality"}, "'quality'.*expected one of .'compositional', 'text_r"),
    "count": ({"generator": "compositional", "count": 0}, "count=0.*count >= 1"),
    "not a list": ({"mixture": {"weight": 1}}, r"expected .*\{mixture: \[\{weight, prompts\}"),
    "part": ({"mixture": [{"prompts": "a"}]}, r"'weight'.*expected"),
    "no parts": ({"mixture": []}, r"Got weights \[\]"),
    "item": (["a", 3], "list, prompt 2: 3; expected text"),
    "surrogate": (["a", "\ud83d"], r"list, prompt 2: '\\ud83d'; expected text, in UTF-8"),
    "set": ({"a", "b"}, r"Got a set; expected a list: .*; of a set, sorted\(prompts\)"),
    "table": (TABLE(), r"Got a Table; expected a list: of a table, list\(table\['caption'\]\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_forms_are_refused(case: str) -> None:
    prompts, message = WRONG[case]
    with pytest.raises(DistillError, match=message):
        prompt_source(prompts)


def test_hash_positions_are_the_same_everywhere() -> None:
    """By `printf 'a red circle' | sha256sum`, the first 12 digits over 16 ** 12."""
    for prompt, digits in (("a red circle", "a1e4a280d27c"), ("猫", "a810bf845a30")):
        assert hash_position(prompt) == int(digits, 16) / 16**12


def test_the_split_is_by_hash() -> None:
    prompts = numbered(5000)
    rest, held_out = split_held_out(prompts, share=0.02, count=10_000)
    assert sorted(rest.all() + held_out) == sorted(prompts)
    assert 60 < len(held_out) < 140  # 100, with a standard deviation of 10
    # Neither order nor company matters, and fewer are the first of more.
    shuffled = random.Random(0).sample(prompts + numbered(500, "other"), 5500)
    assert {p for p in split_held_out(shuffled, 0.02, 10_000)[1] if p in prompts} == set(held_out)
    assert split_held_out(random.Random(1).sample(prompts, 5000), 0.02, 7)[1] == held_out[:7]


@pytest.mark.parametrize("name", sources())
def test_held_out_prompts_are_never_drawn(name: str) -> None:
    source = sources()[name]
    rest, held_out = split_held_out(source, share=0.25, count=40)
    assert 3 < len(held_out) == len(set(held_out)) <= 40
    assert all(hash_position(prompt) < 0.25 for prompt in held_out)
    assert all(hash_position(prompt) >= 0.25 for prompt in draw(rest, 2000))
    assert rest.fingerprint() != source.fingerprint()
    json.dumps(rest.facts())


def test_a_split_that_holds_out_nothing_or_all() -> None:
    few = [prompt for prompt in numbered(20) if hash_position(prompt) > 0.1]
    with pytest.raises(DistillError, match=r"share=0\.1 holds out none of the prompts"):
        split_held_out(few, share=0.1)
    with pytest.raises(DistillError, match=r"without a share of 0\.999999 holds no prompts"):
        split_held_out(PROMPTS, share=0.999999)
    for wrong in ({"share": 0}, {"share": 1}, {"count": 0}):
        with pytest.raises(DistillError, match="expected 0 < share < 1 <= count"):
            split_held_out(PROMPTS, **wrong)
