"""What a run leaves on disk: nothing that is cut short is taken for whole, whenever the run ends.

A run may be killed at any moment, told to end (SIGTERM, as schedulers do), or find its disk full. So

- a checkpoint is whole once its trainer_state.json is there, which is written last, by all ranks' consent
  (`ResponseTrainer`), and `defect` finds no file in it that is cut short;
- the trained model is written to a folder of its own and then moved to where it is looked for (`publish`);
- SIGTERM saves a checkpoint after the step that is under way, on all ranks the same one (`StopOnSigterm`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from modeling.errors import InputError
from modeling.files import FULL

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # of a checkpoint, written last
STOPPED = 128 + signal.SIGTERM  # exit status of a run that SIGTERM ended, as shells have it: 143
SAME_SIGNAL = 5.0  # seconds in which another SIGTERM is the first one, passed on by a launcher


# ------------------------------------------------------------------------------------------- checkpoints that are there


def last_complete_checkpoint(folder: str) -> str | None:
    """The whole checkpoint of the latest step in an output folder. Others of later steps are named in the log."""
    for _, checkpoint in sorted(checkpoints(folder), reverse=True):
        what = defect(checkpoint)
        if what is None:
            return str(checkpoint)
        logger.warning("%s is passed over: %s", checkpoint, what)
    return None


def checkpoints(folder: str) -> list[tuple[int, Path]]:
    """`(step, path)` of each folder checkpoint-STEP, whole or not."""
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    return [(int(match[1]), path) for path in Path(folder).glob("*") if (match := name.fullmatch(path.name))]


def defect(checkpoint: Path) -> str | None:
    """Why a run cannot resume from a checkpoint, as a sentence; None where it can. Reads the ends of its files only."""
    if not checkpoint.is_dir():
        return "there is no such folder."
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {STATE}; the run ended while it was saved."
    except ValueError:
        return f"{STATE} is cut short; the run ended while it was saved."
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    for path in files:
        if (path.suffix == ".safetensors" and not _is_whole_safetensors(path)) or (
            path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path)  # torch.save writes zip archives
        ):
            return f"{path.relative_to(checkpoint)} is cut short."
    for index in checkpoint.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError):
            return f"{index.name} is cut short."
        if missing := sorted(shard for shard in shards if not (checkpoint / shard).is_file()):
            return f"{', '.join(missing)} missing."
    if not any(path.suffix in (".safetensors", ".pt", ".bin") and path.name != "training_args.bin" for path in files):
        return "it holds no weights."
    # DeepSpeed's optimizer lies in the folder that the file `latest` names.
    if not ((checkpoint / "latest").exists() or any(checkpoint.glob("optimizer*"))):
        return "it holds the model alone (--save_only_model), without the optimizer to go on with."
    return None


def _is_whole_safetensors(path: Path) -> bool:
    """Whether the file has all the bytes that its header announces. (The weights are not read.)"""
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


def set_aside(folder: str) -> Path | None:
    """Moves the checkpoints of an earlier run into a new subfolder earlier-N: a new run must never resume from them."""
    earlier = checkpoints(folder)
    if not earlier:
        return None
    number = 1
    while (place := Path(folder, f"earlier-{number}")).exists():
        number += 1
    place.mkdir()
    for _, path in earlier:
        path.rename(place / path.name)
    return place


# ------------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """What is written here goes to `path`: where the disk takes no more, InputError names it and says what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _why_full(error, Path(path))
        if reason is None:
            raise
        raise InputError(
            f"{path} could not be saved: {reason} ({str(error).splitlines()[0]}). Earlier checkpoints are as they "
            "were. Make room (--save_total_limit N keeps fewer checkpoints), then start the same command again: it "
            "resumes from the last whole checkpoint."
        ) from error


def _why_full(error: Exception, path: Path) -> str | None:
    number = getattr(error, "errno", None)
    if number is None and (told := re.search(r"os error (\d+)", str(error))):
        number = int(told[1])
    if number is not None:
        return FULL.get(number)
    if "inline_container" not in str(error):  # where torch.save writes; it does not say why that failed
        return None
    while not path.exists():
        path = path.parent
    return f"the disk took no more, {shutil.disk_usage(path).free / 2**20:.0f} MiB are free on it"


def publish(source: Path, target: Path) -> None:
    """Moves a model saved in `source` (with tokenizer and settings) to `target`, on the same disk.

    At no moment does `target` hold a model that would load and is not this one or, whole, the one before: the old
    weights go first, the new ones come last, and of several files the index last.
    """
    target.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_*"):
        for path in target.glob(pattern):
            path.unlink()
    names = sorted(source.iterdir(), key=lambda path: (path.name.endswith(".index.json"), _is_weights(path), path.name))
    for path in names:
        place = target / path.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(path, place)
    source.rmdir()


def _is_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin")


# ------------------------------------------------------------------------------------------------------------- SIGTERM


class StopOnSigterm(TrainerCallback):
    """After SIGTERM the training saves a checkpoint at the end of the step that is under way, and stops.

    All ranks stop after the same step, whichever of them the signal reached. What is due at that step (evaluation, the
    end of an epoch) is done first, so that a resumed run misses nothing. A second SIGTERM ends the process at
    once.
    """

    def __init__(self):
        self.signalled: float | None = None  # when
        self.agreed = False  # all ranks know of it
        self.stopping = False  # and the checkpoint has been asked for

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """In force for the SIGTERM of this process. (Python takes signals in its main thread only.)"""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _on_signal(self, number, frame) -> None:
        now = time.monotonic()
        if self.signalled is None:
            self.signalled = now
            # Not through logging or print: the signal may have come while these were at work.
            os.write(2, b"SIGTERM: a checkpoint is saved after this step. A second SIGTERM ends the run at once.\n")
        elif now - self.signalled > SAME_SIGNAL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = self.agreed or self._reached_any_rank(args)
        # At the last step of an epoch, what the end of the epoch brings comes first.
        if self.agreed and state.epoch != int(state.epoch):
            self._stop(args, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopping:  # the epoch was left before its end
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.agreed:
            self._stop(args, control)

    def on_save(self, args, state, control, **kwargs):
        if self.stopping:  # or the Trainer would now delete all checkpoints but the best, and load that one
            args.save_total_limit, args.load_best_model_at_end = None, False

    def _reached_any_rank(self, args) -> bool:
        if args.world_size == 1:
            return self.signalled is not None
        ranks = torch.tensor([float(self.signalled is not None)], device=args.device)
        torch.distributed.all_reduce(ranks)
        return ranks.item() > 0

    def _stop(self, args, control) -> None:
        if args.save_strategy == SaveStrategy.BEST and control.should_evaluate:
            return  # whether this step is saved, its evaluation decides: one step later
        self.stopping = control.should_save = control.should_training_stop = True


def ignore_sigterm(start, worker: int) -> None:
    """Starts a worker of a data loader, `start` being how it would start otherwise.

    Schedulers and launchers send SIGTERM to every process: without its workers a rank could not end its step.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if start is not None:
        start(worker)
