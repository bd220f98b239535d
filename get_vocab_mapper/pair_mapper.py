"""The mapper of a pair of tokenizers: built where there is none yet, and read from then on."""

import itertools
import logging
import os
import warnings
from pathlib import Path

import numpy as np

from get_vocab_mapper.builders import BUILDERS, exact_matches, report
from get_vocab_mapper.mapper import DEFAULT_THRESHOLD, VocabMapper
from get_vocab_mapper.mapper_file import read_mapper, save_mapper
from get_vocab_mapper.token_forms import TokenForms
from modeling.files import locked

logger = logging.getLogger(__name__)


def mapper_for_pair(
    kind: str,
    teacher_forms: TokenForms,
    student_forms: TokenForms,
    directory: str | os.PathLike,
    threshold: float = DEFAULT_THRESHOLD,
) -> VocabMapper:
    """Read `directory/TEACHER-to-STUDENT.KIND.safetensors` if it fits; else build the mapper and write it there.

    TEACHER and STUDENT are the last parts of the tokenizers' names. Where a file of that name is of another pair, it
    stays, and the name gets a number (`TEACHER-to-STUDENT-2`). One that cannot be read, or holds too few similar
    tokens, is replaced. Any number of processes may call this at once: one builds and prints the report, the others
    wait and then read.

    Args:
        kind: "em", "mined" or "prefixem".
        teacher_forms, student_forms: both vocabularies.
        directory: is made where there is none.
        threshold: θ, between 0 and 1.

    Raises:
        ValueError: θ is not between 0 and 1, or allows too many pairs to be stored.
        OSError: no file can be written to the directory.
    """
    stem = "-to-".join(os.path.basename(os.path.abspath(forms.name)) for forms in (teacher_forms, student_forms))
    Path(directory).mkdir(parents=True, exist_ok=True)
    with locked(Path(directory, f"{stem}.{kind}.lock")):
        for number in itertools.count(1):
            name = stem if number == 1 else f"{stem}-{number}"
            path = Path(directory, f"{name}.{kind}.safetensors")
            mapper = _read(path)
            if mapper is None or _is_of(mapper, kind, teacher_forms, student_forms):
                break
        if mapper is None or mapper.threshold < threshold:
            mapper = BUILDERS[kind](teacher_forms, student_forms, threshold)
            save_mapper(mapper, path)
            print(f"{report(mapper, teacher_forms, student_forms)}\nwritten: {path}", flush=True)
        else:
            logger.info("The mapper is read from %s.", path)
    return mapper.with_threshold(threshold)


def _read(path: Path) -> VocabMapper | None:
    try:
        return read_mapper(path)
    except FileNotFoundError:
        pass
    except ValueError as error:
        warnings.warn(f"A new mapper takes the place of one that cannot be used: {error}", stacklevel=3)
    return None


def _is_of(mapper: VocabMapper, kind: str, teacher_forms: TokenForms, student_forms: TokenForms) -> bool:
    """Whether the mapper is of this kind and pair. Its fingerprints say nothing of roles (EOS …), its matches do."""
    exact = exact_matches(teacher_forms, student_forms)
    sides = (
        (mapper.teacher, teacher_forms, mapper.to_student.static, exact.to_student),
        (mapper.student, student_forms, mapper.to_teacher.static, exact.to_teacher),
    )
    return mapper.kind == kind and all(
        side.fingerprint == forms.fingerprint
        and np.array_equal(matches, np.where((matches >= 0) | forms.is_special, static, -1))
        for side, forms, static, matches in sides
    )
