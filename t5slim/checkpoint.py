"""Find the files of a checkpoint, in a folder or on the Hub, and check them before their use."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, file_exists, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from .errors import CheckpointError, ConfigError, HubAccessError

# A T5 encoder knows its one embedding by two names; a file may hold either of them, or both.
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")


@dataclass(frozen=True)
class Source:
    """A checkpoint in a local folder or a Hub repository, and how to reach it."""

    name: str
    subfolder: str = ""
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    force_download: bool = False
    local_files_only: bool = False

    @property
    def is_local(self) -> bool:
        """True for a folder on this machine."""
        return os.path.isdir(self.name)

    def find(self, filename: str) -> Path | None:
        """The local path of a file, downloaded where needed; None if there is no such file.

        Raises:
            HubAccessError: The repository doesn't exist or is gated, or it can't be reached and the
                file isn't in the cache.
        """
        if self.is_local:
            path = Path(self.name, self.subfolder, filename)
            return path if path.is_file() else None
        with self._hub_errors(filename):
            try:
                downloaded = hf_hub_download(
                    self.name,
                    filename,
                    subfolder=self.subfolder or None,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=None if self.cache_dir is None else os.fspath(self.cache_dir),
                    force_download=self.force_download,
                    local_files_only=self.local_files_only,
                )
            except LocalEntryNotFoundError:  # also an EntryNotFoundError, but one of the network
                raise
            except EntryNotFoundError:
                return None
        return Path(downloaded)

    def read_config(self) -> tuple[Path, dict[str, Any]]:
        """The path of config.json, and what it holds.

        Raises:
            CheckpointError: There is none.
            ConfigError: It isn't a JSON object.
            HubAccessError: See `find`.
        """
        if (file := self.find("config.json")) is None:
            raise CheckpointError(f"{self} holds no config.json: it isn't a student.")
        return file, read_json(file)

    def find_weights(self, variant: str | None = None) -> list[Path]:
        """The safetensors file, or its shards.

        Raises:
            CheckpointError: There are none. Pickled weights are never opened.
            HubAccessError: See `find`.
        """
        weights_name, index_name, _ = weight_patterns(variant)
        if (file := self.find(weights_name)) is not None:
            return [file]
        if (index := self.find(index_name)) is not None:
            shards = {name: self.find(name) for name in read_json(index)["weight_map"].values()}
            if missing := sorted(name for name, file in shards.items() if file is None):
                raise CheckpointError(f"{self} lacks the shards {', '.join(missing)}.")
            return [file for file in shards.values() if file is not None]
        if self._has_pickle():
            raise CheckpointError(
                f"{self} holds only pickled weights (pytorch_model.bin), which can run any code as "
                "they are opened: t5slim reads safetensors only. Look for a revision that has "
                f"{weights_name}; or, on a machine where such code can do no harm, load the "
                "weights with transformers and save them with `save_pretrained`."
            )
        raise CheckpointError(f"{self} holds no weights: expected {weights_name}.")

    def pinned_by(self, file: Path) -> Source:
        """This source at the commit that `file` was downloaded from.

        A branch may move between two downloads; and files of a known commit come out of the cache
        without asking the Hub again.
        """
        if self.is_local:
            return self
        snapshots = next(parent for parent in file.parents if parent.name == "snapshots")
        return replace(self, revision=file.relative_to(snapshots).parts[0])

    def _has_pickle(self) -> bool:
        names = ("pytorch_model.bin", "pytorch_model.bin.index.json")
        if self.is_local:
            return any(self.find(name) for name in names)
        if self.local_files_only:
            return False
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        with self._hub_errors(names[0]):  # asks, but doesn't download
            return any(
                file_exists(self.name, prefix + name, revision=self.revision, token=self.token)
                for name in names
            )

    @contextmanager
    def _hub_errors(self, filename: str) -> Iterator[None]:
        page = f"{constants.ENDPOINT}/{self.name}"
        login = "log in with `hf auth login`, or pass `token=`"
        try:
            yield
        except HFValidationError as error:
            reason = "is neither a folder on this machine nor a Hub id ('owner/name')."
            raise HubAccessError(f"{self.name!r} {reason}") from error
        except GatedRepoError as error:
            reason = f"is gated: ask for access at {page}, then {login}."
            raise HubAccessError(f"{self.name!r} {reason}") from error
        except RepositoryNotFoundError as error:
            reason = f"is neither a folder on this machine nor found at {page}. Check the spelling;"
            raise HubAccessError(f"{self.name!r} {reason} if it is private, {login}.") from error
        except RevisionNotFoundError as error:
            reason = f"has no revision {self.revision!r}: see {page} for its branches and tags."
            raise HubAccessError(f"{self.name!r} {reason}") from error
        except LocalEntryNotFoundError as error:
            if self.local_files_only or constants.HF_HUB_OFFLINE:
                reason = "offline mode (`local_files_only` or HF_HUB_OFFLINE) forbids a download"
            else:
                reason = f"{page} can't be reached"
            raise HubAccessError(
                f"{filename} of {self.name!r} isn't in the cache, and {reason}. Run `hf download "
                f"{self.name}` where there is a network, or pass the path of a folder."
            ) from error
        # RuntimeError: before 1.27, huggingface_hub tries again with a client that it has closed.
        except (OSError, ValueError, RuntimeError) as error:
            raise HubAccessError(f"Can't download {filename} from {page}: {error}") from error

    def __str__(self) -> str:
        return repr(os.path.join(self.name, self.subfolder) if self.subfolder else self.name)


def weight_patterns(variant: str | None) -> tuple[str, str, str]:
    """How transformers names weights: one file, the index of several, and these."""
    dot_variant = f".{variant}" if variant else ""
    return (
        f"model{dot_variant}.safetensors",
        f"model.safetensors.index{dot_variant}.json",
        f"model{dot_variant}-?????-of-?????.safetensors",
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; a ConfigError says what else it holds."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} isn't valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got a {type(values).__name__}.")
    return values


def check_tensors(
    files: Sequence[Path],
    expected: Mapping[str, torch.Size],
    *,
    ignore: tuple[str, ...] = (),
    hint: str = "",
) -> None:
    """Compare the tensors that safetensors files declare with the ones that a model expects.

    Reads only the headers, so that a checkpoint of the wrong kind is refused before anything is
    allocated.

    Args:
        files: One file, or all shards.
        expected: Name to shape, as in a model's `state_dict`.
        ignore: Prefixes of names that may be there and aren't used.
        hint: What to do next, for a file with missing tensors.

    Raises:
        CheckpointError: A file is broken, or tensors are missing, unexpected or of another shape.
    """
    found: dict[str, list[int]] = {}
    aliases = {name for name in expected if name.endswith(_EMBEDDINGS)}
    embeddings = []
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                names = set(tensors.keys())
                found |= {name: tensors.get_slice(name).get_shape() for name in names}
                embeddings += [tensors.get_tensor(name) for name in names & aliases]
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} isn't a whole safetensors file ({error}). It is truncated, or something "
                "else under this name (a pickle, a Git LFS pointer): copy or download it again."
            ) from error
    missing = expected.keys() - found.keys() - (aliases if embeddings else set())
    unexpected = {name for name in found.keys() - expected.keys() if not name.startswith(ignore)}
    shapes = {
        f"{name} is {tuple(found[name])} and not {tuple(expected[name])}"
        for name in found.keys() & expected.keys()
        if found[name] != list(expected[name])
    }
    if missing or unexpected or shapes:
        parts = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        lines = [f"{kind}: {', '.join(sorted(names))}" for kind, names in parts.items() if names]
        where = files[0] if len(files) == 1 else files[0].parent
        raise CheckpointError(
            "\n  ".join(
                [f"{where} doesn't hold the tensors that its config.json asks for:", *lines]
            )
            + (f"\n{hint}" if missing and hint else "")
        )
    # To load them would leave two tensors where a T5 has one, and save_pretrained would lose one.
    if len(embeddings) == 2 and not torch.equal(*embeddings):
        raise CheckpointError(
            f"{files[0]} holds {' and '.join(sorted(aliases))} with different values: a T5 encoder "
            "has one embedding. Remove the wrong one from the file."
        )


def check_no_lora(model: nn.Module) -> None:
    """Raise a CheckpointError for a student with a LoRA, for which its layout has no place."""
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise CheckpointError(
            "the student has a LoRA in it, for which the layout of students has no place. Save the "
            "LoRA alone, with save_pretrained of its PeftModel; or the student that "
            "merge_and_unload() of the PeftModel returns."
        )


def check_finite(model: nn.Module, source: Source) -> None:
    """Raise a CheckpointError that names the parameters which hold NaN or infinity."""
    broken = []
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta:
            # A quantized weight says that it is a float, and can't say whether it is finite.
            plain = weight if type(weight) is nn.Parameter else weight.dequantize()
            if not plain.isfinite().all():
                broken.append(name)
    if broken:
        raise CheckpointError(
            f"{source} has NaN or infinity in {', '.join(sorted(broken))}. The file is damaged, or "
            "its training diverged: use another revision. (float16 overflows above 65504: for "
            "weights that were saved in a wider type, try bfloat16.)"
        )


def expected_tensors(model_class: type[nn.Module], config: Any) -> dict[str, torch.Size]:
    """Name and shape of each tensor of a model, which is built without memory for its weights."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}


@contextmanager
def written_into(folder: str | os.PathLike[str], variant: str | None) -> Iterator[str]:
    """Yields a temporary folder; what was saved there is moved to `folder`, each file in one step,
    so that a full disk or a crash leaves an earlier save whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".t5slim-") as saved:
        with no_progress_bars():
            yield saved
        names = sorted(os.listdir(saved), reverse=True)  # model.safetensors, and then config.json
        for name in names:
            os.replace(Path(saved, name), folder / name)
    # Weights that an earlier save spread over another number of files would be read instead.
    patterns = weight_patterns(variant)
    if any(fnmatch(name, pattern) for name in names for pattern in patterns):
        for stale in {path for pattern in patterns for path in folder.glob(pattern)}:
            if stale.name not in names:
                stale.unlink()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence transformers' bars, which would announce a student's fraction of a second."""
    previous = transformers_logging.set_tqdm_hook(
        lambda _factory, args, kwargs: tqdm(*args, **kwargs | {"disable": True})
    )
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)
