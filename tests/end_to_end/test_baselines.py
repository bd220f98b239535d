"""FKD, RKD, ULD and MinED as users run them: real tokenizers, real rows, small random models."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from get_vocab_mapper.mapper_file import read_mapper
from get_vocab_mapper.token_forms import token_forms
from tests.end_to_end.rig import flags, response_of, run_script, steps, tiny_llama, training_flags
from tests.reference import baseline_oracles
from tests.unit.tokenizer_zoo import load_real

SCRIPTS = {
    "FKD": "modeling/run_clm_llms_fkd.py",
    "RKD": "modeling/run_clm_llms_rkd.py",
    "ULD": "modeling/run_clm_uld.py",
    "MinED": "modeling/run_clm_MinED.py",
}
BATCH, STEPS, BLOCK_SIZE = 4, 4, 96


@pytest.fixture(scope="module")
def smollm_smollm(phi_smollm, tmp_path_factory):
    """One tokenizer on both sides, and heads padded by 64 and by 128 columns."""
    folder = tmp_path_factory.mktemp("smollm smollm") / "teacher"
    teacher = tiny_llama(folder, load_real("smollm2"), 49_280, hidden=16, seed=3)
    return SimpleNamespace(teacher=teacher, student=phi_smollm.student)


@pytest.fixture(scope="module")
def mined_mapper(phi_smollm, tmp_path_factory):
    mapper = tmp_path_factory.mktemp("mapper") / "mined.safetensors"
    sides = flags(teacher=phi_smollm.teacher, student=phi_smollm.student)
    run_script("get_vocab_mapper/get_MinED_mapper.py", *sides, "--output", str(mapper), "--simi_threshold", "0.1")
    return mapper


@pytest.fixture(scope="module")
def train_file(dolly, tmp_path_factory):
    """One batch of rows that need no cutting, so that every step sees the same ones."""
    rows = json.loads(dolly.train.read_text())
    path = tmp_path_factory.mktemp("rows") / "train.json"
    path.write_text(json.dumps([row for row in rows if len(row["prefix"] + row["text"]) < 260][:BATCH]))
    return path


def arguments(output, **changes):
    common = {
        "block_size": BLOCK_SIZE,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
    }
    return training_flags(output_dir=output, **{**common, **changes})


def predictions(folder, rows):
    """Of every row, from the model's own forward on it alone: (logits that predict the response, its ids, texts)."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = token_forms(tokenizer).texts
    for row in rows:
        ids, z = response_of(model, tokenizer, row)
        yield z, ids, [texts[i] for i in ids]


def kl(p, q):
    return torch.special.xlogy(p, p / q).sum().item()


def oracle_losses(method, pair, rows, mapper=None):
    """CE and KD of a batch, straight from the definitions, at the methods' default temperatures."""
    tau = 1.0 if method == "ULD" else 2.0
    ce = kd = 0.0
    n_tokens = 0
    for teacher, student in zip(predictions(pair.teacher, rows), predictions(pair.student, rows)):
        (z_teacher, teacher_ids, teacher_texts), (z_student, student_ids, student_texts) = teacher, student
        log_p = z_student.log_softmax(-1)
        ce -= sum(log_p[j, s].item() for j, s in enumerate(student_ids))
        n_tokens += len(student_ids)
        p, q = (z_teacher / tau).softmax(-1), (z_student / tau).softmax(-1)
        if method == "FKD":
            kd += sum(tau**2 * kl(p[j], q[j]) for j in range(len(student_ids)))
        elif method == "RKD":
            kd += sum(tau**2 * kl(q[j], p[j]) for j in range(len(student_ids)))
        elif method == "ULD":
            for j in range(min(len(teacher_ids), len(student_ids))):
                sides = torch.zeros(2, max(p.shape[1], q.shape[1]), dtype=torch.float64)
                sides[0, : p.shape[1]], sides[1, : q.shape[1]] = p[j], q[j]
                a, b = sides.sort(descending=True).values
                kd += (a - b).abs().sum().item()
        else:
            for teacher_positions, student_positions in baseline_oracles.mined_groups(teacher_texts, student_texts):
                for j in student_positions:
                    i = teacher_positions[0]
                    target = [0.0] * q.shape[1]
                    alone = len(teacher_positions) == len(student_positions) == 1
                    if alone and mapper[teacher_ids[i]] == student_ids[j]:
                        for v, mass in enumerate(p[i].tolist()):
                            if mapper[v] >= 0:
                                target[mapper[v]] += mass
                    else:
                        target[student_ids[j]] = 1.0
                    target = torch.tensor(target, dtype=torch.float64)
                    kd += tau**2 * kl(target / target.sum(), q[j])
    return ce / n_tokens, kd / n_tokens


@pytest.mark.parametrize("method", SCRIPTS)
def test_step_1_is_the_oracle_s_and_the_divergence_falls(method, request, train_file, tmp_path):
    pair = request.getfixturevalue("smollm_smollm" if method in ("FKD", "RKD") else "phi_smollm")
    mapper, static = {}, None
    if method == "MinED":
        path = request.getfixturevalue("mined_mapper")
        mapper, static = {"teacher_to_student_id_mapping": path}, read_mapper(path).to_student.static.tolist()
    models = flags(model_name_or_path=pair.student, teacher_path=pair.teacher, **mapper)
    alpha = 0.0 if method == "ULD" else 0.5  # with cross-entropy, which falls first, ULD rises at the beginning
    options = arguments(tmp_path / "out", train_file=train_file, kd_alpha=alpha)
    run_script(SCRIPTS[method], *models, *options)

    logged = steps(tmp_path / "out")
    ce, kd = oracle_losses(method, pair, json.loads(train_file.read_text()), static)
    assert logged[0]["ce_loss"] == pytest.approx(ce, rel=1e-5)
    assert logged[0]["kd_loss"] == pytest.approx(kd, rel=1e-5)
    assert logged[0]["loss"] == pytest.approx(alpha * ce + (1 - alpha) * kd, rel=1e-5)
    assert len(logged) == STEPS
    for name in ("loss", "kd_loss"):
        assert logged[-1][name] < logged[0][name]
    if method == "ULD":
        assert all(0 < entry["paired"] <= 1 for entry in logged)
    if method == "MinED":
        assert all(0 < entry["distilled"] <= entry["one_to_one"] <= 1 and 0 < entry["aligned"] <= 1 for entry in logged)


def test_the_split_of_a_step_does_not_matter(phi_smollm, train_file, mined_mapper, tmp_path):
    """One step of 4 examples, at once and one by one, in the script that says most about its positions."""
    models = flags(
        model_name_or_path=phi_smollm.student,
        teacher_path=phi_smollm.teacher,
        teacher_to_student_id_mapping=mined_mapper,
    )
    logged = []
    for batch in (BATCH, 1):
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": BATCH // batch}
        folder = tmp_path / f"batch {batch}"
        run_script(SCRIPTS["MinED"], *models, *arguments(folder, train_file=train_file, max_steps=1, **split))
        logged += steps(folder)
    for name in logged[0].keys() - {"epoch"}:
        assert logged[1][name] == pytest.approx(logged[0][name], rel=1e-5), name
