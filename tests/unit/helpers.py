"""What several test modules make and check: random logits, heads, groups, mappers, small models."""

import gc
from functools import cached_property

import numpy as np
import torch
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from get_vocab_mapper.builders import build_em, build_mined, build_prefixem
from get_vocab_mapper.mapper import Direction, Side, VocabMapper
from modeling.losses.logits import ChunkedLogits
from modeling.losses.mapping import group_topk
from modeling.models.output_head import OutputHead
from modeling.run_clm_alm import boundary_tokens
from modeling.run_clm_bpm import boundary_map
from modeling.text.alignment import Groups
from modeling.text.batch import ResponseCollator
from modeling.text.encoder import Encoder, prepare_example
from modeling.training.training_arguments import TrainingArguments
from tests.methods import METHODS, Mappers
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe, sentencepiece_bpe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_logits(*shape, seed=0, dtype=torch.float32, requires_grad=False):
    values = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(requires_grad)


def gradients(values, leaves, **options):
    """Of a sum of the values, each with a weight of its own."""
    weight = torch.linspace(0.5, 2, values.numel(), dtype=torch.float64).view_as(values)
    return torch.autograd.grad((values.double() * weight).sum(), leaves, **options)


def assert_same(result, expected, *leaves, rtol=1e-5, atol=1e-5):
    """Equal values, and equal gradients with respect to the leaves of a weighted sum of them."""
    torch.testing.assert_close(result.double(), expected.double(), rtol=rtol, atol=atol)
    pairs = zip(*(gradients(values, leaves, retain_graph=True) for values in (result, expected)))
    for gradient, expected_gradient in pairs:
        torch.testing.assert_close(gradient, expected_gradient, rtol=rtol, atol=atol)


class Headed:
    """Hidden states and a head, with the logits that they make, computed whole by hand, or in chunks."""

    def __init__(self, seed, n_rows, vocab_size, padding=2, dtype=torch.float64, requires_grad=True, bias=True, **head):
        def tensor(*shape, seed):
            return (random_logits(*shape, seed=seed) / 3).to(dtype).requires_grad_(requires_grad)

        self.hidden, self.weight = tensor(n_rows, 3, seed=seed), tensor(vocab_size + padding, 3, seed=seed + 1)
        self.bias = tensor(vocab_size + padding, seed=seed + 2) if bias else None
        self.head, self.vocab_size = OutputHead(self.weight, self.bias, **head), vocab_size

    @property
    def leaves(self):
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]

    def whole(self):
        logits = F.linear(self.hidden, self.weight, self.bias) * self.head.multiplier / self.head.divisor
        if self.head.cap is not None:
            logits = self.head.cap * torch.tanh(logits / self.head.cap)
        return logits[:, : self.vocab_size]

    def chunked(self, chunk=4):
        return ChunkedLogits(self.hidden, self.head, self.vocab_size, chunk)


class Made(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes; views of a larger one do not count."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # What an operation writes to its `out`, or changes in place, is no new tensor.
        given = {id(tensor) for tensor in (*args, *(kwargs or {}).values())}
        made = [] if function.is_view else result if isinstance(result, (tuple, list)) else [result]
        self.shapes += [tuple(t.shape) for t in made if isinstance(t, torch.Tensor) and id(t) not in given]
        return result


def direction(static, similar=None):
    """A mapper's direction from a list of ids (−1 for none) and {id: [(distance, other id), …]}."""
    rows = [sorted((similar or {}).get(v, [])) for v in range(len(static))]
    entries = [entry for row in rows for entry in row]
    return Direction(
        static=np.array(static, dtype=np.int32),
        indptr=np.cumsum([0, *map(len, rows)]).astype(np.int32),
        indices=np.array([other for _, other in entries], dtype=np.int32),
        distances=np.array([distance for distance, _ in entries], dtype=np.float32),
    )


def groups_of(teacher_sizes, student_sizes):
    """Groups of so many tokens on either side, in one example of as many bytes as there are groups."""
    sides = [np.repeat(np.arange(len(sizes)), sizes).astype(np.int32) for sizes in (teacher_sizes, student_sizes)]
    return Groups.of([[side + 1 for side in sides]], [sides])


def small_model(tokenizer, padding, seed, **changes):
    """A random Llama whose head has some columns more than the tokenizer has tokens; no uniform outputs."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"vocab_size": len(tokenizer) + padding, **sizes, "initializer_range": 0.3, **changes}
    return LlamaForCausalLM(LlamaConfig(**config))


def without_response(example):
    """A prepared example that takes part in the models' passes alone."""
    return {name: [] if name.endswith("byte_ends") else value for name, value in example.items()}


def mapper_of(to_student, to_teacher):
    """A mapper of two `direction`s."""
    sides = [Side("a tokenizer", len(way.static), "") for way in (to_student, to_teacher)]
    return VocabMapper("em", 0.3, *sides, to_student, to_teacher)


def taken_of(teacher, student, groups, topk):
    """For the oracle: of each group the ids of either side's top k that the project takes."""
    k = min(topk, teacher.shape[1], student.shape[1])
    sides = (teacher, groups.teacher), (student, groups.student)
    return zip(*(group_topk(logits, side, k).ids.tolist() for logits, side in sides))


class Pair:
    """Different tokenizers of a teacher and a student, and rows of text, from FIRST_ROW of a data file on."""

    FIRST_ROW = 101

    def __init__(self):
        self.student, self.teacher = Encoder(byte_level_bpe()), Encoder(sentencepiece_bpe())
        self.rows = [{"row": i, "prefix": f"Say {i}: ", "text": t} for i, t in enumerate(SAMPLE_TEXTS, self.FIRST_ROW)]

    @cached_property
    def mappers(self) -> Mappers:
        builders, ends = (build_em, build_mined, build_prefixem), (self.teacher.stop_ids, self.student.stop_ids)
        em, mined, prefixem = (
            build(self.teacher.forms, self.student.forms, progress=False).with_ends(*ends) for build in builders
        )
        sides = self.teacher, self.student
        return Mappers(
            em,
            torch.from_numpy(mined.to_student.static).long(),
            boundary_map(prefixem, self.student, self.teacher),
            tuple(side.forms.is_special for side in sides),
            tuple(torch.from_numpy(boundary_tokens(side.forms, [side.eos_id])) for side in sides),
        )

    def collator(self, method: str) -> ResponseCollator:
        if method == "SFT":
            return ResponseCollator(self.student)
        return ResponseCollator(self.student, self.teacher_of(method), METHODS[method].alignment)

    def teacher_of(self, method: str) -> Encoder:
        return self.student if METHODS[method].same_tokenizer else self.teacher

    def prepared(self, method: str, rows: slice, longest: int | None = None) -> list[dict]:
        """Examples as the collator of a method takes them; of a text so many characters."""
        encoders = [self.student, self.teacher_of(method)]
        return [prepare_example({**row, "text": row["text"][:longest]}, encoders, 512) for row in self.rows[rows]]


def make_trainer(method, pair, folder, temperature=2.0, **arguments):
    """A method's trainer of small models, whose heads are padded, on a CPU."""
    options = {}
    if method != "SFT":
        teacher = pair.teacher_of(method)
        options = {"teacher": small_model(teacher.tokenizer, 7, seed=2), "teacher_vocab_size": len(teacher.forms)}
        options |= {"kd_alpha": 0.3, "kd_temperature": temperature}
    options |= METHODS[method].settings(pair.mappers)
    trainer = METHODS[method].trainer(
        model=small_model(pair.student.tokenizer, 5, seed=1),
        student_vocab_size=len(pair.student.forms),
        args=TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **arguments),
        data_collator=pair.collator(method),
        processing_class=pair.student.tokenizer,
        **options,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def loss_of(trainer, examples, training=True):
    """The loss of a step of these examples, summed over their response tokens; in evaluation, its mean."""
    trainer.model.train(training)
    batch = trainer.data_collator(examples)
    return trainer.compute_loss(trainer.model, batch, num_items_in_batch=1 if training else None)


def inside_ddp(model, use, tmp_path):
    """`use(model as DDP wraps it)`, in a group of one process.

    DDP's reducer goes before the group. As the group's last owner it would wait for the group's threads with the
    interpreter locked, and they may wait for the interpreter.
    """
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        use(DistributedDataParallel(model))
    finally:
        gc.collect()
        distributed.destroy_process_group()
