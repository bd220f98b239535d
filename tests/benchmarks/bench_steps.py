"""How long a training step of each method takes, to one of plain fine-tuning and one of forward KL.

    CDM_REAL_DIR=… python -m tests.benchmarks.bench_steps [--methods SFT FKD CDM] [--steps 15]
    CDM_REAL_DIR=… python -m tests.benchmarks.bench_steps --device cuda --student_size 0.5b --teacher_size 3.8b \
        --batch_size 8 --bf16

The real scripts, on real rows (Dolly), with random models of the given sizes and real vocabularies: the student and a
teacher with its tokenizer have Qwen2's (151,936 columns), a teacher with another one Phi-3's (32,064). The larger the
transformers, the less the losses matter; `tiny`, the default, suits a CPU. The scripts run in turns, each in a process
of its own, and print the median of their steps; the first ones are left out.

    teacher   the teacher's forward alone, of the same steps
    over      the step to (teacher's forward + a step of SFT): 1 is a loss that costs nothing
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling.text.rows import alpaca_prompt
from script_train.methods import Method, methods
from tests.benchmarks.device import add_device_argument

COLUMNS = {"phi-3": 32_064, "qwen2": 151_936}
# hidden, intermediate, layers, heads, key-value heads; as Qwen2's and Phi-3's of these sizes
SIZES = {
    "tiny": (256, 1024, 4, 4, 2),
    "0.5b": (896, 4864, 24, 14, 2),
    "1.5b": (1536, 8960, 28, 12, 2),
    "3.8b": (3072, 8192, 32, 32, 32),
}
WARM_UP = 3


def save_model(folder: Path, tokenizer, columns: int, size: str) -> Path:
    hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=columns,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1 if size == "tiny" else 0.02,
        dtype="float32" if size == "tiny" else "bfloat16",
    )
    LlamaForCausalLM(config).to(config.dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(source: Path, output: Path, count: int) -> Path:
    with source.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    long = [row for row in rows if 600 < len(row["response"]) < 1500][:count]
    data = [{"prefix": alpaca_prompt(r["instruction"], r["context"][:300]), "text": r["response"]} for r in long]
    output.write_text(json.dumps(data), encoding="utf-8")
    return output


class Bench:
    """Models and rows in a folder, and the command lines of the scripts on them."""

    def __init__(self, folder: Path, arguments: argparse.Namespace):
        if "CDM_REAL_DIR" not in os.environ:
            sys.exit("Set CDM_REAL_DIR to a folder with tokenizers/ and data/.")
        real = Path(os.environ["CDM_REAL_DIR"])
        tokenizers = {name: AutoTokenizer.from_pretrained(real / "tokenizers" / name) for name in COLUMNS}
        roles = {"student": ("qwen2", "student"), "same": ("qwen2", "teacher"), "any": ("phi-3", "teacher")}
        wanted = {"student", *(method.pair for method in chosen(arguments.methods))} & set(roles)
        self.models = {
            role: save_model(folder / role, tokenizers[name], COLUMNS[name], getattr(arguments, f"{side}_size"))
            for role, (name, side) in roles.items()
            if role in wanted
        }
        self.common = {
            "model_name_or_path": self.models["student"],
            "train_file": write_rows(real / "data/dolly/databricks-dolly-15k.jsonl", folder / "rows.json", 400),
            "output_dir": folder / "output",
            "do_train": True,
            "use_cpu": arguments.device == "cpu",
            "bf16": arguments.bf16,
            "dtype": "float32",
            "max_steps": arguments.steps,
            "per_device_train_batch_size": arguments.batch_size,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "resume_from_checkpoint": False,
        }

    def command(self, method: Method, module: str) -> list[str]:
        flags = dict(self.common)
        if method.pair != "none":
            flags["teacher_path"] = self.models[method.pair]
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", module, "--run", str(method.script), *arguments]


def result_of(command: list[str], measured: str = "") -> dict:
    """What a process prints behind RESULT; `measured` is its CDM_BENCH."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CDM_BENCH": measured}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT ")).removeprefix("RESULT "))


def chosen(names: list[str]) -> list[Method]:
    return [method for method in methods() if method.name in names]


def timed_run(script: str) -> None:
    """Runs a script with its arguments, and prints the seconds of each step and of the teacher's part in it."""
    import runpy

    from transformers import Trainer

    from modeling.training.trainer import DistillationTrainer
    from tests.benchmarks.device import seconds

    took: dict[str, list[float]] = {"step": [], "teacher": []}

    def timed(name, function):
        def call(self, *args, **kwargs):
            result = []
            took[name].append(seconds(lambda: result.append(function(self, *args, **kwargs)), self.args.device.type))
            return result[0]

        return call

    if os.environ.get("CDM_BENCH") == "teacher":  # waiting for it would slow the step
        DistillationTrainer.teacher_logits = timed("teacher", DistillationTrainer.teacher_logits)
    else:
        Trainer.training_step = timed("step", Trainer.training_step)
    sys.argv = [script, *sys.argv[sys.argv.index(script) + 1 :]]
    runpy.run_path(script, run_name="__main__")
    print("RESULT", json.dumps({name: statistics.median(t[WARM_UP:]) if t else 0.0 for name, t in took.items()}))


def arguments_of(description: str, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [method.name for method in methods()]
    parser.add_argument("--methods", nargs="+", default=["SFT", "FKD", "CDM"], choices=names)
    parser.add_argument("--steps", type=int, default=steps, help=f"the first {WARM_UP} do not count (default: {steps})")
    parser.add_argument("--student_size", default="tiny", choices=SIZES, help="default: tiny")
    parser.add_argument("--teacher_size", default="tiny", choices=SIZES, help="default: tiny")
    parser.add_argument("--batch_size", type=int, default=2, help="examples a step (default: 2)")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision")
    add_device_argument(parser)
    return parser


def main() -> None:
    parser = arguments_of(__doc__, steps=15)
    parser.add_argument("--turns", type=int, default=3, help="runs of each script (default: 3)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), arguments)
        times: dict[str, list[float]] = {}
        for _ in range(arguments.turns):
            for method in chosen(arguments.methods):
                command = bench.command(method, "tests.benchmarks.bench_steps")
                times.setdefault(method.name, []).append(result_of(command)["step"])
        print(f"{'method':8}  {'step':>9}  {'teacher':>9}  {'to FKD':>6}  {'over':>5}")
        step = {name: statistics.median(values) for name, values in times.items()}
        for method in chosen(arguments.methods):
            teacher = result_of(bench.command(method, "tests.benchmarks.bench_steps"), "teacher")["teacher"]
            took = step[method.name]
            cells = [f"{method.name:8}", f"{1000 * took:6.0f} ms", f"{1000 * teacher:6.0f} ms"]
            cells.append(f"{took / step['FKD']:6.2f}" if "FKD" in step else f"{'–':>6}")
            cells.append(f"{took / (teacher + step['SFT']):5.2f}" if "SFT" in step else f"{'–':>5}")
            print("  ".join(cells), flush=True)


if __name__ == "__main__":
    if "--run" in sys.argv:
        timed_run(sys.argv[sys.argv.index("--run") + 1])
    else:
        main()
