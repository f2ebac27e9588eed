"""Prompts from lists, files, data sets and generators, and mixtures of them."""

import hashlib
import itertools
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pyarrow
import pytest

from t5slim.distill import generate_prompts, split_held_out
from t5slim.distill.prompts import PromptSource, hash_position
from t5slim.errors import DistillError, HubAccessError

PROMPTS = ["a red circle", 'a sign: "hi", in rain', "ein Bär 🐻", "猫", "a\x0cform\u2028feed"]


def load_prompts(prompts):
    return PromptSource(prompts).all()


def draw(prompts: Any, count: int, seed: int = 0, start: int = 0) -> list[str]:
    source = PromptSource(prompts)
    return [source.prompt(index, seed) for index in range(start, start + count)]


def numbered(count: int, name: str = "prompt") -> list[str]:
    return [f"{name} {number}" for number in range(count)]


def mixture(*pairs: tuple[Any, float]) -> dict[str, Any]:
    return {"mixture": [{"prompts": prompts, "weight": weight} for prompts, weight in pairs]}


OBJECTS = [json.dumps({"id": i, "text": prompt}) for i, prompt in enumerate(PROMPTS)]
QUOTED = ['"{}"'.format(prompt.replace('"', '""')) for prompt in PROMPTS]
FILES = {
    "lines.txt": "\n".join(PROMPTS).encode(),
    "crlf.TXT": "\r\n".join([*PROMPTS, ""]).encode(),
    "byte-order-mark": "\n".join(PROMPTS).encode("utf-8-sig"),
    "blank and repeated.txt": "\n\n \t\n  ".join(PROMPTS + PROMPTS[::-1]).encode(),
    "objects.json": f"[{', '.join(OBJECTS)}]".encode(),
    "strings.json": json.dumps(PROMPTS).encode(),
    "lines.jsonl": "\n".join(OBJECTS).encode(),
    "a [1]*.csv": "\n1,".join(["id,Caption", *QUOTED]).encode(),
    "tab.tsv": "\n1\t".join(["id\tcaption", *QUOTED]).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_kind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a 1.csv").write_text("prompt\nof another file\n")
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert load_prompts(path) == load_prompts({"file": str(path)}) == PROMPTS
    assert PromptSource(path).facts() == PromptSource(PROMPTS).facts()
    monkeypatch.chdir(tmp_path)
    assert load_prompts(name) == load_prompts({"file": name}) == PROMPTS


def test_columns_of_files_and_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"caption": text, "url": "u"}) for text in [*PROMPTS, *PROMPTS, None, " "]]
    path, folder = tmp_path / "train.jsonl", str(tmp_path)
    path.write_text("\n".join(lines))
    assert load_prompts({"dataset": folder, "column": "caption"}) == PROMPTS
    assert load_prompts({"dataset": folder, "limit": 2}) == PROMPTS[:2]
    assert load_prompts({"file": path, "column": "url"}) == ["u"]
    with pytest.raises(DistillError, match=r"train\.jsonl.*'url'.; expected Url"):
        load_prompts({"file": path, "column": "Url"})
    with pytest.raises(DistillError, match="Bad split: test"):
        load_prompts({"dataset": folder, "split": "test"})
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(HubAccessError, match=r"'some/body' .*Offline"):
        load_prompts({"dataset": "some/body"})
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it weren't installed
    with pytest.raises(DistillError, match=r"datasets.*pip install 't5slim\[prompts\]'"):
        load_prompts(path)


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "latin 1": ("a.txt", "ok\nBär\n".encode("latin-1"), r"a\.txt, prompt 2: 'B\\udce4r\\n'; expec"),
    "NUL": ("a.txt", b"a\nb\0c\n", r"a\.txt, prompt 2: .* expected text, in UTF-8 and without"),
    "empty": ("a.txt", b"\n \n", r"a\.txt holds no prompts"),
    "comma": ("a.csv", b"prompt\na\nb, c\n", r"a\.csv: .* 1 fields in line 3, saw 2"),
    "no header": ("a.csv", b"a cat\na dog\n", r"columns are .'a cat'.; expected one called prompt"),
    "deep": ("a.json", b'{"a":"["} ' + b'{"a":' * 20_000 + b"}" * 20_000, r"over 1,000 deep"),
    "null": ("a.json", b"null", r"a\.json is nested .* or a line in it is null"),
    "two columns": ("a.csv", b"prompt,text\na,b\n", r"a\.csv: .*, or its name as `column`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_errors_name_the_file_and_the_place(case: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DistillError, match=message):
        load_prompts(tmp_path / name)


ROWS = datasets.Dataset.from_dict({"caption": PROMPTS, "url": ["u"] * len(PROMPTS)})
COLUMNS: dict[str, Any] = {
    "pandas": ROWS.to_pandas()["caption"],
    "arrow": pyarrow.array(PROMPTS),
    "datasets": ROWS["caption"],
    "streamed": ROWS.to_iterable_dataset()["caption"],
    "numpy": numpy.array(PROMPTS),
    "generator": (prompt for prompt in PROMPTS),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_of_each_kind(kind: str) -> None:
    assert load_prompts(COLUMNS[kind]) == PROMPTS


def failing() -> Iterator[str]:
    yield "a"
    raise ConnectionError("the line broke")


OF_A_TABLE = r"expected a list .of a table, table\['caption'\]"
WRONG: list[tuple[Any, str]] = [
    ("a red circle", "is no such file; expected a list of prompts"),
    ("a\0b", "is no such file"),
    ({"path": "a.txt"}, r"\{'path': 'a\.txt'\}: .*; expected .* \{file, column\}, "),
    ({"generator": "quality"}, "generator='quality'.*expected .*compositional or text_rendering"),
    ({"generator": "compositional", "count": 10**12}, "count=10+; expected .*at most 1,000,000"),
    (None, "'NoneType' object is not iterable.*expected"),
    ({"generator": "compositional", "count": 0}, "generator holds no prompts"),
    ({"generator": lambda _: None}, "generator, prompt 1: None; expected text"),
    (mixture((mixture(), 1)), r"Got weights \[\]"),
    (["a", "\ud83d"], r"list, prompt 2: '\\ud83d'; expected text, in UTF-8"),
    ({"a", "b"}, r"got a set.*expected a list .*; of a set, sorted\(prompts\)"),
    (ROWS.to_iterable_dataset(), f"got a IterableDataset.*{OF_A_TABLE}"),
    (ROWS.to_pandas(), f"got a DataFrame.*{OF_A_TABLE}"),
    (pyarrow.table({"a": ["b"]}), f"got a Table.*{OF_A_TABLE}"),
    ({"caption": PROMPTS}, r"keyword argument 'caption'.*of a table, table\['caption'\]"),
    (pandas.Series(["a", None]), "list, prompt 2: nan; expected text"),
    (failing(), "generator object failing.*the line broke.*expected"),
    (itertools.repeat(" "), "list holds no prompts"),
    (["a" * 100_001], "list, prompt 1: .*up to 100,000 characters"),
    ("/dev/zero", "is no such file"),
    ("~/no such file", "/no such file' is no such file"),
]
WEIGHTS = [mixture((PROMPTS, 1), (PROMPTS, w)) for w in (0, -1, float("nan"), float("inf"))]
WRONG += [(form, r"Got weights \[1.*all above 0") for form in WEIGHTS]


@pytest.mark.parametrize(("prompts", "message"), WRONG, ids=range(len(WRONG)))
def test_other_forms_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        PromptSource(prompts)


def test_a_file_is_bounded_and_regular(tmp_path: Path) -> None:
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(20 << 30)  # of zeros, which take no room
    with pytest.raises(DistillError, match=r"a\.txt, prompt 1: '\\x00.*expected text"):
        load_prompts(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(DistillError, match="is no such file"):
        load_prompts(tmp_path / "b.txt")


def test_an_iterable_without_end_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t5slim.distill.prompts._LIMIT", 5)
    assert load_prompts(f"prompt {number}" for number in itertools.count()) == numbered(5)
    assert load_prompts(numbered(9)) == numbered(9)  # a list has an end
    assert load_prompts(itertools.repeat("a")) == ["a"]


def test_a_draw_depends_on_its_index_and_the_seed_alone() -> None:
    """As any change would let a run that is resumed go on with other prompts."""
    form = mixture((numbered(5), 0.5), (numbered(3, "caption"), 3), (["猫"], 1))
    order = "caption 2, caption 0, caption 1, 猫, caption 0, 猫, caption 2, caption 1"
    assert draw(form, 8, seed=3) == order.split(", ")
    order = "prompt 1, prompt 0, prompt 2, prompt 3, prompt 4, prompt 1, prompt 2, prompt 0"
    assert draw(numbered(5), 8, seed=3) == order.split(", ")
    source, in_order = PromptSource(form), draw(form, 500)
    assert all(source.prompt(i) == in_order[i] for i in random.Random(0).sample(range(500), 100))


def test_each_prompt_once_in_an_epoch_and_the_parts_by_weight() -> None:
    parts = {name: numbered(size, name) for name, size in (("a", 40), ("b", 90), ("c", 7))}
    epochs = [draw(parts["b"], 90, start=90 * epoch) for epoch in range(3)]
    assert all(sorted(epoch) == sorted(parts["b"]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [parts["b"], *epochs, draw(parts["b"], 90, seed=1)]}) == 5
    mixed = mixture((parts["a"], 5), (parts["b"], 3), (parts["c"], 2))
    drawn = draw(mixed, 4000, seed=5)
    names = Counter(prompt.split()[0] for prompt in drawn)
    # Within four standard deviations of independent draws.
    assert abs(names["a"] - 2000) < 128 and abs(names["b"] - 1200) < 116
    for start in range(0, 4000 - 90, 90):  # within an epoch, no prompt of a list twice
        own = [prompt for prompt in drawn[start : start + 90] if prompt.startswith("b")]
        assert len(own) == len(set(own))
    # A mixture within a mixture divides its share.
    nested = draw(mixture((mixed, 2), (["d"], 6)), 4000)
    assert abs(sum(prompt.startswith("a") for prompt in nested) - 500) < 84


def test_facts_identify_weights_and_prompts() -> None:
    pairs = [mixture((PROMPTS, weight), (["a"], 1)) for weight in (2, 1)]
    facts = [PromptSource(prompts).facts() for prompts in (PROMPTS, PROMPTS[::-1], *pairs)]
    assert [one["prompts"] for one in facts] == [5, 5, 6, 6]
    assert len({one["sha256"] for one in facts}) == 4 and json.dumps(facts)
    assert PromptSource(PromptSource(PROMPTS)).facts() == facts[0]


DIGESTS = {"compositional": "6d0dfe38a18c", "text_rendering": "4f593604725b"}


@pytest.mark.parametrize("name", DIGESTS)
def test_generated_prompts(name: str) -> None:
    prompts = generate_prompts(name, 2000)
    assert len(set(prompts)) == 2000
    assert load_prompts({"generator": name, "count": 50}) == prompts[:50]
    assert generate_prompts(name, 50, seed=1) != prompts[:50]
    text = "\n".join(prompts)
    assert not re.search(r"[{}]|\ba [aeiou]|\ban [^aeiou]", text)
    # None of the words that a symbol stands for is drawn twice.
    assert not re.search(r"\b(red|blue|chair|table|man|round|two|cat)\b.*\b\1\b", text)
    # The same in every process, though Python's hash of strings is not.
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == DIGESTS[name]


def test_a_generator_of_ones_own() -> None:
    def shapes(rng: random.Random) -> str:
        return f" a {rng.choice(['red', 'yellow'])} circle \n"

    assert sorted(generate_prompts(shapes, 20)) == ["a red circle", "a yellow circle"]
    assert len(load_prompts({"generator": shapes, "count": 1})) == 1


def test_the_split_is_by_hash() -> None:
    # By `printf 'a red circle' | sha256sum`, the first 12 digits over 16 ** 12.
    assert hash_position("a red circle") == 0xA1E4A280D27C / 16**12
    prompts = numbered(5000)
    rest, held_out = split_held_out(prompts, share=0.02, count=10_000)
    assert sorted(rest.all() + held_out) == sorted(prompts)
    assert 60 < len(held_out) < 140  # 100, with a standard deviation of 10
    assert held_out == sorted(held_out, key=hash_position) and hash_position(held_out[-1]) < 0.02
    # Neither order nor company matters, and fewer are the first of more.
    others = mixture((numbered(500, "other"), 1), (random.Random(0).sample(prompts, 5000), 3))
    rest, among_others = split_held_out(others, 0.02, 10_000)
    assert [prompt for prompt in among_others if prompt in prompts] == held_out
    assert not set(among_others) & set(draw(rest, 9000)) and rest.facts()["weights"] == [1, 3]
    assert split_held_out(prompts, 0.02, 7)[1] == held_out[:7]


NOT_SPLIT = "share={} holds out none of the prompts, or all"
NUMBERS = "share=.*expected positive numbers"


@pytest.mark.parametrize(
    "share, count, message",
    [(share, 4, NOT_SPLIT.format(share)) for share in (0, 0.1, 0.999999, 1)]
    + [("0.1", 4, NUMBERS), (0.1, "4", NUMBERS), (0.1, 0, NUMBERS)],
)
def test_a_split_that_means_nothing(share: Any, count: Any, message: str) -> None:
    few = [prompt for prompt in numbered(20) if 0.1 < hash_position(prompt) < 0.999]
    with pytest.raises(DistillError, match=message):
        split_held_out(few, share, count)
