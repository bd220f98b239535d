"""Whether each method's divergence leads where it says: a student that is taught by it alone must bring it to nothing.

    python -m tests.benchmarks.converge [--methods CDM …] [--steps 400]

A small network learns a few texts by cross-entropy: the teacher. A student with another tokenizer (of FKD and RKD: with
the same one), large enough for these texts, is then trained on them by each method with α = 0. Printed is the
divergence per response token at the start and at the end, by each method's own measure, and the student's
cross-entropy, which was never asked for: what of the text the divergence has taught.
"""

import argparse

import torch
from transformers import LlamaForCausalLM

from modeling.models.output_head import logits_at
from modeling.text.batch import ResponseCollator, Side
from modeling.text.encoder import Encoder
from tests.methods import METHODS
from tests.unit.helpers import Pair, small_model

N_ROWS = 6


def network(encoder: Encoder, seed: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return small_model(encoder.tokenizer, 0, seed, **sizes, initializer_range=0.05)


def logits_of(model: LlamaForCausalLM, side: Side):
    width = model.config.vocab_size
    return logits_at(model, side.predictor_rows, width, input_ids=side.input_ids, attention_mask=side.attention_mask)


def train(model: LlamaForCausalLM, loss, steps: int, rate: float) -> list[float]:
    """The loss at every step, of a rate that falls to 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        values.append(value.item())
    return values


def trained_teacher(encoder, examples: list[dict]) -> LlamaForCausalLM:
    """Of the texts on its own side."""
    side = ResponseCollator(encoder)(examples).student
    model = network(encoder, seed=2)
    train(model, lambda m: torch.nn.functional.cross_entropy(logits_of(m, side), side.labels), 60, 3e-3)
    return model.eval()


def converge(pair: Pair, name: str, steps: int) -> dict[str, float]:
    """`first` and `last` divergence, and the student's cross-entropy before and after."""
    method = METHODS[name]
    encoder = pair.teacher_of(name)
    batch = pair.collator(name)(pair.prepared(name, slice(N_ROWS)))
    own = [
        {k.removeprefix("teacher_"): v for k, v in row.items() if k.startswith("teacher_")} | {"row": row["row"]}
        for row in pair.prepared(name, slice(N_ROWS))
    ]
    teacher = trained_teacher(encoder, own)
    with torch.no_grad():
        given = logits_of(teacher, batch.teacher)
    student = network(pair.student, seed=1)
    ces = []

    def divergence(model):
        losses = method.losses(logits_of(model, batch.student), given, batch, pair.mappers)
        ces.append(losses.ce.detach().mean().item())
        return losses.kd_sum() / len(losses.ce)

    values = train(student, divergence, steps, 3e-3)
    return {"first": values[0], "last": values[-1], "ce_first": ces[0], "ce_last": ces[-1]}


def main() -> None:
    names = [name for name in METHODS if name != "SFT"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    pair = Pair()
    print(f"{'method':10}  {'KD at first':>11}  {'at last':>9}  {'share':>6}  {'CE at first':>11}  {'at last':>7}")
    for name in arguments.methods:
        r = converge(pair, name, arguments.steps)
        cells = [f"{name:10}", f"{r['first']:11.4f}", f"{r['last']:9.5f}", f"{r['last'] / r['first']:6.1%}"]
        print("  ".join([*cells, f"{r['ce_first']:11.2f}", f"{r['ce_last']:7.2f}"]), flush=True)


if __name__ == "__main__":
    main()
