"""Vocabulary mappers: which student token a teacher token stands for, and back.

A mapper holds a static map in both directions (-1 is "none"; 0 is an id like any other) and, for the
contextual step of CDM, the similar tokens of every token that has no exact match. `build_em`, `build_mined`
and `build_prefixem` differ in the static map alone.

Two tokens match exactly
- if both tokenizers declare them for the same role: EOS first, then BOS, PAD, UNK. Role matches are one to
  one: a role is skipped where an earlier one has taken its token on either side, and a token that is matched
  by role takes part in no match by text;
- else if their forms are equal, and both are special or neither is. Where several ids of a side share a form,
  every id of the other side with that form maps to the one that text is written with: the first of them in
  `TokenForms.by_preference`. So every other id of that form has an exact match too, though nothing maps to it.

The file format has one version number. It goes up with every change that would make older code misread a file, or
newer code check less of an older one, or build another map; only the current version is read, for a mapper is built
again in a minute.
  1: the arrays, and what they were built for.
  2: the same, with a SHA-256 of it all.
  3: byte-fallback tokens come behind others of their form, and count in the fingerprints.
"""

import hashlib
import json
import os
import shlex
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from rapidfuzz.distance import Levenshtein

from get_vocab_mapper.near_strings import nearest_strings, similar_strings
from get_vocab_mapper.token_forms import ROLES, TokenForms

FORMAT = "cdm-vocab-mapper"
FORMAT_VERSION = 3
KINDS = ("em", "mined", "prefixem", "published")
DEFAULT_THRESHOLD = 0.3

_BUILDERS = {"em": "get_em_mapper.py", "mined": "get_MinED_mapper.py", "prefixem": "get_prefixEM_mapper.py"}


def build_command(
    kind: str,
    output: str | os.PathLike,
    teacher_forms: TokenForms | None = None,
    student_forms: TokenForms | None = None,
    threshold: float | str = DEFAULT_THRESHOLD,
) -> str:
    """The command line that builds a mapper (of kind "em" where a kind has no builder), for messages."""
    words = ["python", f"get_vocab_mapper/{_BUILDERS.get(kind, _BUILDERS['em'])}"]
    words += ["--teacher", "TEACHER" if teacher_forms is None else teacher_forms.name]
    words += ["--student", "STUDENT" if student_forms is None else student_forms.name]
    words += ["--output", str(output)]
    if str(threshold) != str(DEFAULT_THRESHOLD):
        words += ["--simi_threshold", str(threshold)]
    return shlex.join(words)


@dataclass(frozen=True)
class Side:
    """What a mapper remembers of one of its tokenizers."""

    name: str
    size: int
    fingerprint: str

    @classmethod
    def of(cls, forms: TokenForms) -> "Side":
        return cls(name=forms.name, size=len(forms), fingerprint=forms.fingerprint)

    def __str__(self) -> str:
        return f"{self.name!r} ({self.size} tokens)"


@dataclass(frozen=True)
class SimilarTokens:
    """The similar tokens of every token of one side, as rows of a sparse matrix (CSR).

    Attributes:
        indptr: int32 [V + 1]; row v is `indices[indptr[v]:indptr[v + 1]]`.
        indices: int32 [pairs], ids of the other side; each row by growing distance, then growing id.
        distances: float32 [pairs], normalised Levenshtein distances.
    """

    indptr: np.ndarray
    indices: np.ndarray
    distances: np.ndarray

    def row(self, token_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids and the distances of one token's similar tokens."""
        span = slice(self.indptr[token_id], self.indptr[token_id + 1])
        return self.indices[span], self.distances[span]

    def below(self, threshold: float) -> "SimilarTokens":
        """The same table without the pairs at `threshold` or beyond."""
        keep = self.distances < np.float32(threshold)
        kept_before = np.concatenate(([0], np.cumsum(keep)))
        return SimilarTokens(
            indptr=kept_before[self.indptr].astype(np.int32),
            indices=self.indices[keep],
            distances=self.distances[keep],
        )


@dataclass(frozen=True)
class VocabMapper:
    """A vocabulary mapper between a teacher (V_T tokens) and a student (V_S tokens).

    Attributes:
        kind: "em", "mined", "prefixem", or "published" for a file in the layout of the published scripts.
        threshold: θ; the similar tables hold the pairs at a distance below it.
        teacher, student: the tokenizers that it was built for.
        teacher_to_student: int32 [V_T], a student id or -1.
        student_to_teacher: int32 [V_S], a teacher id or -1.
        similar_to_student: the student tokens similar to each teacher token: rows by teacher id [V_T].
        similar_to_teacher: the teacher tokens similar to each student token: rows by student id [V_S].
    """

    kind: str
    threshold: float
    teacher: Side
    student: Side
    teacher_to_student: np.ndarray
    student_to_teacher: np.ndarray
    similar_to_student: SimilarTokens
    similar_to_teacher: SimilarTokens

    def with_threshold(self, threshold: float) -> "VocabMapper":
        """The mapper with a smaller θ.

        Raises:
            ValueError: `threshold` is above the mapper's own; the pairs between the two were never stored.
        """
        _check_threshold(threshold)
        if threshold > self.threshold:
            raise ValueError(
                f"The mapper holds similar tokens below {self.threshold} only, and {threshold} is asked for. "
                f"Build it again with --simi_threshold {threshold}."
            )
        if threshold == self.threshold:
            return self
        return replace(
            self,
            threshold=threshold,
            similar_to_student=self.similar_to_student.below(threshold),
            similar_to_teacher=self.similar_to_teacher.below(threshold),
        )

    def check_tokenizers(
        self,
        teacher_forms: TokenForms | None = None,
        student_forms: TokenForms | None = None,
        source: str = "the mapper",
    ) -> None:
        """Raise ValueError if a given tokenizer is not the one that the mapper was built for."""
        built_for = {"teacher": self.teacher, "student": self.student}
        sides = (("teacher", teacher_forms), ("student", student_forms))
        given = {role: Side.of(forms) for role, forms in sides if forms is not None}
        wrong = [role for role, side in given.items() if side.fingerprint != built_for[role].fingerprint]
        if not wrong:
            return
        pair = f"the teacher tokenizer {self.teacher} and the student tokenizer {self.student}"
        command = build_command(self.kind, "NEW.safetensors", teacher_forms, student_forms, self.threshold)
        swapped = {"teacher": self.student.fingerprint, "student": self.teacher.fingerprint}
        if {role: side.fingerprint for role, side in given.items()} == swapped:
            raise ValueError(
                f"{source} was built for student→teacher: for {pair}, which have changed places here. Exchange "
                f"the two models, or build a mapper for this direction: {command}"
            )
        here = ", ".join(f"the {role} is {given[role]}, whose tokens differ" for role in wrong)
        raise ValueError(
            f"{source} was built for {pair}, and here {here}. Give the mapper of this pair, or build it: {command}"
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the mapper as one .safetensors file. The file appears whole or not at all."""
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "kind": self.kind,
            "threshold": repr(float(self.threshold)),
            "teacher": json.dumps(vars(self.teacher)),
            "student": json.dumps(vars(self.student)),
        }
        arrays = {
            "teacher_to_student": self.teacher_to_student,
            "student_to_teacher": self.student_to_teacher,
        }
        for name in ("similar_to_student", "similar_to_teacher"):
            for part, array in vars(getattr(self, name)).items():
                arrays[f"{name}.{part}"] = array
        metadata["sha256"] = _digest(metadata, arrays)
        _write_whole(Path(path), safetensors.numpy.save(arrays, metadata))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        teacher_forms: TokenForms | None = None,
        student_forms: TokenForms | None = None,
        kind: str = "em",
    ) -> "VocabMapper":
        """Read a file that `save` wrote.

        Args:
            path: the file.
            teacher_forms, student_forms: the vocabularies that it must have been built for, where given.
            kind: what to build where there is no such file, for the message.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, of another format version or no mapper at all, or one of the given
                tokenizers is not the one it was built for. Nothing of a damaged file is used.
        """
        path = Path(path)
        # Never the name of a file of another sort: whoever follows the message would write over it.
        output = path.with_suffix(".safetensors")
        command = build_command(kind, output, teacher_forms, student_forms)
        _require_file(path, command)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata, names = file.metadata() or {}, list(file.keys())
                # Before anything is read: another file's tensors may be a model of many gigabytes.
                if metadata.get("format") != FORMAT:
                    held = f"its first tensor is {names[0]!r}" if names else "it holds nothing"
                    command = build_command(kind, "NEW.safetensors", teacher_forms, student_forms)
                    raise ValueError(
                        f"{path} is a safetensors file, but no vocabulary mapper ({held}). Build one: {command}"
                    )
                sides = metadata.get("kind", kind), output, teacher_forms, student_forms
                anew = build_command(*sides, threshold=metadata.get("threshold", DEFAULT_THRESHOLD))
                _check_version(path, metadata.get("format_version", ""), anew)
                command = build_command(*sides)
                arrays = {name: file.get_tensor(name) for name in names}
        except (safetensors.SafetensorError, TypeError) as error:
            with open(path, "rb") as file:
                looks_like_json = file.read(1) in (b"{", b"[")
            hint = " A file in the published layout must have a name that ends in .json." if looks_like_json else ""
            raise ValueError(
                f"{path} is damaged or no vocabulary mapper ({error}).{hint} Build it again: {command}"
            ) from error
        if metadata.pop("sha256", None) != _digest(metadata, arrays):
            raise ValueError(
                f"{path} is damaged (its content is not what its checksum was taken of). Build it again: {command}"
            )
        try:
            mapper = cls(
                kind=metadata["kind"],
                threshold=float(metadata["threshold"]),
                teacher=Side(**json.loads(metadata["teacher"])),
                student=Side(**json.loads(metadata["student"])),
                teacher_to_student=arrays["teacher_to_student"],
                student_to_teacher=arrays["student_to_teacher"],
                **{
                    name: SimilarTokens(
                        **{part: arrays[f"{name}.{part}"] for part in ("indptr", "indices", "distances")}
                    )
                    for name in ("similar_to_student", "similar_to_teacher")
                },
            )
            mapper._check_arrays()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}). Build it again: {command}") from error
        mapper.check_tokenizers(teacher_forms, student_forms, source=str(path))
        return mapper

    def _check_arrays(self) -> None:
        """Raise ValueError where an array cannot belong to this pair of vocabularies."""
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}")
        _check_threshold(self.threshold)
        for name, size, other_size in (
            ("teacher_to_student", self.teacher.size, self.student.size),
            ("student_to_teacher", self.student.size, self.teacher.size),
        ):
            _check_ids(name, getattr(self, name), size, -1, other_size)
        for name, size, other_size in (
            ("similar_to_student", self.teacher.size, self.student.size),
            ("similar_to_teacher", self.student.size, self.teacher.size),
        ):
            table = getattr(self, name)
            pairs = len(table.indices)
            _check_ids(f"{name}.indptr", table.indptr, size + 1, 0, pairs + 1)
            _check_ids(f"{name}.indices", table.indices, pairs, 0, other_size)
            if table.indptr[0] != 0 or table.indptr[-1] != pairs or (np.diff(table.indptr) < 0).any():
                raise ValueError(f"the rows of {name} do not cover its entries")
            if table.distances.dtype != np.float32 or table.distances.shape != (pairs,):
                raise ValueError(f"{name} has {pairs} entries and another number of distances")
            # Not the other way round: a NaN is neither below nor above.
            if not ((table.distances >= 0) & (table.distances <= np.float32(self.threshold))).all():
                raise ValueError(f"{name} holds a distance outside 0 .. {self.threshold}")
            steps, id_steps = np.diff(table.distances), np.diff(table.indices)
            falls = 1 + np.flatnonzero((steps < 0) | ((steps == 0) & (id_steps <= 0)))
            if not np.isin(falls, table.indptr).all():
                raise ValueError(f"a row of {name} is not in order")

    def export_json(self, path: str | os.PathLike) -> None:
        """Write teacher_to_student in the published scripts' layout.

        That is `{"teacher id": student id}` for every teacher id, where 0 means unmapped. The layout has no
        way to say that a token maps to student id 0: such an entry reads as unmapped.
        """
        entries = {str(v): int(u) for v, u in enumerate(np.maximum(self.teacher_to_student, 0))}
        _write_whole(Path(path), json.dumps(entries).encode())

    @classmethod
    def from_published_json(
        cls,
        path: str | os.PathLike,
        teacher_forms: TokenForms,
        student_forms: TokenForms,
        threshold: float = DEFAULT_THRESHOLD,
        progress: bool = True,
    ) -> "VocabMapper":
        """Read `{"teacher id": student id}`, 0 = unmapped, and compute what that layout leaves out.

        A teacher id that the file leaves out is unmapped. Warns that nothing in the file says which
        tokenizers it belongs to, and how many ids it leaves out.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no such JSON, an id in it is outside its vocabulary or stands there twice, or it
                maps nothing.
        """
        path = Path(path)
        command = build_command("em", path.with_suffix(".safetensors"), teacher_forms, student_forms)
        again = f"Build a mapper: {command}"
        _require_file(path, command)
        layout = f'Expected is {{"teacher id": student id}}, with 0 for an unmapped token. {again}'
        try:
            entries = json.loads(path.read_bytes(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no valid JSON ({error}). {layout}") from error
        if not isinstance(entries, dict):
            raise ValueError(f"{path} holds a JSON {type(entries).__name__}. {layout}")
        pair = f"{Side.of(teacher_forms)} and {Side.of(student_forms)}"
        static = np.full(len(teacher_forms), -1, dtype=np.int32)
        for key, student_id in entries.items():
            # `007` would be a second name of id 7.
            is_id = key.isascii() and key.isdigit() and (key == "0" or key[0] != "0")
            if not is_id or type(student_id) is not int:
                raise ValueError(f"{path}: the entry {key!r}: {student_id!r} is no pair of ids. {layout}")
            # The number of digits first: Python reads no integer of thousands of them.
            too_large = len(key) > 9 or int(key) >= len(teacher_forms)
            if too_large or not 0 <= student_id < len(student_forms):
                raise ValueError(
                    f"{path}: the entry {key!r}: {student_id} is outside the vocabularies of {pair}. The file "
                    f"belongs to another pair of tokenizers. {again}"
                )
            if student_id != 0:
                static[int(key)] = student_id
        if (static < 0).all():
            raise ValueError(f"{path} maps no token of {pair}: all of its {len(entries)} entries are 0. {again}")
        absent = [v for v in range(len(static)) if str(v) not in entries]
        left_out = (
            f" It leaves out {len(absent)} of the {len(static)} teacher ids, the first of them {absent[0]}; they are "
            "taken as unmapped."
            if absent
            else ""
        )
        warnings.warn(
            f"{path} does not say which tokenizers it was made for, so it cannot be checked that it fits {pair}."
            f"{left_out} A mapper from get_vocab_mapper/ can be checked: {command}",
            stacklevel=2,
        )
        to_student, to_teacher = exact_matches(teacher_forms, student_forms)
        cost = np.zeros(len(teacher_forms), dtype=np.int64)
        for v in np.flatnonzero(static >= 0):
            cost[v] = Levenshtein.distance(teacher_forms.texts[v], student_forms.texts[static[v]])
        back = _invert(teacher_forms, static, to_student, cost, len(student_forms))
        return _assemble(
            "published",
            threshold,
            teacher_forms,
            student_forms,
            static,
            back,
            to_student,
            to_teacher,
            progress,
        )

    def report(self, teacher_forms: TokenForms, student_forms: TokenForms) -> str:
        """What the mapper holds, with examples, as text for a person to read."""
        return _report(self, teacher_forms, student_forms)


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
        FileNotFoundError, ValueError: as `VocabMapper.load`, `VocabMapper.with_threshold` and
            `VocabMapper.from_published_json` do.
    """
    if Path(path).suffix.lower() == ".json":
        return VocabMapper.from_published_json(path, teacher_forms, student_forms, threshold, progress)
    mapper = VocabMapper.load(path, teacher_forms, student_forms, kind)
    if threshold > mapper.threshold:
        raise ValueError(
            f"{path} holds similar tokens below {mapper.threshold} only, and --simi_threshold {threshold} is asked "
            f"for. Give {mapper.threshold} or less, or build it again: "
            f"{build_command(mapper.kind, path, teacher_forms, student_forms, threshold)}"
        )
    return mapper.with_threshold(threshold)


def build_em(
    teacher_forms: TokenForms,
    student_forms: TokenForms,
    threshold: float = DEFAULT_THRESHOLD,
    progress: bool = True,
) -> VocabMapper:
    """EM: a token maps to its exact match, and to nothing without one.

    Args:
        teacher_forms, student_forms: both vocabularies.
        threshold: θ of the similar tables, between 0 and 1.
        progress: show progress bars.
    """
    to_student, to_teacher = exact_matches(teacher_forms, student_forms)
    return _assemble(
        "em",
        threshold,
        teacher_forms,
        student_forms,
        to_student,
        to_teacher,
        to_student,
        to_teacher,
        progress,
    )


def build_mined(
    teacher_forms: TokenForms,
    student_forms: TokenForms,
    threshold: float = DEFAULT_THRESHOLD,
    progress: bool = True,
) -> VocabMapper:
    """MinED: every other teacher token that is not special maps to the nearest student token.

    Nearest is the smallest Levenshtein distance between the texts, spaces kept; ties go to the smaller
    difference in length, then the longer common prefix (both in characters), then the first by preference.
    Special student tokens are no candidates. Source: FuseLLM, arXiv 2401.10491. Arguments as for `build_em`.
    """
    to_student, to_teacher = exact_matches(teacher_forms, student_forms)
    queries = _unmatched(teacher_forms, to_student)
    candidates = student_forms.by_preference[~student_forms.is_special[student_forms.by_preference]]
    static = to_student.copy()
    distance = np.zeros(len(teacher_forms), dtype=np.int64)
    if len(candidates):
        found = nearest_strings(
            [teacher_forms.texts[v] for v in queries],
            [student_forms.texts[u] for u in candidates],
            "nearest tokens" if progress else None,
        )
        static[queries] = candidates[found[:, 0]]
        distance[queries] = found[:, 1]
    inverse = _invert(teacher_forms, static, to_student, distance, len(student_forms))
    back = np.where(to_teacher >= 0, to_teacher, inverse)
    return _assemble(
        "mined", threshold, teacher_forms, student_forms, static, back, to_student, to_teacher, progress
    )


def build_prefixem(
    teacher_forms: TokenForms,
    student_forms: TokenForms,
    threshold: float = DEFAULT_THRESHOLD,
    progress: bool = True,
) -> VocabMapper:
    """PrefixEM: every other teacher token maps to the longest student token that begins it, if there is one.

    That is the longest student form, in bytes, which is a proper prefix of the teacher's; the first id by preference
    where several share that form. Special and empty student tokens are no candidates. Arguments as for `build_em`.
    """
    to_student, to_teacher = exact_matches(teacher_forms, student_forms)
    id_of_form = _preferred_ids(student_forms, ~student_forms.is_special)
    static = to_student.copy()
    for v in _unmatched(teacher_forms, to_student):
        form = teacher_forms.forms[v]
        prefixes = (form[:length] for length in range(len(form) - 1, 0, -1))
        static[v] = next((id_of_form[prefix] for prefix in prefixes if prefix in id_of_form), -1)
    # All that map to one student token share the whole of it, so among them preference alone decides.
    no_cost = np.zeros(len(teacher_forms), dtype=np.int64)
    inverse = _invert(teacher_forms, static, to_student, no_cost, len(student_forms))
    back = np.where(to_teacher >= 0, to_teacher, inverse)
    return _assemble(
        "prefixem", threshold, teacher_forms, student_forms, static, back, to_student, to_teacher, progress
    )


def exact_matches(teacher_forms: TokenForms, student_forms: TokenForms) -> tuple[np.ndarray, np.ndarray]:
    """The exact match of every token of either side; the module's docstring says what an exact match is.

    Returns:
        int32 [V_T] of student ids and int32 [V_S] of teacher ids, -1 for none.
    """
    teacher_role, student_role = {}, {}
    for role in ROLES:
        v, u = teacher_forms.roles.get(role), student_forms.roles.get(role)
        if v is not None and u is not None and v not in teacher_role and u not in student_role:
            teacher_role[v], student_role[u] = u, v
    return (
        _matches_of(teacher_forms, teacher_role, student_forms, student_role),
        _matches_of(student_forms, student_role, teacher_forms, teacher_role),
    )


def _matches_of(
    side: TokenForms, by_role: dict[int, int], other: TokenForms, other_by_role: dict[int, int]
) -> np.ndarray:
    matches = np.full(len(side), -1, dtype=np.int32)
    for special in (False, True):
        takes_part = other.is_special == special
        takes_part[list(other_by_role)] = False
        id_of_form = _preferred_ids(other, takes_part)
        for v in np.flatnonzero(side.is_special == special):
            matches[v] = id_of_form.get(side.forms[v], -1)
    for v, u in by_role.items():
        matches[v] = u
    return matches


def _preferred_ids(forms: TokenForms, takes_part: np.ndarray) -> dict[bytes, int]:
    """The first id by preference of each form, among those that take part (bool [V]). No text, b"", is left out."""
    preferred: dict[bytes, int] = {}
    for token_id in forms.by_preference[takes_part[forms.by_preference]].tolist():
        form = forms.forms[token_id]
        if form:
            preferred.setdefault(form, token_id)
    return preferred


def _unmatched(forms: TokenForms, matches: np.ndarray) -> np.ndarray:
    """Ids of the tokens that have no exact match and may be compared by their text."""
    return np.flatnonzero((matches < 0) & ~forms.is_special)


def _invert(
    teacher_forms: TokenForms, static: np.ndarray, exact: np.ndarray, cost: np.ndarray, student_size: int
) -> np.ndarray:
    """For each student token, the teacher token that maps to it: exact, then lowest cost, then first by preference.

    Args:
        static, exact: int32 [V_T], the map to invert and the exact matches.
        cost: int64 [V_T].
    """
    mapped = teacher_forms.by_preference[static[teacher_forms.by_preference] >= 0]
    inexact = static[mapped] != exact[mapped]
    order = np.lexsort((cost[mapped], inexact))  # stable
    back = np.full(student_size, -1, dtype=np.int32)
    best_last = mapped[order[::-1]]
    back[static[best_last]] = best_last  # of several writes to one place the last one stays
    return back


def _assemble(
    kind: str,
    threshold: float,
    teacher_forms: TokenForms,
    student_forms: TokenForms,
    teacher_to_student: np.ndarray,
    student_to_teacher: np.ndarray,
    exact_to_student: np.ndarray,
    exact_to_teacher: np.ndarray,
    progress: bool,
) -> VocabMapper:
    """Add the similar tables to a static map."""
    _check_threshold(threshold)
    v, u, code, distance_of_code = _similar_pairs(
        teacher_forms,
        _unmatched(teacher_forms, exact_to_student),
        student_forms,
        _unmatched(student_forms, exact_to_teacher),
        threshold,
        progress,
    )
    return VocabMapper(
        kind=kind,
        threshold=float(threshold),
        teacher=Side.of(teacher_forms),
        student=Side.of(student_forms),
        teacher_to_student=teacher_to_student.astype(np.int32),
        student_to_teacher=student_to_teacher.astype(np.int32),
        similar_to_student=_rows(v, u, code, distance_of_code, len(teacher_forms), len(student_forms)),
        similar_to_teacher=_rows(u, v, code, distance_of_code, len(student_forms), len(teacher_forms)),
    )


def _similar_pairs(
    teacher_forms: TokenForms,
    teacher_ids: np.ndarray,
    student_forms: TokenForms,
    student_ids: np.ndarray,
    threshold: float,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All similar pairs among the given ids.

    Returns:
        int32 [pairs] teacher ids, student ids, and the rank of each pair's distance among the distinct
        distances; float32, the distinct distances in growing order.
    """
    # Tokens that differ in spaces alone (`the`, ` the`) share their distances, so each text is searched once.
    teacher_groups = _ids_by_text(teacher_forms, teacher_ids)
    student_groups = _ids_by_text(student_forms, student_ids)
    left, right, lev, total = similar_strings(
        teacher_groups.texts, student_groups.texts, threshold, "similar tokens" if progress else None
    )
    base = int(lev.max(initial=0)) + 1
    present, rank = np.unique(total.astype(np.int64) * base + lev, return_inverse=True)
    del lev, total
    fractions = (present % base) / np.maximum(present // base, 1)
    distances, rank_of_fraction = np.unique(fractions, return_inverse=True)
    rank = rank_of_fraction.astype(np.int32)[rank]

    left_count = teacher_groups.counts[left]
    right_count = student_groups.counts[right]
    copies = left_count * right_count
    pairs = int(copies.sum())
    if pairs > np.iinfo(np.int32).max:
        raise ValueError(f"{pairs} pairs of similar tokens are too many to store. Lower --simi_threshold.")
    nth = np.arange(pairs) - np.repeat(np.cumsum(copies) - copies, copies)
    width = np.repeat(right_count, copies)
    v = teacher_groups.ids[np.repeat(teacher_groups.starts[left], copies) + nth // width]
    u = student_groups.ids[np.repeat(student_groups.starts[right], copies) + nth % width]
    return v, u, np.repeat(rank, copies), distances.astype(np.float32)


@dataclass(frozen=True)
class _Groups:
    """Token ids grouped by spaceless text: group g is `ids[starts[g]:starts[g] + counts[g]]`."""

    texts: list[str]
    ids: np.ndarray
    starts: np.ndarray
    counts: np.ndarray


def _ids_by_text(forms: TokenForms, ids: np.ndarray) -> _Groups:
    members: dict[str, list[int]] = {}
    for token_id in ids:
        members.setdefault(forms.spaceless[token_id], []).append(token_id)
    counts = np.fromiter(map(len, members.values()), dtype=np.int64, count=len(members))
    flat = [token_id for group in members.values() for token_id in group]
    return _Groups(
        texts=list(members),
        ids=np.array(flat, dtype=np.int32),
        starts=np.cumsum(counts) - counts,
        counts=counts,
    )


def _rows(
    row: np.ndarray, column: np.ndarray, rank: np.ndarray, distances: np.ndarray, rows: int, columns: int
) -> SimilarTokens:
    """Sort pairs by row, then distance, then column, into CSR."""
    # One integer holds all three keys: sorting it is many times faster than a sort over three arrays.
    column_bits = int(columns).bit_length()
    rank_bits = len(distances).bit_length()
    key = row.astype(np.uint64) << np.uint64(rank_bits + column_bits)
    key |= rank.astype(np.uint64) << np.uint64(column_bits)
    key |= column.astype(np.uint64)
    key.sort()
    indices = (key & np.uint64((1 << column_bits) - 1)).astype(np.int32)
    key >>= np.uint64(column_bits)
    sorted_rank = (key & np.uint64((1 << rank_bits) - 1)).astype(np.int32)
    counts = np.bincount(row, minlength=rows)
    return SimilarTokens(
        indptr=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        indices=indices,
        distances=distances[sorted_rank],
    )


def _check_threshold(threshold: float) -> None:
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"The similarity threshold must be between 0 and 1, and is {threshold}.")


def _check_ids(name: str, array: np.ndarray, length: int, lowest: int, end: int) -> None:
    if array.dtype != np.int32 or array.shape != (length,):
        raise ValueError(f"{name} is {array.dtype} {array.shape}, not int32 ({length},)")
    if array.size and not lowest <= array.min() <= array.max() < end:
        raise ValueError(f"{name} holds a value outside {lowest} .. {end - 1}")


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


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object of these pairs. Raises ValueError where a key stands there twice: the last would win unseen."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} stands there {count} times")
    return entries


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, then rename it: readers never see half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _report(
    mapper: VocabMapper, teacher_forms: TokenForms, student_forms: TokenForms, examples: int = 10
) -> str:
    to_student, to_teacher = exact_matches(teacher_forms, student_forms)
    lines = [f"{mapper.kind} mapper, similar tokens below {mapper.threshold}"]
    for role, side, static, exact, table in (
        ("teacher", mapper.teacher, mapper.teacher_to_student, to_student, mapper.similar_to_student),
        ("student", mapper.student, mapper.student_to_teacher, to_teacher, mapper.similar_to_teacher),
    ):
        mapped = int((static >= 0).sum())
        row_lengths = np.diff(table.indptr)
        lines += [
            f"{role} {side.name}: {side.size} tokens",
            f"  exact match: {int((exact >= 0).sum())}",
            f"  mapped: {mapped} ({100 * mapped / max(side.size, 1):.1f} %)",
            f"  with similar tokens: {int((row_lengths > 0).sum())}, pairs {len(table.indices)}, "
            f"longest row {int(row_lengths.max(initial=0))}",
        ]

    def example(v: int, u: int, note: str) -> str:
        return f"  {v} {teacher_forms.texts[v]!r} -> {u} {student_forms.texts[u]!r}{note}"

    exact_ids = np.flatnonzero((to_student >= 0) & (mapper.teacher_to_student == to_student))
    static_ids = np.flatnonzero((mapper.teacher_to_student >= 0) & (mapper.teacher_to_student != to_student))
    similar_ids = np.flatnonzero(np.diff(mapper.similar_to_student.indptr))
    lines.append("exact matches, for example:")
    lines += [example(v, to_student[v], "") for v in _spread(exact_ids, examples)]
    if len(static_ids):
        lines.append("other static entries, for example:")
    for v in _spread(static_ids, examples):
        u = mapper.teacher_to_student[v]
        distance = Levenshtein.distance(teacher_forms.texts[v], student_forms.texts[u])
        lines.append(example(v, u, f"  (edit distance {distance})"))
    lines.append("similar tokens, the nearest of each, for example:")
    for v in _spread(similar_ids, examples):
        ids, distances = mapper.similar_to_student.row(v)
        lines.append(example(v, ids[0], f"  (distance {distances[0]:.3f}, of {len(ids)})"))
    return "\n".join(lines)


def _spread(ids: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the ids, evenly spread: the first tokens of a vocabulary are all of one sort."""
    return ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(np.int64)]
