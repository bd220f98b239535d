"""What --teacher_cache costs in accuracy and disk space, and what it saves in time, on the pair of the quickstart.

    bash script_train/quickstart.sh
    python tests/benchmarks/teacher_cache.py [--quickstart outputs/quickstart] [--json FILE]

For every form that signals can be kept in: KD of the trained student on the held-out rows, as CDM and as ULD (which
reads the whole distribution), beside that of the teacher that runs, and the size on disk. Then how long one epoch of
CDM on the training rows takes with the teacher that runs, and with its stored signals.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

from modeling import run_clm_distill_CDM, run_clm_uld

SCRIPTS = {"CDM": run_clm_distill_CDM, "ULD": run_clm_uld}
FORMS = {
    "hidden states, float32": {"teacher_cache_dtype": "float32"},
    "hidden states, bfloat16": {"teacher_cache_dtype": "bfloat16"},
    "hidden states, float16": {"teacher_cache_dtype": "float16"},
    "1,024 largest, float16": {"teacher_cache_dtype": "float16", "teacher_cache_topk": 1024},
    "256 largest, float16": {"teacher_cache_dtype": "float16", "teacher_cache_topk": 256},
    "100 largest, float16": {"teacher_cache_dtype": "float16", "teacher_cache_topk": 100},
}


def run(method: str, quickstart: Path, output: Path, **changes) -> dict:
    """All results of one run of a method's script."""
    arguments = {
        "teacher_path": quickstart / "teacher",
        "train_file": quickstart / "data/train.json",
        "validation_file": quickstart / "data/held_out.json",
        "output_dir": output,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
    }
    if method == "CDM":
        arguments["teacher_to_student_id_mapping"] = quickstart / "em_mapper.safetensors"
    arguments |= changes
    sys.argv = [method, *(part for name, value in arguments.items() for part in (f"--{name}", str(value)))]
    with contextlib.redirect_stdout(sys.stderr):
        SCRIPTS[method].main()
    return json.loads((output / "all_results.json").read_text())


def size(cache: Path, kind: str) -> int:
    """Bytes of all files of the kind: "part" or "head"."""
    return sum(file.stat().st_size for file in cache.glob(f"*/{kind}-*.safetensors"))


def accuracy(quickstart: Path, folder: Path) -> list[dict]:
    """`{"form", "CDM": KD, "ULD": KD, "part": bytes, "head": bytes}` of every form; the live teacher first."""
    rows = []
    for form, options in {"(the teacher runs)": {}, **FORMS}.items():
        row, cache = {"form": form}, folder / form
        for method in SCRIPTS:
            given = {**options, "teacher_cache": cache} if options else {}
            results = run(
                method, quickstart, folder / "out", model_name_or_path=quickstart / "cdm", do_eval=True, **given
            )
            row[method] = results["eval_kd_loss"]
        rows.append({**row, "part": size(cache, "part"), "head": size(cache, "head")})
    return rows


def epoch_seconds(quickstart: Path, folder: Path) -> dict[str, float]:
    """Of training alone, the better of two: with the live teacher, and with stored signals."""
    seconds = {}
    for _ in range(2):
        for way, given in (("live", {}), ("stored", {"teacher_cache": folder / "epoch"})):
            options = {"model_name_or_path": quickstart / "student", "do_train": True, "num_train_epochs": 1, **given}
            options["resume_from_checkpoint"] = False
            spent = run("CDM", quickstart, folder / way, **options)["train_runtime"]
            seconds[way] = min(spent, seconds.get(way, spent))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("outputs/quickstart"), help="the quickstart's folder")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = accuracy(arguments.quickstart, Path(folder))
        seconds = epoch_seconds(arguments.quickstart, Path(folder))
    print("| kept | KD of CDM | off by | KD of ULD | off by | signals | head |\n|---|---|---|---|---|---|---|")
    for row in rows:
        kd = " | ".join(f"{row[m]:.5f} | {abs(row[m] / rows[0][m] - 1):.0e}" for m in SCRIPTS)
        print(f"| {row['form']} | {kd} | {row['part'] / 1e6:.1f} MB | {row['head'] / 1e6:.0f} MB |")
    print(f"\nOne epoch: {seconds['live']:.1f} s live, {seconds['stored']:.1f} s stored", end="")
    print(f" ({seconds['stored'] / seconds['live']:.2f} of it).")
    if arguments.json:
        arguments.json.write_text(json.dumps({"forms": rows, "epoch_seconds": seconds}, indent=2))


if __name__ == "__main__":
    main()
