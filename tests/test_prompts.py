"""Prompts as users have them: real files, the generators, and what is put together of them."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from t5slim.distill import (
    GeneratedPrompts,
    PromptList,
    PromptMixture,
    PromptSchedule,
    split_held_out,
)
from t5slim.distill.prompts import PromptSource, load_prompts, prompt_source
from t5slim.distill.prompts.criteria import compositional, text_rendering
from t5slim.distill.prompts.sources import hash_place
from t5slim.distill.prompts.words import COMMON_WORDS
from t5slim.errors import DistillError, HubAccessError

PROMPTS = ["a red circle", 'a sign that says "hi", in rain', "ein großer Bär 🐻", "猫"]


def draw(source: PromptSource, count: int, seed: int = 0, start: int = 0) -> list[str]:
    return [source.prompt(index, seed) for index in range(start, start + count)]


def numbered(count: int, name: str = "prompt") -> list[str]:
    return [f"{name} {number}" for number in range(count)]


# --- files ---------------------------------------------------------------------------------------


def write_csv(path: Path, **dialect: Any) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, **dialect)
        writer.writerow(["id", "Caption"])
        writer.writerows(enumerate(PROMPTS))


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"TEXT": [PROMPTS[0], None, *PROMPTS[1:]], "width": [1, 2, 3, 4, 5]})
    parquet.write_table(table, path, row_group_size=2)


def as_objects(key: str = "prompt") -> list[dict[str, Any]]:
    return [{"id": number, key: prompt} for number, prompt in enumerate(PROMPTS)]


FILES = {
    "lines.txt": lambda path: path.write_text("\n".join(PROMPTS), encoding="utf-8"),
    "crlf.txt": lambda path: path.write_bytes(b"\r\n".join(p.encode() for p in PROMPTS) + b"\r\n"),
    "byte-order-mark.TXT": lambda path: path.write_text("\n".join(PROMPTS), encoding="utf-8-sig"),
    "without-suffix": lambda path: path.write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8"),
    "strings.json": lambda path: path.write_text(json.dumps(PROMPTS), encoding="utf-8"),
    "objects.json": lambda path: path.write_text(json.dumps(as_objects()), encoding="utf-8"),
    "lines.jsonl": lambda path: path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in as_objects("text")) + "\n",
        encoding="utf-8",
    ),
    "strings.ndjson": lambda path: path.write_text("\r\n\r\n".join(map(json.dumps, PROMPTS))),
    "comma.csv": write_csv,
    "all-quoted.csv": lambda path: write_csv(path, quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "tab.tsv": lambda path: write_csv(path, delimiter="\t"),
    "table.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_kind(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name](path)
    assert load_prompts(path) == load_prompts(str(path)) == PROMPTS
    source = prompt_source(path)
    assert source.facts()["source"] == name
    assert source.fingerprint() == PromptList(PROMPTS).fingerprint()


def test_blank_lines_line_ends_and_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        "  a cat\n\n \t\na dog \r\na cat\nform\x0cfeed\nline\u2028separator\n".encode()
    )
    prompts = ["a cat", "a dog", "form\x0cfeed", "line\u2028separator"]
    source = PromptList.from_file(path)
    assert source.prompts == prompts
    assert source.facts() == {
        "kind": "list", "source": "prompts.txt", "prompts": 4, "duplicates": 1, "blank": 2,
        "held_out": 0,
    }  # fmt: skip
    assert PromptList(["a cat\n", "", "a dog\n", *prompts]).prompts == prompts


def test_a_column_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    path.write_text('prompt,caption,url\n"one, two",three,x\n"a\nb",c,y\n')
    assert load_prompts({"file": str(path), "column": "caption"}) == ["three", "c"]
    assert PromptList.from_file(path, "prompt").prompts == ["one, two", "a\nb"]
    with pytest.raises(DistillError, match=r"two\.csv has 2 columns called prompt or caption or"):
        PromptList.from_file(path)
    with pytest.raises(DistillError, match=r"no column 'Prompts', but \['prompt', 'caption', 'ur"):
        PromptList.from_file(path, "Prompts")


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "suffix": ("a.docx", b"a", r"a\.docx ends in '\.docx'; expected one of \.txt, \.json, "),
    "empty": ("a.txt", b"", r"the file .*a\.txt without a prompt in it"),
    "blank": ("a.csv", b"prompt\n\n \n", r"a\.csv without a prompt"),
    "nothing": ("a.csv", b"", r"a\.csv has no columns called prompt or caption or text, but \[\]"),
    "latin 1": ("a.txt", "ok\nBär\n".encode("latin-1"), r"a\.txt, line 2: byte 0xe4 is not UTF-8"),
    "utf-16": ("a.csv", "prompt\n".encode("utf-16"), r"a\.csv, line 1: byte 0xff is not UTF-8"),
    "comma": ("a.csv", b"prompt\na\nb, c\n", r"a\.csv, line 3: 2 fields, where the header has 1"),
    "short row": ("a.tsv", b"id\tprompt\n1\n", r"a\.tsv, line 2: 1 fields, where the header has 2"),
    "open quote": ("a.csv", b'prompt\n"a\nb\n', r"a\.csv, line 3: unexpected end of data"),
    "no header": ("a.csv", b"a cat\na dog\n", r"no columns called prompt .* but \['a cat'\]"),
    "json": ("a.json", b'["a",\n"b"', r"a\.json, line 2: .*; expected a JSON list\. If each line"),
    "json lines": ("a.json", b'"a"\n"b"', r"a\.json, line 2: Extra data.* name the file \.jsonl"),
    "json object": ("a.json", b'{"a": 1}', r"a\.json holds a JSON dict; expected a list"),
    "json number": ("a.json", b'["a", 3]', r"a\.json holds 3; expected strings\. It is item 2"),
    "json line": ("a.jsonl", b'"a"\n\n{"prompt": }', r"a\.jsonl, line 3: Expecting value \(column"),
    "json key": (
        "a.jsonl",
        b'{"text": "a"}\n{"txt": "b"}',
        r"a\.jsonl, line 2: has no column 'tex",
    ),
    "json mixed": ("a.jsonl", b'{"text": "a"}\n"b"', r"line 2: 'b'; expected an object with a fie"),
    "surrogate": (
        "a.jsonl",
        b'"a"\n"\\ud83d"',
        r"holds '\\ud83d'; expected strings\. It is line 2",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_file_is_said(case: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DistillError, match=message) as raised:
        load_prompts(tmp_path / name, "eval_prompts")
    assert str(raised.value).startswith("eval_prompts: ")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="'a red circle' is no such file"):
        load_prompts("a red circle")
    with pytest.raises(DistillError, match="is a folder"):
        load_prompts(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DistillError, match="which has no column 'prompt'"):
        PromptList.from_file(tmp_path / "a.txt", "prompt")


def test_broken_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and so on")
    with pytest.raises(DistillError, match=r"a\.parquet is no parquet file that can be read"):
        load_prompts(path)
    parquet.write_table(pyarrow.table({"prompt": [["a"], ["b"]]}), path)
    with pytest.raises(DistillError, match=r"holds \['a'\]; expected strings\. It is row 1"):
        load_prompts(path)
    parquet.write_table(pyarrow.table({"url": ["a"]}), path)
    with pytest.raises(DistillError, match=r"a\.parquet has no columns called .* but \['url'\]"):
        load_prompts(path)


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_what_is_not_installed_is_named(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.parquet", raising=False)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    form = {"file": tmp_path / "a.parquet"} if module == "pyarrow" else {"dataset": "some/body"}
    with pytest.raises(DistillError, match=rf'with {module}, .*pip install "t5slim\[prompts\]"'):
        prompt_source(form)


# --- data sets -----------------------------------------------------------------------------------


def test_a_dataset_is_streamed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("datasets")
    rows = [json.dumps({"caption": prompt, "width": 3}) for prompt in [*PROMPTS, *PROMPTS, " "]]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    folder = str(tmp_path)

    source = prompt_source({"dataset": folder, "column": "caption"})
    assert source.facts() == {
        "kind": "list", "source": folder, "prompts": 4, "duplicates": 4, "blank": 1, "held_out": 0,
    }  # fmt: skip
    assert load_prompts({"dataset": folder}) == PROMPTS and not caplog.records
    assert PromptList.from_dataset(folder, limit=2).prompts == PROMPTS[:2]
    assert "the first 2 rows are used" in caplog.text

    with pytest.raises(DistillError, match="after 0 rows: Bad split: test"):
        PromptList.from_dataset(folder, split="test")
    with pytest.raises(DistillError, match=r"no column 'text', but \['caption', 'width'\]"):
        PromptList.from_dataset(folder, "text")
    with pytest.raises(DistillError, match="limit is 0"):
        PromptList.from_dataset(folder, limit=0)


def test_a_dataset_that_is_a_program_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / f"{tmp_path.name}.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(DistillError, match="can't be read after 0 rows"):
        PromptList.from_dataset(str(tmp_path))


def test_a_dataset_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubAccessError, match="prompts: The data set 'some/body' can't be read"):
        prompt_source({"dataset": "some/body"})


# --- the order of a list -------------------------------------------------------------------------


def test_each_prompt_once_in_an_epoch() -> None:
    prompts = numbered(50)
    source = PromptList(prompts)
    epochs = [draw(source, 50, start=50 * epoch) for epoch in range(3)]
    assert all(sorted(epoch) == sorted(prompts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [prompts, *epochs]}) == 4
    assert draw(source, 50, seed=1) != epochs[0]


def sources() -> dict[str, PromptSource]:
    lists = PromptList(numbered(70)), PromptList(numbered(30, "caption"))
    mixture = PromptMixture([(lists[0], 0.5), (lists[1], 3), (GeneratedPrompts(text_rendering), 1)])
    return {
        "list": lists[0],
        "compositional": GeneratedPrompts("compositional"),
        "text_rendering": GeneratedPrompts("text_rendering"),
        "mixture": mixture,
        "schedule": PromptSchedule([(mixture, 100), (lists[1], 200), (mixture, 300)]),
    }


@pytest.mark.parametrize("name", sources())
def test_a_draw_depends_on_no_other(name: str) -> None:
    in_order = [sources()[name].prompt(index, 3, index // 2) for index in range(2500)]
    source = sources()[name]
    for index in random.Random(0).sample(range(2500), 300):
        assert source.prompt(index, 3, index // 2) == in_order[index]
    assert in_order != [source.prompt(index, 4, index // 2) for index in range(2500)]


def report() -> list[Any]:
    lines = []
    for source in sources().values():
        rest, held_out = split_held_out(source, share=0.2, count=5)
        lines.append(
            [source.fingerprint(), rest.fingerprint(), held_out, draw(rest, 20, start=990)]
        )
    return lines


def test_every_process_draws_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from test_prompts import report; print(report())"],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{report()}\n"


# --- generators ----------------------------------------------------------------------------------


def test_compositional_prompts_bind_relate_and_count() -> None:
    prompts = draw(GeneratedPrompts("compositional"), 4000)
    assert len(set(prompts)) > 3600
    numbers = {"two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}
    counting = sum(bool(numbers & set(prompt.split())) for prompt in prompts)
    assert 0.3 < counting / len(prompts) < 0.37
    assert all(max(map(len, (prompt, prompt.split()))) < 100 for prompt in prompts)
    for prompt in prompts:
        words = prompt.split()
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), prompt


def test_text_prompts_say_a_common_word() -> None:
    prompts = draw(GeneratedPrompts("text_rendering"), 4000)
    said = [prompt.replace("'", '"').split('"') for prompt in prompts]
    assert all(len(parts) == 3 and parts[1].lower() in COMMON_WORDS for parts in said)
    assert len({parts[1].lower() for parts in said}) > 0.9 * len(COMMON_WORDS) > 1000


def test_generators_have_not_changed() -> None:
    """Else a run that is resumed with this version would go on with other prompts."""
    for name, (first, fingerprint) in GOLDEN.items():
        source = prompt_source({"generator": name})
        assert source.prompt(0) == first
        assert source.fingerprint() == fingerprint


GOLDEN = {
    "compositional": (
        "a sock on top of a turtle",
        "e5f1128308931fe348734a18daada81eb20bdfa69db0ff8c9986dbc71aeb6050",
    ),
    "text_rendering": (
        'a serious librarian holding a card that says "TRUE" on a stage',
        "ad6e17356a123c7805795832fa73cd0f4a37f9609efd1763ad841217b3bcbc15",
    ),
}


def test_a_generator_of_ones_own() -> None:
    def shapes(rng: random.Random) -> str:
        return f" a {rng.choice(['red', 'yellow'])} circle \n"

    source = GeneratedPrompts(shapes)
    assert set(draw(source, 20)) == {"a red circle", "a yellow circle"}
    assert source.facts()["criterion"] == "shapes"
    assert source.fingerprint() != GeneratedPrompts(compositional).fingerprint()
    rest, held_out = split_held_out(source, share=0.5, count=5)
    assert held_out == ["a yellow circle"] and set(draw(rest, 20)) == {"a red circle"}
    with pytest.raises(DistillError, match="1000 prompts in a row that were blank or held out"):
        split_held_out(source, share=0.999)[0].prompt(0)
    with pytest.raises(DistillError, match="'quality'; expected 'compositional' or 'text_render"):
        GeneratedPrompts("quality")


# --- mixtures and schedules ----------------------------------------------------------------------


def test_a_mixture_keeps_its_shares_and_the_epochs_of_its_parts() -> None:
    parts = {name: numbered(size, name) for name, size in (("a", 40), ("b", 90), ("c", 7))}
    mixture = PromptMixture([(parts["a"], 0.5), (parts["b"], 0.3), (parts["c"], 0.2)])
    drawn = draw(mixture, 3000, seed=5)
    for block in range(3):
        names = Counter(prompt.split()[0] for prompt in drawn[1000 * block : 1000 * (block + 1)])
        assert names == {"a": 500, "b": 300, "c": 200}
    for name, prompts in parts.items():
        own = [prompt for prompt in drawn if prompt.split()[0] == name]
        for start in range(0, len(own) - len(prompts), len(prompts)):
            assert sorted(own[start : start + len(prompts)]) == sorted(prompts)
    # Within a block, as if drawn one by one: batches of 20 have the spread of independent draws.
    counts = [sum(p.startswith("a") for p in drawn[i : i + 20]) for i in range(0, 3000, 20)]
    variance = sum((count - 10) ** 2 for count in counts) / len(counts)
    assert 3 < variance < 7  # binomial: 20 * 0.5 * 0.5 = 5


def test_the_parts_of_a_mixture_do_not_go_in_step() -> None:
    mixture = PromptMixture([(GeneratedPrompts("compositional"), 1)] * 2)
    assert len(set(draw(mixture, 200))) > 190


def test_thirds_are_as_exact_as_can_be() -> None:
    facts = PromptMixture([(PROMPTS, 1)] * 3).facts()
    assert [part["share"] for part in facts["parts"]] == [0.334, 0.333, 0.333]
    assert facts["parts"][2]["prompts"]["prompts"] == 4


def test_a_schedule_goes_from_stage_to_stage() -> None:
    schedule = PromptSchedule([(numbered(5, "a"), 10), (numbered(5, "b"), 20)])
    stages = [schedule.prompt(index, update=index // 4).split()[0] for index in range(400)]
    assert stages == ["a"] * 40 + ["b"] * 360
    assert schedule.starts == [0, 10]
    schedule.check_updates(11)
    with pytest.raises(DistillError, match="begins after 10 updates, and the run has 10"):
        schedule.check_updates(10)


def test_the_stages_of_the_paper() -> None:
    schedule = PromptSchedule.paper(numbered(100, "caption"))
    assert schedule.starts == [0, 50_000, 120_000]
    signs = [
        sum('"' in p or "'" in p for p in (schedule.prompt(i, 0, update) for i in range(1000)))
        for update in (49_999, 119_999, 320_000)
    ]
    assert signs == [0, 1000, 250]
    facts = schedule.facts()
    assert [stage["updates"] for stage in facts["stages"]] == [50_000, 70_000, 200_000]
    assert [p["share"] for p in facts["stages"][2]["prompts"]["parts"]] == [0.5, 0.25, 0.25]
    json.dumps(facts)
    assert PromptSchedule.paper(PROMPTS, updates=640).starts == [0, 100, 240]


def test_as_a_yaml_file_would_have_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(numbered(9)))
    path = str(tmp_path / "a.txt")
    parts = [
        {"weight": 2, "prompts": path},
        {"weight": 1, "prompts": {"generator": "compositional"}},
    ]
    form = {
        "schedule": [
            {"updates": 5, "prompts": {"generator": "text_rendering"}},
            {"updates": 7, "prompts": {"mixture": parts}},
        ]
    }
    made = PromptSchedule(
        [
            (GeneratedPrompts("text_rendering"), 5),
            (PromptMixture([(numbered(9), 2), (GeneratedPrompts("compositional"), 1)]), 7),
        ]
    )
    assert prompt_source(form).fingerprint() == made.fingerprint()
    assert prompt_source(made) is made


WRONG: dict[str, tuple[Any, str]] = {
    "no kind": ({"path": "a.txt"}, r"\{'path': 'a\.txt'\}; expected one of the keys file, "),
    "two kinds": ({"file": "a", "dataset": "b"}, "expected one of the keys"),
    "other key": ({"file": "a", "colunm": "b"}, "key 'colunm' beside 'file'; there can be column"),
    "useless key": ({"generator": "a", "column": "b"}, "there can be nothing else"),
    "criterion": ({"generator": "quality"}, "'quality'; expected 'compositional'"),
    "not a list": ({"mixture": {"weight": 1}}, "mixture is {.*}; expected a list"),
    "not a string": ({"file": None}, "file is None; expected a string"),
    "part": ({"mixture": [{"prompts": "a"}]}, "a mapping with the keys weight and prompts"),
    "one part": ({"mixture": [{"weight": 1, "prompts": ["a"]}]}, "mixture of 1 parts"),
    "nested": (
        {"mixture": [{"weight": 1, "prompts": ["a"]}, {"weight": 1, "prompts": ["b", 3]}]},
        r"prompts: mixture\[1\]: a list holds 3; expected strings\. It is item 1",
    ),
    "no stages": ({"schedule": []}, "A schedule without stages"),
    "updates": ({"schedule": [{"updates": 1.5, "prompts": ["a"]}]}, "1.5 updates; expected an int"),
    "inner schedule": (
        {"schedule": [{"updates": 5, "prompts": PromptSchedule([(["a"], 5)])}]},
        r"schedule\[0\]: a schedule, which can only be the outermost",
    ),
    "number": (3, "prompts: 3; expected a list of prompts, or a file"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_source_is_said(case: str) -> None:
    prompts, message = WRONG[case]
    with pytest.raises(DistillError, match=message):
        prompt_source(prompts)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), True, "1"])
def test_weights_are_above_zero(weight: Any) -> None:
    with pytest.raises(DistillError, match=r"A weight of the mixture is .*; expected above 0"):
        PromptMixture([(PROMPTS, 1), (PROMPTS, weight)])


def test_a_weight_too_small_to_be_drawn() -> None:
    with pytest.raises(DistillError, match=r"The weight 1 in a mixture of 10001 gives no draw of"):
        PromptMixture([(PROMPTS, 10_000), (PROMPTS, 1)])


def test_a_list_is_asked_for_where_one_is_needed() -> None:
    with pytest.raises(DistillError, match="eval_prompts: a GeneratedPrompts; expected a list"):
        load_prompts(GeneratedPrompts("compositional"), "eval_prompts")
    with pytest.raises(DistillError, match=r"is no list of prompts\. For a file, see PromptList\."):
        PromptList("prompts.txt")


# --- held out ------------------------------------------------------------------------------------


def test_where_hashes_lie_is_the_same_everywhere() -> None:
    """By `printf 'a red circle' | sha256sum`, the first 12 digits over 16 ** 12."""
    for prompt, digits in HASHES.items():
        assert hash_place(prompt) == int(digits, 16) / 16**12


HASHES = {
    "a red circle": "a1e4a280d27c",
    'a sign that says "hi"': "5b17c0b48886",
    "猫": "a810bf845a30",
}


def test_the_split_is_by_hash() -> None:
    prompts = numbered(5000)
    rest, held_out = split_held_out(prompts, share=0.02, count=10_000)
    assert isinstance(rest, PromptList)
    assert not set(rest.prompts) & set(held_out)
    assert sorted(rest.prompts + held_out) == sorted(prompts)
    assert 60 < len(held_out) < 140  # 100, with a standard deviation of 10
    assert rest.facts()["held_out"] == len(held_out)
    assert sorted(draw(rest, len(rest.prompts))) == sorted(rest.prompts)
    # Neither order nor company matters, and fewer are the first of more.
    shuffled = random.Random(0).sample(prompts + numbered(500, "other"), 5500)
    assert {p for p in split_held_out(shuffled, 0.02, 10_000)[1] if p in prompts} == set(held_out)
    assert split_held_out(random.Random(1).sample(prompts, 5000), 0.02, 7)[1] == held_out[:7]


@pytest.mark.parametrize("name", sources())
def test_what_is_held_out_is_never_drawn(name: str) -> None:
    source = sources()[name]
    rest, held_out = split_held_out(source, share=0.25, count=40)
    assert 3 < len(held_out) == len(set(held_out)) <= 40
    drawn = {rest.prompt(index, 0, index // 4) for index in range(2000)}
    assert all(hash_place(prompt) < 0.25 for prompt in held_out)
    assert all(hash_place(prompt) >= 0.25 for prompt in drawn)
    assert rest.fingerprint() != source.fingerprint()
    json.dumps(rest.facts())


def test_a_mixture_holds_out_of_each_part_its_share() -> None:
    mixture = PromptMixture([(GeneratedPrompts("text_rendering"), 3), (numbered(2000), 1)])
    _, held_out = split_held_out(mixture, count=80)
    assert 8 <= sum(prompt.startswith("prompt ") for prompt in held_out) <= 32


def test_a_split_that_holds_out_nothing_or_all() -> None:
    few = [prompt for prompt in numbered(20) if hash_place(prompt) > 0.1]
    with pytest.raises(DistillError, match=r"No prompt falls into the share of 0\.1 .*too few"):
        split_held_out(few, share=0.1)
    with pytest.raises(DistillError, match="holds out all of 4 prompts of list"):
        split_held_out(PROMPTS, share=0.999999)
    with pytest.raises(DistillError, match="share is 0; expected a number above 0 and below 1"):
        split_held_out(PROMPTS, share=0)
    with pytest.raises(DistillError, match="count is 0"):
        split_held_out(PROMPTS, count=0)
