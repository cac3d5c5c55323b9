"""Checkpoint files as training codes write them: the named tensors in one, found without running or importing anything of it.

A file of torch.save is a pickle, which can run any code, so nothing is unpickled here. Its opcodes are read instead:
containers, texts and numbers become themselves, a tensor becomes a description of where its bytes lie, and any other object
(an `argparse.Namespace`, a module, a trap) becomes a stand-in that knows only its name. So checkpoints with such objects beside
their weights can be read, no tensor is loaded before it is used, and names and shapes of gigabytes are known at once.
"""

from __future__ import annotations

import io
import itertools
import json
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ktray.errors import UserError
from ktray.file_kind import require_readable, what_it_is

WHERE = "teacher.checkpoint"
INSTEAD = "Give a .safetensors file, a state_dict saved by torch.save, an exported student's folder, or an artifact's key."
_AGAIN = "Download or copy it again."

_MAX_OPCODES = 3_000_000  # two or three seconds; a checkpoint with the state of its optimiser has up to 100,000
_MAX_PICKLE = 64 << 20  # bytes
_MAX_HEADER = 16 << 20  # bytes of the header of a .safetensors
_MAX_DEPTH, _MAX_MAPPINGS = 8, 10_000
_NAMES_SHOWN, _SHOWN = 3, 100


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `read` returns it, on the CPU; a `dtype` that is a text, such as ``sparse``, cannot be read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class CheckpointFile:
    """What a checkpoint file contains.

    Attributes:
        state_dicts: (key, name -> tensor) of each mapping in the file that holds named tensors. The key is the path to it
            through nested mappings, such as ``state_dict`` or ``model_ema.module``; empty for the outermost one.
        objects: classes of the objects in it that are neither tensors nor plain data, such as ``argparse.Namespace``.
        lists: keys of the lists that hold tensors without names, such as ``ema.shadow_params``.
    """

    state_dicts: tuple[tuple[str, Mapping[str, StoredTensor]], ...]
    objects: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()


def open_checkpoint(path: Path) -> CheckpointFile:
    """The named tensors of a file: safetensors, or as torch.save writes them now or did before torch 1.6.

    Raises:
        UserError: it cannot be read, is cut off or damaged, or is something else, such as a web page or a program.
    """
    require_readable(path, WHERE)
    with open(path, "rb") as file:
        head = file.read(9)
    try:
        if head[6:] == b"\0\0{":  # the length of the header, then the header in JSON
            return _from_safetensors(path)
        if head.startswith(b"PK\x03\x04"):
            return _from_zip(path)
        if head.startswith(b"\x80"):
            return _from_pickles(path)
    except _Damaged as error:
        raise UserError(f"{path.name} {error.found}", WHERE, error.instead) from error
    if head.lstrip()[:1] == b"{" and (files := _files_of_index(path)):
        problem = f"{path.name} is the index of a checkpoint in {files} files, and ktray reads one file"
        raise UserError(problem, WHERE, "Save all tensors of the model in one .safetensors file.")
    found, instead = what_it_is(path)
    raise UserError(f"{path.name} {found or 'is neither a safetensors file nor one of torch.save'}", WHERE, instead or INSTEAD)


def _files_of_index(path: Path) -> int:
    """How many files an index of Hugging Face names, a JSON file with a ``weight_map``; 0 if it is none."""
    try:
        with open(path, "rb") as file:
            named = json.loads(file.read(_MAX_HEADER))["weight_map"]
        return len(set(named.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0


class _Damaged(Exception):
    """What is wrong with a file, as the end of a sentence, and what to do instead."""

    def __init__(self, found: str, instead: str = _AGAIN) -> None:
        self.found, self.instead = found, instead
        super().__init__(found)


def _cut_off(size: int, needed: int) -> _Damaged:
    return _Damaged(f"is cut off: it has {size:,} bytes, and its header needs {needed:,}")


# --- safetensors


def _from_safetensors(path: Path) -> CheckpointFile:
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        if header > _MAX_HEADER:
            raise _Damaged(f"claims a header of {header:,} bytes, which no checkpoint has")
        if 8 + header > size:
            raise _cut_off(size, 8 + header)
        needed = 8 + header + _end_of_data(file.read(header))
    if size != needed:
        raise _cut_off(size, needed) if size < needed else _Damaged(f"has {size - needed:,} bytes more than its header says")
    try:
        file_of_tensors: Any = safe_open(path, framework="pt")
        parts = {name: file_of_tensors.get_slice(name) for name in file_of_tensors.keys()}  # noqa: SIM118
        tensors = {
            name: StoredTensor(
                tuple(part.get_shape()),
                _SAFETENSORS.get(part.get_dtype(), part.get_dtype()),
                partial(file_of_tensors.get_tensor, name),
            )
            for name, part in parts.items()
        }
    except (SafetensorError, OSError) as error:
        raise _Damaged(f"is a damaged safetensors file ({_first_line(error)})") from error
    return CheckpointFile((("", tensors),))


def _end_of_data(header: bytes) -> int:
    """Bytes behind the header of a .safetensors, as it says."""
    try:
        entries = json.loads(header)
        ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged("is a damaged safetensors file (its header cannot be read)") from error
    return max(ends, default=0)


_SAFETENSORS = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}


def _first_line(error: Exception) -> str:
    return shown((str(error) or type(error).__name__).splitlines()[0])


def shown(text: str) -> str:
    """A text from a file for a message: quoted if it has characters that cannot be printed, and cut if it is long."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


# --- the opcodes of a pickle


class _Global(NamedTuple):
    """A class or function that a pickle names; never imported."""

    module: str
    name: str


@dataclass(eq=False)
class _Object:
    """A stand-in for an object; `items` are those of an object that is a mapping."""

    items: dict[Any, Any] = field(default_factory=dict)


class _Storage(NamedTuple):
    """Memory that tensors share: `numel` elements in the part `key` of the file, of which a view begins at `start`."""

    key: str
    dtype: torch.dtype | str
    numel: Any
    start: Any = 0


class _View(NamedTuple):
    """A tensor as its pickle describes it. The numbers are whatever the file says."""

    storage: _Storage
    dtype: torch.dtype | str
    offset: Any
    shape: Any
    stride: Any
    is_negated: bool = False  # the numbers in memory are those of the tensor with the other sign


_STORAGES: Mapping[str, torch.dtype] = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
    "Untyped": torch.uint8,
}


class _Interpreter:
    """Follows the opcodes of one pickle; see the module's docstring for what they become."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.objects: dict[str, None] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self, opcodes: Iterable[tuple[Any, Any, Any]]) -> Any:
        """The object that the pickle stands for."""
        try:
            for opcode, argument, _ in itertools.islice(opcodes, _MAX_OPCODES):
                name = opcode.name
                if name == "STOP":
                    return self.stack.pop()
                if name in _PLAIN:
                    self.stack.append(argument)
                elif name in _CONSTANTS:
                    self.stack.append(_CONSTANTS[name]())
                elif name not in ("PROTO", "FRAME"):
                    _STEPS[name](self, argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise _Damaged(f"is damaged or cut off: its list of tensors cannot be read ({_first_line(error)})") from error
        raise _Damaged(f"has more than {_MAX_OPCODES:,} entries, which no checkpoint has", INSTEAD)

    def since_mark(self) -> list[Any]:
        """Take what was pushed since the last mark."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def take(self, count: int) -> list[Any]:
        """Take the last `count` values."""
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def add_items(self, flat: Sequence[Any]) -> None:
        """Add keys and values, in turn, to the mapping on top of the stack."""
        target = self.stack[-1]
        items = target.items if isinstance(target, _Object) else target
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if isinstance(key, str | int) and isinstance(items, dict):
                items[key] = value

    def extend(self, values: list[Any]) -> None:
        """Add values to the list on top of the stack."""
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def call(self, function: Any, arguments: Any) -> Any:
        """What a call in the pickle would return; nothing is called."""
        name = ".".join(function) if isinstance(function, _Global) else ""
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            storage, offset, shape, stride = arguments[:4]
            return _View(storage, storage.dtype, offset, shape, stride, _is_negated(arguments[6:]))
        if name == "torch._utils._rebuild_tensor_v3":
            storage, offset, shape, stride = arguments[:4]
            return _View(storage, _dtype(arguments[6]), offset, shape, stride, _is_negated(arguments[7:]))
        if name in _UNREADABLE:
            return _View(_Storage("", _UNREADABLE[name], 0), _UNREADABLE[name], 0, (), ())
        if name in _THEIR_FIRST_ARGUMENT:
            return arguments[0]
        if name == "torch._tensor._rebuild_from_type_v2":
            return self.call(arguments[0], arguments[2])
        if name in _MAPPINGS:
            pairs = arguments[-1] if arguments and isinstance(arguments[-1], dict | list) else ()
            return {key: value for key, value in dict(pairs).items() if isinstance(key, str | int)}
        if function not in _PLAIN_CLASSES and isinstance(function, _Global):
            self.objects[name] = None
        return _Object()

    def refer(self, identity: Any) -> Any:
        """The storage with this persistent identity."""
        if not (isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage"):
            return _Object()
        _, kind, key, _, numel = identity[:5]
        view = identity[5] if len(identity) > 5 else None
        name = kind.name.removesuffix("Storage")
        found = _Storage(str(key), _STORAGES.get(name, name), numel, view[1] if view else 0)
        self.storages[found.key] = found
        return found


def _is_negated(metadata: Sequence[Any]) -> bool:
    """Whether torch wrote a tensor as a view that negates, as the imaginary part of a conjugate is."""
    return bool(metadata) and isinstance(metadata[0], dict) and metadata[0].get("neg") is True


def _dtype(named: Any) -> torch.dtype | str:
    """The torch type that a pickle names."""
    if isinstance(named, _Global) and named.module == "torch":
        found = getattr(torch, named.name, None)
        return found if isinstance(found, torch.dtype) else named.name
    return "unknown"


_UNREADABLE = {  # tensors of other layouts, by how they are rebuilt
    **{f"torch._utils._rebuild_{kind}": "quantised" for kind in ("qtensor", "wrapper_subclass")},
    **{f"torch._utils._rebuild_{kind}": "sparse" for kind in ("sparse_tensor", "sparse_csr_tensor", "nested_tensor")},
    "torch._utils._rebuild_meta_tensor_no_storage": "meta, which has no values",
    **{f"numpy.{core}.multiarray._reconstruct": "array of NumPy" for core in ("core", "_core")},
}
_THEIR_FIRST_ARGUMENT = {
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state", "torch.nn.parameter.Parameter"),
    *("torch.Size", "builtins.tuple", "builtins.list", "__builtin__.tuple", "__builtin__.list"),
}
_MAPPINGS = {
    *("collections.OrderedDict", "collections.defaultdict", "collections.Counter"),
    *("builtins.dict", "__builtin__.dict"),
}
_PLAIN_CLASSES = {
    *(_Global("torch", "device"), _Global("_codecs", "encode"), _Global("builtins", "set"), _Global("__builtin__", "set")),
    *(_Global("numpy", "dtype"), _Global("numpy.core.multiarray", "scalar"), _Global("numpy._core.multiarray", "scalar")),
}
_PLAIN = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "NEXT_BUFFER": _Object},
    **{"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": list},
    **{name: _Object for name in ("EXT1", "EXT2", "EXT4", "PERSID")},
}


def _reduce(it: _Interpreter, argument: Any) -> None:
    function, arguments = it.take(2)
    it.stack.append(it.call(function, arguments))


def _reduce_with_keywords(it: _Interpreter, argument: Any) -> None:
    function, arguments, _ = it.take(3)
    it.stack.append(it.call(function, arguments))


def _instance(it: _Interpreter, argument: str) -> None:
    it.stack.append(it.call(_Global(*argument.split(" ", 1)), it.since_mark()))


def _object(it: _Interpreter, argument: Any) -> None:
    function, *arguments = it.since_mark()
    it.stack.append(it.call(function, arguments))


def _put(it: _Interpreter, argument: Any) -> None:
    it.memo[len(it.memo) if argument is None else int(argument)] = it.stack[-1]


def _as_mapping(it: _Interpreter, argument: Any) -> None:
    flat = it.since_mark()
    it.stack.append({})
    it.add_items(flat)


_STEPS: Mapping[str, Callable[[_Interpreter, Any], Any]] = {
    "MARK": lambda it, _: it.marks.append(len(it.stack)),
    "POP": lambda it, _: it.take(1),
    "POP_MARK": lambda it, _: it.since_mark(),
    "DUP": lambda it, _: it.stack.append(it.stack[-1]),
    "LIST": lambda it, _: it.stack.append(it.since_mark()),
    "FROZENSET": lambda it, _: it.stack.append(it.since_mark()),
    "TUPLE": lambda it, _: it.stack.append(tuple(it.since_mark())),
    **{f"TUPLE{n}": lambda it, _, n=n: it.stack.append(tuple(it.take(n))) for n in (1, 2, 3)},  # type: ignore[misc]
    "DICT": _as_mapping,
    "APPEND": lambda it, _: it.extend(it.take(1)),
    "APPENDS": lambda it, _: it.extend(it.since_mark()),
    "ADDITEMS": lambda it, _: it.extend(it.since_mark()),
    "SETITEM": lambda it, _: it.add_items(it.take(2)),
    "SETITEMS": lambda it, _: it.add_items(it.since_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda it, key: it.stack.append(it.memo[int(key)])),
    "GLOBAL": lambda it, names: it.stack.append(_Global(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda it, _: it.stack.append(_Global(*map(str, it.take(2)))),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _reduce),
    "NEWOBJ_EX": _reduce_with_keywords,
    "BUILD": lambda it, _: it.take(1),
    "INST": _instance,
    "OBJ": _object,
    "BINPERSID": lambda it, _: it.stack.append(it.refer(it.take(1)[0])),
    "READONLY_BUFFER": lambda it, _: None,
}


# --- files of torch.save


class _Record(NamedTuple):
    """Where the bytes of a storage lie in the file, and their CRC-32 if it is known."""

    start: int
    size: int
    crc32: int | None = None


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _from_zip(path: Path) -> CheckpointFile:
    """A file of torch.save since torch 1.6: an uncompressed zip with a pickle, ``NAME/data.pkl``, and ``NAME/data/KEY``."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError) as error:
        raise _Damaged(f"is cut off or damaged: its end, which lists its {size:,} bytes, cannot be read") from error
    root = _root_of_zip(infos)
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
        raise _Damaged("is a compressed zip archive, and torch.save does not compress", "Load it with torch and save it again.")
    if sum(info.file_size for info in infos.values()) > size:
        raise _Damaged(f"is damaged: its parts claim more than its {size:,} bytes")
    content = _mapped(path)
    records = {name: _record(content, info) for name, info in infos.items()}
    pickled = records[f"{root}data.pkl"]
    if pickled.size > _MAX_PICKLE:
        if b"numpy" in content[pickled.start : pickled.start + (1 << 16)]:
            found = f"has {pickled.size:,} bytes of objects besides tensors, arrays of NumPy among them"
            raise _Damaged(found, "Make tensors of the arrays with torch.from_numpy before torch.save.")
        raise _Damaged(f"has {pickled.size:,} bytes of objects besides its tensors, which is too much to read", INSTEAD)
    if f"{root}byteorder" in records and _bytes_of(content, records[f"{root}byteorder"]) != b"little":
        raise _Damaged("was written on a machine with another byte order", "Load it there and save it as safetensors.")
    it = _Interpreter()
    outermost = it.run(pickletools.genops(_bytes_of(content, pickled)))
    parts = {name.removeprefix(f"{root}data/"): each for name, each in records.items() if name.startswith(f"{root}data/")}
    return _content(outermost, it, parts, content)


def _root_of_zip(names: Iterable[str]) -> str:
    """The folder in a zip that holds its pickle, with a slash.

    Raises:
        _Damaged: the zip is a program of torch, or not of torch.
    """
    files = {name.partition("/")[2] for name in names}
    if "constants.pkl" in files or any(name.startswith("code/") for name in files):
        raise _Damaged("is a TorchScript program, not weights", "Save the state_dict() of the model that it was made of.")
    if files & {"archive_format", "serialized_exported_program.json", "models/model.json"} or "archive_format" in names:
        raise _Damaged("is a program of torch.export, not weights", "Save the state_dict() of the model that it was made of.")
    roots = [name.removesuffix("data.pkl") for name in names if name.split("/")[-1] == "data.pkl" and name.count("/") <= 1]
    if not roots:
        some = ", ".join(map(shown, sorted(names)[:_NAMES_SHOWN]))
        raise _Damaged(f"is a zip archive without weights; it holds {some}", "Unpack it, and give the file in it.")
    return roots[0]


def _record(content: mmap.mmap, info: zipfile.ZipInfo) -> _Record:
    begin = info.header_offset
    header = content[begin : begin + 30]
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise _Damaged(f"is damaged: the part {shown(info.filename)} is not where its list says")
    start = begin + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + info.file_size > len(content):
        raise _cut_off(len(content), start + info.file_size)
    return _Record(start, info.file_size, info.CRC or None)


def _bytes_of(content: mmap.mmap, record: _Record) -> bytes:
    found = content[record.start : record.start + record.size]
    if record.crc32 is not None and zlib.crc32(found) != record.crc32:
        raise _Damaged("is damaged: its list of tensors has another checksum than was written")
    return found


_MAGIC = 0x1950A86A20F9469CFC6C  # the first of the five pickles that torch wrote before 1.6


def _from_pickles(path: Path) -> CheckpointFile:
    """A file of torch.save before torch 1.6: a magic number, a version, the machine, the object and the keys of its storages,
    each a pickle, then each storage with its number of elements."""
    content = _mapped(path)
    pickles = io.BytesIO(content[:_MAX_PICKLE])
    first = _Interpreter()
    found = first.run(pickletools.genops(pickles))
    if found != _MAGIC:
        what = f" of {', '.join(map(shown, first.objects))}" if first.objects else ""
        raise _Damaged(f"is a Python pickle{what} that torch.save did not write, and ktray unpickles nothing", INSTEAD)
    _, machine = (_Interpreter().run(pickletools.genops(pickles)) for _ in range(2))
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise _Damaged("was written on a machine with another byte order", "Load it there and save it as safetensors.")
    it = _Interpreter()
    outermost = it.run(pickletools.genops(pickles))
    keys = _Interpreter().run(pickletools.genops(pickles))
    records, position = {}, pickles.tell()
    for key in keys if isinstance(keys, list) else ():
        storage = it.storages.get(str(key))
        count = int.from_bytes(content[position : position + 8], "little", signed=True)
        size = count * storage.dtype.itemsize if storage and isinstance(storage.dtype, torch.dtype) else -1
        if size < 0 or position + 8 + size > len(content):
            raise _cut_off(len(content), position + 8 + max(size, 0))
        records[str(key)] = _Record(position + 8, size)
        position += 8 + size
    return _content(outermost, it, records, content)


def _content(outermost: Any, it: _Interpreter, records: Mapping[str, _Record], content: mmap.mmap) -> CheckpointFile:
    checked: dict[str, None] = {}
    state_dicts = [
        (key, {name: _stored(name, view, records, content, checked) for name, view in views.items()})
        for key, views in _mappings(outermost)
    ]
    return CheckpointFile(tuple(state_dicts), tuple(it.objects), tuple(_lists(outermost)))


def _mappings(outermost: Any) -> Iterator[tuple[str, dict[str, _View]]]:
    """(key, name -> tensor) of each mapping with named tensors, from the outside in."""
    for key, items in _containers(outermost):
        views = {name: each for name, each in items.items() if isinstance(name, str) and isinstance(each, _View)}
        if views:
            yield key, views


def _lists(outermost: Any) -> Iterator[str]:
    """The key of each list of tensors."""
    for key, items in _containers(outermost):
        if items and all(isinstance(name, int) and isinstance(each, _View) for name, each in items.items()):
            yield key


def _containers(outermost: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """(key, its items) of each mapping and list, from the outside in. They may contain themselves."""
    waiting: deque[tuple[tuple[Any, ...], Any]] = deque([((), outermost)])
    seen = {id(outermost)}
    while waiting:
        path, found = waiting.popleft()
        items = found.items if isinstance(found, _Object) else found
        if isinstance(items, list | tuple) and not isinstance(items, _View | _Global | _Storage):
            items = dict(enumerate(items))
        if not isinstance(items, dict):
            continue
        yield ".".join(map(str, path)), items
        for name, each in items.items():
            is_new = isinstance(each, dict | list | tuple | _Object) and id(each) not in seen
            if is_new and len(path) < _MAX_DEPTH and len(seen) < _MAX_MAPPINGS:
                seen.add(id(each))
                waiting.append(((*path, name), each))


def _stored(
    name: str, view: _View, records: Mapping[str, _Record], content: mmap.mmap, checked: dict[str, None]
) -> StoredTensor:
    """A tensor with its bounds checked.

    Args:
        checked: keys of the storages whose checksum has been compared; added to when a tensor is read.
    """
    if isinstance(view.storage, _Storage) and view.storage.dtype in _UNREADABLE.values():
        return StoredTensor((), str(view.dtype), partial(_unsupported, name, str(view.dtype)))
    storage, record = view.storage, records.get(view.storage.key) if isinstance(view.storage, _Storage) else None
    numbers = (view.offset, storage.start, *_numbers(view.shape), *_numbers(view.stride)) if record else (-1,)
    if record is None or any(type(each) is not int or each < 0 for each in numbers) or len(view.shape) != len(view.stride):
        raise _Damaged(f"is damaged: the tensor {shown(name)} has no bytes or an impossible shape")
    shape, dtype = tuple(view.shape), view.dtype
    if not isinstance(dtype, torch.dtype):
        return StoredTensor(shape, dtype, partial(_unsupported, name, dtype))
    begin = view.offset + storage.start
    last = begin + sum((length - 1) * step for length, step in zip(shape, view.stride, strict=True))
    end = begin if 0 in shape else last + 1
    if end * dtype.itemsize > record.size:
        raise _Damaged(
            f"is damaged: the tensor {shown(name)} needs {end * dtype.itemsize:,} bytes, and there are {record.size:,}"
        )

    def read() -> Tensor:
        if storage.key not in checked:
            if record.crc32 is not None and _crc32(content, record) != record.crc32:
                raise UserError(f"the file is damaged: {shown(name)} has another checksum than was written", WHERE, _AGAIN)
            checked[storage.key] = None
        start = record.start + begin * dtype.itemsize
        found = bytearray(content[start : record.start + end * dtype.itemsize])
        if not found:
            return torch.empty(shape, dtype=dtype)
        tensor = torch.frombuffer(found, dtype=dtype).as_strided(shape, view.stride)
        return tensor.neg() if view.is_negated else tensor

    return StoredTensor(shape, dtype, read)


def _numbers(found: Any) -> tuple[Any, ...]:
    return tuple(found) if isinstance(found, list | tuple) else (-1,)


def _unsupported(name: str, dtype: str) -> Tensor:
    raise UserError(f"{shown(name)} is of the type {shown(dtype)}, which ktray cannot read", WHERE, INSTEAD)


_BLOCK = 1 << 24


def _crc32(content: mmap.mmap, record: _Record) -> int:
    found = 0
    for start in range(record.start, record.start + record.size, _BLOCK):
        found = zlib.crc32(content[start : min(start + _BLOCK, record.start + record.size)], found)
    return found
