"""The course of a run: training, from a checkpoint where there is one; saving; evaluating."""

from __future__ import annotations

import json
import logging
import resource
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers.trainer_utils import TrainOutput

from modeling.errors import InputError
from modeling.models.language_model import merged
from modeling.models.output_head import unwrapped
from modeling.training.checkpoints import (
    STATE,
    STOPPED,
    StopOnSigterm,
    defect,
    last_complete_checkpoint,
    publish,
    saving,
    set_aside,
)
from modeling.training.resume_settings import changed_settings, require_settings, resume_settings
from modeling.training.trainer import ResponseTrainer
from modeling.training.training_arguments import TrainingArguments

logger = logging.getLogger(__name__)


def train_save_evaluate(trainer: ResponseTrainer) -> None:
    """Trains, saves, evaluates, as the arguments say.

    It resumes from a whole checkpoint in the output folder; --resume_from_checkpoint false starts over.
    A LoRA student is saved as its adapter (with the path of the base model), or, with --merge_lora true, merged.
    Evaluation comes last, when all is saved: it may cast the model (--bf16_full_eval). It is of the model as saved.
    After SIGTERM the training saves a checkpoint and exits with status 143: no model is written, nothing evaluated.
    """
    args = trainer.args
    if args.do_train:
        result = _train(trainer)
        trainer.model.config.use_cache = True  # off in training; whoever generates with the saved model wants it
        # Under a name of its own until it is whole: a run may end while it saves.
        target, part = Path(args.output_dir, "adapter" if args.merge_lora else ""), Path(args.output_dir, ".saving")
        with saving(target):
            trainer.save_model(str(part))
            trainer.accelerator.wait_for_everyone()
            if args.should_save and isinstance(trainer.model, PeftModel):  # which saves the adapter alone
                unwrapped(trainer.model).generation_config.save_pretrained(part)
            if args.should_save:
                publish(part, target)
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", result.metrics)
            trainer.save_state()
        if args.merge_lora:
            model = merged(trainer.model)  # on every rank: what is evaluated is what is saved
            if args.should_save:
                with saving(args.output_dir):
                    model.save_pretrained(part)
                    trainer.processing_class.save_pretrained(part)
                    publish(part, Path(args.output_dir))
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def _train(trainer: ResponseTrainer) -> TrainOutput:
    """The training, from a checkpoint where there is one. Exits the process where SIGTERM ended it."""
    checkpoint = _checkpoint(trainer.args)
    before = 0  # steps
    if checkpoint is not None:
        require_settings(Path(checkpoint), resume_settings(trainer.model, trainer.args))
        if changes := changed_settings(Path(checkpoint), trainer.noted_settings):
            logger.warning(
                "%s is of a run with other settings: %s. What has been trained stays as it is, and so do the learning "
                "rate and the weight decay; all else is new from here on. --resume_from_checkpoint false starts over.",
                *(checkpoint, "; ".join(changes)),
            )
        before = json.loads(Path(checkpoint, STATE).read_text())["global_step"]
    stop = StopOnSigterm()
    trainer.add_callback(stop)
    with stop.listening():
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if stop.stopping:
            # A launcher ends all ranks as soon as one has ended.
            trainer.accelerator.wait_for_everyone()
            logger.warning(
                "SIGTERM: stopped after step %d of %d, which is saved. The same command, started again, resumes there.",
                *(trainer.state.global_step, trainer.state.max_steps),
            )
            sys.exit(STOPPED)
    if result.global_step > before:
        result.metrics.update(costs(result, before, trainer.args.device))
    elif checkpoint is not None:
        logger.info("All %d steps had been trained before.", result.global_step)
        del result.metrics["train_loss"]  # the mean over no step
    return result


def costs(result: TrainOutput, steps_before: int, device: torch.device) -> dict[str, float]:
    """Seconds of each optimizer step, and the most memory of this device in GiB; on a CPU, of this process."""
    if device.type == "cpu":
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = kilobytes * (1 if sys.platform == "darwin" else 1024)
    else:
        peak = torch.accelerator.max_memory_allocated()
    seconds = result.metrics["train_runtime"] / (result.global_step - steps_before)
    return {"train_seconds_per_step": round(seconds, 4), "train_peak_memory_gib": round(peak / 2**30, 3)}


def _checkpoint(args: TrainingArguments) -> str | None:
    wish = args.resume_from_checkpoint
    if wish is not None and wish.lower() in ("false", "no"):
        if args.should_save and (place := set_aside(args.output_dir)) is not None:
            logger.warning("Starting over: the checkpoints of an earlier run in %s are now in %s.", place.parent, place)
        return None
    if wish is not None and wish.lower() not in ("true", "yes"):
        if (what := defect(Path(wish))) is not None:
            raise InputError(f"--resume_from_checkpoint {wish}: {what} Give another checkpoint, or leave the flag out.")
        return wish
    last = last_complete_checkpoint(args.output_dir)
    if wish is not None and last is None:
        raise InputError(f"--resume_from_checkpoint {wish}: {args.output_dir} holds no complete checkpoint.")
    if last is not None:
        logger.info("Resuming from %s. To start over, give --resume_from_checkpoint false.", last)
    return last
