"""The scaling-down study: a tiny one, and that its page says what was committed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from t5slim.distill import EmbeddingLoss

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from distill_shapes import fresh_student  # noqa: E402
from scaling_down import figures, gradients, measuring, study  # noqa: E402
from scaling_down.measuring import ROWS, Mixed  # noqa: E402
from scaling_down.study import (  # noqa: E402
    CONTROLS,
    COSTS,
    OBJECTIVES,
    SHORT_OF_EMBEDDINGS,
    SIZES,
    SMALLEST,
    Group,
    Study,
    append,
    groups,
    learning_rows,
)
from shapes_world import world  # noqa: E402
from shapes_world.painting import captions  # noqa: E402


@pytest.fixture(scope="module")
def measure():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "GAP_CAPTIONS", 1)
        return measuring.measure_of_this_process(1)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_what_they_are_called(measure, size):
    teacher = sum(tensor.numel() for tensor in measure.pipe.text_encoder_2.parameters())
    student = sum(tensor.numel() for tensor in fresh_student(**SIZES[size]).parameters())
    assert teacher / student == pytest.approx(float(size.removeprefix("1/")), rel=0.04)


def test_every_claim_has_its_runs():
    every = groups()
    assert len({group.name for group in every}) == len(every)
    runs = {(g.size, o, g.seed) for g in every if g.kind == "all" for o in g.objectives}
    wanted = {(s, o, seed) for s in SIZES for o in OBJECTIVES for seed in (0, 1, 2)}
    assert runs == {
        run for run in wanted if run[0] in SHORT_OF_EMBEDDINGS or run[1] != "longer embedding"
    }
    assert {group.kind for group in every} == {"all", *world.CRITERIA}
    assert all(text.count('"') == 2 for text in Group("1/21", 0, "text").prompts(5))


def test_tokens_are_told_apart(measure):
    text = "our teacher forgot the news. a red circle on black"
    ids = measure.pipe.tokenizer_2(
        [text, ". ".join(reversed(text.split(". ")))], padding="max_length", max_length=14,
        return_tensors="pt",
    ).input_ids  # fmt: skip
    names = [[ROWS[kind][0] for kind in row] for row in measure.kinds(ids).tolist()]
    assert ["".join(row) for row in names] == ["iiiiivvvvvvppp", "vvvvviiiiiippp"]


def test_rows_of_one_kind_are_the_students(measure):
    teacher, student = measure.pipe.text_encoder_2, fresh_student().eval()
    ids = measure._ids
    with torch.no_grad():
        for kind in ROWS:
            mixed = Mixed(measure, student, kind)(ids)[0]
            same = (mixed == teacher(ids)[0]).all(-1)
            assert torch.equal(~same, measure.kinds(ids) == ROWS.index(kind))
    assert EmbeddingLoss()(mixed, teacher(ids)[0]).sum() > 0


def test_a_student_learns_from_some_rows_alone(measure):
    student, ids = fresh_student(), measure._ids

    def rows_and_gradient(asked):
        student.zero_grad()
        with learning_rows(student, asked, measure.kinds):
            rows = student(ids)[0]
            rows.square().sum().backward()
        return rows.detach(), torch.cat([tensor.grad.flatten() for tensor in student.parameters()])

    rows, gradient = rows_and_gradient(ROWS)
    of_kinds = [rows_and_gradient([kind]) for kind in ROWS]
    assert all(torch.equal(same, rows) for same, _ in of_kinds)
    assert all(part.norm() > 0.01 * gradient.norm() for _, part in of_kinds)
    assert (sum(part for _, part in of_kinds) - gradient).norm() < 1e-5 * gradient.norm()


def test_a_tiny_study(measure, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "held_out", lambda: captions(1, held_out=True, seed=1)[1])
    tiny = Study(tmp_path, embedding=4, velocity=2, captions=2, count=1)
    monkeypatch.setattr(study, "SIZES", {SMALLEST: SIZES[SMALLEST]})
    append(tmp_path / "results.jsonl", tiny.controls())
    append(tmp_path / "results.jsonl", tiny.costs())
    append(tmp_path / "results.jsonl", tiny.records(Group(SMALLEST, 0)))
    few = Group(SMALLEST, 0, rows="visual", objectives=("embedding",))
    append(tmp_path / "results.jsonl", tiny.records(few))
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    teacher, contextless, costs, *students = map(json.loads, lines)
    velocity, embedding, longer, both, visual = students
    assert teacher["group"] == contextless["group"] == CONTROLS
    assert costs["group"] == COSTS and costs["size"] == SMALLEST
    assert costs["embedding"] > 0 and costs["velocity"] > 0
    assert contextless["gap"] > 0 and contextless["gap_of_rows"].keys() == set(ROWS)
    assert [p["updates"] for p in velocity["curve"]] == [1, 2]
    assert [p["updates"] for p in embedding["curve"]] == [2, 4, 6, 8]
    assert [p["updates"] for p in longer["curve"]] == [2, 4, 6, 8, 10, 12]
    assert [p["updates"] for p in both["curve"]] == [2, 4, 5, 6]
    assert embedding["curve"][:2] == both["curve"][:2]  # one start
    assert embedding["curve"][-1]["passes"] == 0 < both["curve"][-1]["passes"]
    assert visual["rows"] == "visual"
    assert len({record["gap"] for record in students}) == 5

    options = ["--results", str(tmp_path / "results.jsonl"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["figures.py", *options])
    figures.main()
    assert f"| {SMALLEST} | embedding then velocity | " in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "scaling-sizes.png", "scaling-curves.png", "scaling-rank.png",
    }  # fmt: skip

    monkeypatch.setattr(gradients, "WALKS", gradients.ROWS_OF_BATCH["embedding"])
    monkeypatch.setattr(gradients, "BATCHES", 2)
    monkeypatch.setattr(sys, "argv", ["gradients.py", "--runs", str(tmp_path)])
    gradients.main()
    size, *shares = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert size == SMALLEST and len(shares) == 2
    assert all(0 < abs(float(share.removesuffix("%"))) <= 100 for share in shares)


def test_the_page_has_the_committed_tables(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    figures.main()
    page = (ROOT / "docs" / "findings.md").read_text()
    printed = re.findall(r"^\|.*\|$", capsys.readouterr().out, re.MULTILINE)
    assert len(printed) > 30
    assert [line for line in printed if line not in page] == []
