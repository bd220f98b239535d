"""The teacher's signals on disk: computed once, then read for every batch.

    DIR/NAME-KEY/             one folder a teacher; KEY is a digest of all that its signals depend on but the tokens
        cache.json            the same in words, for people
        head-SUM.safetensors  the weights of the teacher's head; SUM is the checksum of the file
        part-SUM.safetensors  signals of some examples, each under a digest of its tokens

Kept of every response token are the last hidden states of the position that predicts it: the head makes the teacher's
logits of them, exactly, up to the dtype that they are kept in. With `topk`, its K largest log-probabilities are kept
instead, and every other token gets an equal share of what they leave: an approximation, and no head is needed.

A file is written under another name and then renamed, so that it is whole or not there; a damaged one is found by its
checksum, and its examples are computed again. An example is found by its tokens: the same folder serves any order of
the data, any seed and batch size, and rows that are new are added to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.utils.hub import cached_file, extract_commit_hash

from modeling.errors import InputError
from modeling.files import FULL, locked, write_whole
from modeling.models.output_head import OutputHead

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same settings give other content
PART_BYTES, PART_SECONDS = 64 << 20, 60.0  # a part is written when it is so large, or has waited so long
TOPK_ROWS = 256  # rows of full logits at a time, where only the largest are kept
WEIGHTS = ("config.json", "adapter_config.json", "*.safetensors", "*.bin", "*.py")  # the files that make a model


@dataclass(frozen=True)
class Settings:
    """What a teacher's signals depend on, beside the tokens it is fed."""

    weights: str  # `weights_digest`
    dtype: str  # that the teacher runs in
    stored_dtype: str
    topk: int | None
    attn_implementation: str | None
    n_tokens: int  # of its vocabulary; under this name, which the key depends on
    format: int = FORMAT

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------- which teacher it is


def weights_digest(path: str, memory: Path) -> str:
    """A digest of the files of a model in a folder; of a model on the hub, the commit.

    Args:
        path: a folder, or a hub name. The base model of an adapter counts too.
        memory: a JSON file that remembers the digests of files which are not touched, so that they are read once.

    Raises InputError where the hub's files are of no known commit.
    """
    folder = Path(path)
    if not folder.is_dir():
        commit = extract_commit_hash(cached_file(path, "config.json"), None)
        if commit is None:
            raise InputError(
                f"--teacher_cache: the commit of the files of {path} is not known. Download it, and give its folder."
            )
        return f"{path}@{commit}"
    known = json.loads(memory.read_text()) if memory.exists() else {}
    digests, new = [], {}
    for file in sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)}):
        if file.name != "training_args.bin":
            stat = file.stat()
            touched = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            entry = known.get(str(file.resolve()))
            if entry is None or entry[:3] != touched:
                entry = new[str(file.resolve())] = [*touched, checksum(file)]
            digests.append(f"{file.name} {entry[3]}")
    if new:
        _write(memory, json.dumps(known | new, indent=1).encode())
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        digests.append(weights_digest(json.loads(adapter.read_text())["base_model_name_or_path"], memory))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


# ------------------------------------------------------------------------------------ what is kept of a response token


def kept(hidden: Tensor, head: OutputHead, settings: Settings) -> dict[str, Tensor]:
    """What is written for the rows of `hidden`, on the CPU: `{"hidden"}`, or `{"values", "ids", "rest"}` with topk.

    Raises InputError where the dtype cannot hold a value.
    """
    dtype = getattr(torch, settings.stored_dtype)
    if settings.topk is None:
        return {"hidden": _narrowed(hidden, dtype).cpu()}
    parts = []
    for rows in hidden.split(TOPK_ROWS):
        log_p = head(rows).float().log_softmax(-1)
        values, ids = log_p.topk(min(settings.topk, log_p.shape[1]), dim=-1)
        # What each other token gets. (Not from 1 - Σ exp(values), which rounding can make negative.)
        rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        rest = rest - math.log(max(log_p.shape[1] - values.shape[1], 1))
        parts.append((_narrowed(values, dtype).cpu(), ids.int().cpu(), rest.cpu()))
    return {name: torch.cat(column) for name, column in zip(("values", "ids", "rest"), zip(*parts))}


def _narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = values.to(dtype)
    if not torch.equal(narrow.isfinite(), values.isfinite()):
        raise InputError(f"The teacher's signals hold values beyond {dtype}. Give --teacher_cache_dtype bfloat16.")
    return narrow


@dataclass(frozen=True)
class TopKHead:
    """Logits of K stored log-probabilities a row: every other token gets an equal share of what they leave.

    `head(rows [r, 2K + 1]) -> logits float32 [r, V]`; a row holds the values, their tokens' ids, and that share's
    logarithm.
    """

    vocab_size: int

    def __call__(self, rows: Tensor) -> Tensor:
        k = rows.shape[-1] // 2
        values, ids, rest = rows.split([k, k, 1], dim=-1)
        return rest.expand(-1, self.vocab_size).scatter(-1, ids.long(), values)

    def to(self, device: torch.device) -> TopKHead:
        return self


# --------------------------------------------------------------------------------------------------------- the folder


class SignalCache:
    """The stored signals of one teacher. To read them, `open`; `rows` then gives those of a batch.

    Args:
        directory: that of --teacher_cache, which may hold the folders of other teachers.
        name: of the teacher, for people.
        settings: a folder with the same settings is filled further, whatever the teacher was called then.
    """

    def __init__(self, directory: Path, name: str, settings: Settings):
        self.settings = settings
        self.folder = next(directory.glob(f"*-{settings.key}"), directory / f"{name}-{settings.key}")
        self.index: dict[bytes, tuple[int, int, int]] = {}  # key of an example -> (part, first row, row after the last)
        self._parts: list = []
        self._head: OutputHead | TopKHead | None = None

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Removes what an interrupted run left, and damaged files, saying which. Each rank looks at its share."""
        for file in self.folder.glob("*.partial"):
            file.unlink(missing_ok=True)
        for file in sorted(self.folder.glob("*-*.safetensors"))[rank::ranks]:
            if checksum(file) != file.stem.rpartition("-")[2]:
                kind = "The examples in it are" if file.name.startswith("part-") else "It is"
                logger.error("%s is damaged, and removed. %s computed again.", file, kind)  # from any rank
                file.unlink()

    def open(self) -> None:
        """Reads which examples are there, and the head."""
        self._parts, self.index = [], {}
        for number, path in enumerate(sorted(self.folder.glob("part-*.safetensors"))):
            part = safe_open(path, "pt")  # memory-mapped: a row is read when it is asked for
            if json.loads(part.metadata()["about"])["key"] != self.settings.key:
                raise InputError(f"{path} was made with other settings than the rest of its folder. Remove it.")
            self._parts.append(part)
            keys, stops = part.get_tensor("keys").numpy(), part.get_tensor("stops").tolist()
            for key, start, stop in zip(keys, [0, *stops], stops):
                self.index[key.tobytes()] = (number, start, stop)
        heads = list(self.folder.glob("head-*.safetensors"))
        if self.settings.topk:
            self._head = TopKHead(self.settings.n_tokens)
        elif heads:
            with safe_open(heads[0], "pt") as file:
                factors = json.loads(file.metadata()["about"])["factors"]
            self._head = OutputHead(**load_file(heads[0]), **factors)

    @property
    def has_head(self) -> bool:
        return self._head is not None

    def rows(self, keys: Sequence[bytes], device: torch.device) -> tuple[Tensor, Callable]:
        """The rows of some examples, one example after the other, and the head that makes logits of them, on `device`.

        Args:
            keys: of the examples, `text.batch.example_key`.

        Raises ValueError for an example that is not there.
        """
        self._head = self._head.to(device)
        names = ("hidden",) if self.settings.topk is None else ("values", "ids", "rest")
        found = {name: [self._parts[0].get_slice(name)[:0]] for name in names}
        for key in keys:
            if key not in self.index:
                raise ValueError(f"{self.folder} holds no signals of an example that was not there when it was filled.")
            part, start, stop = self.index[key]
            for name in names:
                found[name].append(self._parts[part].get_slice(name)[start:stop])
        tensors = [torch.cat(parts).to(device) for parts in found.values()]
        if self.settings.topk is None:
            return tensors[0].to(self._head.weight.dtype), self._head
        return torch.cat([tensor.float() for tensor in tensors], dim=-1), self._head

    # ----------------------------------------------------------------------------------------------------- writing

    def locked(self, rank: int = 0) -> contextlib.AbstractContextManager[None]:
        """One run at a time is inside; another waits. (Rank 0 speaks for its run.)"""
        if rank:
            return contextlib.nullcontext()
        self.folder.mkdir(parents=True, exist_ok=True)
        return locked(self.folder / "lock")

    def describe(self, teacher: str) -> None:
        """Writes cache.json."""
        _write(self.folder / "cache.json", json.dumps({"teacher": teacher, **asdict(self.settings)}, indent=1).encode())

    def write_head(self, head: OutputHead) -> None:
        tensors = {"weight": head.weight, "bias": head.bias}
        tensors = {name: w.detach().cpu().contiguous() for name, w in tensors.items() if w is not None}
        self._write_tensors("head", tensors, factors={n: getattr(head, n) for n in ("multiplier", "divisor", "cap")})

    def write_part(self, signals: dict[bytes, dict[str, Tensor]]) -> None:
        """One file of the given examples, `{key: what `kept` gives}`."""
        lengths = [len(next(iter(tensors.values()))) for tensors in signals.values()]
        tensors = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(signals), dtype=np.uint8).reshape(-1, 16).copy()),
            "stops": torch.tensor(lengths).cumsum(0),
        }
        for name in next(iter(signals.values())):
            tensors[name] = torch.cat([example[name] for example in signals.values()])
        self._write_tensors("part", tensors)

    def _write_tensors(self, kind: str, tensors: dict[str, Tensor], **about: object) -> None:
        content = save(tensors, {"about": json.dumps({"key": self.settings.key, **about})})
        name = f"{kind}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        _write(self.folder / name, content)


def _write(path: Path, content: bytes) -> None:
    """The whole file or nothing. Raises InputError where the disk takes no more."""
    try:
        write_whole(path, content)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(
            f"{path} could not be written: {FULL[error.errno]}. What --teacher_cache holds already is whole. Make "
            "room, then start the same command again: it computes what is missing."
        ) from error


class PartWriter:
    """Collects signals and writes them, a part at a time."""

    def __init__(self, cache: SignalCache):
        self.cache = cache
        self._begin()

    def _begin(self) -> None:
        self.waiting: dict[bytes, dict[str, Tensor]] = {}
        self.n_bytes, self.since = 0, time.monotonic()

    def add(self, key: bytes, signals: dict[str, Tensor]) -> None:
        self.waiting[key] = signals
        self.n_bytes += sum(tensor.nbytes for tensor in signals.values())
        if self.n_bytes >= PART_BYTES or time.monotonic() - self.since >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.cache.write_part(self.waiting)
        self._begin()
