"""How long a training step of CDM takes, to one of forward KL with a teacher of the student's width.

    CDM_REAL_DIR=… python -m tests.benchmarks.bench_steps [--steps 15] [--hidden 256] [--layers 4]

The real scripts, on real rows (Dolly), with random models of one transformer size and real vocabularies: the student
and FKD's teacher have Qwen2's (151,936 columns), CDM's teacher Phi-3's (32,064). The larger the transformers, the less
the losses matter: these are small. Both scripts run in turns, each in a process of its own, and print the median of
their steps; the first ones are left out.
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

from get_vocab_mapper.builders import build_em
from get_vocab_mapper.mapper_file import save_mapper
from get_vocab_mapper.token_forms import token_forms
from modeling.text.rows import alpaca_prompt

ROOT = Path(__file__).parents[2]
COLUMNS = {"phi-3": 32_064, "qwen2": 151_936}
WARM_UP = 3
# Runs a script with its arguments, and prints the seconds of each training step.
TIMED = """
import json, runpy, sys, time
from transformers import Trainer
step, seconds = Trainer.training_step, []
def timed(*args, **kwargs):
    start = time.perf_counter()
    loss = step(*args, **kwargs)
    seconds.append(time.perf_counter() - start)
    return loss
Trainer.training_step = timed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("SECONDS", json.dumps(seconds))
"""


def save_model(folder: Path, tokenizer, columns: int, hidden: int, layers: int) -> Path:
    config = LlamaConfig(
        vocab_size=columns,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(source: Path, output: Path, count: int) -> Path:
    with source.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    long = [row for row in rows if 600 < len(row["response"]) < 1500][:count]
    data = [{"prefix": alpaca_prompt(r["instruction"], r["context"][:300]), "text": r["response"]} for r in long]
    output.write_text(json.dumps(data), encoding="utf-8")
    return output


def step_seconds(script: str, **arguments) -> float:
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-c", TIMED, str(ROOT / "modeling" / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    line = next(line for line in done.stdout.splitlines() if line.startswith("SECONDS "))
    return statistics.median(json.loads(line.removeprefix("SECONDS "))[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help=f"the first {WARM_UP} do not count (default: 15)")
    parser.add_argument("--turns", type=int, default=3, help="runs of each script (default: 3)")
    parser.add_argument("--hidden", type=int, default=256, help="width of the transformers (default: 256)")
    parser.add_argument("--layers", type=int, default=4, help="their layers (default: 4)")
    parser.add_argument("--batch_size", type=int, default=2, help="examples a step (default: 2)")
    arguments = parser.parse_args()
    if "CDM_REAL_DIR" not in os.environ:
        sys.exit("Set CDM_REAL_DIR to a folder with tokenizers/ and data/.")
    real = Path(os.environ["CDM_REAL_DIR"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizers = {name: AutoTokenizer.from_pretrained(real / "tokenizers" / name) for name in COLUMNS}
        sizes = {"hidden": arguments.hidden, "layers": arguments.layers}
        models = {
            role: save_model(folder / role, tokenizers[name], COLUMNS[name], **sizes)
            for role, name in (("student", "qwen2"), ("same", "qwen2"), ("other", "phi-3"))
        }
        mapper = folder / "em.safetensors"
        forms = [token_forms(tokenizers[name]) for name in ("phi-3", "qwen2")]
        save_mapper(build_em(*forms, progress=False), mapper)
        common = {
            "model_name_or_path": models["student"],
            "train_file": write_rows(real / "data/dolly/databricks-dolly-15k.jsonl", folder / "rows.json", 200),
            "output_dir": folder / "output",
            "do_train": True,
            "use_cpu": True,
            "max_steps": arguments.steps,
            "per_device_train_batch_size": arguments.batch_size,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "resume_from_checkpoint": False,
        }
        runs = {
            "FKD": ("run_clm_llms_fkd.py", {"teacher_path": models["same"]}),
            "CDM": (
                "run_clm_distill_CDM.py",
                {"teacher_path": models["other"], "teacher_to_student_id_mapping": mapper},
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(arguments.turns):
            for name, (script, own) in runs.items():
                seconds[name].append(step_seconds(script, **common, **own))
            fkd, cdm = seconds["FKD"][-1], seconds["CDM"][-1]
            print(f"turn {turn + 1}: FKD {fkd:.3f} s, CDM {cdm:.3f} s, ratio {cdm / fkd:.2f}", flush=True)
        ratio = statistics.median(c / f for c, f in zip(seconds["CDM"], seconds["FKD"]))
        print(f"median ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
