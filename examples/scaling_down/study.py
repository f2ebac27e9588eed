r"""The paper's scaling-down study in the miniature world: the loss of a student as it shrinks.

    python examples/scaling_down/study.py --out runs        # goes on where it was stopped
    python examples/scaling_down/figures.py --results runs/results.jsonl --out runs

Students of five sizes learn from the teacher's embeddings (naive embedding matching), from the
denoiser's predictions (velocity matching), or from the one and then the other; each from three
seeds. Half of an embedding run is the start of both its own second half and of one of velocity,
which takes about as many seconds: these two differ in nothing else. Where velocity takes more, a
longer second half takes as many and more. Velocity alone takes one such half. Then the data:
captions of one kind alone, more or less idle text, and embeddings that are matched without the
padding, or without the idle words too. A table without context is the control.

A group of runs with the same start is the work of one process. What it measured is a line for each
of its students in `results.jsonl`. A student that is there isn't made again; one whose run was
killed goes on from its last checkpoint. Several machines share the work by `--groups`; their
`results.jsonl` can then be put one after the other.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput

from t5slim.distill import DistillConfig, DistillResult, cache_teacher, cached_teacher, train
from t5slim.hub import write_atomic

sys.path.insert(0, str(Path(__file__).parents[1]))
from contextless.contextless import ContextlessEncoder
from scaling_down.measuring import TOKENS, Measure, measure_of_this_process
from shapes_world import world
from shapes_world.generation import CALL, captions
from shapes_world.students import denoiser_passes, fresh_student, settings

# Parts of the teacher's 5.5 million parameters; of the smallest, two thirds are the projection.
SIZES: dict[str, dict[str, int]] = {
    "1/4": {"d_model": 160, "d_kv": 32, "num_heads": 5, "d_ff": 320, "num_layers": 4},
    "1/8": {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 192, "num_layers": 3},
    "1/21": {},  # as `fresh_student` has it
    "1/33": {"d_model": 40, "d_kv": 10, "num_heads": 4, "d_ff": 80, "num_layers": 2},
    "1/50": {"d_model": 20, "d_kv": 10, "num_heads": 2, "d_ff": 40, "num_layers": 2},
}
MIDDLE, SMALLEST = "1/21", "1/50"
# The halves of a run.
OBJECTIVES = {
    "velocity": ("velocity",),
    "embedding": ("embedding", "embedding"),
    "longer embedding": ("embedding", "embedding twice"),
    "embedding then velocity": ("embedding", "velocity"),
}
# Where half a run of velocity takes more seconds than half a run of embeddings, which `costs`
# measures.
SHORT_OF_EMBEDDINGS = ("1/21", "1/33", "1/50")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Group:
    """Runs with the same start.

    Attributes:
        size: of the student, a key of `SIZES`.
        seed: of its first weights, and of all that is drawn in training.
        kind: of its captions, a criterion; or "all".
        chatter: share of the captions that have an idle sentence beside them.
        tokens: whose embeddings are matched: "all", or some of `TOKENS` with "+" between.
        objectives: of the students, after the same start.
    """

    size: str
    seed: int
    kind: str = "all"
    chatter: float = 0.5
    tokens: str = "all"
    objectives: tuple[str, ...] = tuple(OBJECTIVES)

    @property
    def name(self) -> str:
        name = f"{self.size.replace('/', '-')}-{self.kind}-{self.chatter:g}-{self.seed}"
        return name if self.tokens == "all" else f"{name}-{self.tokens}"

    def prompts(self, count: int) -> list[str]:
        """`count` captions of each criterion in it."""
        scenes, texts = captions(count, held_out=False, chatter=self.chatter)
        pairs = zip(scenes, texts, strict=True)
        return [text for scene, text in pairs if self.kind in ("all", scene.criterion)]


CONTROLS, COSTS = "controls", "costs"


def groups(seeds: Sequence[int] = SEEDS) -> list[Group]:
    """All of them. Whole seeds first, so that a study that was stopped says something."""
    found, after = [], ("embedding", "embedding then velocity")
    for seed in seeds:
        for size in SIZES:
            longer = size in SHORT_OF_EMBEDDINGS
            chosen = tuple(o for o in OBJECTIVES if longer or o != "longer embedding")
            found.append(Group(size, seed, objectives=chosen))
        found += [Group(MIDDLE, seed, kind, objectives=after[1:]) for kind in world.CRITERIA]
        smallest = functools.partial(Group, SMALLEST, seed, objectives=after)
        found += [smallest(chatter=share) for share in (0.0, 1.0)]
        found += [smallest(tokens=tokens) for tokens in ("visual+idle", "visual")]
    return found


def main() -> None:
    """Make what is missing, and say where the results are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--groups", nargs="+", default=["*"], help="those of such names: '1-4-*'")
    parser.add_argument("--workers", type=int, default=4 if torch.cuda.is_available() else 2)
    parser.add_argument("--embedding", type=int, default=4800, help="updates of half a run")
    parser.add_argument("--velocity", type=int, default=600, help="updates of half a run")
    parser.add_argument("--captions", type=int, default=2000, help="to train on, of each criterion")
    parser.add_argument("--count", type=int, default=40, help="judged images of each criterion")
    args = parser.parse_args()
    wanted = [
        group
        for group in groups(args.seeds)
        if any(fnmatch.fnmatch(group.name, pattern) for pattern in args.groups)
    ]
    if not wanted:
        parser.error(f"no group has such a name; there are {[g.name for g in groups(args.seeds)]}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the processes with it
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(one["group"], one.get("objective")) for one in map(json.loads, lines)}
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    torch.set_num_threads(threads)
    study = Study(args.out, args.embedding, args.velocity, args.captions, args.count)
    if (CONTROLS, "teacher") not in done:
        append(results, study.controls())
    if (COSTS, None) not in done:
        append(results, study.costs())
    missing = []
    for group in wanted:
        left = tuple(one for one in group.objectives if (group.name, one) not in done)
        if left:
            missing.append(replace(group, objectives=left))
    context = multiprocessing.get_context("spawn")  # CUDA can't be forked
    with context.Pool(args.workers, torch.set_num_threads, (threads,)) as pool:
        work = pool.imap_unordered(study.records, missing)
        for records in tqdm(work, "study", len(missing), unit="group"):
            append(results, records)
    print(f"The results are in {results}")


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """All of a group, or nothing of it."""
    before = path.read_bytes() if path.exists() else b""
    write_atomic(path, before + "".join(json.dumps(one) + "\n" for one in records).encode())


@dataclass(frozen=True)
class Study:
    """Amounts of everything; sent to the processes.

    Attributes:
        folder: for the runs, and the teacher's embeddings.
        embedding: updates of half an embedding run.
        velocity: updates of half a run of velocity.
        captions: to train on, of each criterion.
        count: images to judge, of each criterion.
    """

    folder: Path
    embedding: int
    velocity: int
    captions: int
    count: int

    def controls(self) -> list[dict[str, Any]]:
        """The teacher, and the table without context. Caches the teacher's embeddings for all
        runs."""
        measure = measure_of_this_process(self.count)
        pipe = measure.pipe
        texts = {text for group in groups() for text in group.prompts(self.captions)}
        texts |= {*measure.gap.prompts, *held_out()}
        cache_teacher(pipe, sorted(texts), self._cache, pipeline_kwargs=CALL)
        prompts = Group(MIDDLE, 0).prompts(self.captions)
        table = ContextlessEncoder.from_teacher(pipe, prompts, pipeline_kwargs=CALL)
        numbers = sum(tensor.numel() for tensor in pipe.text_encoder_2.parameters())
        teacher = {"objective": "teacher", "parameters": numbers, "right": measure.right(None)}
        # Most of the vocabulary is in no caption; what isn't has the mean of all.
        known = table.entries.weight.unique(dim=0).numel() + table.positions.weight.numel()
        control = {"objective": "contextless", "parameters": known} | measure(table)
        return [{"group": CONTROLS} | one for one in (teacher, control)]

    def costs(self) -> list[dict[str, Any]]:
        """Seconds of an update of each size, before there are other processes: those of the runs
        depend on what runs beside them."""
        pipe, found = measure_of_this_process(self.count).pipe, []
        few = replace(self, captions=-(-self.captions // 30))  # all known when time is taken
        for size in tqdm(SIZES, "seconds of an update", unit="size"):
            record: dict[str, Any] = {"group": COSTS, "device": device_name(pipe), "size": size}
            for term, updates in {"embedding": self.embedding, "velocity": self.velocity}.items():
                # Of the second half: the first reads the teacher's cache, and a GPU its kernels.
                steps = -(-updates // 30)
                config = self._config(term, max_steps=2 * steps, eval_every=steps)
                student, prompts = fresh_student(**SIZES[size]), held_out()[:1]
                result = few._train(pipe, student, Group(size, 0), config, eval_prompts=prompts)
                begin, end = (entry["seconds"] for entry in result.history)
                record[term] = (end - begin) / steps
            found.append(record)
        return found

    def records(self, group: Group) -> list[dict[str, Any]]:
        """The results of each student of a group."""
        measure = measure_of_this_process(self.count)
        found = []
        for objective in group.objectives:
            halves = self._halves(measure, group, objective)
            student = halves[-1].student
            facts = {key: value for key, value in asdict(group).items() if key != "objectives"}
            facts |= {"group": group.name, "objective": objective}
            facts |= {"parameters": sum(tensor.numel() for tensor in student.parameters())}
            found.append(facts | {"curve": curve(halves)} | measure(student))
        return found

    def _halves(self, measure: Measure, group: Group, objective: str) -> list[DistillResult]:
        student = fresh_student(group.seed, **SIZES[group.size])
        halves: list[DistillResult] = []
        for term in OBJECTIVES[objective]:
            rate, schedule, norm = (3e-3 if term == "velocity" else 2e-3), "cosine", 1.0
            if len(OBJECTIVES[objective]) == 2 and not halves:
                schedule = "constant"  # it goes on
            if term == "velocity" and halves:
                # More, or a step as long as a rare gradient of 100 times the usual norm, and
                # velocity first undoes what was learned; the wider the student, the sooner.
                rate, norm = 1e-4 * 64 / student.config.d_model, 0.05
            config = self._config(
                term,
                learning_rate=rate,
                lr_schedule=schedule,
                max_grad_norm=norm,
                eval_every=-(-self.velocity // 4) if term == "velocity" else self.velocity,
                seed=group.seed,
            )
            name = "-then-".join(OBJECTIVES[objective][: len(halves) + 1]).replace(" ", "-")
            folder = self.folder / group.name / name
            matched = group.tokens.split("+") if group.tokens != "all" else TOKENS
            learned = TOKENS if term == "velocity" else matched
            with learning_only(student, learned, measure.kinds):
                halves.append(
                    self._train(
                        measure.pipe, student, group, config,
                        eval_prompts=held_out(), output_dir=folder, resume=True,
                    )
                )  # fmt: skip
        return halves

    def _config(self, term: str, **changes: Any) -> DistillConfig:
        # In float32 on all devices, so that their results can be put together.
        common = {"ema_decay": 0.99, "mixed_precision": "no", "trackers": ()}
        of_term: dict[str, Any] = {
            "embedding": {"batch_size": 16, "max_steps": self.embedding},
            "embedding twice": {"batch_size": 16, "max_steps": 2 * self.embedding},
            "velocity": {"batch_size": 8, "max_steps": self.velocity},
        }[term]
        of_term["objective"] = term.removesuffix(" twice")
        return settings(**common | of_term | changes)

    def _train(
        self, pipe: Any, student: nn.Module, group: Group, config: DistillConfig, **options: Any
    ) -> DistillResult:
        prompts = group.prompts(self.captions)
        with cached_teacher(pipe, self._cache):
            return train(pipe, student, prompts, config, pipeline_kwargs=CALL, **options)

    @property
    def _cache(self) -> Path:
        return self.folder / "teacher-embeddings"


@contextmanager
def learning_only(
    student: nn.Module, learned: Sequence[str], kinds: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Within, a student learns nothing from its embeddings of other tokens; they are the same."""

    def without_gradient(_: nn.Module, args: tuple[Tensor], output: BaseModelOutput) -> None:
        embeddings, wanted = output.last_hidden_state, [TOKENS.index(kind) for kind in learned]
        of_kind = torch.isin(kinds(args[0]), torch.tensor(wanted, device=embeddings.device))[
            ..., None
        ]
        output.last_hidden_state = torch.where(of_kind, embeddings, embeddings.detach())

    hook = student.register_forward_hook(without_gradient) if set(learned) != set(TOKENS) else None
    try:
        yield
    finally:
        if hook:
            hook.remove()


def device_name(pipe: Any) -> str:
    """Of the device; of a CPU, the number of its threads."""
    if pipe.device.type == "cuda":
        return torch.cuda.get_device_name(pipe.device)
    return f"CPU, threads: {torch.get_num_threads()}"


def held_out() -> list[str]:
    """Prompts that the gap is measured on while a student learns."""
    return captions(3, held_out=True, seed=1)[1]


def curve(halves: Sequence[DistillResult]) -> list[dict[str, float]]:
    """The gap after so many updates and denoiser passes, through all halves."""
    points, before = [], {"updates": 0, "passes": 0}
    for half in halves:
        for entry in half.history:
            costs = {"updates": entry["step"], "passes": denoiser_passes(entry)}
            point = {key: before[key] + cost for key, cost in costs.items()}
            points.append(point | {"gap": entry["velocity_gap"]})
        before = {key: points[-1][key] for key in before}
    return points


if __name__ == "__main__":
    main()
