"""What is known of each prompt: its ids, its mask, and the rows that the teacher made of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .calls import call_encoder

# Of the teacher's rows, in host memory: 0.6 MB for a prompt of 77 tokens and 4096 channels in
# bfloat16.
MAX_ROWS_BYTES = 8 << 30


class PromptTable:
    """Numbers the prompts that pass through the text slot, and asks the teacher for each only once.

    A prompt is what the encoder sees of it, ids and mask, so the empty prompt that classifier-free
    guidance adds to every batch is one entry. Ids and masks stay; the teacher's rows stay up to
    `MAX_ROWS_BYTES`, and those that were longest not asked for make room.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[bytes, bytes | None], int] = {}
        self._ids: list[Tensor] = []
        self._masks: list[Tensor | None] = []
        self._rows: OrderedDict[int, Tensor] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._ids)

    def numbers(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
        """The number of each prompt of a batch; a new prompt gets the next one.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), or None.
        """
        ids = input_ids.to("cpu", torch.int32)
        masks = None if attention_mask is None else attention_mask.to("cpu")
        numbers = []
        for i in range(len(ids)):
            mask = None if masks is None else masks[i].clone()
            key = (ids[i].numpy().tobytes(), None if mask is None else mask.numpy().tobytes())
            if key not in self._numbers:
                self._numbers[key] = len(self._ids)
                self._ids.append(ids[i].clone())
                self._masks.append(mask)
            numbers.append(self._numbers[key])
        return numbers

    def batch(self, numbers: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Ids (B, S) and mask (B, S) or None of the prompts with these numbers."""
        ids = torch.stack([self._ids[n] for n in numbers]).to(device, torch.int64)
        masks = [mask for n in numbers if (mask := self._masks[n]) is not None]
        return ids, torch.stack(masks).to(device) if masks else None

    def teacher_rows(
        self, forward: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """The teacher's rows for a batch, (B, S, D): remembered, or asked for with `forward`."""
        numbers = self.numbers(input_ids, attention_mask)
        missing = [i for i, n in enumerate(numbers) if n not in self._rows and n not in numbers[:i]]
        fresh: dict[int, Tensor] = {}
        if missing:
            with torch.no_grad():
                rows = call_encoder(
                    forward,
                    input_ids[missing],
                    None if attention_mask is None else attention_mask[missing],
                )
            fresh = {numbers[i]: row for i, row in zip(missing, rows, strict=True)}
        result = torch.stack(
            [fresh[n] if n in fresh else self._rows[n].to(input_ids.device) for n in numbers]
        )
        for n, row in fresh.items():
            self._rows[n] = row.to("cpu", copy=True)
            self._bytes += row.nbytes
        for n in numbers:
            self._rows.move_to_end(n)
        while self._bytes > MAX_ROWS_BYTES and len(self._rows) > 1:
            self._bytes -= self._rows.popitem(last=False)[1].nbytes
        return result


def encode_prompts(
    student: Callable[..., Any], table: PromptTable, numbers: Sequence[int], device: torch.device
) -> Tensor:
    """The student's rows for prompts of the table, (B, S, D), each different prompt encoded
    once.
    """
    different = list(dict.fromkeys(numbers))
    ids, mask = table.batch(different, device)
    rows = call_encoder(student, ids, mask)
    if len(different) == len(numbers) and list(numbers) == different:
        return rows
    places = {n: i for i, n in enumerate(different)}
    return rows[torch.tensor([places[n] for n in numbers], device=rows.device)]
