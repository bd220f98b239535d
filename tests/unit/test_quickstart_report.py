"""What the quickstart says at its end."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "script_train"))
import quickstart_report


@pytest.mark.parametrize(
    ("sft", "cdm", "end"),
    [
        (1.518, 1.5, "less than 0.05 apart, which at this size is no difference."),
        (1.5, 1.518, "less than 0.05 apart, which at this size is no difference."),
        (1.5, 1.5, "less than 0.05 apart, which at this size is no difference."),
        (1.6, 1.5, "CDM beats SFT by 0.100."),
        (1.5, 1.6, "SFT beats CDM by 0.100."),
    ],
)
def test_a_small_difference_is_no_victory(tmp_path, sft, cdm, end):
    for name, content in (
        ("eval_sft/eval_results.json", {"eval_bits_per_byte": sft}),
        ("cdm/eval_results.json", {"eval_bits_per_byte": cdm}),
        ("data/held_out.json", [{}] * 15),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    said = quickstart_report.verdict(tmp_path)
    assert said.startswith(f"On the 15 held-out rows SFT has {sft:.3f}, and CDM {cdm:.3f} bits per byte: ")
    assert end in said and ("beats" in said) == ("beats" in end)
    assert ("compare_methods.sh" in said) == ("no difference" in said)
