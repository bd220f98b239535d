"""script_train/launch.sh: which device, how many processes, which launcher and which flags.

A machine with accelerators is played by a stub that torch loads as it loads torch-npu: through the entry point group
`torch.backends`, whenever it is imported.
"""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "modeling/run_clm_sft.py")
READ_BY_LAUNCH = (
    *("DEVICE", "DEVICE_COUNT", "NPROC", "HOSTFILE", "MASTER_PORT", "ZERO", "PRECISION", "DRY_RUN", "PYTHON"),
    *("NNODES", "NODE_RANK", "MASTER_ADDR"),
    *(
        "CUDA_VISIBLE_DEVICES",
        "ASCEND_RT_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "TORCH_DEVICE_BACKEND_AUTOLOAD",
    ),
)
STUBS = {
    "torch_npu": """
        import types, torch
        torch.utils.rename_privateuse1_backend("npu")
        module = types.ModuleType("torch.npu")
        module.is_available, module.device_count = lambda: True, lambda: 4
        torch._register_device_module("npu", module)
    """,
    "cuda_stub": """
        import torch
        torch._C._accelerator_getAccelerator = lambda: torch.device("cuda")
        torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 3
    """,
    "npu_without_toolkit": """
        raise ImportError("libhccl.so: cannot open shared object file")
    """,
}


@pytest.fixture
def stub(tmp_path):
    """Installs one of STUBS in a folder, to be put on PYTHONPATH."""

    def install(name: str) -> str:
        site = tmp_path / "site packages"
        metadata = site / f"{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[torch.backends]\n{name} = {name}:load\n")
        lines = [line[8:] for line in STUBS[name].splitlines()]
        (site / f"{name}.py").write_text("\n".join([*lines, "def load(): pass", ""]))
        return str(site)

    return install


def run_bash(command: str, cwd: Path | str = "/", **env: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in READ_BY_LAUNCH}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env={**clean, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def command_of(*arguments: str, cwd: Path | str = "/", root: Path = ROOT, **env: str) -> list[str]:
    """What `launch modeling/run_clm_sft.py ARGUMENTS…` would run, word by word."""
    line = shlex.join(["launch", "modeling/run_clm_sft.py", *arguments])
    done = run_bash(f"source {shlex.quote(str(root / 'script_train/launch.sh'))}; {line}", cwd, DRY_RUN="1", **env)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def error_of(**env: str) -> str:
    done = run_bash(f"source '{ROOT}/script_train/launch.sh'; launch modeling/run_clm_sft.py", DRY_RUN="1", **env)
    assert done.returncode != 0
    assert done.stdout == ""
    return done.stderr


def deepspeed(*launcher: str, flags: tuple[str, ...], zero: str = "deepspeed_config.json") -> list[str]:
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", "29500", *launcher]
    return [*start, SCRIPT, *flags, "--deepspeed", str(ROOT / "config" / zero)]


def test_without_accelerator_it_is_plain_python_on_the_cpu():
    assert command_of("--seed", "1", TORCH_DEVICE_BACKEND_AUTOLOAD="0", CUDA_VISIBLE_DEVICES="") == [
        *(sys.executable, SCRIPT, "--use_cpu", "true", "--seed", "1"),
    ]


BF16 = ("--bf16", "true")
ON_CUDA, ON_CPU = {"DEVICE": "cuda", "NPROC": "2"}, {"DEVICE": "cpu", "NPROC": "2"}


@pytest.mark.parametrize(
    ("stubbed", "env", "processes", "flags"),
    [
        pytest.param("torch_npu", {}, "4", BF16, id="an npu is found"),
        pytest.param("cuda_stub", {}, "3", BF16, id="cuda is found"),
        pytest.param(None, {**ON_CUDA, "PRECISION": "fp16"}, "2", ("--fp16", "true"), id="fp16"),
        pytest.param(None, {**ON_CUDA, "PRECISION": "fp32"}, "2", (), id="fp32"),
        pytest.param(None, {**ON_CPU, "PRECISION": "bf16"}, "2", ("--use_cpu", "true", *BF16), id="two on the cpu"),
    ],
)
def test_devices_processes_and_precision(stub, stubbed, env, processes, flags):
    site = {"PYTHONPATH": stub(stubbed)} if stubbed else {}
    assert command_of(**env, **site) == deepspeed("--num_gpus", processes, flags=flags)


def test_a_torch_npu_without_its_toolkit_is_named(stub):
    message = error_of(PYTHONPATH=stub("npu_without_toolkit"))
    assert "libhccl.so" in message
    assert "set_env.sh" in message


def test_a_given_device_that_torch_does_not_see(stub):
    site = stub("torch_npu")
    assert "torch sees: npu" in error_of(DEVICE="cuda", PYTHONPATH=site)
    # On another machine than the one that trains, with NPROC given, nothing is asked.
    assert command_of(DEVICE="cuda", NPROC="8", ZERO="3") == deepspeed(
        *("--num_gpus", "8"), flags=BF16, zero="deepspeed_zero3_config.json"
    )
    assert command_of(DEVICE="cpu", PYTHONPATH=site) == [sys.executable, SCRIPT, "--use_cpu", "true"]


def test_bf16_on_the_cpu():
    assert command_of(DEVICE="cpu", PRECISION="bf16") == [sys.executable, SCRIPT, "--use_cpu", "true", *BF16]


def test_only_visible_devices_are_used(stub):
    cuda = {"DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "2,5,7"}
    assert command_of(NPROC="3", **cuda) == deepspeed("--include", "localhost:2,5,7", flags=BF16)
    assert command_of(NPROC="2", **cuda) == deepspeed("--include", "localhost:2,5", flags=BF16)
    assert "only the devices 2,5,7 are visible" in error_of(NPROC="4", **cuda)
    npu = {"PYTHONPATH": stub("torch_npu"), "ASCEND_RT_VISIBLE_DEVICES": "4,5,6,7"}
    assert command_of(**npu) == deepspeed("--include", "localhost:4,5,6,7", flags=BF16)


def test_hostfile(tmp_path, stub):
    hostfile = tmp_path / "my hosts"
    hostfile.write_text("node-a slots=4\nnode-b slots=4\n")
    npu = {"PYTHONPATH": stub("torch_npu"), "HOSTFILE": str(hostfile)}
    assert command_of(**npu) == deepspeed("--hostfile", str(hostfile), flags=BF16)
    assert command_of(NPROC="2", **npu) == deepspeed("--hostfile", str(hostfile), "--num_gpus", "2", flags=BF16)
    assert "no such file" in error_of(DEVICE="cuda", NPROC="2", HOSTFILE=str(tmp_path / "none"))


def several(rank: str, address: str, port: str, **env: str) -> None:
    """The command of one of two machines with four devices, and the list that DeepSpeed is given."""
    words = command_of(DEVICE="cuda", NPROC="4", **env)
    at = words.index("--hostfile")
    assert Path(words[at + 1]).read_text() == "node0 slots=4\nnode1 slots=4\n"
    Path(words[at + 1]).unlink()
    assert words[3:at] == ["--master_port", port]
    assert words[at + 2 : at + 7] == ["--no_ssh", "--node_rank", rank, "--master_addr", address]
    assert words[at + 7] == SCRIPT and "--deepspeed" in words


def test_several_machines(tmp_path):
    several("1", "10.0.0.1", "29500", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    pet = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "first", "PET_MASTER_PORT": "1234"}
    several("0", "first", "1234", **pet)
    (tmp_path / "scontrol").write_text("#!/bin/sh\n[ \"$3\" = 'n[3-4]' ] && printf 'n3\\nn4\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "n[3-4]"}
    several("1", "n3", "29500", PATH=f"{tmp_path}:{os.environ['PATH']}", **slurm)
    assert "--no_ssh" not in command_of(DEVICE="cuda", NPROC="4", SLURM_STEP_NUM_NODES="1", SLURM_NODEID="0")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"NNODES": "two"}, "NNODES=two is not a number"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK= is none of 0 to 1"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK=2 is none of 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "HOSTFILE": "h"}, "HOSTFILE and NNODES=2"),
        ({"DEVICE": "tpu", "NPROC": "1"}, "DEVICE=tpu"),
        ({"DEVICE": "cpu", "NPROC": "two"}, "NPROC=two"),
        ({"DEVICE": "cpu", "NPROC": "0"}, "NPROC=0"),
        ({"DEVICE": "cpu", "PRECISION": "fp8"}, "PRECISION=fp8"),
        ({"DEVICE": "cuda", "NPROC": "1", "ZERO": "1"}, "ZERO=1"),
    ],
)
def test_what_is_not_understood_is_named(env, words):
    assert words in error_of(**env)


def test_spaces_in_paths_and_arguments(tmp_path):
    root = tmp_path / "a project"
    (root / "script_train").mkdir(parents=True)
    (root / "script_train/launch.sh").write_bytes((ROOT / "script_train/launch.sh").read_bytes())
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    words = command_of("--train_file", "my data.json", "--note", "$HOME \"'", root=root, DEVICE="cpu", PYTHON="")
    assert words == [
        *(str(python), str(root / "modeling/run_clm_sft.py"), "--use_cpu", "true"),
        *("--train_file", "my data.json", "--note", "$HOME \"'"),
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_script_gets_its_arguments(warm, tmp_path, processes):
    """For real: plain Python for one process, DeepSpeed for two. Relative paths stay relative to the caller."""
    script = tmp_path / "print words.py"
    script.write_text("import os, sys\nopen(f\"rank {os.environ.get('RANK', 0)}\", 'w').write(str(sys.argv[1:]))\n")
    done = run_bash(
        f"source '{ROOT}/script_train/launch.sh'; launch '{script}' --words 'two words' '\"quoted\" $HOME'",
        cwd=tmp_path,
        **{"DEVICE": "cpu", "NPROC": str(processes), "MASTER_PORT": "29637", "PYTHON": warm},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(processes):
        words = (tmp_path / f"rank {rank}").read_text()
        assert "'--words', 'two words', '\"quoted\" $HOME'" in words


@pytest.mark.parametrize("script", sorted((ROOT / "script_train").glob("*/*.sh")), ids=lambda path: path.name)
def test_a_training_script_names_arguments_that_exist(script, tmp_path, monkeypatch, capsys):
    """The command of every thin script is understood by the Python script that it starts."""
    env = {"DEVICE": "cpu", "VALIDATION": "held out.json", "OUTPUT": str(tmp_path / "out put")}
    done = run_bash(f"bash '{script}' --max_steps 3", DRY_RUN="1", **env)
    assert done.returncode == 0, done.stderr
    *builder, training = map(shlex.split, done.stdout.splitlines())
    assert training[-2:] == ["--max_steps", "3"]
    assert training[training.index("--output_dir") + 1] == env["OUTPUT"]
    for words in (*builder, training):
        assert words[0] == sys.executable
        monkeypatch.setattr(sys, "argv", [words[1], "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_path(words[1], run_name="__main__")
        known = {word.strip("[],") for word in capsys.readouterr().out.split()}
        assert {word for word in words[2:] if word.startswith("--")} <= known
