"""A run that names no mapper: the one of its pair is built once, beside its output folder, and read from then on."""

import pytest

from tests.end_to_end.rig import launcher, run_script, steps
from tests.end_to_end.test_teacher_cache import arguments, bench, train, without_times  # noqa: F401

BUILT, READ = "written: ", "The mapper is read from"
KINDS = {"CDM": "em", "MinED": "mined", "BPM": "prefixem", "Strict": "em"}
FILES = {method: f"teacher-to-student.{kind}.safetensors" for method, kind in KINDS.items()}


@pytest.mark.parametrize("method", FILES)
def test_built_once_then_read(train, tmp_path, capsys, method):  # noqa: F811
    named, _ = train(method, max_steps=2)
    for said in (BUILT, READ):
        capsys.readouterr()
        logged, _ = train(method, teacher_to_student_id_mapping=None, max_steps=2)
        told = "".join(capsys.readouterr())
        assert told.count(said) == told.count(BUILT) + told.count(READ) == 1
        for got, want in zip(logged, named, strict=True):
            assert without_times(got) == pytest.approx(without_times(want))
    path = tmp_path / "mappers" / FILES[method]
    assert list(path.parent.glob("*.safetensors")) == [path]
    train(method, teacher_to_student_id_mapping=None, max_steps=1, mapper_dir=tmp_path / "elsewhere")
    assert [file.name for file in (tmp_path / "elsewhere").glob("*.safetensors")] == [path.name]


def test_two_ranks_build_it_once(train, bench, tmp_path):  # noqa: F811
    run = {"max_steps": 2, "do_eval": False, "per_device_train_batch_size": 2, "teacher_to_student_id_mapping": None}
    words = arguments(bench, "CDM", tmp_path / "two", **run)
    done = run_script("modeling/run_clm_distill_CDM.py", *words, launch=launcher(2))
    assert (done.stdout + done.stderr).count(BUILT) == 1
    assert [path.name for path in (tmp_path / "mappers").glob("*.safetensors")] == [FILES["CDM"]]
    for got, want in zip(steps(tmp_path / "two"), train("CDM", max_steps=2)[0], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
