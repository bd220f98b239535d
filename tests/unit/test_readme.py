"""The READMEs say what is there: flags, files, settings, commands, the table of methods, and code that runs."""

import argparse
import contextlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rapidfuzz.distance import Levenshtein

from script_train.methods import methods
from tests.reference import cdm_oracle, vocab_mapper_oracle
from tests.unit.tokenizer_zoo import sentencepiece_bpe, unigram

ROOT = Path(__file__).parents[2]
FOLDERS = ("data", "get_vocab_mapper", "modeling", "script_eval", "script_train", "tests")
READMES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in FOLDERS)]
FILE_TYPES = (".py", ".sh", ".md", ".html", ".svg", ".png", ".toml", ".txt")
OF_THE_READER = ("outputs/", "evalplus/", "tokenizers/", "modeling/run_clm_tvd.py", "run_clm_NAME.py")
WRITTEN_BY_RUNS = ("table.md", "choice.md", "curves.png", "scores.png", "differences.png")
OF_OTHER_PROGRAMS = {"--help", "--nproc_per_node", "--apply_chat_template"}
OF_OTHER_PROGRAMS |= {"--nodes", "--ntasks", "--gpus", "--cpus", "--time", "--signal"}  # Slurm's, up to a hyphen
NO_BENCHMARKS = ("__init__.py", "device.py")
BENCHMARKS = [path for path in (ROOT / "tests/benchmarks").glob("*.py") if path.name not in NO_BENCHMARKS]
PARSED_SCRIPTS = (
    *sorted((ROOT / "modeling").glob("run_clm_*.py")),
    *sorted((ROOT / "get_vocab_mapper").glob("get_*_mapper.py")),
    *(ROOT / "script_eval" / name for name in ("generate.py", "score_rouge.py", "show_alignment.py", "summarize.py")),
    ROOT / "script_eval/check_pair.py",
    ROOT / "script_train/make_transfer_pair.py",
    ROOT / "data/prepare_data.py",
    *BENCHMARKS,
)

every_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def read(readme: Path) -> str:
    return readme.read_text(encoding="utf-8")


def blocks(readme: Path, language: str, above: str = "") -> list[str]:
    """The fenced blocks of a language, perhaps only those below a certain line."""
    return re.findall(rf"^{above}```{language}\n(.*?)^```$", read(readme), re.MULTILINE | re.DOTALL)


def snippet(readme: Path, name: str) -> str:
    (found,) = blocks(readme, "python", above=f"<!-- snippet: {name} -->\n")
    return found


def code_spans(readme: Path) -> list[str]:
    """What is in backticks, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", read(readme), flags=re.MULTILINE | re.DOTALL))


# -------------------------------------------------------------------------------------------------------------- flags


class Parsed(BaseException):
    """A script has come to the point where it reads its arguments. (No Exception: no script may catch it.)"""


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    options = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            options.update(*map(options_of, action.choices.values()))
    return options


@pytest.fixture(scope="module")
def options() -> dict[Path, set[str]]:
    """What `--help` of each script lists, read off its parser as the script makes it."""
    found: dict[Path, set[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "script_eval")
        for script in PARSED_SCRIPTS:

            def stop(parser, *args, script=script, **kwargs):
                found[script] = options_of(parser)
                raise Parsed

            patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
            patch.setattr(sys, "argv", [str(script)])
            with contextlib.suppress(Parsed):
                runpy.run_path(str(script), run_name="__main__")
    assert set(found) == set(PARSED_SCRIPTS)
    return found


@every_readme
def test_every_flag_is_one_of_a_script(readme, options):
    known = set().union(OF_OTHER_PROGRAMS, *options.values())
    unknown = set(re.findall(r"(?<![\w-])--[A-Za-z]\w*", read(readme))) - known
    assert not unknown


# -------------------------------------------------------------------------------------------------------------- files


@every_readme
def test_every_path_is_there(readme):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", read(readme)) if "://" not in link]
    missing = [link for link in links if not (readme.parent / link.split("#")[0]).exists()]
    for span in code_spans(readme):
        is_path = re.fullmatch(r"[\w.*-]+(/[\w.*-]*)*", span) and (span.endswith(FILE_TYPES) or span.endswith("/"))
        if not is_path or span.startswith(OF_THE_READER) or span in WRITTEN_BY_RUNS:
            continue
        anywhere = [f"{folder}/**/{span}" for folder in FOLDERS] if "/" not in span else []
        if not any(readme.parent.glob(span.rstrip("/"))) and not any(any(ROOT.glob(p)) for p in [span, *anywhere]):
            missing.append(span)
    assert not missing


def test_the_tree_is_that_of_the_project():
    (tree,) = blocks(ROOT / "README.md", "text")
    above = ROOT
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0]
        folder = above if line.startswith(" ") else ROOT
        for name in names.split(", "):
            assert any(folder.glob(name.rstrip("/"))), line
        if line[0] != " " and names.endswith("/"):
            above = ROOT / names


@pytest.mark.parametrize("folder", ["modeling", "script_eval", "script_train", "data", "get_vocab_mapper"])
def test_every_file_has_its_line(folder):
    """The README of a folder names each file in it, and in the folders below."""
    readme = ROOT / folder / "README.md"
    named = set(code_spans(readme))
    files = {
        str(path.relative_to(readme.parent))
        for pattern in ("*.py", "*.sh", "*/*.py", "*/*.sh", "*.html", "*.json")
        for path in readme.parent.glob(pattern)
        if path.name != "__init__.py" and path.parent.name != "figures"
    }
    unnamed = {file for file in files if not any(fnmatch(file, span) for span in named)}
    assert not unnamed


def test_every_folder_is_introduced_at_the_top():
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) < 250
    assert all(re.search(rf"^{folder}/", text, re.MULTILINE) for folder in FOLDERS)


# ----------------------------------------------------------------------------------------------------------- commands


def commands() -> list[tuple[str, str]]:
    """`(README, command)`, of fenced blocks and of the text. Continued lines are one command, and a comment is none."""
    found = []
    for readme in filter(Path.exists, READMES):
        lines = [line for block in blocks(readme, "bash") for line in block.replace("\\\n", " ").splitlines()]
        lines += [span for span in code_spans(readme) if re.match(r"([A-Z_]+=\S+ )*(python|bash) ", span)]
        words = [shlex.split(line, comments=True) for line in lines]
        found += [(str(readme.relative_to(ROOT)), shlex.join(command)) for command in words if command]
    return list(dict.fromkeys(found))


def split_settings(command: str) -> tuple[dict[str, str], list[str]]:
    words = shlex.split(command)
    settings = {}
    while words and (match := re.fullmatch(r"([A-Z][A-Z0-9_]*)=(.*)", words[0])):
        settings[match[1]] = match[2]
        words.pop(0)
    return settings, words


def settings_of(script: Path) -> set[str]:
    """What a shell script reads from the environment, and what it sources reads."""
    text = read(script)
    found = set(re.findall(r"\$\{([A-Z][A-Z0-9_]*):?[-:+]", text))
    for name in re.findall(r"^(?:source|exec bash) .*?([\w-]+\.sh)", text, re.MULTILINE):
        (sourced,) = ROOT.glob(f"script_*/{name}")
        found |= settings_of(sourced)
    return found


@pytest.mark.parametrize(("readme", "command"), commands())
def test_every_command_parses(readme, command, options, tmp_path, pytestconfig):
    settings, words = split_settings(command)
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    if words[0] == "python":
        module = words[1] == "-m"
        script = ROOT / (words[2].replace(".", "/") + ".py" if module else words[1])
        assert set(flags) <= options[script]
        assert set(settings) <= {"CDM_REAL_DIR"}
        return
    assert words[0] == "bash"
    script = ROOT / words[1]
    assert set(settings) <= settings_of(script)
    if "-m" in words:
        marker = words[words.index("-m") + 1]
        assert any(line.startswith(f"{marker}:") for line in pytestconfig.getini("markers"))
    if script.parent.parent.name == "script_train":  # its settings are those of one training: print that
        environment = os.environ | settings | {"DRY_RUN": "1", "DEVICE": "cpu", "NPROC": "1", "PYTHON": sys.executable}
        environment |= {"OUTPUT": str(tmp_path / "output"), "MAPPER": str(tmp_path / "mapper.safetensors")}
        done = subprocess.run(["bash", script, *words[2:]], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        *_, last = done.stdout.splitlines()
        printed = shlex.split(last)
        if printed[1] == "-m":  # a launcher, with words of its own
            printed = printed[next(i for i, word in enumerate(printed) if word.endswith(".py")) - 1 :]
            assert printed.pop(printed.index("--deepspeed") + 1).endswith(".json")
        assert {word for word in printed if word.startswith("--")} <= options[Path(printed[1])]


@every_readme
def test_every_setting_is_read_somewhere(readme):
    """Names in capitals, as the settings of the shell scripts and of the tests have them."""
    sources = [path for folder in ("script_train", "script_eval", "tests") for path in (ROOT / folder).rglob("*")]
    text = "\n".join(read(path) for path in sources if path.suffix in (".sh", ".py"))
    known = {*re.findall(r"[A-Z][A-Z0-9_]+", text), "METHOD_ALPHA", "METHOD_TEMPERATURE"}  # METHOD is a method's name
    named = {match[1] for span in code_spans(readme) if (match := re.fullmatch(r"([A-Z][A-Z0-9_]+)(=.*)?", span))}
    unknown = named - known
    assert not unknown


# ------------------------------------------------------------------------------------------------- methods and snippets


def test_the_table_of_methods_is_their_list():
    rows = re.findall(r"^\| (\w+) \| `(run_clm_\w+\.py)` \|", read(ROOT / "README.md"), re.MULTILINE)
    assert rows == [(method.name, method.script.name) for method in methods()]


def oracle_side(forms, tokens: torch.Tensor, logits: torch.Tensor, others: list[str], static: list[int], similar: dict):
    """One side for the oracle: what its tokens match, and what they are similar to, by text."""
    assert len(set(forms.texts)) == len(forms)
    near: dict[str, dict[str, float]] = {}
    for (token, other), distance in similar.items():
        near.setdefault(forms.texts[token], {})[others[other]] = distance
    return cdm_oracle.Side(
        vocabulary=list(forms.texts),
        tokens=tokens.tolist(),
        logits=logits.detach().double(),
        match={forms.texts[token]: others[other] for token, other in enumerate(static) if other >= 0},
        similar=near,
    )


def test_cdm_by_hand(tmp_path):
    """The snippet's loss and its gradient are those of the oracles, from mapping and alignment on."""
    for name, kind in (("TEACHER", sentencepiece_bpe), ("STUDENT", unigram)):
        kind(byte_fallback=False).save_pretrained(tmp_path / name)
    code = snippet(ROOT / "modeling/README.md", "loss")
    assert len(code.splitlines()) <= 15
    torch.manual_seed(5)
    names = {name: str(tmp_path / name) for name in ("TEACHER", "STUDENT")}
    exec(compile(code, "README.md", "exec"), names)

    teacher, student, batch = names["teacher"].forms, names["student"].forms, names["batch"]
    to_student, to_teacher = vocab_mapper_oracle.static_map("em", teacher, student)
    similar = vocab_mapper_oracle.similar(teacher, student, 0.3, Levenshtein.distance)
    back = {(u, v): distance for (v, u), distance in similar.items()}
    labels, z = batch.student.labels, names["z_student"]
    expected = cdm_oracle.cdm(
        oracle_side(teacher, batch.teacher.labels, names["z_teacher"], student.texts, to_student, similar),
        oracle_side(student, labels, z, teacher.texts, to_teacher, back),
        topk=100,
        temperature=1.0,
    )
    sizes = {(len(teachers), len(students)) for teachers, students in expected.groups}
    assert (1, 1) in sizes and len(sizes) > 1
    by_hand = z.detach().double().requires_grad_()
    ce = torch.nn.functional.cross_entropy(by_hand, labels)
    ce.backward()
    loss = (ce.item() + expected.kd_sum / len(labels)) / 2
    assert names["losses"].mean(kd_alpha=0.5).item() == pytest.approx(loss, rel=1e-5)
    gradient = (by_hand.grad + expected.gradient / len(labels)) / 2
    torch.testing.assert_close(z.grad.double(), gradient, rtol=1e-4, atol=1e-7)


def test_a_new_method():
    names = {"__name__": "run_clm_tvd"}
    exec(compile(snippet(ROOT / "README.md", "method"), "README.md", "exec"), names)
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7), torch.arange(5)
    losses = names["tvd_losses"](student, teacher, SimpleNamespace(student=SimpleNamespace(labels=labels)))
    p, q = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(losses.kd, (p - q).abs().sum(-1) / 2)
    torch.testing.assert_close(losses.ce, -p[range(5), labels].log())
