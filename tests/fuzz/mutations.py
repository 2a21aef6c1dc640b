"""Hostile versions of files: other bytes, values of other kinds, pickles that run code, and what is no file.

Each change is drawn from a `random.Random`, so that a seed gives the same input again.
"""

import copy
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import pickle
import random
import shutil
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
import zstandard

from common.files import sha256
from data.prepare import JOURNAL
from data.tokens import MANIFEST, dump_with_checksum
from training.checkpoint.format import CHECKSUM, INDEX

#: Name of the file that executed code makes in the folder outside.
EXECUTED = "executed"
#: Module on the path whose import makes that file too.
PLANTED_MODULE = "planted_module"

DEEP = 100_000
#: Values of every kind that a reader may meet where it expects another.
VALUES = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.5, 1e308, 1e-320,
    float("nan"), float("inf"), -float("inf"), "", " ", "a", "0", "nan", "1e400", "null", [], {}, [[]], [None],
    [1, "a"], {"a": 1}, {"": {}}, [{"a": [1]}], "[/b][bold red]x[/]", "\\input{/etc/passwd}\\write18{x}",
    "<script>planted</script>", "\x1b[2J\x1b]0;x\x07", "\u202egnp.exe", "| a | b |\n|---|",
    "../../../outside/precious.txt", "..", ".", "/", "/dev/zero",
    "~", "${oc.env:HOME}", "${", "a" * 100_000, "\x00", "\ud800", "{0.__class__}", "%s%n", f"{PLANTED_MODULE}.Strategy",
    "os.system", "__class__", "2024-13-45", "a/b@3", ":memory:", "-1", "00012",
)  # fmt: skip
#: Texts that stand for a value as they are.
RAW_JSON = (
    "1e400", "-1e400", "1" * 5000, "NaN", "-Infinity", "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP,
    "[" * DEEP, r'"\ud800"', r'"\udc00\ud800"', '"\\u0000"', "{}{}", "'x'", "0x10", "01", "", "1,", "truely", "-", '"',
    "1E-400", '{"a":1,"a":2}', "1.7976931348623157e309", "\x00", '"\t"', "// x\n1",
)  # fmt: skip
RAW_YAML = (
    "*unknown", "&a [*a]", "&a {b: *a}", "!!python/object/apply:os.mkdir [MARKER]", "!!python/name:os.system",
    "!!python/object/new:os.system [touch MARKER]", "!!python/module:planted_module", "!!binary x", "2020-13-45",
    "!!timestamp x", "2020-01-01", "0o9", "1_000", "1:30:00", "[" * DEEP, "[" * 5000 + "]" * 5000, "{a: " * 5000,
    "!!float x", "!!int x", "!!int ''", "!!float ''", "!!bool x", "? [a]: b", "<<: *x", ".inf", ".nan", "~", "yes",
    "!!set {a}", "!!omap [a]", "!!pairs [a]", "!x y", "!!null x", "1e3", "1" * 5000, "@", "`", "%", "\x00", "'",
    '"\\ud800"', '"\\x', "[&a [1, 1], *a]", "{<<: {a: 1}}", "!!map []", "!!str", "!!seq {}", "- - -", "0b2", "0x",
    "{a, b: c, ? d}", "+.inf", "!!python/tuple [1]",
)  # fmt: skip
BOMB = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
_RAW = "RAWxRAW"


class Planted:
    """An object whose unpickling makes the file `EXECUTED`, in one of several ways."""

    def __init__(self, marker: Path, way: int) -> None:
        self.marker, self.way = marker, way

    def __reduce__(self) -> Any:
        statement = f"open({str(self.marker)!r}, 'w')"
        ways = ((os.mkdir, (str(self.marker),)), (os.system, (f"touch '{self.marker}'",)), (exec, (statement,)),
                (eval, (statement,)), (open, (str(self.marker), "w")), (Path.touch, (self.marker,)))  # fmt: skip
        return ways[self.way % len(ways)]


def plant_module(folder: Path, marker: Path) -> None:
    """Write the module whose import makes the file `EXECUTED`."""
    (folder / f"{PLANTED_MODULE}.py").write_text(
        f"import pathlib, zclip\npathlib.Path({str(marker)!r}).touch()\nclass Strategy(zclip.FixedNorm):\n    pass\n"
    )


class Mutator:
    """Changes files in a folder; `outside` is a folder that must stay as it is."""

    def __init__(self, rng: random.Random, outside: Path) -> None:
        self.rng, self.outside, self.marker = rng, outside, outside / EXECUTED

    def mutate(self, root: Path, files: list[Path], made: list[Path]) -> str:
        """Change one of the files or folders below `root`, sometimes two; return what was done.

        `made` are files that programs make: another kind of file may be there already.
        """
        rng = self.rng
        done = []
        for _ in range(rng.choice((1, 1, 1, 2))):
            file = rng.choice(files)
            if made and rng.random() < 0.1:
                file = rng.choice(made)
                if not os.path.lexists(file):
                    if os.path.lexists(file.parent) and not file.parent.is_dir():
                        continue  # it was changed before
                    file.parent.mkdir(exist_ok=True)
                    file.touch()
                done.append(f"{file.relative_to(root)}: {self._replace_kind(file, files)}")
                continue
            if not os.path.lexists(file):
                continue
            if file.is_dir() or rng.random() < 0.1:
                done.append(f"{file.relative_to(root)}: {self._replace_kind(file, files)}")
                continue
            structured = self._structured(file)
            if structured is not None and file.is_file() and rng.random() < 0.75:
                with suppress(Exception):  # it was changed before
                    done.append(f"{file.relative_to(root)}: {structured(file)}")
                    continue
            if file.is_file():
                done.append(f"{file.relative_to(root)}: {self._bytes(file)}")
        if rng.random() < 0.6:
            reseal(root)
        return "; ".join(done)

    def _structured(self, file: Path) -> Callable[[Path], str] | None:
        """Return what changes the content of a file of this name."""
        inner = file.name.removesuffix(file.suffix) if file.suffix in _PACK else file.name
        if file.suffix in _PACK:
            return self._packed
        if file.name == INDEX:
            return self._index
        kinds = {".jsonl": self._lines, ".json": self._json, ".yaml": self._yaml, ".ckpt": self._archive,
                 ".pt": self._archive, ".safetensors": self._safetensors, ".csv": self._csv,
                 ".npy": self._npy}  # fmt: skip
        return kinds.get(Path(inner).suffix)

    # What is no file, or another one.

    def _replace_kind(self, file: Path, files: list[Path]) -> str:
        targets = {"link outside": self.outside / "precious.txt", "link to /dev/zero": Path("/dev/zero"),
                   "link to a folder outside": self.outside, "dangling link": self.outside / "made",
                   "link to itself": file}  # fmt: skip
        kinds = ["missing", "empty", "fifo", "folder", "socket", "another file", *targets]
        kind = self.rng.choice(kinds)
        other = self.rng.choice(files)
        content = other.read_bytes() if other.is_file() else b""
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        if kind in targets:
            file.symlink_to(targets[kind])
        elif kind == "empty":
            file.touch()
        elif kind == "fifo":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as server, suppress(OSError):  # a path may be too long
                server.bind(str(file))
        elif kind == "another file":
            file.write_bytes(content)
        return kind

    def _bytes(self, file: Path) -> str:
        content, what = self._changed_bytes(file.read_bytes())
        file.write_bytes(content)
        return what

    def _changed_bytes(self, content: bytes) -> tuple[bytes, str]:
        rng, size = self.rng, len(content)
        start = rng.randrange(size + 1)
        length = min(rng.choice((1, 4, 16, 100, 512, 4096)), size - start)
        other = rng.randrange(size + 1)
        block = content[start : start + length]
        if rng.random() < 0.3:
            flipped = bytearray(content)
            for _ in range(rng.choice((1, 1, 2, 8)) if size else 0):
                flipped[rng.randrange(size)] ^= 1 << rng.randrange(8)
            return bytes(flipped), "bits flipped"
        noise = rng.choice(
            (bytes(100), rng.randbytes(50), b"\n", b"\xff\xfe", b"{}", b"\r\n", b"\xed\xa0\x80", b"]" * 9)
        )
        rest = content[start + length :]
        swapped = content[:start] + rest
        changed = {
            "cut": content[:start], "cut head": content[start:], "zero": content[:start] + bytes(length) + rest,
            "remove": swapped, "double": content[: start + length] + block + rest, "empty": b"",
            "swap": swapped[:other] + block + swapped[other:], "insert": content[:start] + noise + content[start:],
            "append": content + noise, "bom": b"\xef\xbb\xbf" + content,
        }  # fmt: skip
        way = rng.choice(list(changed))
        return changed[way], f"{way} at {start}, {length} bytes"

    # Values.

    def structure(self, value: Any, planted: bool = False) -> tuple[Any, str]:
        """Return a copy of a nested value with one change, and what it is. `planted` allows objects that run code."""
        root = [copy.deepcopy(value)]
        places = _places(root)
        deepest = max(len(path) for _, _, path in places)
        depth = self.rng.randint(1, deepest)
        container, key, path = self.rng.choice([place for place in places if len(place[2]) >= depth] or places)
        old = _get(container, key)
        new = self._value(old, planted)
        way = self.rng.choice(("set", "set", "set", "set", "remove", "rename", "swap", "wrap", "add"))
        name = ".".join(map(str, path[1:]))[:100] or "all"
        if way == "remove" and isinstance(container, dict | list) and container is not root:
            del container[key]
        elif way == "rename" and isinstance(container, dict):
            names = (str(key).upper(), "", "a" * 1000, "\x1b[1m", "__proto__", 5, None, "\ud800", "steps")
            container[self.rng.choice(names)] = container.pop(key)
        elif way == "swap" and isinstance(container, dict | list) and len(container) > 1:
            sibling = self.rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
            container[key], container[sibling] = container[sibling], container[key]
        elif way == "wrap":
            _set(container, key, self.rng.choice(([old], {"a": old}, [old] * 3)))
        elif way == "add" and isinstance(old, dict):
            old[self.rng.choice(("extra", "items", "", "\\a_b$", "acc,none", "[red]"))] = new
        elif way == "add" and isinstance(old, list):
            old.insert(self.rng.randrange(len(old) + 1), new)
        else:
            way = "set"
            _set(container, key, new)
        return root[0], f"{way} {name} ({repr(new)[:60]})"

    def _value(self, old: Any, planted: bool) -> Any:
        if planted and self.rng.random() < 0.15:
            return Planted(self.marker, self.rng.randrange(6))
        if isinstance(old, torch.Tensor) and self.rng.random() < 0.8:
            return self._tensor(old)
        if isinstance(old, torch.Size | tuple) and self.rng.random() < 0.5:
            return type(old)(self.rng.choice(([], [0], [1], [2**40], [-1], [2**62, 2**62], list(old)[::-1], [*old, 2])))
        if isinstance(old, int | float) and not isinstance(old, bool) and self.rng.random() < 0.3:
            return self.rng.choice((old + 1, -old, old * 1000, old / 3, str(old), float(old), old - 1))
        if planted and self.rng.random() < 0.1:
            return self.rng.choice((torch.float16, torch.zeros(3), b"bytes", (1, 2), {1, 2}, torch.Size([3])))
        return copy.deepcopy(self.rng.choice(VALUES))

    def _tensor(self, old: torch.Tensor) -> torch.Tensor:
        ways: list[Callable[[], torch.Tensor]] = [
            lambda: torch.full_like(old, float("nan")) if old.is_floating_point() else torch.full_like(old, -1),
            lambda: torch.full_like(old, float("inf")) if old.is_floating_point() else torch.full_like(old, 2**20),
            lambda: torch.full_like(old, -5), lambda: old.reshape(-1)[:0], lambda: old.reshape(-1)[:1].reshape(()),
            lambda: old.reshape(-1), lambda: old.unsqueeze(0), lambda: old.half(), lambda: old.to(torch.int64),
            lambda: old.to(torch.bool), lambda: old.to(torch.complex64), lambda: torch.zeros(1).expand(2**45),
            lambda: torch.zeros((0, 2**40)), lambda: old.to(torch.float64), lambda: old.to_sparse(),
            lambda: torch.nn.Parameter(old.float()), lambda: old.to(torch.bfloat16), lambda: old.to("meta"),
            lambda: torch.zeros(()), lambda: torch.cat([old.reshape(-1), old.reshape(-1)]),
        ]  # fmt: skip
        with suppress(RuntimeError, IndexError, TypeError):
            return self.rng.choice(ways)()
        return torch.zeros(())

    # Formats.

    def _json_text(self, value: Any, **options: Any) -> tuple[str, str]:
        """Return a changed value in JSON, and what was changed."""
        if self.rng.random() < 0.25:
            raw = self.rng.choice(RAW_JSON)
            root = [copy.deepcopy(value)]
            container, key, path = self.rng.choice(_places(root))
            _set(container, key, _RAW)
            text = json.dumps(root[0], **options).replace(f'"{_RAW}"', raw)
            return text, f"{'.'.join(map(str, path[1:]))}: {raw[:40]}"
        changed, what = self.structure(value)
        return json.dumps(changed, default=str, **options), what

    def _json(self, file: Path) -> str:
        text, what = self._json_text(json.loads(file.read_text()))
        file.write_text(text)
        return what

    def _lines(self, file: Path) -> str:
        content, what = self._changed_lines(file.read_bytes())
        file.write_bytes(content)
        return what

    def _changed_lines(self, content: bytes) -> tuple[bytes, str]:
        lines = content.splitlines(keepends=True)
        number = self.rng.randrange(len(lines))
        if self.rng.random() < 0.4:
            number = len(lines) - 1  # readers look at the last line first
        if self.rng.random() < 0.7:
            text, what = self._json_text(json.loads(lines[number]))
            lines[number] = text.encode() + b"\n"
        else:
            line = lines[number]
            ways = {"remove": b"", "double": line + line, "cut": line[: len(line) // 2], "blank": b"\n" + line,
                    "nulls": b"\0" * 100 + line, "text": b"what is this\n", "list": b"[1,2]\n", "number": b"5\n",
                    "no utf-8": b"\xff\xfe\n", "null": b"null\n", "long": b'{"a":"' + b"x" * (3 << 20) + b'"}\n',
                    "windows": line.replace(b"\n", b"\r\n"), "surrogate": b'{"a":"\\ud800"}\n',
                    "string": b'"x"\n'}  # fmt: skip
            what = self.rng.choice(list(ways))
            lines[number] = ways[what]
        return b"".join(lines), f"line {number + 1}: {what}"

    def _yaml(self, file: Path) -> str:
        value = yaml.safe_load(file.read_text())
        if self.rng.random() < 0.05:
            file.write_text(f"{BOMB}\n{file.read_text()}")
            return "a bomb of aliases"
        if self.rng.random() < 0.35:
            raw = self.rng.choice(RAW_YAML).replace("MARKER", str(self.marker))
            root = [value]
            container, key, path = self.rng.choice(_places(root))
            _set(container, key, _RAW)
            file.write_text(yaml.safe_dump(root[0], sort_keys=False).replace(_RAW, raw))
            return f"{'.'.join(map(str, path[1:]))}: {raw[:60]}"
        changed, what = self.structure(value)
        file.write_text(yaml.safe_dump(changed, sort_keys=False))
        return what

    def _csv(self, file: Path) -> str:
        lines = file.read_text().splitlines()
        number = self.rng.randrange(len(lines))
        cells = lines[number].split(",")
        hostile = ('"', "", "nan", "-1", "1e999", "x", '"a\nb"', "\x00", "9" * 200_000)
        cells[self.rng.randrange(len(cells))] = self.rng.choice(hostile)
        lines[number] = ",".join(cells)
        file.write_text("\n".join(lines))
        return f"line {number + 1}: {lines[number][:60]}"

    def _packed(self, file: Path) -> str:
        pack, unpack = _PACK[file.suffix]
        content = unpack(file.read_bytes())
        change = self._changed_lines if Path(file.stem).suffix == ".jsonl" else self._changed_bytes
        changed, what = change(content)
        file.write_bytes(pack(changed))
        return what

    def _archive(self, file: Path) -> str:
        if self.rng.random() < 0.05:
            file.write_bytes(pickle.dumps(Planted(self.marker, self.rng.randrange(6))))
            return "a pickle that runs code"
        changed, what = self.structure(torch.load(file, weights_only=True), planted=True)
        torch.save(changed, file)
        return what

    def _index(self, file: Path) -> str:
        if self.rng.random() < 0.1:
            changed, what = Planted(self.marker, self.rng.randrange(6)), "a pickle that runs code"
        else:
            changed, what = self.structure(pickle.loads(file.read_bytes()), planted=True)  # our own, unchanged
        file.write_bytes(pickle.dumps(changed))
        return what

    def _safetensors(self, file: Path) -> str:
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        text, what = self._json_text(json.loads(content[8 : 8 + size]))
        header = text.encode(errors="surrogatepass")
        stated = self.rng.choice((len(header), len(header), len(header), 2**63, 0, len(header) + 8))
        file.write_bytes(struct.pack("<Q", stated) + header + content[8 + size :])
        return f"header: {what}"

    def _npy(self, file: Path) -> str:
        content = file.read_bytes()
        old, new = self.rng.choice((
            (b"'<u2'", b"'|O' "), (b"'<u2'", b"'<f8'"), (b"False", b"True "), (b"'shape': (", b"'shape': (-1,"),
            (b"'shape': (", b"'shape': (9"), (b"'descr'", b"'other'"), (b"\x93NUMPY\x01", b"\x93NUMPY\x03"),
            (b"'<u2'", b"__import__('os')"), (b"{", b"{" * 100), (b"<u8", b"<i4"), (b"NUMPY", b"numpy"),
        ))  # fmt: skip
        file.write_bytes(content.replace(old, new, 1))
        return f"{old!r} is {new!r}"


_PACK: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    ".gz": (gzip.compress, gzip.decompress),
    ".xz": (lzma.compress, lzma.decompress),
    ".zst": (zstandard.compress, lambda content: zstandard.ZstdDecompressor().decompressobj().decompress(content)),
}


def reseal(root: Path) -> None:
    """Make the checksums in a folder those of its files again, as whoever changes files on purpose does."""
    for index in root.rglob(INDEX):
        checksum = index.parent / CHECKSUM
        if index.is_file() and checksum.is_file() and not checksum.is_symlink():
            checksum.write_text(sha256(index))
    for name in (MANIFEST, JOURNAL):
        for file in root.rglob(name):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                if file.is_symlink() or not file.is_file():
                    continue
                facts = json.loads(file.read_text())
                facts.pop("checksum", None)
                for entry in facts["files"]:
                    path = file.parent / entry
                    if path.is_file():
                        facts["files"][entry] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
                file.write_text(dump_with_checksum(facts))


def digest_of(folder: Path) -> str:
    """Return a digest of the names and contents of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def _places(value: Any) -> list[tuple[Any, Any, tuple[Any, ...]]]:
    """Return every place of a nested value: its container, its key there, and the keys that lead to it."""
    places = []
    stack: list[tuple[Any, tuple[Any, ...]]] = [(value, ())]
    while stack and len(places) < 20_000:
        container, path = stack.pop()
        items: Any = ()
        if isinstance(container, dict):
            items = list(container.items())
        elif isinstance(container, list):
            items = enumerate(container)
        elif dataclasses.is_dataclass(container) and not isinstance(container, type):
            items = vars(container).items()
        for key, inner in items:
            places.append((container, key, (*path, key)))
            stack.append((inner, (*path, key)))
    return places


def _get(container: Any, key: Any) -> Any:
    return container[key] if isinstance(container, dict | list) else getattr(container, key)


def _set(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, dict | list):
        container[key] = value
    else:
        object.__setattr__(container, key, value)
