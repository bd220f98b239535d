"""Any number of runs as one table (Markdown and CSV), and as pictures: training curves, and scores with error bars.

    python script_eval/summarize.py outputs/sft outputs/cdm outputs/uld --output outputs/summary
    python script_eval/summarize.py outputs/comparison              # every run in this folder

A run is a folder with a trainer_state.json (its curves), an eval_results.json (held-out rows), or results.json files of
the evaluations, which are looked for in it, above all in its `evaluation` folder; checkpoints are passed over. A run
called METHOD_seed7 or METHOD/seed_7 is one training seed of METHOD: such runs are averaged, with the standard deviation
over them. For a single run the deviation is that over the sampling seeds. An eval_results.json in the run's
`evaluation` folder counts before its own, so that all methods can be held against one teacher.

    python script_eval/summarize.py outputs/sft outputs/cdm --references outputs/teacher outputs/eval_untrained_student

With --against METHOD a second table, and a picture, hold each method's differences to it, seed by seed.

References are listed above the methods, and are lines in the bar chart: they are never the best, and may lack figures.

What is not comparable is not averaged: runs of a method that were trained or evaluated with other settings, or on other
numbers of rows. Between methods, a column with unlike settings has no best. Either is said under the table.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from eval_records import differences, read_json

FILES = ("results.json", "eval_results.json", "trainer_state.json", "train_results.json")
SEED = re.compile(r"^(?P<method>.*?)[_\-.]?seed[_\-.=]?(?P<seed>\d+)$")
OWN_TO_A_RUN = ("model", "model_fingerprint", "device", "seed", "sets")  # settings that comparable scores may differ in
# Of eval_results.json: what every method measures. Whatever else it holds tells its KD from another method's.
MEASURED_BY_ALL = re.compile(
    r"epoch|eval_(loss|ce_loss|kd_loss|perplexity|bits_per_byte|runtime|\w+_(time|per_second))"
)
BUDGET = ("max_steps", "num_train_epochs", "train_batch_size")  # of trainer_state.json

# column, task, benchmark, metric; in the order of the table. Percentages, more is better.
SCORES = (
    ("Dolly", "instructions", "dolly", "rouge_l"),
    ("SelfInst", "instructions", "self-inst", "rouge_l"),
    ("Vicuna", "instructions", "vicuna", "rouge_l"),
    ("S-NI", "instructions", "sinst", "rouge_l"),
    ("UnNI", "instructions", "uinst", "rouge_l"),
    ("HumanEval", "code", "HumanEval", "pass@1"),
    ("HumanEval+", "code", "HumanEval+", "pass@1"),
    ("MBPP", "code", "MBPP", "pass@1"),
    ("MBPP+", "code", "MBPP+", "pass@1"),
    ("GSM8K strict", "math", "GSM8K", "strict-match"),
    ("GSM8K flexible", "math", "GSM8K", "flexible-extract"),
)
# column, key of eval_results.json, unit; less is better.
HELD_OUT = (
    ("bits per byte", "eval_bits_per_byte", "bits per byte of the responses"),
    ("KD", "eval_kd_loss", "nats per response token"),
)
# column, key of train_results.json; less is better, and nobody is the best.
COSTS = (("s/step", "train_seconds_per_step"), ("GiB", "train_peak_memory_gib"))
COMPARED = "bits per byte"  # the one for which a margin can be given
COST_COLUMNS = tuple(column for column, _ in COSTS)
LESS_IS_BETTER = (*(column for column, _, _ in HELD_OUT), *COST_COLUMNS)
CURVES = (
    ("loss", "Loss"),
    ("ce_loss", "Cross-entropy (CE)"),
    ("kd_loss", "KD, each method's own"),
    ("mapped_rate", "Mapped rate"),
    ("coverage", "Student tokens compared"),
    ("topk_mass", "Probability compared"),
    ("chunk_tokens", "Tokens of a chunk"),
    ("residual_mass", "Residual mass"),
    ("dropped", "Not distilled"),
)
SHARES = ("mapped_rate", "coverage", "topk_mass", "residual_mass", "dropped")  # of 1


# -------------------------------------------------------------------------------------------------- finding the runs


@dataclass
class Score:
    """One figure of one run. Figures compare where `made_with` is equal."""

    value: float
    std: float | None
    made_with: dict


@dataclass
class Run:
    folder: Path
    method: str
    seed: str | None
    scores: dict[str, Score] = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)
    budget: dict | None = None
    reference: bool = False

    @property
    def name(self) -> str:
        return self.method if self.seed is None else f"{self.method}, seed {self.seed}"


def run_folder(path: Path, given: Path) -> Path:
    """The run that a file belongs to: what holds the folder `evaluation` that it is in, or its own folder.

    Only folders inside the given one are asked: that one may itself lie in an `evaluation`.
    """
    parts = path.parent.relative_to(given).parts
    if "evaluation" in parts:
        last = len(parts) - 1 - parts[::-1].index("evaluation")
        return given.joinpath(*parts[:last])
    return path.parent


def name_of(folder: Path, given: Path) -> tuple[str, str | None]:
    """`(method, training seed)` of a run found in a folder that was given."""
    inside = folder.relative_to(given).parts
    parts = inside or (given.resolve().name,)
    match = SEED.match(parts[-1])
    if match is None:
        return "/".join(parts), None
    method = "/".join([*parts[:-1], *([match["method"]] if match["method"] else [])])
    parent = given if inside else given.resolve().parent
    return method or parent.resolve().name, match["seed"]


def find_runs(given: Sequence[Path], references: Sequence[Path] = ()) -> tuple[list[Run], list[str]]:
    """The runs in these folders, references first, in this order, and a message for each folder that holds none."""
    runs: dict[Path, Run] = {}
    messages = []
    for place, top in enumerate([*references, *given]):
        paths = sorted(p for name in FILES for p in top.rglob(name) if not any("checkpoint-" in x for x in p.parts))
        if not paths:
            messages.append(f"{top}: {'no results in it' if top.is_dir() else 'no such folder'}.")
        for path in paths:
            folder = run_folder(path, top)
            new = Run(folder, *name_of(folder, top), reference=place < len(references))
            add_file(runs.setdefault(folder.resolve(), new), path)
    # Folders of one name in different places are different methods.
    places: dict[tuple, list[Run]] = {}
    for run in runs.values():
        places.setdefault((run.method, run.seed), []).append(run)
    for same in places.values():
        if len(same) > 1:
            for run in same:
                run.method = str(run.folder if run.seed is None else run.folder.parent / run.method)
    return list(runs.values()), messages


def add_file(run: Run, path: Path) -> None:
    content = read_json(path)
    if path.name == "trainer_state.json":
        run.log = content["log_history"]
        run.budget = {key: content.get(key) for key in BUDGET}
    elif path.name == "train_results.json":
        run.scores |= {column: Score(content[key], None, {}) for column, key in COSTS if key in content}
    elif path.name == "eval_results.json":
        criteria = sorted(key.removeprefix("eval_") for key in content if not MEASURED_BY_ALL.fullmatch(key))
        before_its_own = run.folder != path.parent
        for column, key, _ in HELD_OUT:
            if key in content and (before_its_own or column not in run.scores):
                made_with = {"measured with": criteria} if column == "KD" else {}
                run.scores[column] = Score(content[key], None, made_with)
    elif "scores" in content:
        for column, benchmark, metric in score_columns(content["task"], content["scores"]):
            entry = content["scores"].get(benchmark, {}).get(metric)
            if entry is not None:
                made_with = {k: v for k, v in content["settings"].items() if k not in OWN_TO_A_RUN}
                made_with |= {"rows": content["counts"][benchmark], "seeds": content["seeds"]}
                run.scores[column] = Score(entry["mean"], entry["std"], made_with)


def score_columns(task: str, benchmarks: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """`(column, benchmark, metric)` of a task; an instruction set of another name has a column of its own."""
    yield from ((column, benchmark, metric) for column, of, benchmark, metric in SCORES if of == task)
    if task == "instructions":
        known = {benchmark for _, _, benchmark, _ in SCORES}
        yield from ((f"{name} ROUGE-L", name, "rouge_l") for name in benchmarks if name not in known)


# --------------------------------------------------------------------------------------------------------- the table


@dataclass
class Cell:
    """A method's figure in a column: None where its runs do not compare (`refused`) or none has it."""

    mean: float | None = None
    std: float | None = None
    n_runs: int = 0
    refused: bool = False

    def text(self, digits: int) -> str:
        if self.mean is None:
            return "not averaged" if self.refused else "missing"
        return f"{self.mean:.{digits}f}" + ("" if self.std is None else f" ± {self.std:.{digits}f}")


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def columns_of(runs: Sequence[Run]) -> list[str]:
    known = [score[0] for score in SCORES]
    others = [column for run in runs for column in run.scores if column not in (*known, *LESS_IS_BETTER)]
    every = [*known, *dict.fromkeys(others), *LESS_IS_BETTER]
    return [column for column in every if any(column in run.scores for run in runs)]


def how_they_differ(dicts: Sequence[dict]) -> str | None:
    """The first settings in which one of these is unlike the first of them, as text."""
    for other in dicts[1:]:
        if different := differences(dicts[0], other):
            return "; ".join(f"{name} {shorten(a)} and {shorten(b)}" for name, a, b in different)
    return None


def shorten(value: object, longest: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def cell_of(runs: Sequence[Run], column: str) -> tuple[Cell, list[str]]:
    """The cell of one method, and what has to be said about it."""
    having = [run for run in runs if column in run.scores]
    if not having:
        return Cell(), [] if runs[0].reference else [f"missing for {runs[0].method}."]
    lacking = [run.name for run in runs if column not in run.scores]
    messages = [f"missing for {'; '.join(lacking)}."] if lacking else []
    scores = [run.scores[column] for run in having]
    if len(scores) == 1:
        return Cell(scores[0].value, scores[0].std, 1), messages
    reason = how_they_differ([score.made_with for score in scores])
    reason = reason or how_they_differ([run.budget for run in having if run.budget is not None])
    if reason:
        messages.append(f"the runs of {having[0].method} are not averaged, they differ in {reason}.")
        return Cell(n_runs=len(scores), refused=True), messages
    values = [score.value for score in scores]
    return Cell(statistics.fmean(values), statistics.stdev(values), len(values)), messages


def digits_of(column: str) -> int:
    return 3 if column in LESS_IS_BETTER and column not in COST_COLUMNS else 2


def best_of(cells: dict[str, Cell], column: str, margin: float = 0.0) -> set[str]:
    """Those with the best figure, as it is printed, or nearer to it than `margin`. Nobody is best alone."""
    figures = {name: round(cell.mean, digits_of(column)) for name, cell in cells.items() if cell.mean is not None}
    if len(figures) < 2:
        return set()
    best = (min if column in LESS_IS_BETTER else max)(figures.values())
    return {name for name, figure in figures.items() if figure == best or abs(figure - best) < margin}


def verdict(best: set[str], margin: float) -> str:
    """Who is best in bits per byte, or that the margin does not tell; empty where the methods do not compare."""
    if len(best) > 1:
        names = " and ".join(sorted(best))
        return f"\n{names} differ by less than {margin} bits per byte: a comparison of this size shows no difference.\n"
    return f"\n{next(iter(best))} is the best by {margin} bits per byte or more.\n" if best else ""


@dataclass
class Table:
    methods: dict[str, list[Run]]
    columns: list[str]
    cells: dict[str, dict[str, Cell]]  # column → method → cell
    best: dict[str, set[str]]
    messages: list[str]

    @property
    def references(self) -> list[str]:
        return [method for method, runs in self.methods.items() if runs[0].reference]

    @property
    def competing(self) -> dict[str, list[Run]]:
        return {method: runs for method, runs in self.methods.items() if not runs[0].reference}


def make_table(runs: Sequence[Run], margin: float = 0.0) -> Table:
    methods, columns = by_method(runs), columns_of(runs)
    table = Table(methods, columns, {}, {}, list(missing_seeds(methods)))
    said: dict[str, list[str]] = {}  # message → the columns that it is about
    for column in columns:
        cells, messages = {}, []
        for method, of_method in methods.items():
            cells[method], of_cell = cell_of(of_method, column)
            messages += of_cell if column not in COST_COLUMNS else []
        averaged = [r for m, cell in cells.items() if cell.mean is not None for r in methods[m] if column in r.scores]
        reason = how_they_differ([run.scores[column].made_with for run in averaged])
        if reason:
            messages.append(f"the methods are not comparable, they differ in {reason}.")
        table.cells[column] = cells
        competing = {method: cell for method, cell in cells.items() if method not in table.references}
        without = reason or column in COST_COLUMNS
        table.best[column] = set() if without else best_of(competing, column, margin if column == COMPARED else 0.0)
        for message in messages:
            said.setdefault(message, []).append(column)
    table.messages += [f"{', '.join(of_columns)}: {message}" for message, of_columns in said.items()]
    budgets = {
        method: next((r.budget for r in of_method if r.budget), None) for method, of_method in table.competing.items()
    }
    trained = {method: budget for method, budget in budgets.items() if budget}
    if reason := how_they_differ(list(trained.values())):
        table.messages.append(f"The methods were not trained alike ({', '.join(trained)}): {reason}.")
    return table


def differences_to(table: Table, baseline: str) -> dict[str, dict[str, Cell]]:
    """`{method: {column: cell}}`: the means of the differences of runs with the same seed.

    Raises ValueError where the baseline is no method of the table.
    """
    if baseline not in table.competing:
        raise ValueError(f"--against {baseline}: there is no such method, but {', '.join(table.competing)}.")
    columns = [c for c in table.columns if c not in COST_COLUMNS and table.cells[c][baseline].mean is not None]
    found: dict[str, dict[str, Cell]] = {}
    for method, runs in table.competing.items():
        for column in columns if method != baseline else ():
            of_baseline = {run.seed: run.scores[column] for run in table.methods[baseline] if column in run.scores}
            having = [run for run in runs if column in run.scores and run.seed in of_baseline]
            pairs = [(run.scores[column], of_baseline[run.seed]) for run in having]
            if pairs and not how_they_differ([score.made_with for pair in pairs for score in pair]):
                values = [score.value - other.value for score, other in pairs]
                std = statistics.stdev(values) if len(values) > 1 else None
                found.setdefault(method, {})[column] = Cell(statistics.fmean(values), std, len(values))
    return found


def missing_seeds(methods: dict[str, list[Run]]) -> Iterator[str]:
    seeds = {method: {run.seed for run in runs if run.seed is not None} for method, runs in methods.items()}
    every = set().union(*seeds.values())
    for method, there in seeds.items():
        if there and (missing := sorted(every - there, key=int)):
            yield f"{method}: there is no run with seed {', '.join(missing)}, which other methods have."


def columns_with_differences(found: dict[str, dict[str, Cell]]) -> list[str]:
    return list(dict.fromkeys(column for cells in found.values() for column in cells))


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def arrow(column: str) -> str:
    return f"{column} {'↓' if column in LESS_IS_BETTER else '↑'}"


def differences_table(found: dict[str, dict[str, Cell]], baseline: str) -> str:
    """What `differences_to` has found, in Markdown."""
    columns = columns_with_differences(found)
    lines = [row([f"minus {baseline}", "pairs", *map(arrow, columns)]), row(["---", *["---:"] * (len(columns) + 1)])]
    for method, cells in found.items():
        texts = []
        for column in columns:
            cell = cells.get(column)
            digits = digits_of(column)
            mean = 0.0 if cell is None else round(cell.mean, digits) + 0.0  # no -0.000
            text = "–" if cell is None else replace(cell, mean=mean).text(digits)
            texts.append(f"+{text}" if mean > 0 else text)
        lines.append(row([method, str(max(cell.n_runs for cell in cells.values())), *texts]))
    note = f"Each method's figure minus {baseline}'s with the same seed: mean ± standard deviation over the pairs."
    return "\n".join([*lines, "", note, ""])


def markdown(table: Table, given: dict[str, dict[str, str]]) -> str:
    """The table, with further columns `{column: {method: text}}` in front."""
    arrows = [*given, *map(arrow, table.columns)]
    lines = [row(["", "runs", *arrows]), row(["---", *["---:"] * (len(arrows) + 1)])]
    for method, runs in table.methods.items():
        cells = [texts.get(method, "–") for texts in given.values()]
        for column in table.columns:
            cell = table.cells[column][method]
            lacks = runs[0].reference and cell.n_runs == 0
            text = "–" if lacks else cell.text(digits_of(column))
            text = f"**{text}**" if method in table.best[column] else text
            cells.append(text + (f" ({cell.n_runs} of {len(runs)})" if 0 < cell.n_runs < len(runs) else ""))
        lines.append(row([method, str(len(runs)), *cells]))
    explanation = (
        "Percent, more is better (↑): ROUGE-L of the instruction sets, pass@1, exact match. Less is better (↓): on the "
        "held-out rows; seconds of an optimizer step, and memory at its peak. ± is the standard deviation, over "
        "training seeds where a method has several runs, else over sampling seeds. The best of a column is bold."
    )
    if table.references:
        explanation += f" For reference, and never the best: {', '.join(table.references)} (– is not applicable)."
    notes = [f"- {message}" for message in table.messages]
    return "\n".join([*lines, "", explanation, *(["", *notes] if notes else []), ""])


def write_csv(runs: Sequence[Run], columns: Sequence[str], path: Path) -> None:
    """One line a run and figure, not rounded: nothing is averaged here but over sampling seeds."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "training seed", "column", "value", "standard deviation", "rows", "folder"])
        for run in runs:
            for column in columns:
                if score := run.scores.get(column):
                    std = "" if score.std is None else score.std
                    rows = score.made_with.get("rows", "")
                    writer.writerow([run.method, run.seed or "", column, score.value, std, rows, run.folder])


# -------------------------------------------------------------------------------------------------------- the pictures


def styles(methods: Sequence[str]) -> dict[str, dict]:
    """A look for each method. The colours run from dark to light, so that greyscale keeps them apart."""
    colours = plt.get_cmap("viridis")
    last = max(1, len(methods) - 1)
    lines = ("-", "--", "-.", ":", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)))
    hatches = ("", "///", "...", "xxx", "---", "\\\\\\")
    return {
        method: {
            "color": colours(0.82 * i / last),
            "linestyle": lines[i % len(lines)],
            "hatch": hatches[i % len(hatches)],
        }
        for i, method in enumerate(methods)
    }


def draw_curves(methods: dict[str, list[Run]], look: dict[str, dict], path: Path) -> bool:
    """A panel for each logged figure, a line for each method; False where nothing was logged.

    Of several runs of a method the line is the mean, over the steps that all of them logged; each is a thin one beside.
    Dots are the held-out rows, where a training evaluates them on its way.
    """
    runs = [run for of_method in methods.values() for run in of_method]
    panels = [(key, title) for key, title in CURVES if any(key in entry for run in runs for entry in run.log)]
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.9), layout="constrained", squeeze=False)
    handles = {}
    for (key, title), axis in zip(panels, axes[0]):
        for method, of_method in methods.items():
            style = {name: look[method][name] for name in ("color", "linestyle")}
            logged = [{e["step"]: e[key] for e in run.log if key in e and "step" in e} for run in of_method]
            logged = [values for values in logged if values]
            if len(logged) > 1:
                for values in logged:
                    axis.plot(values.keys(), values.values(), linewidth=0.6, alpha=0.5, color=style["color"])
            steps = sorted(set.intersection(*map(set, logged))) if logged else []
            if steps:
                means = [statistics.fmean(values[step] for values in logged) for step in steps]
                (line,) = axis.plot(steps, means, linewidth=2, marker="o" if len(steps) < 3 else None, **style)
                handles.setdefault(method, line)
            for run in of_method:
                if held_out := {e["step"]: e[f"eval_{key}"] for e in run.log if f"eval_{key}" in e}:
                    axis.plot(held_out.keys(), held_out.values(), "o", markersize=4, color=style["color"])
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if key in SHARES:
            axis.set_ylim(0, 1.02)
        if key in SHARES:
            axis.set_ylabel("share")
        elif key != "chunk_tokens":
            axis.set_ylabel("nats per response token")
    save(figure, handles, path)
    return True


def draw_bars(table: Table, look: dict[str, dict], path: Path) -> bool:
    """The columns of the table as groups of bars, a panel for each unit; False where there is none.

    References are lines across the groups.
    """
    percent = [column for column in table.columns if column not in LESS_IS_BETTER]  # nor is a cost
    panels = [(percent, "percent (more is better)")] if percent else []
    panels += [([column], f"{unit}\n(less is better)") for column, _, unit in HELD_OUT if column in table.columns]
    if not panels:
        return False
    widths = [max(1.6, len(columns)) for columns, _ in panels]
    size = (max(6.0, 1.2 + sum(widths) * (0.7 + 0.25 * len(table.competing))), 4.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, width_ratios=widths, layout="constrained", squeeze=False)
    handles = {}
    for (columns, label), axis in zip(panels, axes[0]):
        width = 0.8 / max(1, len(table.competing))
        for i, method in enumerate(table.competing):
            for place, column in enumerate(columns):
                cell = table.cells[column][method]
                if cell.mean is not None:
                    bar = axis.bar(
                        place + (i - (len(table.competing) - 1) / 2) * width,
                        cell.mean,
                        width,
                        yerr=cell.std,
                        capsize=3,
                        color=look[method]["color"],
                        hatch=look[method]["hatch"],
                        edgecolor="white",
                        ecolor="0.45",  # seen on a dark bar and on white
                    )
                    handles.setdefault(method, bar)
        for method, line in zip(table.references, itertools.cycle(((0, (1, 1)), "--", "-.", "-"))):
            for place, column in enumerate(columns):
                cell = table.cells[column][method]
                if cell.mean is not None:
                    handles[method] = axis.hlines(
                        *(cell.mean, place - 0.47, place + 0.47),
                        **{"linestyle": line, "color": "0.45", "linewidth": 1.6},
                    )
        axis.set_xticks(range(len(columns)), columns, rotation=25 if len(columns) > 4 else 0)
        for tick in axis.get_xticklabels():
            tick.set_ha("right" if len(columns) > 4 else "center")
        axis.set(ylabel=label, xlim=(-0.6, len(columns) - 0.4), ylim=(0, None))
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    save(figure, handles, path)
    return True


def draw_differences(found: dict[str, dict[str, Cell]], baseline: str, look: dict[str, dict], path: Path) -> None:
    """A panel for each column, a point for each method, whiskers of one standard deviation."""
    columns = columns_with_differences(found)
    size = (1.6 + 3.4 * len(columns), 1.5 + 0.36 * len(found))
    figure, axes = plt.subplots(1, len(columns), figsize=size, layout="constrained", squeeze=False, sharey=True)
    names = list(found)[::-1]  # the first on top
    for column, axis in zip(columns, axes[0]):
        for place, method in enumerate(names):
            if cell := found[method].get(column):
                axis.errorbar(cell.mean, place, xerr=cell.std, fmt="o", capsize=3, color=look[method]["color"])
        axis.axvline(0, color="0.45", linestyle="--", linewidth=1.2)
        axis.locator_params(axis="x", nbins=5)
        better = "←" if column in LESS_IS_BETTER else "→"
        axis.set(title=f"{column} minus {baseline}'s", xlabel=f"better {better}", ylim=(-0.6, len(names) - 0.4))
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(names)), names)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save(figure, handles: dict, path: Path) -> None:
    """With a legend below, in as many columns, four at most, as the figure has room for."""
    for n_columns in range(min(len(handles), 4), 0, -1):
        legend = figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=n_columns, handlelength=3.5
        )
        if n_columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    figure.get_layout_engine().set(wspace=0.05)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------- main


def summarise(
    given: Sequence[Path],
    output: Path,
    say: Callable[[str], None] = print,
    references: Sequence[Path] = (),
    margin: float = 0.0,
    against: str | None = None,
    columns: Path | None = None,
) -> Table:
    runs, messages = find_runs(given, references)
    if not runs:
        raise ValueError("there is nothing to summarise: " + " ".join(messages))
    table = make_table(runs, margin)
    table.messages[:0] = messages
    output.mkdir(parents=True, exist_ok=True)
    text = markdown(table, {} if columns is None else read_json(columns))
    differences = {} if against is None else differences_to(table, against)
    text += f"\n{differences_table(differences, against)}" if differences else ""
    text += verdict(table.best.get(COMPARED, set()), margin) if margin else ""
    (output / "table.md").write_text(text, encoding="utf-8")
    write_csv(runs, table.columns, output / "table.csv")
    look = styles(list(table.competing))
    files = ["table.md", "table.csv"]
    files += ["curves.png"] * draw_curves(table.competing, look, output / "curves.png")
    files += ["scores.png"] * draw_bars(table, look, output / "scores.png")
    if differences:
        draw_differences(differences, against, look, output / "differences.png")
        files.append("differences.png")
    say(text)
    say("Written: " + ", ".join(str(output / name) for name in files))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="Runs, or folders with runs in them.")
    parser.add_argument(
        "--references", type=Path, nargs="+", default=[], help="Runs to hold the others against, such as the teacher."
    )
    parser.add_argument("--output", type=Path, default=Path("summary"), help="Folder for the table and the pictures.")
    parser.add_argument(
        "--against", metavar="METHOD", help="Also the differences to this method, seed by seed, and a picture of them."
    )
    parser.add_argument("--columns", type=Path, help="JSON file of columns to put in front: {column: {method: text}}.")
    parser.add_argument("--margin", type=float, default=0.0, help="Bits per byte that the best must be ahead by.")
    args = parser.parse_args()
    try:
        summarise(args.folders, args.output, print, args.references, args.margin, args.against, args.columns)
    except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        sys.exit(f"error: {error}")
