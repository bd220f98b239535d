"""The methods, as their shell scripts in script_train/*/ declare them: the one list of the project.

    python script_train/methods.py         # prints it

A script that trains by a method has this line, which bash reads too:

    METHOD=CDM SCRIPT=run_clm_distill_CDM.py PAIR=any ORDER=6

METHOD is the name in tables, SCRIPT the file in modeling/. PAIR says which teachers it takes: none, those with the
student's tokenizer (same), or any. ORDER is the place in tables; methods without one follow, by name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DECLARATION = re.compile(r"^METHOD=(\w+) SCRIPT=(\S+) PAIR=(none|same|any)(?: ORDER=(\d+))?$", re.MULTILINE)
MAPPER_KIND = re.compile(r"^MAPPER_KIND=(?:\$\{MAPPER_KIND:-)?(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: in tables, and of its folder in a comparison.
        script: the Python file that trains by it.
        shell: the shell file with its settings.
        pair: the teachers that it takes: `none`, `same` (those with the student's tokenizer) or `any`.
        mapper_kind: the vocabulary mapper that it needs (`em`, `MinED`, `prefixEM`), or None.
        order: its place in tables.
    """

    name: str
    script: Path
    shell: Path
    pair: str
    mapper_kind: str | None
    order: float


def methods(root: Path = ROOT) -> list[Method]:
    """All methods of the project in `root`, in the order of tables.

    Raises ValueError for a declaration that cannot be read, a script that is not there, or a name that stands twice.
    """
    found: dict[str, Method] = {}
    for shell in sorted((root / "script_train").glob("*/*.sh")):
        text = shell.read_text(encoding="utf-8")
        if not re.search(r"^METHOD=", text, re.MULTILINE):
            continue
        declared = DECLARATION.search(text)
        if declared is None:
            raise ValueError(f"{shell}: its METHOD line has not the form METHOD=… SCRIPT=… PAIR=none|same|any ORDER=…")
        name, script, pair, order = declared.groups()
        if name in found:
            raise ValueError(
                f"METHOD={name} stands in {found[name].shell} and in {shell}. Remove the line from one of them: a "
                "script for another pair or with other settings is no method of its own."
            )
        if not (root / "modeling" / script).is_file():
            raise ValueError(f"{shell}: SCRIPT={script} is not in {root / 'modeling'}.")
        kind = MAPPER_KIND.search(text)
        found[name] = Method(
            name, root / "modeling" / script, shell, pair, kind[1] if kind else None, float(order or math.inf)
        )
    return sorted(found.values(), key=lambda method: (method.order, method.name))


if __name__ == "__main__":
    for method in methods():
        print(f"{method.name:8} {method.pair:5} {method.script.relative_to(ROOT)}  {method.shell.relative_to(ROOT)}")
