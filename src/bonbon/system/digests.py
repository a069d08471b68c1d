"""Short hashes of files and of models' weights, to detect changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from bonbon.system.atomic_files import read_json
from bonbon.system.errors import BonbonError


def weights_digest(folder: Path) -> str | None:
    """Return a hash of the head of every tensor in a folder's weights and an adapter's base.

    It detects a model that was retrained in the same folder, and is fast for any size. None if
    there are no safetensors (a hub id). Raises BonbonError for a broken file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        for part in _tensor_heads(path):
            digest.update(part)
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        base = Path(str(read_json(adapter).get("base_model_name_or_path")))
        digest.update(str(weights_digest(base)).encode())
    return digest.hexdigest()


def _tensor_heads(path: Path) -> Iterator[bytes]:
    """Yield the header of a safetensors file, and up to 4 KiB of each of its tensors."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
            yield header
            for name, tensor in json.loads(header).items():
                if name != "__metadata__":
                    start, end = tensor["data_offsets"]
                    file.seek(8 + length + start)
                    yield file.read(min(end - start, 4096))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BonbonError(f"cannot read the weights {path}: {error}") from error


def file_digest(path: Path) -> str:
    """Return a short hash of a file's content."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise BonbonError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()
