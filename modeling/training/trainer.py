"""What the trainers of all methods share: predicting logits, the step's normaliser, logging and evaluation.

A method is a function of logits and a batch that gives `Losses`, and a subclass whose `compute_loss` calls it:

    class MyTrainer(DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            student = self.student_logits(model, inputs)   # z^S [R_S, V_S], one row a response token
            teacher = self.teacher_logits(inputs)          # z^T [R_T, V_T]
            return self.weigh(my_losses(student, teacher, inputs), inputs, num_items_in_batch)

Both logits hold the rows that *predict* the response tokens (the causal shift is in the batch's `predictor_rows`),
over the columns that the tokenizer really has, with the stop tokens of a side folded into one (see `text.ends`).
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from modeling.errors import InputError
from modeling.losses.logits import ChunkedLogits, Logits, folded, stop_logits
from modeling.losses.result import Losses
from modeling.models.output_head import OutputHead, last_hidden_states, logits_at, response_rows, unwrapped
from modeling.models.teachers import Teacher, as_teacher
from modeling.text.batch import Batch, Side
from modeling.text.ends import end_choice
from modeling.training.checkpoints import ignore_sigterm, saving
from modeling.training.finite_check import GRADIENT, LOSS, STUDENT, TEACHER, FiniteCheck, largest
from modeling.training.resume_settings import resume_settings, write_settings


class RunningMeans:
    """Means whose parts come from many micro-batches and ranks: sum of numerators over sum of denominators.

    The sums stay on the device, so recording never waits for it; `reduce` makes the one transfer.
    """

    def __init__(self):
        self.sums: dict[str, list] = {}

    def record(self, name: str, numerator: Tensor | float, denominator: Tensor | float) -> None:
        sums = self.sums.setdefault(name, [0.0, 0.0])
        sums[0] = sums[0] + (numerator.detach().float() if isinstance(numerator, Tensor) else numerator)
        sums[1] = sums[1] + denominator

    def reduce(self, accelerator) -> dict[str, float]:
        """The means over all ranks (every rank must call), and a fresh start. A mean of nothing is left out."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        device = accelerator.device
        sums = [torch.as_tensor(n, dtype=torch.float32, device=device) for name in names for n in self.sums[name]]
        sums = accelerator.reduce(torch.stack(sums).view(-1, 2), reduction="sum").tolist()
        self.sums = {}
        return {name: numerator / denominator for name, (numerator, denominator) in zip(names, sums) if denominator}


class ResponseTrainer(Trainer):
    """Trains on responses: `L = CE`, one mean over the response tokens of the whole optimizer step.

    A mixture-of-experts student whose configuration asks for it (`output_router_logits`) is trained with its router
    loss as well, `L + router_aux_loss_coef · router_loss` (Switch Transformer, arXiv 2101.03961, equation 4), logged
    without the coefficient. It is no sum over tokens: the model gives one figure for all tokens of a micro-batch,
    prompts included. That of a micro-batch weighs its share of the step's response tokens, so that the weights of a
    step sum to 1 however it is split; how evenly the experts are used within a micro-batch still depends on the split.
    Evaluation leaves it out.

    Args beyond those of `Trainer`:
        student_vocab_size: how many columns of the student's logits are real, `len(tokenizer)`.
    """

    # `weigh` divides by the tokens of all micro-batches, so the Trainer must not divide by their number again.
    loss_is_scaled_for_ga = True
    kd_alpha = 1.0

    def __init__(self, *args, student_vocab_size: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.student_vocab_size = student_vocab_size
        self.noted_settings: dict[str, str] = {}  # `resume_settings.noted_settings`, for the checkpoints
        self.student_head: OutputHead | None = None  # found when the model is where it will be trained
        self.router_loss: Tensor | None = None  # of the student's last forward
        self.end_choice: Tensor | None = None  # likewise: what cross-entropy adds, float [R_S]
        self.train_means, self.eval_means = RunningMeans(), RunningMeans()
        self.finite = FiniteCheck(self.accelerator)
        if bool(self.args.deepspeed) != self.is_deepspeed_enabled:
            raise RuntimeError("--deepspeed was given, but accelerate did not start it. Check ACCELERATE_* variables.")

    # -------------------------------------------------------------------------------------------- logits and the loss

    def student_logits(self, model, batch: Batch) -> Logits:
        """[R_S, V_S] predicting logits of the response tokens, with gradient, in the model's dtype."""
        side = batch.student
        inputs = {"input_ids": side.input_ids, "attention_mask": side.attention_mask}
        if self.args.logits_chunk and self.student_head is None:
            self.student_head = OutputHead.of(model)
        handle = model.register_forward_hook(self._keep_router_loss)
        try:
            if self.args.logits_chunk:
                hidden = response_rows(last_hidden_states(model, **inputs), side.predictor_rows)
                logits = ChunkedLogits(hidden, self.student_head, self.student_vocab_size, self.args.logits_chunk)
            else:
                logits = logits_at(model, side.predictor_rows, self.student_vocab_size, **inputs)
        finally:
            handle.remove()
        self.end_choice = None
        if len(side.stop_ids) > 1:
            said = side.input_ids.flatten()[side.predictor_rows + 1]
            self.end_choice = end_choice(stop_logits(logits, side.stop_ids), side.stop_ids, said)
        return folded(logits, side.stop_ids)

    def _keep_router_loss(self, model, inputs, output) -> None:
        router_loss = getattr(output, "aux_loss", None)
        self.router_loss = router_loss if model.training and isinstance(router_loss, Tensor) else None

    def weigh(self, losses: Losses, batch: Batch, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Scalar: α·ΣCE + (1 − α)·ΣKD over this micro-batch, per response token of the optimizer step.

        The step is all its micro-batches on all ranks: logged values and gradients do not depend on how its examples
        are split into them.

        Args:
            losses: of this micro-batch. A unit of KD counts the student tokens that it covers.
            num_items_in_batch: response tokens of the whole step; None in evaluation.
        """
        if self.end_choice is not None:
            losses = replace(losses, ce=losses.ce + self.end_choice)
        self.require_finite(STUDENT, batch.student, batch.rows, losses.ce)
        ce = losses.ce.sum()
        loss, totals = ce, {"ce_loss": ce, **losses.parts}
        if losses.kd is not None:
            totals["kd_loss"] = kd = losses.kd_sum()
            loss = self.kd_alpha * ce + (1 - self.kd_alpha) * kd
        if self.router_loss is not None:
            totals["router_loss"] = self.router_loss * len(losses.ce)
            loss = loss + router_coefficient(self.model) * totals["router_loss"]
        for name, (total, count) in losses.means.items():
            self.record(name, total, count)
        tensors = [loss, *totals.values(), *(total for total, _ in losses.means.values() if torch.is_tensor(total))]
        self.require_finite(LOSS, None, batch.rows, torch.stack([t.detach().float() for t in tensors]).sum())

        if self.model.training:
            parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            for name, total in totals.items():
                self.record(name, total / num_items_in_batch, 1 / parts)
            # Ranks' gradients are averaged, and the logged loss too: the factor turns both means into sums.
            return loss / num_items_in_batch * self.accelerator.num_processes

        n_tokens = len(losses.ce)
        for name, total in {"loss": loss, **totals}.items():  # in training, the Trainer logs the loss itself
            self.record(name, total, n_tokens)
        self.record("bits_per_byte", ce / math.log(2), sum(batch.n_bytes))
        return loss / max(n_tokens, 1)

    def record(self, name: str, numerator: Tensor | float, denominator: Tensor | float) -> None:
        """Logs Σ numerator / Σ denominator over micro-batches and ranks since the last log (or in an evaluation)."""
        (self.train_means if self.model.training else self.eval_means).record(name, numerator, denominator)

    # ------------------------------------------------------------------------------------------- NaN and infinity

    def require_finite(self, what: str, side: Side | None, rows: list[int], values: Tensor) -> None:
        """Stops the run, within this step or when it next logs or saves, if a value is NaN or infinite.

        Args:
            what: one of `finite_check.MESSAGES`.
            side: whose response tokens the values belong to; None for a scalar for all of them.
            rows: of the data file, of the batch's examples.
            values: float `[R]`, one a response token, or a scalar.
        """
        bad = ~torch.isfinite(values.detach())
        if side is not None:
            counts = torch.zeros(len(rows), dtype=torch.int32, device=bad.device)
            bad = counts.index_add_(0, side.example, bad.int()) > 0
        self.finite.add(what, self.state.global_step + 1, self.model.training, rows, bad.reshape(-1))

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs) -> None:
        """The end of a step or epoch. Nothing that is not finite is logged as if it were, evaluated or saved."""
        if grad_norm is not None and not self.accelerator.optimizer_step_was_skipped:  # loss scaling skips an overflow
            bad = ~torch.isfinite(torch.as_tensor(grad_norm))
            self.finite.add(GRADIENT, self.state.global_step, True, [], bad.reshape(1))
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.finite.look_together()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def train(self, *args, **kwargs) -> TrainOutput:
        output = super().train(*args, **kwargs)
        self.finite.look_together()
        return output

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """int64 scalar: the response tokens of the step, over its micro-batches and all ranks (at least 1)."""
        count = torch.tensor(sum(len(batch.student.labels) for batch in batch_samples), device=device)
        return self.accelerator.reduce(count, reduction="sum").clamp_min(1)

    def _prepare_inputs(self, batch: Batch) -> Batch:
        return batch.to(self.args.device, non_blocking=True)

    # The Trainer asks these of a dictionary of the model's arguments.

    def floating_point_ops(self, batch: Batch) -> int:
        return super().floating_point_ops({"input_ids": batch.student.input_ids})

    def _track_num_input_tokens(self, batch: Batch) -> None:
        side = batch.student
        super()._track_num_input_tokens({"input_ids": side.input_ids, "attention_mask": side.attention_mask})

    # ------------------------------------------------------------------------------------------- logging, evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.train_means.reduce(self.accelerator)
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------- checkpoints, data loading

    def _save_checkpoint(self, model, trial) -> None:
        """A checkpoint of this step. What an earlier run left under its name goes first: old and new never mix."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with saving(folder):
            if self.args.should_save:
                if folder.exists():
                    shutil.rmtree(folder)
                write_settings(folder, self.noted_settings | resume_settings(self.model, self.args))
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Every rank's last file. trainer_state.json comes next, and means that all is there: so ranks wait here."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, **kwargs) -> None:
        """Nothing where the run resumes at its last step: the Trainer itself would train one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        loader.worker_init_fn = partial(ignore_sigterm, loader.worker_init_fn)
        return loader

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Every example exactly once over all ranks, and as many batches on each (ZeRO-3 needs them in step)."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        shard = EvenShard(dataset, self.accelerator.process_index, self.accelerator.num_processes)
        return DataLoader(
            shard,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            worker_init_fn=partial(ignore_sigterm, None),
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None) -> tuple[None, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, inputs)  # records what evaluation_loop reports
        return None, None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """CE, KD and the rest over the whole set; perplexity a token; bits a byte, which compares across tokenizers."""
        self.eval_means = RunningMeans()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        self.finite.look_together()
        means = self.eval_means.reduce(self.accelerator)
        if "ce_loss" in means:
            means["perplexity"] = math.exp(min(means["ce_loss"], 700.0))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return EvalLoopOutput(None, None, output.metrics, len(dataloader.dataset.dataset))


def router_coefficient(model: PreTrainedModel) -> float:
    """What a mixture-of-experts model multiplies its router loss with. Raises InputError where it does not say."""
    inner = unwrapped(model)
    for place in (inner, inner.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(coefficient := getattr(place, name, None), (int, float)):
                return coefficient
    raise InputError(
        f"{type(inner).__name__} gives a router loss (output_router_logits in its config.json), and names no "
        "router_aux_loss_coef for it. Name one there, or set output_router_logits to false."
    )


class DistillationTrainer(ResponseTrainer):
    """A `ResponseTrainer` with a teacher: `L = α·CE + (1 − α)·KD`.

    Args beyond those of `ResponseTrainer`:
        teacher: a model (frozen here, in eval mode; it stays on the devices that it is on), or its stored signals.
        teacher_vocab_size: how many columns of the teacher's logits are real.
        kd_alpha: α.
        kd_temperature: τ.
    """

    def __init__(
        self,
        *args,
        teacher: Teacher | PreTrainedModel,
        teacher_vocab_size: int,
        kd_alpha: float,
        kd_temperature: float,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.teacher = as_teacher(teacher, teacher_vocab_size)
        self.teacher_vocab_size = teacher_vocab_size
        self.kd_alpha, self.kd_temperature = kd_alpha, kd_temperature

    def teacher_logits(self, batch: Batch) -> Logits:
        """[R_T, V_T] predicting logits of the teacher's response tokens, in the teacher's dtype."""
        return self.logits_of(self.teacher, batch.teacher, self.teacher_vocab_size, batch.rows)

    def logits_of(self, teacher: Teacher, side: Side, vocab_size: int, rows: list[int]) -> Logits:
        """[R, vocab_size]: what a teacher, this or another, says of the response tokens of these rows."""
        if self.args.logits_chunk:
            logits = ChunkedLogits(*teacher.signal(side), vocab_size, self.args.logits_chunk)
        else:
            logits = teacher.logits(side)
        logits = folded(logits, side.stop_ids)
        self.require_finite(TEACHER, side, rows, largest(logits))
        return logits


class EvenShard(Dataset):
    """One rank's share of a dataset. Shares that would be shorter are filled with an example that has no response."""

    def __init__(self, dataset, rank: int, ranks: int):
        self.dataset, self.rank, self.ranks = dataset, rank, ranks

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.ranks)

    def __getitem__(self, index: int) -> dict:
        place = index * self.ranks + self.rank
        if place < len(self.dataset):
            return self.dataset[place]
        return {name: [] if name.endswith("byte_ends") else value for name, value in self.dataset[0].items()}
