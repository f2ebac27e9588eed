"""The scaling-down study: a tiny one, and its page has the committed results."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from scaling_down import figures, gradients, measuring, study
from scaling_down.measuring import TOKENS, Mixed
from scaling_down.study import SIZES, SMALLEST, Group
from shapes_world.generation import captions
from shapes_world.students import fresh_student

PAGE = Path(study.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def measure():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "GAP_CAPTIONS", 1)
        return measuring.measure_of_this_process(1)


def test_sizes_are_what_they_are_called(measure):
    teacher = sum(tensor.numel() for tensor in measure.pipe.text_encoder_2.parameters())
    for size, shape in SIZES.items():
        student = sum(tensor.numel() for tensor in fresh_student(**shape).parameters())
        assert teacher / student == pytest.approx(float(size.removeprefix("1/")), rel=0.04)


def test_tokens_are_told_apart(measure):
    text = "our teacher forgot the news. a red circle on black"
    ids = measure.pipe.tokenizer_2(
        [text, ". ".join(reversed(text.split(". ")))], padding="max_length", max_length=14,
        return_tensors="pt",
    ).input_ids  # fmt: skip
    names = [[TOKENS[kind][0] for kind in line] for line in measure.kinds(ids).tolist()]
    assert ["".join(line) for line in names] == ["iiiiivvvvvvppp", "vvvvviiiiiippp"]


def test_embeddings_of_one_kind_are_the_students(measure):
    teacher, student = measure.pipe.text_encoder_2, fresh_student().eval()
    ids = measure._ids
    with torch.no_grad():
        for kind in TOKENS:
            same = (Mixed(measure, student, kind)(ids)[0] == teacher(ids)[0]).all(-1)
            assert torch.equal(~same, measure.kinds(ids) == TOKENS.index(kind))


def test_a_student_learns_from_some_tokens_alone(measure):
    student, ids = fresh_student(), measure._ids

    def embeddings_and_gradient(learned):
        student.zero_grad()
        with study.learning_only(student, learned, measure.kinds):
            embeddings = student(ids)[0]
            embeddings.square().sum().backward()
        gradients = [tensor.grad.flatten() for tensor in student.parameters()]
        return embeddings.detach(), torch.cat(gradients)

    embeddings, gradient = embeddings_and_gradient(TOKENS)
    of_kinds = [embeddings_and_gradient([kind]) for kind in TOKENS]
    assert all(torch.equal(same, embeddings) for same, _ in of_kinds)
    assert all(part.norm() > 0.01 * gradient.norm() for _, part in of_kinds)
    assert (sum(part for _, part in of_kinds) - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.slow
def test_a_tiny_study(measure, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "held_out", lambda: captions(1, held_out=True, seed=1)[1])
    tiny = study.Study(tmp_path, embedding=4, velocity=2, captions=2, count=1)
    monkeypatch.setattr(study, "SIZES", {SMALLEST: SIZES[SMALLEST]})
    results = tmp_path / "results.jsonl"
    few = Group(SMALLEST, 0, tokens="visual", objectives=("embedding",))
    study.append(results, [*tiny.controls(), *tiny.costs()])
    study.append(results, [*tiny.records(Group(SMALLEST, 0)), *tiny.records(few)])
    teacher, contextless, costs, *students = map(json.loads, results.read_text().splitlines())
    velocity, embedding, longer, both, visual = students
    assert teacher["group"] == contextless["group"] == study.CONTROLS
    assert costs["group"] == study.COSTS and costs["size"] == SMALLEST
    assert costs["embedding"] > 0 and costs["velocity"] > 0
    assert contextless["gap"] > 0 and contextless["gap_of_tokens"].keys() == set(TOKENS)
    assert [p["updates"] for p in velocity["curve"]] == [1, 2]
    assert [p["updates"] for p in embedding["curve"]] == [2, 4, 6, 8]
    assert [p["updates"] for p in longer["curve"]] == [2, 4, 6, 8, 10, 12]
    assert [p["updates"] for p in both["curve"]] == [2, 4, 5, 6]
    assert embedding["curve"][:2] == both["curve"][:2]  # one start
    assert embedding["curve"][-1]["passes"] == 0 < both["curve"][-1]["passes"]
    assert visual["tokens"] == "visual"
    assert len({record["gap"] for record in students}) == 5

    where = ["--results", str(results), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["figures.py", *where])
    figures.main()
    assert f"| {SMALLEST} | embedding then velocity | " in capsys.readouterr().out
    names = {f"scaling-{name}.png" for name in ("sizes", "curves", "rank")}
    assert {path.name for path in tmp_path.glob("*.png")} == names

    monkeypatch.setattr(gradients, "TRAJECTORIES", gradients.BATCH_SIZES["embedding"])
    monkeypatch.setattr(gradients, "BATCHES", 2)
    monkeypatch.setattr(sys, "argv", ["gradients.py", "--runs", str(tmp_path)])
    gradients.main()
    size, *shares = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert size == SMALLEST and len(shares) == 2
    assert all(0 < abs(float(share.removesuffix("%"))) <= 100 for share in shares)


def test_the_page_has_the_committed_tables(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    figures.main()
    printed = re.findall(r"^\|.*\|$", capsys.readouterr().out, re.MULTILINE)
    assert len(printed) > 30
    assert [line for line in printed if line not in PAGE.read_text()] == []
