"""Every training script under every launcher: the same losses, and the same after a kill.

    CDM_REAL_DIR=... python -m tests.end_to_end.launch_matrix [--scripts CDM ULD] [--ways "torchrun 2"] [--json FILE]

For each script and each way to launch it, on 64 real Dolly rows and small random models: an uninterrupted run of 4
steps of 16 rows; the same run, killed (SIGKILL, all processes) as soon as its checkpoint of step 2 is whole, and
started again. Printed per cell: the loss of step 1, its relative difference from the plain run's, and the largest
relative difference of any step's loss between the uninterrupted and the resumed run. The suite runs a few cells.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import psutil

from tests.end_to_end.rig import ROOT, dolly_file, environment, launcher, run_script, steps, tiny_llama, training_flags
from tests.end_to_end.warm_python import kill_all
from tests.unit.tokenizer_zoo import byte_level_bpe, sentencepiece_bpe

SCRIPTS = {
    "SFT": "run_clm_sft.py",
    "FKD": "run_clm_llms_fkd.py",
    "RKD": "run_clm_llms_rkd.py",
    "ULD": "run_clm_uld.py",
    "MinED": "run_clm_MinED.py",
    "CDM": "run_clm_distill_CDM.py",
    "Strict": "run_clm_strict.py",
    "BPM": "run_clm_bpm.py",
    "GOLD": "run_clm_gold.py",
    "SimCT": "run_clm_simct.py",
    "ALM": "run_clm_alm.py",
}
MAPPERS = {"MinED": "MinED", "CDM": "em", "Strict": "em", "BPM": "prefixEM", "GOLD": "em", "SimCT": "em"}
WAYS = ("plain", "torchrun 2", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3")
STEPS, ROWS_A_STEP = 4, 16


@dataclass
class Bench:
    """The models, mappers and rows of all cells, in one folder."""

    folder: Path

    @property
    def train(self) -> Path:
        return self.folder / "train.json"

    def make(self) -> "Bench":
        self.folder.mkdir(parents=True, exist_ok=True)
        dolly_file(self.train, range(STEPS * ROWS_A_STEP), shorter_than=700)
        texts = [row["prefix"] + row["text"] for row in json.loads(self.train.read_text())]
        byte_level, sentencepiece = byte_level_bpe(texts, vocab_size=2000), sentencepiece_bpe(texts, vocab_size=1500)
        tiny_llama(self.folder / "student", byte_level, len(byte_level) + 40, seed=1)
        tiny_llama(self.folder / "same tokenizer", byte_level, len(byte_level) + 8, seed=2)
        tiny_llama(self.folder / "other tokenizer", sentencepiece, len(sentencepiece) + 16, seed=3)
        for kind in dict.fromkeys(MAPPERS.values()):
            run_script(
                f"get_vocab_mapper/get_{kind}_mapper.py",
                *("--teacher", str(self.folder / "other tokenizer"), "--student", str(self.folder / "student")),
                *("--output", str(self.folder / f"{kind}.safetensors")),
            )
        for stage in range(4):
            config = json.loads((ROOT / f"config/deepspeed{'_zero3' if stage == 3 else ''}_config.json").read_text())
            config["zero_optimization"]["stage"] = stage
            (self.folder / f"zero{stage}.json").write_text(json.dumps(config))
        return self

    def command(self, script: str, way: str, output: Path) -> list[str]:
        ranks = 1 if way == "plain" else 2
        arguments = {
            "model_name_or_path": self.folder / "student",
            "train_file": self.train,
            "output_dir": output,
            "block_size": 256,
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": ROWS_A_STEP // 4 // ranks,
            "save_steps": 2,
            "learning_rate": 1e-3,
        }
        if script in ("FKD", "RKD"):
            arguments["teacher_path"] = self.folder / "same tokenizer"
        elif script != "SFT":
            arguments["teacher_path"] = self.folder / "other tokenizer"
        if script in MAPPERS:
            arguments["teacher_to_student_id_mapping"] = self.folder / f"{MAPPERS[script]}.safetensors"
        if way.startswith("ZeRO"):
            arguments["deepspeed"] = self.folder / f"zero{way[-1]}.json"
        launch = launcher(ranks, deepspeed=way.startswith("ZeRO"))
        return [*launch, str(ROOT / "modeling" / SCRIPTS[script]), *training_flags(**arguments)]


def run(command: list[str], kill_at: Path | None = None) -> None:
    """Runs to the end, or kills every process of the run once the file `kill_at` is there."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if kill_at is not None and kill_at.exists():
                    return
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                _kill(process)
        output.seek(0)
        assert process.returncode == 0, f"{' '.join(command)}\n{output.read()[-8000:]}"
        assert kill_at is None, f"the run was over before {kill_at} was seen"


def _kill(process: subprocess.Popen) -> None:
    """SIGKILL to a launcher and to everything that it started."""
    _, *ranks = kill_all(process.pid)
    process.wait()
    psutil.wait_procs(ranks, timeout=60)  # they may write, and hold their memory, until they are gone


def uninterrupted_losses(bench: Bench, script: str, way: str) -> list[float]:
    folder = bench.folder / f"{script} {way}"
    run(bench.command(script, way, folder))
    return losses(folder)


def resumed_losses(bench: Bench, script: str, way: str) -> list[float]:
    """Of the run that was killed after step 2 and started again."""
    folder = bench.folder / f"{script} {way} killed"
    run(bench.command(script, way, folder), kill_at=folder / "checkpoint-2/trainer_state.json")
    run(bench.command(script, way, folder))
    return losses(folder)


def losses(folder: Path) -> list[float]:
    logged = steps(folder)
    assert [entry["step"] for entry in logged] == list(range(1, STEPS + 1)), logged
    return [entry["loss"] for entry in logged]


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(x) for x, y in zip(a, b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the first is the reference")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder)).make()
        print("| script | way | loss of step 1 | against the first way | resumed against uninterrupted |")
        print("|---|---|---|---|---|")
        for script, way in product(arguments.scripts, arguments.ways):
            whole, resumed = uninterrupted_losses(bench, script, way), resumed_losses(bench, script, way)
            results.setdefault(script, {})[way] = {"uninterrupted": whole, "resumed": resumed}
            first, plain = whole[0], results[script][arguments.ways[0]]["uninterrupted"][0]
            difference = largest_difference(whole, resumed)
            print(f"| {script} | {way} | {first:.6f} | {abs(first - plain) / plain:.1e} | {difference:.1e} |")
            sys.stdout.flush()
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
