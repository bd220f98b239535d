"""Two machines, each with a command of its own, and no ssh: played by two launchers on this one."""

import json
import subprocess
import time

import pytest

from tests.end_to_end import rig
from tests.end_to_end.rig import ROOT, environment, flags, free_port, run_script, steps, tiny_llama
from tests.end_to_end.warm_python import kill_all
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe

pytestmark = pytest.mark.timeout(900)
SFT = "modeling/run_clm_sft.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = byte_level_bpe()
    return tiny_llama(tmp_path_factory.mktemp("nodes") / "model", tokenizer, len(tokenizer))


@pytest.fixture
def data(tmp_path):
    rows = [{"prefix": f"Say {i}: ", "text": text} for i, text in enumerate(SAMPLE_TEXTS * 3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows[:16]), encoding="utf-8")
    return tmp_path / "rows.json"


def arguments(model, data, output, max_steps=4, **further):
    return flags(
        **{"model_name_or_path": model, "train_file": data, "output_dir": output, "do_train": True, "seed": 3},
        **{"max_steps": max_steps, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1},
        **{"save_strategy": "steps", "save_steps": 1, "report_to": "none", "disable_tqdm": True, **further},
    )


def start(model, data, output, port, log, max_steps=4, **env):
    """`launch modeling/run_clm_sft.py …`, in a process group of its own."""
    command = ["bash", str(ROOT / "script_train/launch.sh"), "launch", SFT, *arguments(model, data, output, max_steps)]
    env = environment(**{"DEVICE": "cpu", "PYTHON": rig.PYTHON, "MASTER_PORT": str(port), **env})
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def two_nodes(model, data, output, tmp_path, **options):
    port = free_port()
    logs = [(tmp_path / f"node {rank}.log").open("w+") for rank in range(2)]
    nodes = {"NNODES": "2", "NPROC": "1", "MASTER_ADDR": "127.0.0.1"}
    return [
        start(model, data, output, port, log, NODE_RANK=str(rank), **nodes, **options) for rank, log in enumerate(logs)
    ], logs


def text_of(log) -> str:
    log.seek(0)
    return log.read()[-4000:]


def losses_of(output) -> list[float]:
    return [entry["loss"] for entry in steps(output)]


def test_two_nodes_take_the_steps_of_one_process(model, data, tmp_path):
    run_script(SFT, *arguments(model, data, tmp_path / "one", gradient_accumulation_steps=2, use_cpu=True))
    both, logs = two_nodes(model, data, tmp_path / "two", tmp_path)
    for node, log in zip(both, logs):
        assert node.wait(timeout=400) == 0, text_of(log)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    assert len(losses_of(tmp_path / "two")) == 4


def test_a_node_that_is_killed_ends_the_other_and_the_run_resumes(model, data, tmp_path):
    both, logs = two_nodes(model, data, tmp_path / "two", tmp_path, max_steps=400)
    until = time.monotonic() + 300
    while not (tmp_path / "two/checkpoint-2/trainer_state.json").exists():
        assert time.monotonic() < until and all(node.poll() is None for node in both), text_of(logs[0])
        time.sleep(0.2)
    kill_all(both[1].pid)
    for node, log in zip(both, logs):
        assert node.wait(timeout=200) != 0, text_of(log)
    last = max(int(path.name.split("-")[1]) for path in (tmp_path / "two").glob("checkpoint-*"))
    both, logs = two_nodes(model, data, tmp_path / "two", tmp_path, max_steps=last + 2)
    for node, log in zip(both, logs):
        assert node.wait(timeout=400) == 0, text_of(log)
    assert steps(tmp_path / "two")[-1]["step"] == last + 2
    assert "Resuming from" in text_of(logs[0]) or len(steps(tmp_path / "two")) == last + 2
