"""A run, from the command line to a trained folder: what all methods share around their losses.

run = Run(__doc__, method=MyArguments)      # arguments, and a look at models and data before minutes are spent
run.train(MyTrainer, my_setting=run.method.my_setting)
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import transformers
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from get_vocab_mapper.mapper import VocabMapper, build_command
from get_vocab_mapper.mapper_file import load_mapper
from get_vocab_mapper.pair_mapper import mapper_for_pair
from modeling.errors import InputError, user_input
from modeling.models.language_model import LanguageModel, merged
from modeling.text.batch import Alignment, ResponseCollator
from modeling.text.encoder import require_same_tokenizer
from modeling.text.json_files import require_json_file
from modeling.training.arguments import DataArguments, DistillationArguments, StudentArguments
from modeling.training.checkpoints import (
    STOPPED,
    StopOnSigterm,
    defect,
    last_complete_checkpoint,
    publish,
    saving,
    set_aside,
)
from modeling.training.datasets import load_data
from modeling.training.parsing import parse_arguments
from modeling.training.resume_settings import require_settings, resume_settings
from modeling.training.student import load_student
from modeling.training.teacher import load_teacher
from modeling.training.trainer import ResponseTrainer
from modeling.training.training_arguments import TrainingArguments

logger = logging.getLogger(__name__)


class Run:
    """The arguments of a script, and the models that they name, looked at before their weights are read.

    Args:
        description: of the script, for --help.
        distillation: the dataclass of the teacher's arguments; None without a teacher.
        method: the dataclass of the method's own arguments, where it has some.

    Attributes:
        student_args, distillation, method, data, training: the parsed arguments.
        student, teacher: the models.
    """

    def __init__(
        self,
        description: str,
        distillation: type[DistillationArguments] | None = DistillationArguments,
        method: type | None = None,
    ):
        types = [StudentArguments, distillation, method, DataArguments, TrainingArguments]
        parsed = iter(parse_arguments([kind for kind in types if kind is not None], description))
        self.student_args, self.distillation, self.method, self.data, self.training = (
            None if kind is None else next(parsed) for kind in types
        )
        self._start()
        self.student = self.model(self.student_args.model_name_or_path, "model_name_or_path")
        self.teacher = self.model(self.distillation.teacher_path, "teacher_path") if distillation else None

    def _start(self) -> None:
        """Logging (one process speaks for all) and the seed. Raises InputError where a data file cannot be any."""
        args, data = self.training, self.data
        logging.basicConfig(
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            datefmt="%H:%M:%S",
            level=logging.INFO if args.should_log else logging.ERROR,
            force=True,
        )
        for chatty in ("httpx", "httpx2", "httpcore", "numexpr", "filelock", "fsspec", "numba"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        if args.should_log:
            transformers.utils.logging.set_verbosity_warning()
        set_seed(args.seed)
        for needed, flag, path in (
            (args.do_train, "train_file", data.train_file),
            (args.do_eval or args.eval_strategy != "no", "validation_file", data.validation_file),
        ):
            if needed and path is not None:
                with user_input(f"--{flag}"):
                    require_json_file(path)

    def model(self, path: str, flag: str) -> LanguageModel:
        """A model that a flag names. Raises InputError where it cannot be read, or reads too few tokens."""
        args = self.student_args
        model = LanguageModel(path, flag, args.trust_remote_code, args.attn_implementation)
        model.require_room_for(self.data.block_size)
        return model

    def require_same_tokenizer(self, teacher: LanguageModel | None = None) -> None:
        """Raises InputError unless the student and a teacher (by default the teacher) have one tokenizer."""
        teacher = teacher or self.teacher
        with user_input(str(teacher)):
            require_same_tokenizer(self.student.encoder, teacher.encoder)

    def mapper(self, kind: str, threshold: float, any_kind: bool = False) -> VocabMapper:
        """The mapper of the pair: the file that was named, or one in --mapper_dir, which is built if it is not there.

        Args:
            kind: "em", "mined" or "prefixem".
            threshold: of similar tokens.
            any_kind: whether a named file may be of another kind. (One in the published layout does not say its own.)

        Raises InputError for a file of another pair, a damaged one, or one of another kind.
        """
        sides = self.teacher.encoder.forms, self.student.encoder.forms
        named = self.method.teacher_to_student_id_mapping
        if named is None:
            directory = self.method.mapper_dir or Path(self.training.output_dir).absolute().parent / "mappers"
            with user_input("--mapper_dir"):
                return mapper_for_pair(kind, *sides, directory, threshold)
        with user_input("--teacher_to_student_id_mapping"):
            mapper = load_mapper(named, *sides, threshold, kind=kind)
        if not any_kind and mapper.kind not in (kind, "published"):
            raise InputError(
                f"--teacher_to_student_id_mapping {named} is of the kind {mapper.kind!r}, and {kind!r} is needed. "
                f"Build it: {build_command(kind, 'NEW.safetensors', *sides)}; or leave the flag out."
            )
        return mapper

    def train(self, trainer: type[ResponseTrainer], alignment: Alignment | None = None, **settings) -> None:
        """Loads what the trainer needs, then trains, saves and evaluates, as the arguments say.

        Args:
            trainer: its class.
            alignment: that the method asks the collator for.
            settings: further arguments of the trainer's. A `LanguageModel` among them is a second teacher, which is fed
                the student's tokens.
        """
        encoders = [model.encoder for model in (self.student, self.teacher) if model is not None]
        model = load_student(self.student, self.student_args)
        datasets = load_data(self.data, self.training, encoders)
        if self.teacher is not None:
            teachers = (self.distillation, self.training, datasets)
            settings |= {
                "teacher": load_teacher(self.teacher, *teachers),
                "teacher_vocab_size": self.teacher.vocab_size,
                "kd_alpha": self.distillation.kd_alpha,
                "kd_temperature": self.distillation.kd_temperature,
            }
            for name, setting in settings.items():
                if isinstance(setting, LanguageModel):
                    settings[name] = load_teacher(setting, *teachers, prefix="")
        train_save_evaluate(
            trainer(
                model=model,
                args=self.training,
                train_dataset=datasets[0],
                eval_dataset=datasets[1],
                data_collator=ResponseCollator(*encoders, alignment=alignment),
                processing_class=self.student.encoder.tokenizer,
                student_vocab_size=self.student.vocab_size,
                **settings,
            )
        )


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
    if checkpoint is not None:
        require_settings(Path(checkpoint), resume_settings(trainer.model, trainer.args))
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
    if checkpoint is not None and f"{PREFIX_CHECKPOINT_DIR}-{result.global_step}" == Path(checkpoint).name:
        logger.info("All %d steps had been trained before.", result.global_step)
        del result.metrics["train_loss"]  # the mean over no step
    return result


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
