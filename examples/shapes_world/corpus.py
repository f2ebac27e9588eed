"""Text for the miniature world's language model: English that lies on every machine, and captions.

Most of it is not about images: sentences of the documentation in Python's standard library and in
installed packages. The rest are captions of the world, half of them said a second time in other
words (`world.restate`).
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from . import world

PACKAGES = ("torch", "transformers", "diffusers", "numpy")
VOCABULARY_SIZE = 1536
SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]


def documentation_sentences(limit: int = 44_000) -> list[str]:
    """Clean lower-case sentences of 4 to 30 words out of docstrings, shuffled; the same for the
    same packages."""
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"the corpus is read from the documentation of {name}: pip install {name}"
            )
        folders.append(Path(spec.submodule_search_locations[0]))
    sentences: dict[str, None] = {}  # an ordered set
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if "site-packages" not in path.relative_to(folder).parts:
                sentences.update(dict.fromkeys(_sentences(path)))
    result = list(sentences)
    random.Random(0).shuffle(result)
    return result[:limit]


def _sentences(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences in other people's files
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # deliberately broken test files of the standard library
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = re.sub(r"\s+", " ", ast.get_docstring(node) or "")
            for sentence in re.split(r"(?<=[a-z])[.:;] ", text):
                sentence = sentence.strip(" .").lower()
                if re.fullmatch(r"[a-z][a-z,' -]+", sentence) and 4 <= len(sentence.split()) <= 30:
                    yield sentence


def caption_text(rng: random.Random) -> str:
    """A training caption, every second time followed by the same scene in other words, in either
    order."""
    scene = world.sample_scene(rng, rng.choice(world.CRITERIA))
    caption = world.describe(scene, rng)
    if rng.random() < 0.5:
        return caption
    other = (
        world.restate(scene, rng) if rng.random() < 0.6 else world.describe(scene, rng, chatter=0)
    )
    return ". ".join((caption, other) if rng.random() < 0.5 else (other, caption))


def train_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """A word-piece tokenizer with T5's special tokens; each capital letter is a token, so that
    words can be spelled."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Split(Regex("[A-Z]"), "isolated"),
        ]
    )
    rng = random.Random(0)
    captions = [caption_text(rng) for _ in range(len(sentences) // 2)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(sentences + captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=world.MAX_TOKENS,
    )
