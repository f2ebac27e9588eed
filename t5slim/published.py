"""The students that others have published."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedStudent:
    """What is known of a student on the Hub; `patch_pipeline(pipe, student.repo_id)` takes it.

    Attributes:
        repo_id: on the Hub.
        pipeline: that it was distilled for. Others with the same width take it, too, but it has
            never seen their denoisers.
        architecture: of its encoder.
        parameters: of encoder and projection.
        max_tokens: the length of text at which it was distilled.
        licence: as its authors state it; None: they state none, and the pipeline that it was
            distilled through may have a say (FLUX.1-dev is non-commercial).
        source: where it is described.
    """

    repo_id: str
    pipeline: str
    architecture: str
    parameters: int
    max_tokens: int
    licence: str | None
    source: str


_PAPER = "Wang et al., CVPR 2025, arXiv 2503.19897"
_STUDENTS = (
    PublishedStudent("LifuWang/DistillT5", "FLUX.1-dev", "T5-base", 129_551_488, 77, None, _PAPER),
    PublishedStudent(
        "LifuWang/DistillT5-Small", "FLUX.1-dev", "T5-small", 54_207_168, 77, None, _PAPER
    ),
)


def students() -> list[PublishedStudent]:
    """The published students that are known to this version, the most capable first."""
    return list(_STUDENTS)
