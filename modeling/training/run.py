"""A run, from the command line to a trained folder: what all methods share around their losses.

run = Run(__doc__, method=MyArguments)      # arguments, and a look at models and data before minutes are spent
run.train(MyTrainer, my_setting=run.method.my_setting)
"""

from __future__ import annotations

import json
import logging
from functools import cached_property
from pathlib import Path

import numpy as np
import transformers
from transformers import set_seed

from get_vocab_mapper.builders import exact_matches
from get_vocab_mapper.mapper import VocabMapper, build_command
from get_vocab_mapper.mapper_file import load_mapper
from get_vocab_mapper.pair_mapper import mapper_for_pair
from modeling.errors import InputError, user_input
from modeling.losses.logits import loss_memory
from modeling.models.language_model import LanguageModel
from modeling.models.output_head import unwrapped
from modeling.text.batch import Alignment, ResponseCollator
from modeling.text.encoder import Encoder, require_same_tokenizer
from modeling.text.ends import shared_ends
from modeling.text.messages import ChatRows
from modeling.text.pair import PairFigures
from modeling.text.rows import are_chat_rows
from modeling.text.sources import require_source
from modeling.training.arguments import DataArguments, DistillationArguments, StudentArguments, check
from modeling.training.course import train_save_evaluate
from modeling.training.datasets import load_data
from modeling.training.parsing import parse_arguments
from modeling.training.resume_settings import noted_settings
from modeling.training.student import load_student
from modeling.training.teacher import load_teacher
from modeling.training.trainer import ResponseTrainer
from modeling.training.training_arguments import TrainingArguments

logger = logging.getLogger(__name__)

PAIR_ROWS = 100  # of the data, for a line about the pair


class Run:
    """The arguments of a script, and the models that they name, looked at before their weights are read.

    Args:
        description: of the script, for --help.
        distillation: the dataclass of the teacher's arguments; None without a teacher.
        method: the dataclass of the method's own arguments, where it has some.

    Attributes:
        student_args, distillation, method, data, training: the parsed arguments.
        student, teacher: the models.
        chat: how the rows become chats; None where they are none.
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
        self.chat = self._chat_rows()
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
                    require_source(path)

    def _chat_rows(self) -> ChatRows | None:
        """How the rows become chats, where the first of them is one or --chat true says so.

        Raises InputError where there are no chats for what is said of them.
        """
        data, flag = self.data, "train_file" if self.training.do_train else "validation_file"
        source = getattr(data, flag)
        with user_input(f"--{flag}"):
            chats = data.chat or are_chat_rows(source)
        groups = (self.student_args, self.distillation, data)
        for name in ("student_chat_template", "teacher_chat_template", "system", "template_kwargs", "train_on"):
            value = next((getattr(group, name) for group in groups if hasattr(group, name)), None)
            remedy = f"{source} holds no messages. Give --chat true too, or leave it out"
            with user_input():
                check(chats or value in (None, "last"), name, value, remedy)
        return ChatRows(data.chat, data.train_on, data.system) if chats else None

    def model(self, path: str, flag: str) -> LanguageModel:
        """A model that a flag names. Raises InputError where it cannot be read, or reads too few tokens."""
        args, file, template, kwargs = self.student_args, None, None, None
        if flag in ("model_name_or_path", "teacher_path"):  # a second teacher is fed the student's tokens
            side, group = ("student", args) if flag == "model_name_or_path" else ("teacher", self.distillation)
            file = getattr(group, f"{side}_chat_template")
            kwargs = None if self.chat is None else json.loads(self.data.template_kwargs or "{}")
        if file is not None:
            with user_input(f"--{side}_chat_template {file}"):
                template = Path(file).read_text(encoding="utf-8")
        model = LanguageModel(path, flag, args.trust_remote_code, args.attn_implementation, template, kwargs)
        model.require_room_for(self.data.block_size)
        return model

    def second_teacher(self, flag: str) -> LanguageModel | None:
        """The one that a flag of the method's names, with the student's tokens; what stops it stops the student too."""
        if (path := getattr(self.method, flag)) is None:
            return None
        second = self.model(path, flag)
        self.require_same_tokenizer(second)
        self.encoders = shared_ends(*self.encoders, second.encoder)[: len(self.encoders)]
        return second

    def require_same_tokenizer(self, teacher: LanguageModel | None = None) -> None:
        """Raises InputError unless the student and a teacher (by default the teacher) have one tokenizer."""
        teacher = teacher or self.teacher
        with user_input(str(teacher)):
            require_same_tokenizer(self.student.encoder, teacher.encoder)

    @cached_property
    def encoders(self) -> list[Encoder]:
        """Those of the student and, where there is one, of the teacher."""
        return shared_ends(*(model.encoder for model in (self.student, self.teacher) if model is not None))

    def mapper(self, kind: str, threshold: float, any_kind: bool = False) -> VocabMapper:
        """The mapper of the pair: the file that was named, or one in --mapper_dir, which is built if it is not there.

        In it, the stop tokens of both sides match by role (see `text.ends`).

        Args:
            kind: "em", "mined" or "prefixem".
            threshold: of similar tokens.
            any_kind: whether a named file may be of another kind. (One in the published layout does not say its own.)

        Raises InputError for a file of another pair, a damaged one, or one of another kind.
        """
        mapper = self._mapper(kind, threshold, any_kind)
        student, teacher = self.encoders
        declared = all(side.stop_ids == (side.tokenizer.eos_token_id,) for side in self.encoders)
        if declared and mapper.kind != "published":
            return mapper  # which is built with what tokenizers declare
        return mapper.with_ends(teacher.stop_ids, student.stop_ids)

    def _mapper(self, kind: str, threshold: float, any_kind: bool) -> VocabMapper:
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

    def shared_tokens(self, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Teacher ids and student ids of the pairs of tokens with equal bytes: `VocabMapper.mutual_pairs` of EM.

        Args:
            special: whether special tokens that match by role or text are pairs too.

        Raises InputError where there is none, and as `mapper`.
        """
        mapper = self.mapper("em", threshold=0.0)  # without the tables of similar tokens
        teacher, student = sides = self.teacher.encoder.forms, self.student.encoder.forms
        is_special = tuple(forms.is_special.copy() for forms in sides)
        for flags, encoder in zip(is_special, reversed(self.encoders)):
            flags[list(encoder.stop_ids)] = True
        pairs = mapper.mutual_pairs(None if special else is_special)
        if mapper.kind == "published":  # which may map tokens of any bytes
            alike = [is_special[0][t] or teacher.forms[t] == student.forms[s] for t, s in zip(*pairs)]
            pairs = tuple(ids[alike] for ids in pairs)
        if not len(pairs[0]):
            raise InputError(
                f"The tokenizers {sides[0].name!r} and {sides[1].name!r} share no token, and this method compares the "
                "shared ones. Take one that needs no vocabulary mapper."
            )
        return pairs

    def train(self, trainer: type[ResponseTrainer], alignment: Alignment | None = None, **settings) -> None:
        """Loads what the trainer needs, then trains, saves and evaluates, as the arguments say.

        Args:
            trainer: its class.
            alignment: that the method asks the collator for.
            settings: further arguments of the trainer's. A `LanguageModel` among them is a `second_teacher`.
        """
        encoders, model = self.encoders, load_student(self.student, self.student_args)
        stop_ids = list(encoders[0].stop_ids)
        unwrapped(model).generation_config.eos_token_id = stop_ids if len(stop_ids) > 1 else stop_ids[0]
        datasets = load_data(self.data, self.training, encoders, self.chat)
        if self.teacher is not None:
            if self.training.should_log:
                rows = next(dataset for dataset in datasets if dataset is not None)
                examples = [rows[i] for i in range(min(PAIR_ROWS, len(rows)))]
                matches = exact_matches(encoders[1].forms, encoders[0].forms)
                figures = PairFigures.of(*encoders, matches, examples)
                logger.info("The pair, on %d rows: %s.", len(examples), figures)
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
        with loss_memory(self.training.loss_memory):
            made = trainer(
                model=model,
                args=self.training,
                train_dataset=datasets[0],
                eval_dataset=datasets[1],
                data_collator=ResponseCollator(*encoders, alignment=alignment),
                processing_class=self.student.encoder.tokenizer,
                student_vocab_size=self.student.vocab_size,
                **settings,
            )
            made.noted_settings = noted_settings(self.data, self.distillation, self.method, self.training)
            train_save_evaluate(made)
