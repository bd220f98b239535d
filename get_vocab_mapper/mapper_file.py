"""The two layouts of a mapper's file: the project's own .safetensors file, and the JSON of the published scripts.

The own format has one version number. It goes up with every change that would make older code misread a file, or newer
code check less of an older one, or build another map; only the current version is read, as building takes a minute.
  1: the arrays, and what they were built for.
  2: the same, with a SHA-256 of it all.
  3: byte-fallback tokens come behind others of their form, and count in the fingerprints.
"""

import hashlib
import json
import os
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from get_vocab_mapper.builders import build_published
from get_vocab_mapper.mapper import DEFAULT_THRESHOLD, Direction, Side, VocabMapper, build_command
from get_vocab_mapper.token_forms import TokenForms
from modeling.files import write_whole

FORMAT = "cdm-vocab-mapper"
FORMAT_VERSION = 3

# What the file calls the arrays of each `Direction`.
_PARTS = ("indptr", "indices", "distances")
TO_STUDENT = {"static": "teacher_to_student"} | {part: f"similar_to_student.{part}" for part in _PARTS}
TO_TEACHER = {"static": "student_to_teacher"} | {part: f"similar_to_teacher.{part}" for part in _PARTS}


def save_mapper(mapper: VocabMapper, path: str | os.PathLike) -> None:
    """Write the mapper as one .safetensors file. The file appears whole or not at all."""
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "kind": mapper.kind,
        "threshold": repr(float(mapper.threshold)),
    }
    for role, side in (("teacher", mapper.teacher), ("student", mapper.student)):
        metadata[role] = json.dumps({"name": side.name, "size": side.vocab_size, "fingerprint": side.fingerprint})
    arrays = {}
    for direction, names in ((mapper.to_student, TO_STUDENT), (mapper.to_teacher, TO_TEACHER)):
        arrays |= {name: getattr(direction, part) for part, name in names.items()}
    metadata["sha256"] = _digest(metadata, arrays)
    write_whole(Path(path), safetensors.numpy.save(arrays, metadata))


def load_mapper(
    path: str | os.PathLike,
    teacher_forms: TokenForms,
    student_forms: TokenForms,
    threshold: float = DEFAULT_THRESHOLD,
    progress: bool = True,
    kind: str = "em",
) -> VocabMapper:
    """Read a mapper of either layout (a published file is one that ends in .json) for this pair and this θ.

    `kind` is what to build where there is no such file, for the message.

    Raises:
        FileNotFoundError, ValueError: as `read_mapper`, `VocabMapper.with_threshold` and `read_published_json` do.
    """
    if Path(path).suffix.lower() == ".json":
        return read_published_json(path, teacher_forms, student_forms, threshold, progress)
    mapper = read_mapper(path, teacher_forms, student_forms, kind)
    if threshold > mapper.threshold:
        raise ValueError(
            f"{path} holds similar tokens below {mapper.threshold} only, and --simi_threshold {threshold} is asked "
            f"for. Give {mapper.threshold} or less, or build it again: "
            f"{build_command(mapper.kind, path, teacher_forms, student_forms, threshold)}"
        )
    return mapper.with_threshold(threshold)


def read_mapper(
    path: str | os.PathLike,
    teacher_forms: TokenForms | None = None,
    student_forms: TokenForms | None = None,
    kind: str = "em",
) -> VocabMapper:
    """Read a file that `save_mapper` wrote.

    Args:
        path: the file.
        teacher_forms, student_forms: the vocabularies that it must have been built for; both or neither.
        kind: what to build where there is no such file, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another format version or no mapper at all, or was built for other
            tokenizers. Nothing of a damaged file is used.
    """
    path = Path(path)
    command = partial(build_command, teacher_forms=teacher_forms, student_forms=student_forms)
    # Never the name of a file of another sort: whoever follows the message would write over it.
    output = path.with_suffix(".safetensors")
    _require_file(path, command(kind, output))
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            # Before anything is read: another file's tensors may be a model of many gigabytes.
            if metadata.get("format") != FORMAT:
                held = f"its first tensor is {names[0]!r}" if names else "it holds nothing"
                anew = command(kind, "NEW.safetensors")
                raise ValueError(f"{path} is a safetensors file, but no vocabulary mapper ({held}). Build one: {anew}")
            kind, threshold = metadata.get("kind", kind), metadata.get("threshold", DEFAULT_THRESHOLD)
            _check_version(path, metadata.get("format_version", ""), command(kind, output, threshold=threshold))
            arrays = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, TypeError) as error:
        with path.open("rb") as file:
            json_like = file.read(1) in (b"{", b"[")
        hint = " A file in the published layout must have a name that ends in .json." if json_like else ""
        raise ValueError(
            f"{path} is damaged or no vocabulary mapper ({error}).{hint} Build it again: {command(kind, output)}"
        ) from error
    try:
        mapper = _to_mapper(metadata, arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}). Build it again: {command(kind, output)}") from error
    if teacher_forms is not None or student_forms is not None:
        mapper.check_tokenizers(teacher_forms, student_forms, source=str(path))
    return mapper


def _require_file(path: Path, command: str) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Give the mapper file itself, or build one: {command}")
    if not path.is_file():
        raise FileNotFoundError(f"There is no vocabulary mapper at {path}. Build it: {command}")


def _check_version(path: Path, version: str, command: str) -> None:
    if version != str(FORMAT_VERSION):
        newer = version.isdecimal() and int(version) > FORMAT_VERSION
        raise ValueError(
            f"{path} has mapper format version {version!r}, and this code reads {FORMAT_VERSION}. "
            f"{'Update the code, or build it again' if newer else 'Build it again'}: {command}"
        )


def _digest(metadata: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of all that a file says. safetensors itself has no checksum: a wrong id would teach a wrong token."""
    described = [(name, array.dtype.name, array.shape) for name, array in sorted(arrays.items())]
    digest = hashlib.sha256(json.dumps([sorted(metadata.items()), described]).encode())
    for name, *_ in described:
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


def _to_mapper(metadata: dict[str, str], arrays: dict[str, np.ndarray]) -> VocabMapper:
    """What a file of the current version holds. Raises KeyError, TypeError or ValueError where that cannot be."""
    if metadata.pop("sha256", None) != _digest(metadata, arrays):
        raise ValueError("its content is not what its checksum was taken of")
    teacher, student = (json.loads(metadata[role]) for role in ("teacher", "student"))
    return VocabMapper(
        kind=metadata["kind"],
        threshold=float(metadata["threshold"]),
        teacher=Side(teacher["name"], teacher["size"], teacher["fingerprint"]),
        student=Side(student["name"], student["size"], student["fingerprint"]),
        to_student=Direction(**{part: arrays[name] for part, name in TO_STUDENT.items()}),
        to_teacher=Direction(**{part: arrays[name] for part, name in TO_TEACHER.items()}),
    )


def export_json(mapper: VocabMapper, path: str | os.PathLike) -> None:
    """Write the map from teacher to student in the published scripts' layout.

    That is `{"teacher id": student id}` for every teacher id, where 0 means unmapped. The layout has no way to say that
    a token maps to student id 0: such an entry reads as unmapped.
    """
    entries = {str(v): int(u) for v, u in enumerate(np.maximum(mapper.to_student.static, 0))}
    write_whole(Path(path), json.dumps(entries).encode())


def read_published_json(
    path: str | os.PathLike, teacher_forms: TokenForms, student_forms: TokenForms, threshold: float, progress: bool
) -> VocabMapper:
    """Read `{"teacher id": student id}`, 0 = unmapped, and compute what that layout leaves out.

    A teacher id that the file leaves out is unmapped. Warns that nothing in the file says which tokenizers it belongs
    to, and how many ids it leaves out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such JSON, an id in it is outside its vocabulary or stands there twice, or it maps
            nothing.
    """
    path = Path(path)
    command = build_command("em", path.with_suffix(".safetensors"), teacher_forms, student_forms)
    again = f"Build a mapper: {command}"
    layout = f'Expected is {{"teacher id": student id}}, with 0 for an unmapped token. {again}'
    pair = f"{Side.of(teacher_forms)} and {Side.of(student_forms)}"
    _require_file(path, command)
    try:
        entries = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}). {layout}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a JSON {type(entries).__name__}. {layout}")
    teacher_ids = {str(v): v for v in range(len(teacher_forms))}
    static = np.full(len(teacher_forms), -1, dtype=np.int32)
    for key, u in entries.items():
        if key not in teacher_ids or type(u) is not int or not 0 <= u < len(student_forms):
            raise ValueError(
                f"{path}: the entry {key!r}: {u!r} is no pair of ids of {pair}. The file belongs to another pair of "
                f"tokenizers, or is in another layout. {layout}"
            )
        if u != 0:
            static[teacher_ids[key]] = u
    if (static < 0).all():
        raise ValueError(f"{path} maps no token of {pair}: all of its {len(entries)} entries are 0. {again}")
    unsaid = f"{path} does not say which tokenizers it was made for, so it cannot be checked that it fits {pair}."
    absent = [v for key, v in teacher_ids.items() if key not in entries]
    if absent:
        unsaid += f" It leaves out {len(absent)} of the {len(static)} teacher ids, the first of them {absent[0]}; they "
        unsaid += "are taken as unmapped."
    warnings.warn(f"{unsaid} A mapper from get_vocab_mapper/ can be checked: {command}", stacklevel=2)
    return build_published(static, teacher_forms, student_forms, threshold, progress)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object of these pairs. Raises ValueError where a key stands there twice: the last would win unseen."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} stands there {count} times")
    return entries
