"""The quickstart's closing table and training curves, from what its runs left behind.

python quickstart_report.py outputs/quickstart
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARGIN = 0.05  # bits per byte: from one seed, and so few rows, a smaller difference is no finding
COLUMNS = (
    # header, key in eval_results.json, digits
    ("CE", "eval_ce_loss", 3),
    ("bits per byte", "eval_bits_per_byte", 3),
    ("KD to teacher", "eval_kd_loss", 3),
    ("mapped rate", "eval_mapped_rate", 3),
)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def seconds_per_step(run: Path) -> float:
    """Training alone: the evaluations between the epochs are taken off."""
    state, result = read(run / "trainer_state.json"), read(run / "train_results.json")
    evaluations = sum(entry.get("eval_runtime", 0.0) for entry in state["log_history"])
    return (result["train_runtime"] - evaluations) / state["global_step"]


def table(folder: Path) -> str:
    rows = (
        # name, folder of eval_results.json, folder of the training
        ("teacher, as it comes", "eval_teacher_base", None),
        ("teacher, fine-tuned", "teacher", "teacher"),
        ("student, untrained", "eval_student", None),
        ("student, SFT", "eval_sft", "sft"),
        ("student, CDM", "cdm", "cdm"),
    )
    cells = [["held-out rows", *(header for header, _, _ in COLUMNS), "seconds a step"]]
    for name, evaluation, training in rows:
        results = read(folder / evaluation / "eval_results.json")
        values = [f"{results[key]:.{digits}f}" if key in results else "–" for _, key, digits in COLUMNS]
        cells.append([name, *values, f"{seconds_per_step(folder / training):.2f}" if training else "–"])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def verdict(folder: Path) -> str:
    """Which student won, where the difference is more than chance makes with so few rows and one seed."""
    sft, cdm = (read(folder / run / "eval_results.json")["eval_bits_per_byte"] for run in ("eval_sft", "cdm"))
    rows = len(read(folder / "data/held_out.json"))
    figures = f"On the {rows} held-out rows SFT has {sft:.3f}, and CDM {cdm:.3f} bits per byte"
    if abs(sft - cdm) < MARGIN:
        return (
            f"{figures}: less than {MARGIN} apart, which at this size is no difference. With several seeds, and data "
            "and models of your own, script_train/compare_methods.sh can show one."
        )
    better, worse = ("CDM", "SFT") if cdm < sft else ("SFT", "CDM")
    return f"{figures}: {better} beats {worse} by {abs(sft - cdm):.3f}."


def curve(folder: Path, run: str, key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one logged quantity. A held-out one starts with the untrained student at epoch 0."""
    log = [e for e in read(folder / run / "trainer_state.json")["log_history"] if key in e]
    if key.startswith("eval_"):
        log.insert(0, {**read(folder / "eval_student" / "eval_results.json"), "epoch": 0.0})
    return [e["epoch"] for e in log], [e[key] for e in log]


def draw(folder: Path, output: Path) -> None:
    figure, (ce, kd, rates) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for run, name, color in (("sft", "SFT", "tab:gray"), ("cdm", "CDM", "tab:blue")):
        # SFT's training log has ce_loss too: the same quantity for both.
        ce.plot(*curve(folder, run, "ce_loss"), color=color, linestyle="--", label=f"{name}, training")
        ce.plot(*curve(folder, run, "eval_ce_loss"), color=color, marker="o", label=f"{name}, held-out")
    ce.set(title="Cross-entropy", ylabel="nats per response token")
    kd.plot(*curve(folder, "cdm", "kd_loss"), color="tab:blue", linestyle="--", label="CDM, training")
    kd.plot(*curve(folder, "cdm", "eval_kd_loss"), color="tab:blue", marker="o", label="CDM, held-out")
    sft_kd = read(folder / "eval_sft" / "eval_results.json")["eval_kd_loss"]
    kd.axhline(sft_kd, color="tab:gray", linestyle=":", label="SFT at its end, held-out")
    kd.set(title="KD to the teacher", ylabel="nats per response token")
    for key, label, style in (
        ("eval_mapped_rate", "mapped rate", "-"),
        ("eval_teacher_mass", "teacher's probability mapped", "--"),
        ("eval_one_to_one", "tokens in 1–1 groups", "-."),
        ("eval_aligned", "tokens in byte-exact groups", ":"),
    ):
        rates.plot(*curve(folder, "cdm", key), linestyle=style, marker=".", color="black", label=label)
    rates.set(title="CDM's alignment and mapping, held-out", ylim=(0, 1.02))
    for axes in (ce, kd, rates):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(f"\n{table(folder)}\n\n{verdict(folder)}")
    curves = folder / "training_curves.png"
    draw(folder, curves)
    print(f"Training curves: {curves}")
