"""What an evaluation found, as `results.json` and as a table: the last step of each eval_*.sh.

Every results.json has the same form: `scores` is `{benchmark: {metric: {mean, std, values}}}`, in percent; beside it
are `counts`, `seeds`, `missing`, `settings`, `versions`, `model` and `date`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval_records import (
    differences,
    mean_and_std,
    read_json,
    read_lines,
    summary,
    text_table,
    write_results,
)
from score_rouge import not_scored

SETS = ("dolly", "self-inst", "vicuna", "sinst", "uinst")  # the protocol's order
OF_A_FILE = ("model", "seed", "data", "data_sha256", "limit")  # settings that may differ between generations
CODE_NAMES = {"humaneval": ("HumanEval", "HumanEval+"), "mbpp": ("MBPP", "MBPP+")}


def one_for_all(files: Sequence[Path]) -> dict:
    """The settings of all these generations. Raises ValueError where they differ: such scores make no mean."""
    every = [{k: v for k, v in read_json(path).items() if k not in OF_A_FILE} for path in files]
    for path, settings in zip(files, every):
        different = differences(every[0], settings)
        if different:
            name, first, other = different[0]
            raise ValueError(f"{files[0]} has {name} {first!r}, and {path} {other!r}: not comparable.")
    return every[0]


def instructions(folder: Path, model: str, sets: list[str], seeds: list[int]) -> str:
    """The sets that were asked for, and those that an earlier call has finished for the same seeds."""

    def scores_of(name: str) -> list[Path]:
        return [folder / name / f"{seed}.scores.json" for seed in seeds]

    sets = [*sets, *(name for name in SETS if name not in sets and all(p.exists() for p in scores_of(name)))]
    sets.sort(key=lambda name: SETS.index(name) if name in SETS else len(SETS))
    there = [name for name in sets if all(path.exists() for path in scores_of(name))]
    missing = [name for name in sets if name not in there]
    if not there:
        raise ValueError(f"None of the sets is there: {' '.join(missing)}. Set DATA_DIR.")
    found = {name: {str(seed): read_json(p) for seed, p in zip(seeds, scores_of(name))} for name in there}
    tokenizer = one_tokenizer(found)
    first = {name: next(iter(by_seed.values())) for name, by_seed in found.items()}
    scores = {
        name: {
            metric: summary({seed: values[metric] for seed, values in by_seed.items()})
            for metric in ("rouge_l", "exact_match", "tokens", "unfinished", "cut_prompts")
            if first[name][metric] is not None
        }
        for name, by_seed in found.items()
    }
    counts = {name: of_set["count"] for name, of_set in first.items()}
    files = {name: read_json(folder / name / f"{seeds[0]}.settings.json") for name in there}
    settings = one_for_all([folder / name / f"{seed}.settings.json" for name in there for seed in seeds])
    settings["sets"] = {name: {key: files[name][key] for key in ("data", "data_sha256", "limit")} for name in there}
    settings["rouge_tokenizer"] = tokenizer
    environment = read_json(folder / there[0] / f"{seeds[0]}.environment.json")
    write_results(
        folder,
        *("instructions", model),
        scores=scores,
        counts=counts,
        seeds=seeds,
        missing=missing,
        settings={**settings, "device": environment["device"]},
        without_rouge_l={name: of_set["without_rouge_l"] for name, of_set in first.items()},
    )
    rows = [["", "ROUGE-L", "exact match", "rows", "tokens", "without EOS"]]
    for name in sets:
        if name in missing:
            rows.append([name, "missing", *[""] * 4])
            continue
        of_set = scores[name]
        cells = [mean_and_std(of_set[m]) if m in of_set else "missing" for m in ("rouge_l", "exact_match")]
        unfinished = f"{100 * of_set['unfinished']['mean'] / counts[name]:.0f} %"
        rows.append([name, *cells, str(counts[name]), f"{of_set['tokens']['mean']:.0f}", unfinished])
    habits = "with DSKD's two habits" if settings["dskd_compat"] else "n-gram blocking off"
    how = "greedy" if settings["greedy"] else f"sampled, mean ± standard deviation over {len(seeds)} seeds"
    note = f"{how}; {habits}, prompts cut on the {settings['prompts_cut_on']}"
    if settings["rouge_tokenizer"] == "unicode":
        note += "; ROUGE-L of words and characters of any script, without a stemmer"
    missing_rows = [f"\n{name}: {said}" for name, of_set in first.items() if (said := not_scored(of_set))]
    return f"{text_table(rows)}\n{note}{''.join(missing_rows)}"


def one_tokenizer(found: dict[str, dict[str, dict]]) -> str:
    """The tokenizer of all these ROUGE-L scores. Raises ValueError where they differ."""
    of_set = {n: s.get("rouge_tokenizer", "unknown") for n, by_seed in found.items() for s in by_seed.values()}
    if len(set(of_set.values())) > 1:
        told = ", ".join(f"{name} {tokenizer}" for name, tokenizer in of_set.items())
        raise ValueError(f"The sets were scored with different tokenizers ({told}). Name all of them in SETS.")
    return next(iter(of_set.values()))


def code(folder: Path, model: str, datasets: list[str], min_time_limit: float) -> str:
    """pass@1 over the tasks that were asked: `plus` wants EvalPlus's tests passed besides the original ones."""
    scores, counts, missing, files = {}, {}, [], []
    for dataset in datasets:
        result = folder / dataset / "samples_eval_results.json"
        base_name, plus_name = CODE_NAMES[dataset]
        if not result.exists():
            missing += [base_name, plus_name]
            continue
        asked = [row["task_id"] for row in read_lines(folder / dataset / "prompts.jsonl")]
        of_task = {name: runs[0] for name, runs in read_json(result)["eval"].items()}
        base = [of_task[name]["base_status"] == "pass" for name in asked]
        plus = [passed and of_task[name]["plus_status"] == "pass" for name, passed in zip(asked, base)]
        for name, passed in ((base_name, base), (plus_name, plus)):
            scores[name] = {"pass@1": summary({"greedy": 100 * sum(passed) / len(passed)})}
            counts[name] = len(passed)
        files.append(folder / dataset / "generations.settings.json")
    if not scores:
        raise ValueError(f"None of the data sets is there: {' '.join(datasets)}. Set DATA_DIR.")
    environment = read_json(files[0].with_name("generations.environment.json"))
    settings = {**one_for_all(files), "min_time_limit": min_time_limit, "device": environment["device"]}
    write_results(folder, "code", model, scores=scores, counts=counts, seeds=[], missing=missing, settings=settings)
    rows = [["", "pass@1", "tasks"]]
    for name in [name for dataset in datasets for name in CODE_NAMES[dataset]]:
        done = name in scores
        rows.append([name, *([mean_and_std(scores[name]["pass@1"]), str(counts[name])] if done else ["missing", ""])])
    return text_table(rows)


def math(folder: Path, model: str) -> str:
    """The harness's two figures, and its standard error over the questions."""
    files = sorted(folder.glob("harness/**/results_*.json"))
    if not files:
        raise ValueError(f"{folder}/harness has no results of the harness.")
    harness = read_json(files[-1])
    ((task, found),) = harness["results"].items()
    counts = {"GSM8K": harness["n-samples"][task]["effective"]}
    scores = {"GSM8K": {}}
    for name in ("strict-match", "flexible-extract"):
        stderr = found[f"exact_match_stderr,{name}"]
        scores["GSM8K"][name] = {
            **summary({"greedy": 100 * found[f"exact_match,{name}"]}),
            "stderr": 100 * stderr if isinstance(stderr, float) else None,
        }
    settings = {**read_json(folder / "settings.json"), "task_version": harness["versions"][task]}
    del settings["model"]
    write_results(folder, "math", model, scores=scores, counts=counts, seeds=[], missing=[], settings=settings)
    rows = [["GSM8K", "exact match", "standard error", "questions"]]
    for name, entry in scores["GSM8K"].items():
        stderr = "–" if entry["stderr"] is None else f"{entry['stderr']:.2f}"
        rows.append([name, mean_and_std(entry), stderr, str(counts["GSM8K"])])
    return text_table(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=("instructions", "code", "math"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sets", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--min_time_limit", type=float)
    args = parser.parse_args()
    try:
        if args.task == "instructions":
            table = instructions(args.folder, args.model, args.sets, args.seeds)
        elif args.task == "code":
            table = code(args.folder, args.model, args.sets, args.min_time_limit)
        else:
            table = math(args.folder, args.model)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"\n{args.model}\n{table}\n{args.folder / 'results.json'}")
