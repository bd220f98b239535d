"""How long the work takes that depends on the text alone, and dynamic time warping, as responses grow.

    CDM_REAL_DIR=… python -m tests.benchmarks.bench_alignment [--pairs phi-3:qwen2 …] [--lengths 256 …] [--json FILE]

The responses are real ones (Dolly), joined to about the wanted number of student tokens; there are as many of them as
make a batch, no two alike. All times are milliseconds an example, medians over the repeats:

    read      a prepared example, from the memory-mapped data set
    collate   the collator: padding, and the table of edit distances. With `read`, a data loader's worker does this
    table     the table alone
    prefix    the rows of BPM, once the collator has seen the text
    dtw       dynamic time warping with random weights, which waits for the logits
    oracle    both in plain Python, as the definition reads (tests/reference), up to --oracle_max student tokens
    ratio     oracle / (table + dtw); the groups are checked to be the same
    cpu       collate + dtw in processor time, for a machine that others use as well; all else is wall-clock time
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer

from modeling.text.alignment import dtw_groups
from modeling.text.batch import ResponseCollator, TokenDistances, token_distances
from modeling.text.encoder import Encoder, prepare_example
from modeling.text.rows import alpaca_prompt
from tests.benchmarks import PAIRS
from tests.reference import cdm_oracle


def joined_responses(file: Path, student: Encoder, n_tokens: int, count: int) -> list[str]:
    """`count` texts of about `n_tokens` student tokens, EOS included, from the responses of a Dolly file in order."""
    with file.open(encoding="utf-8") as lines:
        whole = "\n".join(json.loads(line)["response"] for line in lines)
    texts, start = [], 0
    for _ in range(count):
        piece = whole[start : start + 12 * n_tokens]
        ends = student.encode("", piece).byte_ends
        if len(ends) < n_tokens:
            raise ValueError(f"{file} has too little text for {count} responses of {n_tokens} tokens")
        texts.append(piece.encode()[: ends[n_tokens - 2]].decode("utf-8", "ignore"))
        start += len(texts[-1])
    return texts


def median_times(step: Callable[[int], object], count: int, repeats: int) -> tuple[float, float]:
    """Wall and processor seconds of `step(i)`: medians over the repeats of the mean over i < count."""
    wall, cpu = [], []
    step(0)  # compiles, fills caches
    for _ in range(repeats):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        for i in range(count):
            step(i)
        wall.append((time.perf_counter() - wall_start) / count)
        cpu.append((time.process_time() - cpu_start) / count)
    return statistics.median(wall), statistics.median(cpu)


def response_ids(row: dict, side: str) -> np.ndarray:
    return row[f"{side}input_ids"][row[f"{side}response_start"] :]


def random_weights(distances: TokenDistances) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(3, 6, len(index)) for index in (distances.teacher_index, distances.student_index)]


def fast_groups(d: TokenDistances) -> tuple[np.ndarray, np.ndarray]:
    return dtw_groups(d.table, d.teacher_index, d.student_index, *random_weights(d))


def slow_groups(
    teacher: Encoder, teacher_ids: Sequence[int], student: Encoder, student_ids: Sequence[int], weights: list
) -> list[tuple[list[int], list[int]]]:
    """Alignment as its definition reads, edit distances included."""
    teacher_weights, student_weights = weights
    cost = []
    for t, a in zip(teacher_ids, teacher_weights.tolist()):
        cost.append([])
        for s, b in zip(student_ids, student_weights.tolist()):
            texts = map(cdm_oracle.without_spaces, (teacher.forms.texts[t], student.forms.texts[s]))
            both_eos = t == teacher.eos_id and s == student.eos_id
            cost[-1].append(0 if both_eos else cdm_oracle.levenshtein(*texts) * a * b)
    return cdm_oracle.cut_at_diagonals(cdm_oracle.dtw_path(cost))


def oracle_seconds(teacher: Encoder, student: Encoder, row: dict, distances: TokenDistances, repeats: int) -> float:
    """Median time of `slow_groups`, whose groups must be those of the fast way."""
    sides = teacher, response_ids(row, "teacher_").tolist(), student, response_ids(row, "").tolist()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        groups = slow_groups(*sides, random_weights(distances))
        seconds.append(time.perf_counter() - start)
    for side, group in enumerate(fast_groups(distances)):
        if group.tolist() != [g for g, positions in enumerate(groups) for _ in positions[side]]:
            raise AssertionError("the oracle finds other groups")
    return statistics.median(seconds)


def measure(
    teacher: Encoder, student: Encoder, texts: list[str], repeats: int, with_oracle: bool, folder: Path
) -> dict[str, float]:
    n_tokens = max(len(text.encode()) for text in texts) + 1000  # more than any tokenizer makes of them
    prompt = alpaca_prompt("Tell me more.")
    rows = [{"row": i, "prefix": prompt, "text": text} for i, text in enumerate(texts, 1)]
    Dataset.from_list([prepare_example(row, [student, teacher], n_tokens) for row in rows]).save_to_disk(folder)
    data = Dataset.load_from_disk(folder).with_format("numpy")
    collator = ResponseCollator(student, teacher, "entropy_dtw")
    rows = [data[i] for i in range(len(data))]
    batch = collator(rows)
    distances = batch.token_distances
    distinct = [[np.unique(response_ids(row, side)) for side in ("teacher_", "")] for row in rows]

    def table_of(i: int) -> np.ndarray:
        return token_distances(teacher, distinct[i][0], student, distinct[i][1])

    count = len(rows)
    read, _ = median_times(lambda i: data[i], count, repeats)
    collate, collate_cpu = median_times(lambda i: collator([rows[i]]), count, repeats)
    table, _ = median_times(table_of, count, repeats)
    find = ResponseCollator(student, teacher, "prefix").find_prefix_rows
    sides = [(one.student, one.teacher) for one in (collator([row]) for row in rows)]
    prefix, _ = median_times(lambda i: find(*sides[i]), count, repeats)
    dtw, dtw_cpu = median_times(lambda i: fast_groups(distances[i]), count, repeats)
    result = {
        "student_tokens": statistics.mean(batch.student.lengths),
        "teacher_tokens": statistics.mean(batch.teacher.lengths),
        "read": read,
        "collate": collate,
        "table": table,
        "prefix": prefix,
        "dtw": dtw,
        "cpu": collate_cpu + dtw_cpu,
    }
    if with_oracle:
        # Of the first example alone, and so is what it is compared with.
        result["oracle"] = oracle_seconds(teacher, student, rows[0], distances[0], repeats)
        first, _ = median_times(lambda _: (table_of(0), fast_groups(distances[0])), 1, repeats)
        result["ratio"] = result["oracle"] / first
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), help="TEACHER:STUDENT, of CDM_REAL_DIR/tokenizers")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="student tokens")
    parser.add_argument("--examples", type=int, default=8, help="of each length (default: 8)")
    parser.add_argument("--repeats", type=int, default=7, help="times each is measured (default: 7)")
    parser.add_argument("--oracle_max", type=int, default=512, help="student tokens up to which the oracle runs")
    parser.add_argument("--json", type=Path, help="write the figures there as well, times in seconds")
    arguments = parser.parse_args()
    if "CDM_REAL_DIR" not in os.environ:
        parser.error("set CDM_REAL_DIR to a folder with tokenizers/ and data/")
    folder = Path(os.environ["CDM_REAL_DIR"])
    disable_progress_bars()

    columns = "tokens   teach    read  collate   table  prefix     dtw     cpu    oracle   ratio   (ms an example)"
    print(f"{'pair':16}  {columns}")
    results = []
    for pair in arguments.pairs:
        teacher, student = (
            Encoder(AutoTokenizer.from_pretrained(folder / "tokenizers" / name)) for name in pair.split(":")
        )
        for length in arguments.lengths:
            with_oracle = length <= arguments.oracle_max
            file = folder / "data/dolly/databricks-dolly-15k.jsonl"
            texts = joined_responses(file, student, length, arguments.examples)
            with tempfile.TemporaryDirectory() as data:
                r = measure(teacher, student, texts, arguments.repeats, with_oracle, Path(data))
            results.append({"pair": pair, **r})
            times = "".join(f"  {1e3 * r[name]:6.2f}" for name in ("table", "prefix", "dtw", "cpu"))
            oracle = f"{1e3 * r['oracle']:8.0f}  {r['ratio']:6.0f}" if with_oracle else f"{'–':>8}  {'–':>6}"
            print(
                f"{pair:16}  {r['student_tokens']:6.0f}  {r['teacher_tokens']:6.0f}  {1e3 * r['read']:6.2f}  "
                f"{1e3 * r['collate']:7.2f}{times}  {oracle}",
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
