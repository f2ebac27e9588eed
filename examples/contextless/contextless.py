"""An encoder without context: a table of the teacher's mean embeddings, by word and by position.

It shows how much of a text encoder a denoiser uses at all, and what a student is worth beyond a
table. Spingarn et al. find that such a bag of position-tagged words guides diffusion transformers
about as well as their text encoder does.

Source: Spingarn et al., 2026, "Text-to-Image Models Need Less from Text Encoders Than You Think",
arXiv 2606.03715.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from t5slim.distill.pipeline import check_pipeline_kwargs, frozen, teacher_of, tokenize
from t5slim.distill.prompts import PromptSource
from t5slim.distill.teacher import TeacherEmbeddings
from t5slim.slot import TextSlot

_BATCH = 64
# The kinds of tokens: inside a word, at its start, or a word of its own.
_INNER, _FIRST, _ALONE = range(3)
_WORD_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's
Word = tuple[int, ...]  # its tokens


class ContextlessEncoder(PreTrainedModel):
    """A table in the place of a T5: an embedding of each token in its word, plus one of its
    position.

    There is no transformer in it and nothing to train: no token depends on any outside its word. A
    word of several tokens that isn't in the table is read token by token, and a token that isn't as
    the mean of all. Positions behind the last one of the table have that one's embedding.

    Args:
        width: Width D of the embeddings.
        kinds: The kind of each token of the vocabulary, from `token_kinds`.
        words: The words of several tokens in the table.
        num_positions: The positions in it.
    """

    def __init__(
        self, width: int, kinds: Sequence[int], words: Sequence[Word], num_positions: int
    ) -> None:
        # By these two names t5slim recognises an encoder for a T5 slot.
        super().__init__(PretrainedConfig(vocab_size=len(kinds), project_out_dim=width))
        self.kinds, self.first_entries, end = kinds, dict[Word, int](), len(kinds)
        for word in words:
            self.first_entries[word] = end
            end += len(word)
        # First the tokens, by their ids; then those of the words, one word after the other.
        self.entries = nn.Embedding.from_pretrained(torch.zeros(end, width))
        self.positions = nn.Embedding.from_pretrained(torch.zeros(num_positions, width))

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, return_dict: Any = None, **_: Any
    ) -> BaseModelOutput | tuple[Tensor]:
        """Look tokens up, (B, T) ids; the output's first is (B, T, D). No mask means anything."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = positions.clamp(max=self.positions.num_embeddings - 1)
        embeddings = self.entries(self.entries_of(input_ids)) + self.positions(positions)
        if return_dict is False:
            return (embeddings,)
        return BaseModelOutput(last_hidden_state=embeddings)

    def entries_of(self, input_ids: Tensor) -> Tensor:
        """(B, T), the index of each token's entry: that in its word, or else the token's own."""
        entries = input_ids.tolist()
        for of_prompt in entries:
            for start, word in words_of(of_prompt, self.kinds):
                if (first := self.first_entries.get(word)) is not None:
                    of_prompt[start : start + len(word)] = range(first, first + len(word))
        return torch.tensor(entries, device=input_ids.device)

    @classmethod
    @torch.no_grad()
    def from_teacher(
        cls, pipe: Any, prompts: Any, *, pipeline_kwargs: Mapping[str, Any] | None = None
    ) -> ContextlessEncoder:
        """Average a teacher's embeddings of each word over the contexts in which `prompts` have it.

        They are fitted by least squares as the sum of two tables, one of words and one of
        positions. Padding and the end of a prompt are words like others, since FLUX.1 and SD3 read
        their embeddings, too.

        Args:
            pipe: A pipeline with the teacher in its text slot, or within `cached_teacher`.
            prompts: A list or a file, as for `train`. Thousands: each word should stand in many
                contexts and at many positions.
            pipeline_kwargs: How to call the pipeline, as for `train`. `max_sequence_length` decides
                how many positions there are.
        """
        read, slot = read_prompts(pipe, prompts, pipeline_kwargs), TextSlot(pipe)
        ids, _ = read.tokens(range(len(read.indices)), torch.device("cpu"))
        kinds = token_kinds(slot.tokenizer)
        found = {word for of_prompt in ids.tolist() for _, word in words_of(of_prompt, kinds)}
        words = sorted(word for word in found if len(word) > 1)
        encoder: Any = cls(slot.width or 0, kinds, words, ids.shape[1]).to(pipe._execution_device)
        sums = torch.zeros_like(encoder.entries.weight)
        of_positions = torch.zeros_like(encoder.positions.weight)
        counts = sums.new_zeros(len(sums), len(of_positions))
        for ids, encoded in encoded_batches(pipe, read):
            entries = encoder.entries_of(ids)
            sums.index_add_(0, entries.flatten(), encoded.to(sums).flatten(0, 1))
            of_positions[: ids.shape[1]] += encoded.to(sums).sum(0)
            positions = torch.arange(ids.shape[1], device=sums.device).expand_as(ids)
            counts.index_put_((entries, positions), counts.new_ones(()), accumulate=True)
        encoder.positions.weight.copy_(_position_table(sums, of_positions, counts))
        sums -= counts @ encoder.positions.weight
        seen = counts.sum(1, keepdim=True)
        mean = sums.sum(0) / seen.sum()
        # A token that never stood alone means what it does in the words that it was seen in.
        in_words = torch.tensor([*sum(words, ())], dtype=torch.int64, device=sums.device)
        alone = seen > 0
        for totals in (sums, seen):
            by_token = torch.zeros_like(totals).index_add(0, in_words, totals[len(kinds) :])
            totals.copy_(torch.where(alone, totals, by_token))
        encoder.entries.weight.copy_(torch.where(seen > 0, sums / seen.clamp(min=1), mean))
        return encoder.to(teacher_of(pipe).dtype).eval()


def read_prompts(
    pipe: Any, prompts: Any, pipeline_kwargs: Mapping[str, Any] | None
) -> TeacherEmbeddings:
    """Prompts and the empty one as the pipeline tokenizes them, each once, not yet encoded."""
    kwargs, read = check_pipeline_kwargs(pipe, pipeline_kwargs), TeacherEmbeddings()
    texts = [*PromptSource(prompts).all(), ""]
    with frozen(pipe, gradient_checkpointing=False):
        for start in range(0, len(texts), _BATCH):
            for tokens in tokenize(pipe, texts[start : start + _BATCH], kwargs):
                read.add(*tokens)
    return read


def encoded_batches(pipe: Any, read: TeacherEmbeddings) -> Iterator[tuple[Tensor, Tensor]]:
    """The ids (B, T) of the prompts, and the teacher's embeddings of them, (B, T, D)."""
    with frozen(pipe, gradient_checkpointing=False):
        for start in tqdm(range(0, len(read.indices), _BATCH), "encode", unit="batch"):
            indices = range(start, min(start + _BATCH, len(read.indices)))
            device = torch.device(pipe._execution_device)
            ids, _ = read.tokens(indices, device)
            yield ids, read.get(teacher_of(pipe), indices, device)
        pipe.maybe_free_model_hooks()


def words_of(ids: Sequence[int], kinds: Sequence[int]) -> list[tuple[int, Word]]:
    """The words of a prompt, each with the position of its first token."""
    inner = range(1, len(ids))
    ends = [i for i in inner if kinds[ids[i]] != _INNER or kinds[ids[i - 1]] == _ALONE]
    return [(start, tuple(ids[start:end])) for start, end in pairwise([0, *ends, len(ids)])]


def token_kinds(tokenizer: Any) -> list[int]:
    """The kind of each token of a vocabulary.

    SentencePiece marks those that begin a word. Tokens without a letter or digit stand alone:
    special ones, of which padding repeats, and punctuation, so that "cat," is the word "cat".
    Without marks, every token is a word.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    if not any(token.startswith(_WORD_MARK) for token in tokens):
        return [_ALONE] * len(tokens)
    return [
        _ALONE
        if token in special or not any(map(str.isalnum, token))
        else _FIRST
        if token.startswith(_WORD_MARK)
        else _INNER
        for token in tokens
    ]


def _position_table(sums: Tensor, of_positions: Tensor, counts: Tensor) -> Tensor:
    """The table of positions that, with the best one of words, is nearest to all embeddings.

    Args:
        sums: (E, D), of the embeddings of each entry.
        of_positions: (P, D), of the embeddings at each position.
        counts: (E, P), how often an entry stood at a position.

    Returns:
        (P, D). Of all that fit alike, for what one table adds the other can take, the shortest.
    """
    # The normal equations, from which the entries are eliminated: P of them are left.
    counts = counts.to("cpu", torch.float64)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    left = torch.diag(counts.sum(0)) - counts.T @ shares
    right = of_positions.to("cpu", torch.float64) - shares.T @ sums.to("cpu", torch.float64)
    return torch.linalg.pinv(left, hermitian=True) @ right
