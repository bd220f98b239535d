"""What the trainers of all methods share: predicting logits, the step's normaliser, logging and evaluation.

A method is a subclass whose `compute_loss` says it:

    class MyTrainer(DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            student = self.student_logits(model, inputs)   # z^S [R_S, V_S], one row a response token
            teacher = self.teacher_logits(inputs)          # z^T [R_T, V_T]
            ce = cross_entropy(student, self.response_labels(inputs))
            kd = ...                                       # one weighted divergence a unit
            return self.step_loss(inputs, ce, kd, num_items_in_batch)

Both logit tensors hold the rows that *predict* the response tokens (the causal shift is in the collator's
`positions`), over the columns that the tokenizer really has.
"""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from modeling.checkpoints import ignore_sigterm, resume_settings, saving, write_settings
from modeling.chunked_logits import ChunkedLogits
from modeling.divergences import Logits
from modeling.errors import InputError
from modeling.examples import IGNORED
from modeling.finite_check import GRADIENT, LOSS, STUDENT, TEACHER, FiniteCheck, largest
from modeling.output_head import OutputHead, last_hidden_states, logits_at, unwrapped
from modeling.teachers import Teacher, as_teacher, response_rows


class RunningMeans:
    """Means whose parts come from many micro-batches and ranks: sum of numerators over sum of denominators.

    The sums stay on the device, so recording never waits for it; `reduce` makes the one transfer.
    """

    def __init__(self):
        self.sums: dict[str, list] = {}

    def record(self, name: str, numerator: Tensor | float, denominator: float) -> None:
        sums = self.sums.setdefault(name, [0.0, 0.0])
        sums[0] = sums[0] + (numerator.detach().float() if isinstance(numerator, Tensor) else numerator)
        sums[1] += denominator

    def reduce(self, accelerator) -> dict[str, float]:
        """The means over all ranks (every rank must call), and a fresh start. A mean of nothing is left out."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        device = accelerator.device
        numerators = [torch.as_tensor(self.sums[name][0], dtype=torch.float32, device=device) for name in names]
        denominators = torch.tensor([self.sums[name][1] for name in names], dtype=torch.float32, device=device)
        sums = accelerator.reduce(torch.stack([torch.stack(numerators), denominators], dim=1), reduction="sum").tolist()
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
        n_student_tokens: how many columns of the student's logits are real, `len(tokenizer)`.
    """

    # `step_loss` divides by the tokens of all micro-batches, so the Trainer must not divide by their number again.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, n_student_tokens: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.n_student_tokens = n_student_tokens
        self.student_head: OutputHead | None = None  # found when the model is where it will be trained
        self.router_loss: Tensor | None = None  # of the student's last forward
        self.train_means, self.eval_means = RunningMeans(), RunningMeans()
        self.finite = FiniteCheck(self.accelerator)
        self.recorded: list[Tensor] = []  # numerators of this micro-batch, not yet looked at
        if bool(self.args.deepspeed) != self.is_deepspeed_enabled:
            raise RuntimeError("--deepspeed was given, but accelerate did not start it. Check ACCELERATE_* variables.")

    # ------------------------------------------------------------------------------------------- logits and labels

    def student_logits(self, model, inputs: dict) -> Logits:
        """[R_S, V_S] predicting logits of the response tokens, with gradient, in the model's dtype."""
        batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if self.args.logits_chunk and self.student_head is None:
            self.student_head = OutputHead.of(model)
        handle = model.register_forward_hook(self._keep_router_loss)
        try:
            if self.args.logits_chunk:
                hidden = response_rows(last_hidden_states(model, **batch), inputs["positions"])
                return ChunkedLogits(hidden, self.student_head, self.n_student_tokens, self.args.logits_chunk)
            return logits_at(model, inputs["positions"], self.n_student_tokens, **batch)
        finally:
            handle.remove()

    def _keep_router_loss(self, model, inputs, output) -> None:
        router_loss = getattr(output, "aux_loss", None)
        self.router_loss = router_loss if model.training and isinstance(router_loss, Tensor) else None

    @staticmethod
    def response_labels(inputs: dict, side: str = "") -> Tensor:
        """int64 [R]: the response tokens themselves, the student's, or with side "teacher_" the teacher's."""
        return inputs[f"{side}labels"].flatten()[inputs[f"{side}positions"] + 1]

    # ------------------------------------------------------------------------------------------------ the step's loss

    def step_loss(self, inputs: dict, ce: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Scalar: Σ CE over this micro-batch, per response token of the optimizer step (all micro-batches, all ranks).

        Args:
            ce: float32 [R_S], one a response token.
            num_items_in_batch: response tokens of the whole step; None in evaluation.
        """
        self.require_finite(STUDENT, inputs, ce)
        return self.per_token(inputs, num_items_in_batch, loss=ce.sum(), ce_loss=ce.sum())

    def per_token(self, inputs: dict, num_items_in_batch: Tensor | int | None, **totals: Tensor) -> Tensor:
        """Logs each total (a sum over this micro-batch) per response token, and returns `loss` so, ready for backward.

        Logged values and gradients do not depend on how a step's examples are split into micro-batches and ranks.
        """
        if self.router_loss is not None:
            totals["router_loss"] = self.router_loss * inputs["positions"].numel()
            totals["loss"] = totals["loss"] + router_coefficient(self.model) * totals["router_loss"]
        loss = self._per_token(inputs, num_items_in_batch, totals)
        self.require_finite(LOSS, inputs, torch.stack([loss.detach().float(), *self.recorded]).sum())
        self.recorded = []
        return loss

    def _per_token(self, inputs: dict, num_items_in_batch: Tensor | int | None, totals: dict[str, Tensor]) -> Tensor:
        if self.model.training:
            parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            for name, total in totals.items():
                if name != "loss":  # the Trainer logs that itself
                    self.record(name, total / num_items_in_batch, 1 / parts)
            # Ranks' gradients are averaged, and the logged loss too: the factor turns both means into sums.
            return totals["loss"] / num_items_in_batch * self.accelerator.num_processes

        n_tokens = inputs["positions"].numel()
        for name, total in totals.items():
            self.record(name, total, n_tokens)
        n_bytes = sum(response.n_bytes for response in inputs["responses"])
        self.record("bits_per_byte", totals["ce_loss"] / math.log(2), n_bytes)
        return totals["loss"] / max(n_tokens, 1)

    def record(self, name: str, numerator: Tensor | float, denominator: float) -> None:
        """Logs Σ numerator / Σ denominator over micro-batches and ranks since the last log (or in an evaluation)."""
        (self.train_means if self.model.training else self.eval_means).record(name, numerator, denominator)
        if isinstance(numerator, Tensor):
            self.recorded.append(numerator.detach().float())

    # ------------------------------------------------------------------------------------------- NaN and infinity

    def require_finite(self, what: str, inputs: dict, values: Tensor, side: str = "") -> None:
        """Stops the run, within this step or when it next logs or saves, if a value is NaN or infinite.

        Args:
            what: one of `finite_check.MESSAGES`.
            values: float `[R]`, one a response token of the side, whose row is named; or a scalar for all of them.
            side: "" or "teacher_".
        """
        rows, bad = [response.row for response in inputs["responses"]], ~torch.isfinite(values.detach())
        if values.dim():
            counts = torch.zeros(len(rows), dtype=torch.int32, device=bad.device)
            bad = counts.index_add_(0, inputs[f"{side}example"], bad.int()) > 0
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
        count = sum((batch["labels"] != IGNORED).sum() for batch in batch_samples)
        count = torch.as_tensor(count, dtype=torch.int64, device=device)
        return self.accelerator.reduce(count, reduction="sum").clamp_min(1)

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
                write_settings(folder, resume_settings(self.model, self.args))
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Every rank's last file. trainer_state.json comes next, and means that all is there: so ranks wait here."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, **kwargs) -> None:
        """Nothing where the run goes on from its last step: the Trainer itself would train one step more."""
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
        n_teacher_tokens: how many columns of the teacher's logits are real.
        kd_alpha: α.
    """

    def __init__(self, *args, teacher: Teacher | PreTrainedModel, n_teacher_tokens: int, kd_alpha: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = as_teacher(teacher, n_teacher_tokens)
        self.n_teacher_tokens = n_teacher_tokens
        self.kd_alpha = kd_alpha

    def teacher_logits(self, inputs: dict) -> Logits:
        """[R_T, V_T] predicting logits of the teacher's response tokens, in the teacher's dtype."""
        logits = self.logits_of(self.teacher, inputs, self.n_teacher_tokens)
        self.require_finite(TEACHER, inputs, largest(logits), "teacher_")
        return logits

    def logits_of(self, teacher: Teacher, inputs: dict, n_tokens: int) -> Logits:
        """[R, n_tokens]: what a teacher, this or another, says of the response tokens that it is fed."""
        if self.args.logits_chunk:
            return ChunkedLogits(*teacher.signal(inputs), n_tokens, self.args.logits_chunk)
        return teacher.logits(inputs)

    def step_loss(
        self, inputs: dict, ce: Tensor, kd: Tensor, num_items_in_batch: Tensor | int | None, **parts: Tensor
    ) -> Tensor:
        """Scalar: α·ΣCE + (1 − α)·ΣKD over this micro-batch, per response token of the optimizer step.

        Args:
            ce: float32 [R_S], one a response token.
            kd: float32 [units], each already times the student tokens that its unit covers.
            num_items_in_batch: response tokens of the whole step; None in evaluation.
            parts: float32 [units] each: what else is logged, a sum per response token like KD.
        """
        self.require_finite(STUDENT, inputs, ce)
        ce, kd = ce.sum(), kd.sum()
        loss = self.kd_alpha * ce + (1 - self.kd_alpha) * kd
        parts = {name: part.sum() for name, part in parts.items()}
        return self.per_token(inputs, num_items_in_batch, loss=loss, ce_loss=ce, kd_loss=kd, **parts)


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
        return {name: [] if name.endswith("ends") else value for name, value in self.dataset[0].items()}
