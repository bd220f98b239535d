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

    def run(self, first: int = 0, last: int | None = None, jobs: int = 1) -> None:
        """Runs the steps `first` to `last`, the latter not among them, up to `jobs` of them at the same time.

        Raises ValueError, before anything is run, as `require_same`; exits where a step fails.
        """
        last = len(self.steps) if last is None else last
        self.require_same(last)
        if jobs > 1:
            self.run_side_by_side(first, last, jobs)
            return
        for place in range(first, last):
            self.run_step(self.steps[place], f"[{place + 1}/{len(self.steps)}]", self.seconds_left(place))

    def run_side_by_side(self, first: int, last: int, jobs: int) -> None:
        """Each step as soon as what it builds on is there. What it prints goes to `records/ID.log`."""
        numbers = {step.id: f"[{place + 1}/{len(self.steps)}]" for place, step in enumerate(self.steps)}
        waiting = [step for step in self.steps[first:last] if not self.is_done(step)]
        slots: dict[int, tuple[Step, subprocess.Popen, dict, float]] = {}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = max(1, cores // jobs)
        with Children() as children:
            while (waiting or slots) and not children.received:
                missing = {step.id for step in waiting} | {step.id for step, *_ in slots.values()}
                ready = [step for step in waiting if not missing & set(step.builds_on)]
                for slot, step in zip([slot for slot in range(jobs) if slot not in slots], ready):
                    waiting.remove(step)
                    print(f"{numbers[step.id]} {step.name}", flush=True)
                    record, port = self.begin(step), int(os.environ.get("MASTER_PORT") or 29500) + slot
                    with open(self.log_file(step.id), "w") as log:
                        env = {"OMP_NUM_THREADS": str(share), **os.environ, "MASTER_PORT": str(port)}
                        child = children.start(step.command, stdout=log, stderr=log, env=env)
                    slots[slot] = (step, child, record, time.monotonic())
                time.sleep(0.1)
                for slot, (step, child, record, began) in list(slots.items()):
                    if child.poll() is not None and not children.received:
                        del slots[slot]
                        if child.returncode:
                            print("".join(self.log_file(step.id).read_text(errors="replace").splitlines(True)[-30:]))
                            print(f"The whole of it: {self.log_file(step.id)}", flush=True)
                            children.stop()
                        seconds = self.finish(step, record, began, status_of(child))
                        left = self.seconds_left(first) / jobs
                        rest = f"; in all about {duration(left)} left" if left else ""
                        print(f"{numbers[step.id]} {step.name}: {seconds:.0f} s{rest}", flush=True)

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
        record, began = self.begin(step), time.monotonic()
        seconds = self.finish(step, record, began, run(step.command))
        print(f"{number} {seconds:.0f} s", flush=True)

    def begin(self, step: Step) -> dict:
        """Writes and returns the record of a step that begins."""
        record = {"name": step.name, "command": step.text, "result": str(step.result.relative_to(self.output))}
        record |= {"made_with": step.made_with, "digest": self.digests[step.id], "began": now()}
        write_json(self.record_file(step.id), {**record, "seconds": None})
        return record

    def finish(self, step: Step, record: dict, began: float, status: int) -> float:
        """Takes note of a step that has ended; how many seconds it took. Exits where it has failed."""
        if status:
            print(f"error: {step.name}: exit status {status}.", file=sys.stderr)
            sys.exit(status)
        if not step.result.is_file():
            sys.exit(f"error: {step.name}: the command ended well, but has written no {step.result}.")
        for path in step.result.parent.glob(step.spent) if step.spent else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        seconds = time.monotonic() - began
        write_json(self.record_file(step.id), {**record, "seconds": round(seconds, 1)})
        return seconds

    def record_file(self, id: str) -> Path:
        return self.output / "records" / f"{id}.json"

    def log_file(self, id: str) -> Path:
        return self.record_file(id).with_suffix(".log")

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


class Children(list[subprocess.Popen]):
    """Commands that run at the same time, each in a process group of its own.

    Inside `with`, SIGTERM and Ctrl-C are passed on to all of their processes; behind it, this process exits too.
    """

    def __init__(self):
        super().__init__()
        self.received: list[int] = []

    def start(self, command: list[str], **options) -> subprocess.Popen:
        self.append(subprocess.Popen(command, start_new_session=True, **options))
        return self[-1]

    def stop(self, number: int = signal.SIGTERM) -> None:
        for child in self:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)

    def __enter__(self) -> Children:
        def pass_on(number: int, _) -> None:
            self.received.append(number)
            self.stop(number)

        self.before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for child in self:
            child.wait()
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received:
            sys.exit(128 + self.received[0])


def status_of(child: subprocess.Popen) -> int:
    """The exit status of a child that has ended; that of a shell where a signal has ended it."""
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def run(command: list[str]) -> int:
    """The command's exit status. Signals as `Children`."""
    with Children() as children:
        child = children.start(command)
        child.wait()
    return status_of(child)


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
