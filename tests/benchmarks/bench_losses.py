"""How long each method's loss takes, forward and backward from the logits, and what part of CDM's is not arithmetic.

    CDM_REAL_DIR=… python -m tests.benchmarks.bench_losses [--pairs phi-3:qwen2 …] [--lengths 256 512 …] [--device cuda]

Timed are the methods' functions and the backward pass to the student's logits. The logits are given: the models' own
time does not count. The responses are real ones (Dolly), joined to about the wanted number of student
tokens in one example and tokenised by real tokenizers; the logits are random, with the real token the likeliest in most
places. FKD and RKD have a teacher with the student's tokenizer, so of the student's width. The methods take turns, and
every time is a median.

    ratio        to FKD
    torch CE     torch.nn.functional.cross_entropy alone, the floor
    peak         on an accelerator: memory beyond the logits and their gradient, in units of the student's logits
    KD alone     CDM's divergence with all its steps but without cross-entropy, to the forward KL alone
    host         share of CDM's time in DTW, groups, pair search and copies between host and device
    dtw          share of CDM's time in DTW alone
    oracle       seconds of the slow oracle, CDM as its definition reads (tests/reference), up to --oracle_max tokens
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoTokenizer

from get_vocab_mapper.builders import BUILDERS
from get_vocab_mapper.mapper import VocabMapper
from get_vocab_mapper.mapper_file import load_mapper, save_mapper
from get_vocab_mapper.token_forms import TokenForms
from modeling.losses import alignment, mapping
from modeling.losses.alignment import entropy_dtw
from modeling.losses.divergences import kl_rows
from modeling.losses.logits import entropy
from modeling.losses.mapping import contextual_kl
from modeling.losses.rows import StudentRows
from modeling.run_clm_alm import boundary_tokens
from modeling.run_clm_bpm import boundary_map
from modeling.text.alignment import Groups
from modeling.text.batch import Batch, ResponseCollator
from modeling.text.encoder import Encoder, prepare_example
from modeling.text.rows import alpaca_prompt
from tests.benchmarks import PAIRS
from tests.benchmarks.device import add_device_argument, peak_bytes_of, seconds
from tests.methods import METHODS, ONE_A_SCRIPT, Mappers
from tests.reference import cdm_oracle

PADDED = {"qwen2": 151_936}  # columns of the family's head, where it has more than the tokenizer has tokens
LEAST_REPEATS, MOST_SECONDS = 3, 60  # of a slow method: no more repeats than that many, once they took so long


# --------------------------------------------------------------------------------------------------- real responses


class Pair:
    """Two real tokenizers, and examples of about so many student tokens."""

    def __init__(self, folder: Path, name: str, mappers: Path):
        self.name = name
        self.teacher_name, self.student_name = name.split(":")
        self.teacher, self.student = (
            Encoder(AutoTokenizer.from_pretrained(folder / "tokenizers" / side)) for side in name.split(":")
        )
        with (folder / "data/dolly/databricks-dolly-15k.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        self.text = "\n".join(row["response"] for row in rows[:1000])
        self.mappers = mappers

    def mapper(self, kind: str) -> VocabMapper:
        """Built once, and then read from the folder of mappers."""
        file = self.mappers / f"{self.teacher_name}-to-{self.student_name}.{kind}.safetensors"
        if not file.exists():
            save_mapper(BUILDERS[kind](self.teacher.forms, self.student.forms), file)
        return load_mapper(file, self.teacher.forms, self.student.forms, threshold=0.3 if kind == "em" else 0.0)

    def example(self, n_tokens: int, teacher: Encoder) -> dict:
        ends = self.student.encode("", self.text[: 12 * n_tokens]).byte_ends
        text = self.text.encode()[: ends[n_tokens - 2]].decode("utf-8", "ignore")  # and EOS
        row = {"row": 1, "prefix": alpaca_prompt("Tell me more."), "text": text}
        return prepare_example(row, [self.student, teacher], block_size=16 * n_tokens)

    def width(self, side: str) -> tuple[int, int]:
        """Columns of the side's head, and how many of them are tokens."""
        n_tokens = len(getattr(self, side).forms.forms)
        return PADDED.get(getattr(self, f"{side}_name"), n_tokens), n_tokens


def given_logits(labels: Tensor, width: tuple[int, int], seed: int, dtype: torch.dtype) -> Tensor:
    """`[R, tokens]`, a view of a padded head: noise of deviation 2, and the labels higher by about 10."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.empty(len(labels), width[0], dtype=dtype).normal_(0, 2, generator=random)
    boost = torch.empty(len(labels), 1, dtype=dtype).normal_(10, 3, generator=random)
    return logits.scatter_add_(1, labels[:, None], boost)[:, : width[1]]


# ------------------------------------------------------------------------------------------------------- the timing


class HostTime(ExitStack):
    """Measures how long CDM's calls of the functions below take, wherever they are called."""

    PLACES = ((alignment, "dtw_groups"), (Groups, "of"), (Groups, "to"), (mapping, "match_pairs"))

    def __enter__(self) -> dict[str, float]:
        spent = {name: 0.0 for _, name in self.PLACES}
        for place, name in self.PLACES:
            self.enter_context(mock.patch.object(place, name, timed(getattr(place, name), name, spent)))
        return spent


def timed(function: Callable, name: str, spent: dict[str, float]) -> Callable:
    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return result

    return call


def measure(
    pair: Pair, n_tokens: int, repeats: int, dtype: torch.dtype, methods: list[str], kind: str, device: str = "cpu"
) -> dict:
    examples = {same: pair.example(n_tokens, pair.student if same else pair.teacher) for same in (False, True)}

    def batch_of(alignment: str | None, same_tokenizer: bool = False) -> Batch:
        teacher = pair.student if same_tokenizer else pair.teacher
        return ResponseCollator(pair.student, teacher, alignment)([examples[same_tokenizer]]).to(device)

    batch = batch_of("entropy_dtw" if kind == "dtw" else "byte")
    labels, teacher_labels = batch.student.labels, batch.teacher.labels

    def logits(labels: Tensor, side: str, seed: int) -> Tensor:
        return given_logits(labels.cpu(), pair.width(side), seed, dtype).to(device)

    student = logits(labels, "student", 0).requires_grad_()
    teachers = {False: logits(teacher_labels, "teacher", 1), True: logits(labels, "student", 2)}
    sides = pair.teacher, pair.student
    mappers = Mappers(
        pair.mapper("em") if {"CDM", "Strict", "GOLD", "SimCT"} & set(methods) else None,
        torch.from_numpy(pair.mapper("mined").to_student.static).long().to(device) if "MinED" in methods else None,
        boundary_map(pair.mapper("prefixem"), pair.student, pair.teacher) if "BPM" in methods else None,
        tuple(side.forms.is_special for side in sides),
        tuple(torch.from_numpy(boundary_tokens(side.forms, [side.eos_id])).to(device) for side in sides),
        device,
    )

    def loss_of(name: str) -> Callable[[], Tensor]:
        method = METHODS[name]
        given = batch if name == "CDM" else batch_of(method.alignment, method.same_tokenizer)
        return lambda: method.losses(student, teachers[method.same_tokenizer], given, mappers).mean()

    losses = {name: loss_of(name) for name in methods}
    losses["torch CE"] = lambda: torch.nn.functional.cross_entropy(student.float(), labels)
    if "CDM" in methods:  # the divergences without cross-entropy

        def contextual_kd() -> Tensor:
            rows, groups = StudentRows(student, labels), batch.groups
            if groups is None:
                groups = entropy_dtw(rows.entropy(), entropy(teachers[False]), batch)
            return (contextual_kl(rows, teachers[False], groups, mappers.em).kd * groups.student.size).sum()

        def forward_kl() -> Tensor:
            return StudentRows(student, labels).read(lambda s, t: kl_rows(t, s, 2.0), teachers[True]).sum()

        losses |= {"CDM, KD alone": contextual_kd, "FKD, KD alone": forward_kl}

    times: dict[str, list[float]] = {name: [] for name in losses}
    host: list[tuple[float, float]] = []
    for repeat in range(repeats + 1):  # the first one warms up
        for name, loss in losses.items():
            if len(times[name]) >= LEAST_REPEATS and sum(times[name]) > MOST_SECONDS:
                continue
            with HostTime() as spent:
                took = seconds(lambda loss=loss: torch.autograd.grad(loss(), student), device)
            if repeat:
                times[name].append(took)
                if name == "CDM":
                    host.append((sum(spent.values()) / took, spent["dtw_groups"] / took))
    result = {
        "pair": pair.name,
        "student_tokens": len(labels),
        "teacher_tokens": len(teacher_labels),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
    }
    if device != "cpu":
        result["peak"] = {
            name: peak_bytes_of(lambda loss=loss: torch.autograd.grad(loss(), student)) / student.nbytes - 1
            for name, loss in losses.items()
        }
    if host:
        result["host"], result["dtw"] = (statistics.median(share) for share in zip(*host))
    return result


# ------------------------------------------------------------------------------------------------------- the oracle


def oracle_seconds(pair: Pair, n_tokens: int) -> float:
    mapper = pair.mapper("em")
    batch = ResponseCollator(pair.student, pair.teacher)([pair.example(n_tokens, pair.teacher)])
    names = [distinct_texts(side.forms) for side in (pair.teacher, pair.student)]
    sides = []
    for i, (labels, side, way) in enumerate(
        (
            (batch.teacher.labels, "teacher", mapper.to_student),
            (batch.student.labels, "student", mapper.to_teacher),
        )
    ):
        own, other = names[i], names[1 - i]
        sides.append(
            cdm_oracle.Side(
                vocabulary=own,
                tokens=labels.tolist(),
                logits=given_logits(labels, pair.width(side), i, torch.float32).double(),
                match={own[v]: other[u] for v, u in enumerate(way.static) if u >= 0},
                similar={
                    name: {other[u]: d for u, d in zip(*(part.tolist() for part in way.row(v)))}
                    for v, name in enumerate(own)
                },
            )
        )
    return seconds(lambda: cdm_oracle.cdm(*sides, 100, 1.0))


def distinct_texts(forms: TokenForms) -> list[str]:
    """The oracle tells tokens apart by their texts."""
    seen: set[str] = set()
    texts = []
    for i, text in enumerate(forms.texts):
        texts.append(f"{text}\0{i}" if text in seen else text)
        seen.add(text)
    return texts


# ------------------------------------------------------------------------------------------------------------- main


def row_of(result: dict, methods: list[str]) -> str:
    times = result["seconds"]
    cells = [f"{result['pair']:16}", f"{result['student_tokens']:6}", f"{result['teacher_tokens']:6}"]
    for method in methods:
        ratio = f" ({times[method] / times['FKD']:.2f})" if "FKD" in methods else ""
        cells.append(f"{1000 * times[method]:8.1f}{ratio:>7}")
    cells.append(f"{1000 * times['torch CE']:8.1f}")
    if "CDM" in methods:
        cells.append(f"{times['CDM, KD alone'] / times['FKD, KD alone']:8.2f}")
        cells += [f"{result['host']:6.1%}", f"{result['dtw']:6.1%}"]
    cells.append(f"{result['oracle']:8.1f}" if result.get("oracle") else f"{'–':>8}")
    if "peak" in result:
        cells.append("  peak: " + ", ".join(f"{name} {result['peak'][name]:.2f}" for name in methods))
    return "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), help="TEACHER:STUDENT, of CDM_REAL_DIR/tokenizers")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--methods", nargs="+", default=ONE_A_SCRIPT, choices=ONE_A_SCRIPT)
    parser.add_argument("--alignment", default="dtw", choices=["dtw", "byte"], help="CDM's")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both sides' logits")
    add_device_argument(parser)
    parser.add_argument("--repeats", type=int, default=7, help="times each is measured (default: 7)")
    parser.add_argument("--oracle_max", type=int, default=128, help="student tokens up to which the oracle runs")
    parser.add_argument("--mappers", type=Path, default=Path("outputs/benchmark_mappers"), help="they are kept there")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    if "CDM_REAL_DIR" not in os.environ:
        sys.exit("Set CDM_REAL_DIR to a folder with tokenizers/ and data/.")
    arguments.mappers.mkdir(parents=True, exist_ok=True)
    methods = arguments.methods
    where = f"{torch.get_num_threads()} threads" if arguments.device == "cpu" else arguments.device
    print(f"{where}, {arguments.dtype}; milliseconds (ratio to FKD)")
    headers = [f"{'pair':16}", "tokens", " teach", *(f"{method:>15}" for method in methods), "torch CE"]
    headers += ["KD alone", "  host", "   dtw"] if "CDM" in methods else []
    print("  ".join([*headers, "  oracle"]))
    results = []
    for name in arguments.pairs:
        pair = Pair(Path(os.environ["CDM_REAL_DIR"]), name, arguments.mappers)
        for n_tokens in arguments.lengths:
            dtype = getattr(torch, arguments.dtype)
            result = measure(pair, n_tokens, arguments.repeats, dtype, methods, arguments.alignment, arguments.device)
            if n_tokens <= arguments.oracle_max:
                result["oracle"] = oracle_seconds(pair, n_tokens)
            print(row_of(result, methods), flush=True)
            results.append(result)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
