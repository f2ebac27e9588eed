"""Access to the Hugging Face Hub: files, errors that say what to do, and model cards."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import walk_tb
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, constants, errors, hf_hub_download
from torch import OutOfMemoryError, nn
from transformers import PreTrainedModel
from transformers.utils import extract_commit_hash

from .errors import CheckpointError, ConfigError, HubAccessError, T5SlimError

_ACCESS = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
# In this order, in an error and its causes: "not in the cache" may hide a 429.
_FAILURES = (errors.HFValidationError, errors.HTTPError, OSError)


@contextmanager
def hub_errors(what: str, *, loading: bool = False) -> Iterator[None]:
    """Turn every failure to read or write a folder or Hub id into a HubAccessError.

    Other errors pass. But while files are `loading` that are known to be complete, any other error
    means that one of them is damaged, and becomes a CheckpointError.
    """
    try:
        yield
    except (T5SlimError, MemoryError, OutOfMemoryError):
        raise
    except Exception as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        # The client stumbles over an answer that isn't a Hub's, with a KeyError or the like.
        stumbled = str(frame.f_globals.get("__name__")).startswith(("huggingface_hub.", "json."))
        chain: list[Any] = [error]
        while (last := chain[-1]) is not None:  # diffusers doesn't chain its OSErrors by `from`
            context = last.__context__ if isinstance(last, OSError) else None
            chain.append(last.__cause__ or context)
        for kind in (*_FAILURES, Exception) if stumbled else _FAILURES:
            if cause := next((one for one in chain if isinstance(one, kind)), None):
                where = f", neither as a folder on this machine nor at {constants.ENDPOINT}"
                cached = " Try force_download=True." * bool(extract_commit_hash(str(cause), None))
                raise HubAccessError(
                    f"Can't access {what!r}{'' if os.path.exists(what) else where}: "
                    f"{type(cause).__name__}: {cause}{cached}"
                ) from error
        if loading:
            raise CheckpointError(
                f"{what!r} can't be loaded: {error!r}. If it isn't whole, is a pickle or a Git "
                "LFS pointer, copy it again, or force_download=True; else check the arguments."
            ) from error
        raise


def local_path(name: str | os.PathLike[str]) -> str:
    """A folder or Hub id as a string, with `~` expanded."""
    return os.path.expanduser(os.fspath(name))


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Make a folder, if it isn't there; a ConfigError says why it can't be made."""
    try:
        path = Path(local_path(folder))
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError, ValueError) as error:  # ValueError: a NUL
        raise ConfigError(f"{folder!r} can't be made a folder: {error}") from error
    return path


def find_file(name: str, *filenames: str, subfolder: str = "", **access: Any) -> Path | None:
    """The local path of a file of a folder or Hub repository, downloaded where needed.

    Returns:
        That of the first that is there; None if the folder or repository has none of them.
    """
    with hub_errors(name):
        paths = [Path(subfolder, filename).as_posix() for filename in filenames]
        if os.path.exists(name):
            return next((file for path in paths if (file := Path(name, path)).is_file()), None)
        for path in paths:
            try:
                return Path(hf_hub_download(name, path, **access))
            except errors.RemoteEntryNotFoundError:
                continue
            except errors.LocalEntryNotFoundError:
                # Without the Hub, the cache alone tells whether there is one of the others.
                for other in paths:
                    with suppress(errors.LocalEntryNotFoundError):
                        cached = access | {"local_files_only": True}
                        return Path(hf_hub_download(name, other, **cached))
                raise
    return None


def find_json(name: str, filename: str, kwargs: dict[str, Any]) -> tuple[dict, dict]:
    """A JSON file that a checkpoint must have, and the arguments that find its other files.

    These are taken out of `kwargs`, and pinned to one commit: a branch may move between two
    downloads, and files of a known commit come out of the cache without another request.
    """
    access = {key: kwargs.pop(key, None) for key in _ACCESS}
    access = {key: value for key, value in access.items() if value is not None}
    if (file := find_file(name, filename, **access)) is None:
        where = os.path.join(name, access.get("subfolder", "")).rstrip("/")
        raise CheckpointError(f"{where!r} holds no {filename}: expected a folder or Hub id.")
    if commit := extract_commit_hash(str(file), None):
        access["revision"] = commit
    return {**read_json(file), "attn_implementation": None}, access  # it may name code on the Hub


def load_strictly(
    load: Callable[..., Any], name: str, access: dict, unused: tuple[str, ...] = (), **kwargs: Any
) -> tuple[Any, dict]:
    """Load a model, and refuse one whose files lack a tensor or hold another.

    `load` is the `from_pretrained` of its class, `access` is from `find_json`, and `unused` are
    prefixes of tensors that the file may hold without the model.

    Raises:
        CheckpointError: Tensors are missing, unexpected, of another shape or not finite; the file
            is truncated, or there are only pickled weights.
        HubAccessError: A file can't be read.
    """
    dot = f".{kwargs['variant']}" if kwargs.get("variant") else ""
    single, index = f"model{dot}.safetensors", f"model.safetensors.index{dot}.json"
    file = find_file(name, single, index, **access)
    # An adapter would change the weights, or have transformers load those of another repository.
    if file is None or Path(file.parent, "adapter_config.json").exists():
        raise CheckpointError(
            f"{name!r} holds no weights: expected {single}, and no adapter_config.json (merge "
            "it). Pickled weights can run code, and are never opened: use a file of safetensors."
        )
    kwargs |= {"use_safetensors": True, "output_loading_info": True, "local_files_only": True}
    with hub_errors(name, loading=True):
        files = [file]
        if file.name == index:
            metadata, weight_map = map(read_json(file).get, ("metadata", "weight_map"))
            shards = {*map(str, weight_map.values())} if isinstance(weight_map, dict) else set()
            beside = [re.fullmatch(r"[\w.-]+\.safetensors", shard) for shard in shards]
            if not all([shards, isinstance(metadata, dict), *beside]):
                raise ValueError(f'{file} needs "metadata", and a "weight_map" to *.safetensors')
            files = [path for shard in shards if (path := find_file(name, shard, **access))]
        size = sum(path.stat().st_size for path in files)
        config = kwargs["config"]
        projection = (config.d_model + config.project_out_dim) * config.project_out_dim
        if config.parameters - projection > 4 * size:  # in 4 bits, one has half a byte
            raise ValueError(f"{size:,} bytes can't hold what its config.json asks for")
        model, found = load(file.parent, ignore_mismatched_sizes=True, **kwargs)
    model.config.name_or_path = name
    wrong = {
        "missing": found["missing_keys"],
        "unexpected": [key for key in found["unexpected_keys"] if not key.startswith(unused)],
        "of another shape (in the file, in the config)": [*map(str, found["mismatched_keys"])],
    }
    if not any(wrong.values()):
        # Not of quantized weights. `isfinite` takes 40 times as long as `aminmax`, which keeps NaN.
        weights = [(k, w) for k, w in model.named_parameters() if type(w) is nn.Parameter]
        ends = {key: weight.aminmax() for key, weight in weights if not weight.is_meta}
        wrong["NaN or infinity in"] = [k for k in ends if not all(e.isfinite() for e in ends[k])]
    if any(wrong.values()):
        lines = [f"{name!r} doesn't hold the tensors that its config.json asks for:"]
        lines += [f"  {what}: {', '.join(sorted(keys))}" for what, keys in wrong.items() if keys]
        if prefix := re.match(r"((module|_orig_mod)\.)+", min(wrong["unexpected"], default="")):
            lines += [f"They begin with {prefix[0]!r}: save the model inside of that wrapper."]
        lines += ["Use another revision or force_download=True; or, of a plain T5, from_t5."]
        raise CheckpointError("\n".join(lines))
    return model, found


def check_weights(model: nn.Module) -> None:
    """Raise a CheckpointError for a model on the meta device."""
    if any(weight.is_meta for weight in model.parameters()):
        raise CheckpointError(
            f"this {type(model).__name__} has no weights (it is on the meta device): load it with "
            "from_pretrained; or, of an offloaded pipeline, call its remove_all_hooks() first."
        )


def check_no_lora(model: nn.Module) -> None:
    """Raise a CheckpointError for a student with a LoRA, for which its layout has no place."""
    check_weights(model)
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise CheckpointError(
            "the student has a LoRA in it, for which its layout has no place. Save the LoRA alone, "
            "with save_pretrained of its PeftModel, or what its merge_and_unload() returns."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; a ConfigError says what else it holds."""
    try:
        if not isinstance(values := json.loads(path.read_bytes()), dict):
            raise ValueError(f"expected an object, got a {type(values).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        advice = "Copy it again, or download it with force_download=True."
        raise ConfigError(f"{path} isn't valid JSON: {error}. {advice}") from error
    return values


@contextmanager
def atomic_save(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a folder whose files then replace those of `folder`: a full disk harms no old file."""
    path = make_folder(folder)
    with hub_errors(str(path)), tempfile.TemporaryDirectory(dir=path, prefix=".t5slim-") as saved:
        yield saved
        for name in sorted(os.listdir(saved), reverse=True):  # the weights, then config.json
            os.replace(Path(saved, name), path / name)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file, so that a reader finds the old content or the new."""
    with atomic_save(path.parent) as folder:
        Path(folder, path.name).write_bytes(content)


def model_card(
    student: PreTrainedModel, repo_id: str, notes: str = "", metadata: Mapping | None = None
) -> ModelCard:
    """The card of a student, by `model_card.md`, as `SlimT5Encoder.push_to_hub` describes it."""
    known = {"base_model": getattr(student.config, "base_model", None), "library_name": "t5slim"}
    known |= {"pipeline_tag": "text-to-image", "tags": ["t5slim", "t5", "diffusers"]}
    data = ModelCardData(**known | {"model_name": repo_id.split("/")[-1], **(metadata or {})})
    template = str(Path(__file__).with_name("model_card.md"))
    return ModelCard.from_template(data, template, student=student, repo_id=repo_id, notes=notes)
