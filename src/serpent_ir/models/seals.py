"""Hashes for safetensors files, whose format has no checksum.

Files that this program writes have one in the metadata.
"""

import hashlib
import json
from io import BufferedReader
from pathlib import Path
from typing import Any

KEY = "serpent_sha256"
"""The key in the metadata. Its value is the SHA-256 of [header, metadata] without it, as sorted JSON, and of the bytes
that follow."""


def sealed(content: bytes) -> bytes:
    """A safetensors file's bytes, with its hash, and with its metadata sorted by name.

    The library writes metadata in an order that differs from call to call, but runs with the same weights should give
    files with the same hash.
    """
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), memoryview(content)[8 + size :]
    metadata = header.pop("__metadata__", {})
    metadata.pop(KEY, None)
    found = _hash_of(header, metadata)
    found.update(data)
    header = {"__metadata__": dict(sorted({**metadata, KEY: found.hexdigest()}.items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return b"".join([len(text).to_bytes(8, "little"), text, data])


def why_damaged(path: Path, shipped: Path) -> str:
    """Why a safetensors file that the library can read is not as it was written; "" if it is, or if nothing tells.

    A file in the folder `shipped` is compared with the hash in its JSON card there, any other file with the hash in its
    metadata. Raises OSError.
    """
    with path.open("rb") as file:
        card = path.with_suffix(".json")
        if path.parent.resolve() == shipped and card.exists():
            try:
                expected = json.loads(card.read_bytes())["sha256"]
            except (ValueError, KeyError, TypeError, RecursionError):
                return f"{card.name} beside it is"
            return "" if hashlib.file_digest(file, "sha256").hexdigest() == expected else "its hash differs"
        return _why_not_as_written(file)


def _why_not_as_written(file: BufferedReader) -> str:
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.pop("__metadata__", {})
    expected = metadata.pop(KEY, "")
    if not expected:
        return ""
    found = _hash_of(header, metadata)
    same = hashlib.file_digest(file, lambda: found).hexdigest() == expected
    return "" if same else f"its hash differs; if it was changed on purpose, write it without {KEY} in its metadata"


def _hash_of(header: dict[str, Any], metadata: dict[str, str]) -> Any:
    """The hash object after everything that precedes the tensors' bytes."""
    return hashlib.sha256(json.dumps([header, metadata], sort_keys=True, separators=(",", ":")).encode())
