"""What the fuzzers share: how a call may end, and edits of files."""

import json
import re
import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from t5slim import T5SlimError

SECONDS, GIB = 10, 2**30
Files = dict[str, bytes]


class Unacceptable(BaseException):
    """A call takes too much time or memory. Nothing catches it on its way out."""


def ends(counts: dict[str, int], call: Callable[[], Any]) -> None:
    """Count how a call ends: by a result, or an error of t5slim.

    Anything else raises, as do 10 seconds, and 1 GiB above the memory before.
    """

    def overtime(*_: Any) -> None:
        raise Unacceptable(f"more than {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, overtime)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    Path("/proc/self/clear_refs").write_text("5")  # so that the peak is that of the call
    before, end = _bytes("VmHWM"), "unacceptable"
    # The limit keeps the machine from harm, and is wide: threads, arenas and mapped files take
    # addresses without memory. What is judged is the peak.
    resource.setrlimit(resource.RLIMIT_AS, (_bytes("VmSize") + 8 * GIB, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again and again: a callback may swallow one
    try:
        try:
            call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        end = "result"
    except T5SlimError as error:
        end = type(error).__name__
    finally:
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        taken = _bytes("VmHWM") - before
        end = "unacceptable" if taken > GIB else end
        counts[end] = counts.get(end, 0) + 1
    if taken > GIB:
        raise Unacceptable(f"{taken / GIB:.1f} GiB")


def _bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024


class Edit(NamedTuple):
    """A change that fits any files: the file is the nth, the place a byte or a value of its JSON.

    They are counted from the start again behind the end.
    """

    what: str
    place: int = 0
    value: Any = None
    key: str = ""
    file: int = 0


_PIECES = [b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b'"', b"\xff" * 8]
_PIECES += [b"[" * 100_000, b'{"a":' * 20_000, b"x" * 200_000]
_SCALARS: list[Any] = [None, False, True, 0, -1, 1, 2**31, 2**63, 10**8, 10**400, 1e308, "", "{}"]
_SCALARS += [float("inf"), float("nan"), "\0", "\ud800", "..", "a" * 100_000, "1e3"]
_VALUES: Any = st.recursive(
    st.sampled_from(_SCALARS) | st.integers() | st.floats() | st.text(max_size=9),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x),
)
_NAMES = ["junk", "9", "99999999", "1-", ".t5slim-x", "\u0663", "config.json", "checkpoints/1"]
_NAMES += ["00000009-0123456789abcdef.safetensors", "teacher.json", "distillation.json"]


def edits(keys: str, values: Sequence[Any], one: bool) -> st.SearchStrategy[list[Edit]]:
    """One to three edits, of one file or several; keys and values mean something in its JSON."""
    pick, files = st.sampled_from, st.integers(0, 99)
    places = st.integers(0, 300) | st.integers(0, 10**6)
    pieces = st.binary(min_size=1, max_size=9) | pick(_PIECES)
    of_bytes = pick(["flip", "cut", "insert", "write", "repeat"])
    of_json, of_files = pick(["set", "delete", "add"]), pick(["remove", "move", "swap", "folder"])
    key, value = pick(keys.split()) | st.text(max_size=9), pick([*values, None]) | _VALUES
    edit = st.builds(Edit, of_bytes, places, pieces, st.just(""), files)
    edit |= st.builds(Edit, of_json, places, value, key, files)
    if not one:
        edit |= st.builds(Edit, of_files, st.just(0), st.none(), pick(_NAMES), files)
    return st.lists(edit, min_size=1, max_size=3)


def edited(files: Files, changes: Sequence[Edit], only: Sequence[str] = ()) -> Files:
    """Files with edits, of some `only`; of JSON, none is made where there is none."""
    files = dict(files)
    for what, place, value, key, file in changes:
        names = sorted(only or files) or [""]
        name, other = (names[i % len(names)] for i in (file, file + 1))
        content = files.pop(name, b"")
        at = place % (len(content) + 1)
        start, rest = content[:at], content[at:]
        match what:
            case "flip":
                files[name] = start + bytes(b ^ 1 << value[0] % 8 for b in rest[:1]) + rest[1:]
            case "cut":
                files[name] = start + rest[value[0] ** 2 :]
            case "insert" | "write":
                files[name] = start + value + rest[len(value) * (what == "write") :]
            case "repeat":
                files[name] = start + rest[:99] + rest
            case "swap":
                files |= {name: files.get(other, b""), other: content}
            case "move" | "folder":
                files[key if what == "move" else f"{name}/file"] = content
            case "set" | "delete" | "add":
                with suppress(ValueError, RecursionError, AttributeError, TypeError):
                    content = _edited_json(content, what, place, value, key)
                files[name] = content
    return files


def _edited_json(content: bytes, what: str, place: int, value: Any, key: str) -> bytes:
    end = 0
    if content[8:9] == b"{":  # the header of safetensors
        end = 8 + int.from_bytes(content[:8], "little")
    whole = {"": json.loads(content[8:end] if end else content)}
    places: list[tuple[Any, Any]] = [(whole, "")]
    for parent, at in places:  # which get more in the meantime
        if isinstance(inner := parent[at], (dict, list)):
            indices = inner if isinstance(inner, dict) else range(len(inner))
            places += [(inner, index) for index in indices]
    parent, at = places[place % len(places)]
    if what == "delete":
        del parent[at]
    elif what == "add" and isinstance(parent, list):
        parent.append(value)
    else:
        parent[at if what == "set" else key] = value
    text = json.dumps(whole.get("")).encode()
    return len(text).to_bytes(8, "little") + text + content[end:] if end else text


def written(folder: Path, files: Files) -> Path:
    """A folder that holds these files, as `files_of` gives them, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        with suppress(OSError):  # something else has that name
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder
