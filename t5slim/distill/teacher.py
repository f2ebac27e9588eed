"""What is known of each prompt: its ids, its mask, and the rows that the teacher made of it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..slot import find_text_slot
from .calls import call_encoder

# Of the teacher's rows, in host memory: 0.6 MB for a prompt of 77 tokens and 4096 channels in
# bfloat16.
MAX_ROWS_BYTES = 8 << 30
_ENCODED_TOGETHER = 8


class PromptTable:
    """Numbers the prompts that pass through the text slot, and asks the teacher for each only once.

    A prompt is what the encoder sees of it, ids and mask, so the empty prompt that classifier-free
    guidance adds to every batch is one entry. Ids and masks stay; the teacher's rows stay up to
    `MAX_ROWS_BYTES`, and those that were longest not asked for make room.

    The rows of a prompt depend on nothing but the prompt, bit for bit: not on the batch that it
    came in, nor on what was asked before. So a run that was resumed sees the rows of one that
    wasn't.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
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
        mask = None if attention_mask is None else attention_mask.to("cpu")
        numbers = []
        for i, key in enumerate(prompt_keys(ids, mask)):
            if key not in self._numbers:
                self._numbers[key] = len(self._ids)
                self._ids.append(ids[i].clone())
                self._masks.append(None if mask is None else mask[i].clone())
            numbers.append(self._numbers[key])
        return numbers

    @property
    def keys(self) -> list[str]:
        """What `prompt_keys` calls each prompt, by number."""
        return list(self._numbers)

    def batch(self, numbers: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Ids (B, S) and mask (B, S) or None of the prompts with these numbers.

        Bria encodes each prompt by itself and pads none: those are padded here, with a mask.
        """
        ids = [self._ids[n] for n in numbers]
        masks = [mask for n in numbers if (mask := self._masks[n]) is not None]
        if not masks and len(set(map(len, ids))) > 1:
            masks = [torch.ones_like(i) for i in ids]
        padded = pad_sequence(ids, batch_first=True).to(device, torch.int64)
        return padded, pad_sequence(masks, batch_first=True).to(device) if masks else None

    def teacher_rows(
        self, forward: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """The teacher's rows for a batch, (B, S, D): remembered, or asked for with `forward`."""
        return self.rows(forward, self.numbers(input_ids, attention_mask), input_ids.device)

    def rows(
        self, forward: Callable[..., Any], numbers: Sequence[int], device: torch.device
    ) -> Tensor:
        """The same for prompts by number, (B, S, D); those of the shorter ones end with zeros."""
        missing = [n for n in dict.fromkeys(numbers) if n not in self._rows]

        def length(number: int) -> int:
            return len(self._ids[number])

        for _, alike in groupby(sorted(missing, key=length), length):
            together = list(alike)
            rows = encode_alike(forward, *self.batch(together, device))
            for n, row in zip(together, rows, strict=True):
                self._rows[n] = row.to("cpu", copy=True)
                self._bytes += row.nbytes
        for n in numbers:
            self._rows.move_to_end(n)
        result = pad_sequence([self._rows[n] for n in numbers], batch_first=True).to(device)
        while self._bytes > MAX_ROWS_BYTES and len(self._rows) > 1:
            self._bytes -= self._rows.popitem(last=False)[1].nbytes
        return result


def encode_alike(
    forward: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """The teacher's rows, (B, S, D), of each prompt the same, bit for bit, in every batch.

    Matrix products round as the size of their batch has it, so prompts are encoded in batches of
    one size, the last one filled up.
    """
    rows = []
    for start in range(0, len(input_ids), _ENCODED_TOGETHER):
        stop = min(start + _ENCODED_TOGETHER, len(input_ids))
        index = [min(i, stop - 1) for i in range(start, start + _ENCODED_TOGETHER)]
        mask = None if attention_mask is None else attention_mask[index]
        with torch.no_grad():
            rows.append(call_encoder(forward, input_ids[index], mask)[: stop - start])
    return torch.cat(rows)


def prompt_keys(input_ids: Tensor, attention_mask: Tensor | None) -> list[str]:
    """What names each prompt of a batch on every machine: SHA-256 of its ids and its mask, in hex.

    Args:
        input_ids: (B, S), integers.
        attention_mask: (B, S), or None, which is another prompt than a mask of ones.
    """
    ids = input_ids.to("cpu", torch.int32).numpy()
    masks = None if attention_mask is None else attention_mask.to("cpu", torch.bool).numpy()
    keys = []
    for i in range(len(ids)):
        content = hashlib.sha256(ids[i].tobytes())
        if masks is not None:
            content.update(b"mask" + masks[i].tobytes())
        keys.append(content.hexdigest())
    return keys


def tokenize_empty(
    pipe: Any, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The empty prompt, ids and mask (1, S), padded as those of the batch that was passed."""
    tokenizer = getattr(pipe, find_text_slot(pipe).tokenizer_name)
    tokens = tokenizer(
        [""], padding="max_length", max_length=input_ids.shape[1], return_tensors="pt"
    )
    mask = None if attention_mask is None else tokens.attention_mask.to(attention_mask)
    return tokens.input_ids.to(input_ids), mask


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
