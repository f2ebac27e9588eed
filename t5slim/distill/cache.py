"""The teacher's rows in a folder of safetensors shards, which many processes read and fill at once.

    teacher.json                     whose rows they are
    rows-<time>-<random>.safetensors shards: the rows (S, D) of some hundred prompts each
    prompts-<digest>.json            the keys of a list of prompts that was cached whole

In a shard, a prompt's rows are named "<key>.<SHA-256 of the rows>": its header is the index, and a
row that was damaged is known when it is read. Nothing is ever written to a file that has its final
name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import read_json
from ..errors import DistillError

logger = logging.getLogger(__name__)

# What a killed process loses at most: a shard's worth of encoding. 256 MB are 400 prompts of 77
# tokens and 4096 channels in bfloat16.
SHARD_BYTES = 256 << 20
SHARD_SECONDS = 60.0

TEACHER_FILE = "teacher.json"
# Facts that decide what the rows are. The others in teacher.json (its name, its revision) are there
# to be read: the same weights may lie under another path on another machine.
_DECISIVE = ("weights", "dtype", "width", "tokenizer")


class TeacherCache:
    """The rows of one teacher, in a folder.

    Args:
        folder: an existing cache; or, with `teacher`, a new or empty folder.
        teacher: facts of the teacher that the rows are, or are to be, from, as
            `describe_teacher(pipe)` finds them. None: any.

    Attributes:
        folder: where it is.
        teacher: what teacher.json says: `name_or_path`, `revision`, `dtype`, `width` and the
            SHA-256 of the `weights` (a sample of each tensor) and of the `tokenizer`'s vocabulary.

    Raises:
        DistillError: the folder holds no cache, or that of another teacher: the message says in
            what they differ.
    """

    def __init__(
        self, folder: str | os.PathLike[str], teacher: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = Path(folder)
        self._shards: set[str] = set()  # seen, also those that are damaged
        self._index: dict[str, tuple[str, str]] = {}  # key: shard, SHA-256 of the rows
        self._files: dict[str, Any] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_since = 0.0
        file = self.folder / TEACHER_FILE
        if not file.is_file():
            if not (teacher and teacher.get("weights")):
                raise DistillError(
                    f"{str(self.folder)!r} is no cache of a teacher's rows: it has no "
                    f"{TEACHER_FILE}. t5slim.distill.cache_teacher makes one, from a pipeline that "
                    "holds its T5."
                )
            self._create(file, teacher)
        self.teacher = read_json(file)
        if teacher is not None:
            self.check(teacher)
        self.refresh()

    def _create(self, file: Path, teacher: Mapping[str, Any]) -> None:
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        if file.name in names:  # another process was faster
            return
        if any(not name.startswith(".") for name in names):
            raise DistillError(
                f"{str(self.folder)!r} holds other files, and no {TEACHER_FILE}: it is no cache of "
                "a teacher's rows. Pass a new or empty folder."
            )
        text = json.dumps(dict(teacher), indent=2) + "\n"
        self._write(file.name, lambda path: path.write_text(text, encoding="utf-8"))

    def check(self, teacher: Mapping[str, Any]) -> None:
        """Refuse another teacher.

        Args:
            teacher: what is known of it; a fact that is missing, or None, isn't compared.

        Raises:
            DistillError: they differ; the message says in what.
        """
        differences = [
            f"{name}: {self.teacher.get(name)} in the cache, {teacher[name]} in the pipeline"
            for name in _DECISIVE
            if teacher.get(name) not in (None, self.teacher.get(name))
        ]
        if differences:
            raise DistillError(
                f"{str(self.folder)!r} caches the rows of another teacher "
                f"({self.teacher.get('name_or_path') or 'unnamed'}) than this pipeline's. "
                f"{'; '.join(differences)}. Pass another folder, or load the pipeline with that "
                "teacher."
            )

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        return key in self._index or key in self._pending

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all shards; divided by `len`, those of a prompt."""
        return sum(path.stat().st_size for path in self._shard_files())

    def rows(self, key: str) -> Tensor | None:
        """The rows of a prompt, (S, D) on the CPU, or None if they aren't here.

        A shard that turns out to be damaged is set aside, with a warning, and its prompts are as if
        they had never been cached.

        Args:
            key: the prompt's, of `prompt_keys`.
        """
        if key not in self._index:
            self.refresh()
        while key in self._index:
            shard, checksum = self._index[key]
            try:
                rows = self._opened(shard).get_tensor(f"{key}.{checksum}")
            except (OSError, SafetensorError) as error:
                self._set_aside(shard, error)
                continue
            if sha256_of(rows) == checksum:
                return rows
            self._set_aside(shard, f"its rows for {key} have another SHA-256 than was written")
        return None

    def add(self, key: str, rows: Tensor) -> None:
        """Cache the rows (S, D) of a prompt; they are on disk after the next `flush`."""
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending[key] = rows.detach().to("cpu", copy=True).contiguous()
        size = sum(tensor.nbytes for tensor in self._pending.values())
        if size >= SHARD_BYTES or time.monotonic() - self._pending_since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added, and learn what other processes wrote.

        Raises:
            DistillError: it can't be written, as on a full disk. What was written before is intact.
        """
        pending, self._pending = self._pending, {}
        if pending:
            # By time of writing: of two processes that encoded the same prompt, the first counts.
            name = f"rows-{time.time_ns()}-{secrets.token_hex(4)}.safetensors"
            tensors = {f"{key}.{sha256_of(rows)}": rows for key, rows in pending.items()}
            self._write(name, lambda path: save_file(tensors, path))
        self.refresh()

    def refresh(self) -> None:
        """Look for shards that other processes have written. Reads their headers only."""
        for path in self._shard_files():
            if path.name in self._shards:
                continue
            self._shards.add(path.name)
            try:
                with safe_open(path, "pt", backend="pread") as file:
                    entries = dict(name.split(".") for name in file.keys())  # noqa: SIM118
            except (OSError, SafetensorError, ValueError) as error:
                self._set_aside(path.name, error)
                continue
            for key, checksum in entries.items():
                self._index.setdefault(key, (path.name, checksum))

    def holds_all(self, prompts_digest: str) -> bool:
        """True if a list of prompts was recorded under this digest, and all of it is still here."""
        file = self.folder / f"prompts-{prompts_digest}.json"
        return file.is_file() and all(key in self._index for key in read_json(file)["keys"])

    def record(self, prompts_digest: str, keys: Iterable[str]) -> None:
        """Note the keys of a list of prompts that is here as a whole, for `holds_all`."""
        text = json.dumps({"keys": list(keys)})
        self._write(
            f"prompts-{prompts_digest}.json", lambda path: path.write_text(text, encoding="utf-8")
        )

    def _shard_files(self) -> list[Path]:
        return sorted(self.folder.glob("rows-*.safetensors"))

    def _opened(self, shard: str) -> Any:
        """A shard stays open: its header, which names all of its prompts, is read only once."""
        if shard not in self._files:
            self._files[shard] = safe_open(self.folder / shard, "pt", backend="pread")
        return self._files[shard]

    def _set_aside(self, shard: str, reason: object) -> None:
        self._files.pop(shard, None)
        lost = [key for key, (name, _) in self._index.items() if name == shard]
        for key in lost:
            del self._index[key]
        path = self.folder / shard
        with suppress(OSError):  # a folder that is only read; or another process was faster
            path.rename(path.with_suffix(".damaged"))
        logger.warning(
            "%s is damaged (%s) and won't be used; its prompts have to be encoded again.",
            path, reason,
        )  # fmt: skip

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        temporary = self.folder / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise DistillError(
                f"Can't write {name} to {str(self.folder)!r}: {error}. What was cached before is "
                "intact, and the same call goes on from there."
            ) from error


def sha256_of(tensor: Tensor) -> str:
    """SHA-256 of the values of a tensor on the CPU, of any dtype, in hex."""
    content = tensor.contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()
