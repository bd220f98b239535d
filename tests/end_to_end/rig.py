"""What the end-to-end tests share: small random models with real vocabularies, and running scripts as users do."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling.text.rows import alpaca_prompt
from tests.unit.tokenizer_zoo import load_real, real_dir

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable  # in a test session, one that has the heavy imports done: `warm` in conftest.py
COLUMNS = {"phi-3": 32_064, "qwen2": 151_936}  # the widths of the real models' heads, padding included


def tiny_llama(
    folder: Path, tokenizer, columns: int, hidden: int = 32, layers: int = 2, seed: int = 0, tied: bool = False
) -> Path:
    """Saves a random Llama of `columns` logits with the given tokenizer. Wide initial weights: no uniform outputs."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=columns,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def real_llama(folder: Path, name: str, **options) -> Path:
    return tiny_llama(folder / name, load_real(name), COLUMNS[name], **options)


def dolly_file(path: Path, rows: range, shorter_than: int = 10**9) -> Path:
    """Real Dolly rows in the training form: of those with fewer characters than that, the given ones."""
    with (real_dir() / "data/dolly/databricks-dolly-15k.jsonl").open(encoding="utf-8") as file:
        lines = map(json.loads, file)
        data = [{"prefix": alpaca_prompt(r["instruction"], r["context"]), "text": r["response"]} for r in lines]
    data = [row for row in data if len(row["prefix"] + row["text"]) < shorter_than]
    path.write_text(json.dumps([data[i] for i in rows]), encoding="utf-8")
    return path


def response_of(model, tokenizer, row: dict) -> tuple[list[int], torch.Tensor]:
    """`(tokens, logits)` of a row's response, EOS included, from the model's own forward on that row alone.

    The logits are float64 [R, V]: row j predicts token j. A first token that nothing predicts is left out.
    """
    encoding = tokenizer(row["prefix"] + row["text"], return_offsets_mapping=True)
    ids = [*encoding["input_ids"], tokenizer.eos_token_id]
    start = next(i for i, (_, end) in enumerate(encoding["offset_mapping"]) if end > len(row["prefix"]))
    start = max(start, 1)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0, start - 1 : -1, : len(tokenizer)]
    return ids[start:], logits.double()


def environment(**extra: str) -> dict[str, str]:
    """Without the variables of a launcher, and with one thread a process: two ranks must not fight over two cores.

    The interpreter's own tools come first, as `launch.sh` has it: with another ninja, DeepSpeed compiles all anew.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return {**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **extra}


DRAWN_PORTS: list[int] = []


def free_port() -> int:
    """A port that nothing listens on, below those that the system gives to outgoing connections.

    Drawn, not counted: two processes that run tests beside each other must not come to the same one.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            DRAWN_PORTS.append(port)
            return port


def remove_shared_memory() -> None:
    """What DeepSpeed leaves behind on a CPU: 69 MB a rank of every run, under the name of its port."""
    for port in DRAWN_PORTS:
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)
    DRAWN_PORTS.clear()


def launcher(ranks: int = 1, deepspeed: bool = False, cold: bool = False) -> list[str]:
    """The words in front of a script. `cold`: ranks with an interpreter of their own, to which signals can be sent."""
    python, port = sys.executable if cold else PYTHON, str(free_port())
    if deepspeed:
        return [python, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", port]
    if ranks > 1:
        return [python, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]
    return [python]


def flags(**arguments) -> list[str]:
    """A command line; None leaves a flag out."""
    given = {name: value if isinstance(value, list) else [value] for name, value in arguments.items()}
    return [str(word) for name, values in given.items() if values != [None] for word in (f"--{name}", *values)]


def training_flags(**arguments) -> list[str]:
    """Those of a training on the CPU that logs every step."""
    common = {"do_train": True, "use_cpu": True, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    return flags(**{**common, **arguments})


def run_script(script: str, *arguments: str, launch: list[str] | None = None, fails: bool = False):
    """Runs `python script …` (or under a launcher) and returns the finished process; its output is shown on failure."""
    command = [*(launch or [PYTHON]), str(ROOT / script), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert (done.returncode != 0) == fails, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-12000:]}"
    return done


def in_a_fork(action: Callable[[], None], seconds: int = 300) -> SimpleNamespace:
    """`status` (negative: the signal that ended it) and `output` of the action, in a fork.

    The fork has done the heavy imports, may be killed at any point, and leaves no trace in this process.
    """
    with open(os.memfd_create("output"), "w+", buffering=1, encoding="utf-8") as output:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setsid()  # a group of its own, to be signalled as a whole
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.stdout = sys.stderr = output
                action()
                status = 0
            except SystemExit as end:  # as the interpreter does it: a message goes to stderr
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        until = time.monotonic() + seconds
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise TimeoutError(f"still at work after {seconds} s")
            time.sleep(0.02)
        output.seek(0)
        return SimpleNamespace(status=os.waitstatus_to_exitcode(ended[1]), output=output.read())


def log_history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def steps(folder: Path) -> list[dict]:
    """The logged training steps, in order."""
    return [entry for entry in log_history(folder) if "loss" in entry]
