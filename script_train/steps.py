"""Scripts of several steps that resume where they stopped, and never mix what was made with different settings.

    python steps.py OUTPUT ID RESULT NAME [WHAT IT BUILDS ON …] -- COMMAND …      # one step, as in quickstart.sh
    python steps.py --start_over OUTPUT

A step is a command and the last file that it writes, in a folder of its own. Its record, OUTPUT/records/ID.json, says
what it was made with (its settings, and a digest of each thing that it builds on), by which command, when, and how long
it took. A finished step is not done again. An interrupted one is, in the same folder, where a training finds its
checkpoints. What was made with anything else is named, and nothing is run; what was deleted is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "script_eval"))
from eval_records import differences, file_digest, now, read_json, write_json

HERE = Path(__file__).resolve().parent
# How and where a step runs, not what it makes.
NO_SETTINGS = ("--preprocessing_num_workers", "--teacher_cache", "--report_to", "--master_port")


@dataclass
class Step:
    """One command of a plan.

    Attributes:
        id: names the record.
        result: the last file that the command writes.
        name: for people.
        command: its words; settings of a shell script stand in front of it, as in `env EPOCHS=3 bash FILE`.
        builds_on: ids of earlier steps, and names of what is given (data, models).
        spent: a pattern of what beside the result is of no use once that is there.
        expected: how many seconds it may take; 0 where nobody knows.
        text: the command as `as_run` gives it; filled in by the plan, like `made_with`.
        made_with: the settings, and the digests of what it builds on.
    """

    id: str
    result: Path
    name: str
    command: list[str]
    builds_on: Sequence[str] = ()
    spent: str = ""
    expected: float = 0.0
    text: str = ""
    made_with: dict[str, str] = field(default_factory=dict)


class Plan:
    """Steps in order. `digests` holds one for each thing that they build on: what is given, and earlier steps."""

    def __init__(self, output: Path, digests: dict[str, str]):
        self.output = output
        self.digests = dict(digests)
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        step.text = as_run(step.command)
        words = [word.replace(f"{self.output}/", "") for word in shlex.split(step.text)]  # the folder may be moved
        step.made_with = settings_of(words) | {name: self.digests[name] for name in step.builds_on}
        self.digests[step.id] = hashlib.sha256(json.dumps(step.made_with, sort_keys=True).encode()).hexdigest()[:16]
        self.steps.append(step)

    def run(self, first: int = 0, last: int | None = None) -> None:
        """Runs the steps `first` to `last`, the latter not among them.

        Raises ValueError, before anything is run, as `require_same`; exits where a step fails.
        """
        last = len(self.steps) if last is None else last
        self.require_same(last)
        for place in range(first, last):
            self.run_step(self.steps[place], f"[{place + 1}/{len(self.steps)}]", self.seconds_left(place))

    def seconds_left(self, first: int = 0) -> float:
        """What the steps from `first` on may take, as far as anybody knows."""
        return sum(step.expected for step in self.steps[first:] if not self.is_done(step))

    def is_done(self, step: Step) -> bool:
        record = self.record(step)
        return record is not None and record["seconds"] is not None and step.result.is_file()

    def run_step(self, step: Step, number: str, left: float = 0.0) -> None:
        if self.is_done(step):
            print(f"\n{number} {step.name}: done before", flush=True)
            return
        print(f"\n{number} {step.name}" + (f" (in all about {duration(left)} left)" if left else ""), flush=True)
        record = {"name": step.name, "command": step.text, "result": str(step.result.relative_to(self.output))}
        record |= {"made_with": step.made_with, "digest": self.digests[step.id], "began": now()}
        write_json(self.record_file(step.id), {**record, "seconds": None})
        began = time.monotonic()
        status = run(step.command)
        if status:
            print(f"error: {step.name}: exit status {status}.", file=sys.stderr)
            sys.exit(status)
        if not step.result.is_file():
            sys.exit(f"error: {step.name}: the command ended well, but has written no {step.result}.")
        for path in step.result.parent.glob(step.spent) if step.spent else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        seconds = time.monotonic() - began
        write_json(self.record_file(step.id), {**record, "seconds": round(seconds, 1)})
        print(f"{number} {seconds:.0f} s", flush=True)

    def record_file(self, id: str) -> Path:
        return self.output / "records" / f"{id}.json"

    def record(self, step: Step) -> dict | None:
        """That of an earlier call, unless what it made is gone."""
        there = own(self.output, step.result).exists() and self.record_file(step.id).is_file()
        return read_json(self.record_file(step.id)) if there else None

    def require_same(self, last: int | None = None) -> None:
        """Raises ValueError naming how what is there was made, where the first `last` steps would make it otherwise."""
        found: dict[tuple, str] = {}  # difference → the first step that has it
        stale = []
        for step in self.steps[:last]:
            place, record = own(self.output, step.result), self.record(step)
            if record is None and place.exists() and (place.is_file() or any(place.iterdir())):
                raise ValueError(f"{place}: no record says how it was made. Give another OUTPUT, or delete it.")
            if record and (different := differences(record["made_with"], step.made_with)):
                stale.append(place)
                for difference in different:
                    found.setdefault(difference, step.name)
        if not stale:
            return
        ids = {step.id for step in self.steps}
        causes = {key: name for key, name in found.items() if key[0] not in ids} or found
        lines = [f"  {what}: {then!r} then, {today!r} now ({name})" for (what, then, today), name in causes.items()]
        places = [str(place.relative_to(self.output)) for place in stale if not set(place.parents) & set(stale)]
        raise ValueError(
            "\n".join([f"{self.output} holds what was made with other settings:", *lines])
            + "\nGive the earlier ones, or another OUTPUT to keep both. FRESH=1 starts over; to make anew only what "
            f"differs, delete there {' '.join(places)}"
        )


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


def own(output: Path, result: Path) -> Path:
    """What a step has to itself: the folder of its result, or, in `output`, that file alone."""
    return result if result.parent == output else result.parent


def as_run(command: list[str]) -> str:
    """The command as text; of a training script, the Python command that it comes down to, with all flags."""
    if not any(word.endswith(".sh") and HERE in Path(word).resolve().parents for word in command):
        return shlex.join(command)
    done = subprocess.run(command, env={**os.environ, "DRY_RUN": "1"}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.splitlines()[-1].rstrip()


def settings_of(words: list[str]) -> dict[str, str]:
    """`{"command": script, "--flag": values, "NAME": value}` of a command's words."""
    settings, flag = {}, ""
    for word in words:
        if word.startswith("--"):
            flag = word
            settings[flag] = ""
        elif flag:
            settings[flag] = f"{settings[flag]} {word}".lstrip()
        elif word.endswith((".py", ".sh")):
            settings["command"] = Path(word).name
        elif "=" in word:
            name, _, value = word.partition("=")
            settings[name] = value
    return {name: value for name, value in settings.items() if name not in NO_SETTINGS}


def run(command: list[str]) -> int:
    """The command's exit status. SIGTERM and Ctrl-C are passed on to all of its processes; then this one exits too."""
    received: list[int] = []
    child = None

    def pass_on(number: int, _) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            if child is not None:
                os.killpg(child.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    child = subprocess.Popen(command, start_new_session=True)
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if received:
        sys.exit(128 + received[0])
    return status if status >= 0 else 128 - status


def start_over(output: Path) -> None:
    """Deletes what the recorded steps have made, and nothing else."""
    for file in (output / "records").glob("*.json"):
        place = own(output, output / read_json(file)["result"])
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
    shutil.rmtree(output / "records", ignore_errors=True)


def main() -> None:
    if sys.argv[1] == "--start_over":
        start_over(Path(sys.argv[2]))
        return
    end = sys.argv.index("--")
    (output, id, result, name, *builds_on), command = sys.argv[1:end], sys.argv[end + 1 :]
    plan = Plan(Path(output), {})
    for what in builds_on:
        path = Path(what)
        plan.digests[what] = file_digest(path) if path.is_file() else read_json(plan.record_file(what))["digest"]
    number, _, name = name.partition(" ")
    plan.add(Step(id, plan.output / result, name, command, builds_on))
    plan.require_same()
    plan.run_step(plan.steps[0], number)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
