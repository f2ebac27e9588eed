"""Access to the Hugging Face Hub: files, errors that say what to do, and model cards."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData, constants, errors, hf_hub_download
from safetensors import SafetensorError
from torch import nn
from transformers.utils import extract_commit_hash
from transformers.utils import logging as transformers_logging

from .errors import CheckpointError, ConfigError, HubAccessError, T5SlimError

if TYPE_CHECKING:
    from .encoder import SlimT5Encoder

# Arguments that say where files are.
_ACCESS = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
_TAGS = ["t5slim", "t5", "text-to-image", "diffusers"]
# The facts stand between two comments: they can be replaced, and the words around them stay.
_FACTS = re.compile(r"<!-- t5slim: facts.*?<!-- t5slim: end of facts -->", re.DOTALL)

_LOGIN = "log in with `hf auth login`, or pass `token=`"
_NOT_CACHED = (
    "{what!r} isn't in the cache, or not all of it, and {page} cannot be reached, or offline mode "
    "(`local_files_only`, HF_HUB_OFFLINE) forbids a download. Run `hf download {what}` where there "
    "is a network, or pass the path of a folder."
)
_NO_FOLDER = "{what!r} is neither a folder on this machine nor "
_REFUSED = "The Hub refuses access to {what!r}: " + _LOGIN + " that permits it. {error}"
_OTHER = "Can't access {what!r}: {error}"
# By class or by status. The first that fits holds: "not in the cache" may hide a 429 or 503.
_ADVICE: dict[object, str] = {
    errors.HFValidationError: _NO_FOLDER + "a Hub id ('owner/name').",
    errors.GatedRepoError: "{what!r} is gated: ask for access at {page}, then " + _LOGIN + ".",
    errors.RepositoryNotFoundError: _NO_FOLDER + "found at {page}; if it is private, " + _LOGIN,
    errors.RevisionNotFoundError: "{what!r} has no such revision: see {page} for those it has.",
    401: _REFUSED,
    403: _REFUSED,
    429: "The Hub refuses {what!r} for now, after too many requests: wait, or " + _LOGIN + ".",
    500: "The Hub can't serve {what!r} now: try again later. {error}",
    errors.LocalEntryNotFoundError: _NOT_CACHED,
    errors.OfflineModeIsEnabled: _NOT_CACHED,
    errors.HTTPError: _OTHER,
    OSError: _OTHER,
}


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn every failure to read or write `what` into a HubAccessError; other errors pass."""
    try:
        yield
    except T5SlimError:
        raise
    except Exception as error:
        causes = list(_chain(error))
        responses = [cause.response for cause in causes if isinstance(cause, errors.HfHubHTTPError)]
        kinds: set[object] = {min(response.status_code, 500) for response in responses}
        kinds |= {kind for cause in causes for kind in type(cause).__mro__}
        if "client has been closed" in str(error):  # of huggingface_hub itself, before 1.27
            kinds.add(OSError)
        advice = next((text for kind, text in _ADVICE.items() if kind in kinds), None)
        if advice is None:
            raise
        page = f"{constants.ENDPOINT}/{what}"
        raise HubAccessError(advice.format(what=what, page=page, error=error)) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it; diffusers doesn't chain its OSErrors by `from`."""
    while error is not None:
        yield error
        error = error.__cause__ or (error.__context__ if isinstance(error, OSError) else None)


def find_file(name: str, filename: str, *, subfolder: str = "", **access: Any) -> Path | None:
    """The local path of a file of a folder or Hub repository, downloaded where needed, or None."""
    if os.path.isdir(name):
        path = Path(name, subfolder, filename)
        return path if path.is_file() else None
    with hub_errors(name):
        try:
            return Path(hf_hub_download(name, filename, subfolder=subfolder or None, **access))
        except errors.LocalEntryNotFoundError:  # an EntryNotFoundError, too, but the network's
            raise
        except errors.EntryNotFoundError:
            return None


def find_json(name: str, filename: str, kwargs: dict[str, Any]) -> tuple[dict, dict]:
    """A JSON file that a checkpoint must have, and the arguments that find its other files.

    These are taken out of `kwargs`, and pinned to one commit: a branch may move between two
    downloads, and files of a known commit come out of the cache without another request.
    """
    access = {key: kwargs.pop(key) for key in _ACCESS if key in kwargs}
    if (file := find_file(name, filename, **access)) is None:
        where = os.path.join(name, access.get("subfolder", "")).rstrip("/")
        raise CheckpointError(f"{where!r} holds no {filename}: it is no student and no pipeline.")
    if commit := extract_commit_hash(str(file), None):
        access["revision"] = commit
    return read_json(file), access


def _find_weights(name: str, variant: str | None, **access: Any) -> list[Path]:
    """The local paths of the weights of a checkpoint; refuse one that lacks some or has none."""
    dot = f".{variant}" if variant else ""
    names = [f"model{dot}.safetensors"]
    if find_file(name, names[0], **access) is None:
        index = find_file(name, f"model.safetensors.index{dot}.json", **access)
        if index is None:
            raise CheckpointError(
                f"{name!r} holds no weights: expected {names[0]}. Pickled weights "
                "(pytorch_model.bin) are never opened, since they can run any code: look for a "
                "revision with safetensors, or convert them where such code can do no harm."
            )
        names = sorted(set(read_json(index)["weight_map"].values()))
    found = {shard: find_file(name, shard, **access) for shard in names}
    if missing := [shard for shard, path in found.items() if path is None]:
        raise CheckpointError(f"{name!r} lacks the shards {', '.join(missing)}.")
    return [path for path in found.values() if path is not None]


def load_strictly(
    load: Callable[..., Any],
    name: str,
    access: dict[str, Any],
    unused: tuple[str, ...] = (),
    **kwargs: Any,
) -> Any:
    """Load by a class's `from_pretrained`; each tensor must be as expected, or `unused`."""
    weights = _find_weights(name, kwargs.get("variant"), **access)
    size, parameters = sum(file.stat().st_size for file in weights), kwargs["config"].parameters
    kwargs |= {"use_safetensors": True, "output_loading_info": True}
    try:
        # transformers allocates what is missing: not gigabytes for a broken file of a kilobyte.
        if parameters > max(4 * size, 10**8):
            raise SafetensorError(f"{size:,} bytes for {parameters:,} parameters")
        with _no_progress_bars():
            # Everything is local by now: no second request.
            model, found = load(weights[0].parent, ignore_mismatched_sizes=True, **kwargs)
    except SafetensorError as error:
        raise CheckpointError(
            f"{name!r}: the weights aren't a whole safetensors file ({error}), but truncated, a "
            "pickle, a Git LFS pointer, or another model's: copy or download them again."
        ) from error
    wrong = {
        "missing": found["missing_keys"],
        "unexpected": [key for key in found["unexpected_keys"] if not key.startswith(unused)],
        "of another shape": [
            f"{key} is {(*got,)} and not {(*expected,)}"
            for key, got, expected in found["mismatched_keys"]
        ],
    }
    if not any(wrong.values()):
        # A quantized weight says that it is a float, and can't say whether it is finite.
        wrong["NaN or infinity in"] = [
            key
            for key, weight in model.named_parameters()
            if type(weight) is nn.Parameter and not weight.is_meta and not weight.isfinite().all()
        ]
        # A T5 knows its one embedding by two names. transformers leaves them apart if they differ,
        # and save_pretrained would lose one.
        encoder = model if hasattr(model, "shared") else model.encoder
        one, other = encoder.shared.weight, encoder.encoder.embed_tokens.weight
        if one is not other and not one.is_meta and not torch.equal(one, other):
            wrong["of different values, though one"] = ["shared.weight", "embed_tokens.weight"]
    if any(wrong.values()):
        lines = [f"{name!r} doesn't hold the tensors that its config.json asks for:"]
        lines += [f"  {what}: {', '.join(sorted(keys))}" for what, keys in wrong.items() if keys]
        lines += ["Use another revision; or, of a plain T5, make a student by from_t5."]
        raise CheckpointError("\n".join(lines))
    return model


@contextmanager
def atomic_save(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a folder whose files then replace those of `folder`: a full disk harms no old file."""
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".t5slim-") as saved:
        with _no_progress_bars():
            yield saved
        for name in sorted(os.listdir(saved), reverse=True):  # the weights, then config.json
            os.replace(Path(saved, name), Path(folder, name))


def check_no_lora(model: nn.Module) -> None:
    """Raise a CheckpointError for a student with a LoRA, for which its layout has no place."""
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise CheckpointError(
            "the student has a LoRA in it, for which its layout has no place. Save the LoRA alone, "
            "with save_pretrained of its PeftModel, or what its merge_and_unload() returns."
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' bars, which would announce a student's fraction of a second."""
    previous = transformers_logging.set_tqdm_hook(
        lambda bar, args, kwargs: bar(*args, **kwargs | {"disable": True})
    )
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; a ConfigError says what else it holds."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} isn't valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got a {type(values).__name__}.")
    return values


def write_atomic(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: a reader finds the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def update_model_card(
    card: ModelCard | None,
    student: SlimT5Encoder,
    repo_id: str,
    notes: str = "",
    tags: Sequence[str] = (),
) -> ModelCard:
    """A card with its facts replaced and tags added, and else as it was; a new one for None."""
    total, projection = (
        sum(weight.numel() for weight in part.parameters()) / 1e6  # counts the tied embedding once
        for part in (student, student.final_projection)
    )
    base = getattr(student.config, "base_model", None)
    new = ModelCard.from_template(
        ModelCardData(library_name="t5slim", base_model=base, tags=_TAGS),
        template_path=str(Path(__file__).with_name("model_card.md")),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        notes=notes,
        base_model=base,
        config=student.config,
        millions={"encoder": total - projection, "projection": projection, "total": total},
        gib=student.get_memory_footprint() / 2**30,
        dtype=str(student.dtype).removeprefix("torch."),
        t5slim=sys.modules["t5slim"].__version__,  # not imported: it imports this module
        transformers=transformers.__version__,
        torch=torch.__version__,
    )
    if card is None:
        card = new
    elif facts := _FACTS.search(new.text):
        card.text = _FACTS.sub(lambda _: facts[0], card.text)
    data: Any = card.data
    data.tags = list(dict.fromkeys([*(data.tags or []), *_TAGS, *tags]))
    data.library_name = data.library_name or "t5slim"
    return card
