"""Draws modeling/figures/method.svg, the README's figure of CDM.

    python modeling/figures/method_figure.py

The two tokenisations are Phi-3's and Qwen2's, and the groups are computed. Entropies and top-k lists are made up.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyBboxPatch, Polygon
from rapidfuzz.distance import Levenshtein

from modeling.alignment import dtw_groups, entropy_weights

EOS = "EOS"
TEACHER = ["Some", "␣athlet", "es", "␣recommend", "␣blue", "ber", "ries", ".", EOS]
STUDENT = ["Some", "␣athletes", "␣recommend", "␣blue", "berries", ".", EOS]
# A word's beginning is hard to predict, its end easy.
TEACHER_ENTROPY = [2.6, 3.0, 0.1, 2.5, 3.1, 0.3, 0.1, 0.8, 0.4]
STUDENT_ENTROPY = [3.0, 3.6, 2.9, 3.8, 0.5, 1.0, 0.5]

# The top k of group 2, most probable first.
TEACHER_TOP = ["␣athlet", "␣people", "␣children", "␣players"]
STUDENT_TOP = ["␣athletes", "␣people", "␣vegan", "␣players"]

INK, QUIET = "#222222", "#777777"
FILLS = ["#dce9f5", "#f7c873"]  # neighbouring groups: light and dark in greyscale too


def groups() -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """The group of each token, and the weights that led to it."""
    weights = [entropy_weights(torch.tensor(h), [len(h)]).numpy() for h in (TEACHER_ENTROPY, STUDENT_ENTROPY)]
    distance = np.array(
        [
            [0 if t == s == EOS else Levenshtein.distance(t.replace("␣", ""), s.replace("␣", "")) for s in STUDENT]
            for t in TEACHER
        ]
    )
    teacher, student = dtw_groups(distance, np.arange(len(TEACHER)), np.arange(len(STUDENT)), *weights)
    return teacher, student, weights[0].tolist(), weights[1].tolist()


def box(axes, x, y, width, height, text, fill, size=9.5, style="-", color=INK):
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            fc=fill,
            ec=color,
            lw=0.9,
            ls=style,
        )
    )
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        family="monospace",
        size=size,
        color=color,
    )


def panel(axes, title):
    axes.set_axis_off()
    axes.set_title(title, loc="left", size=10.5, weight="bold", color=INK, pad=4)


def draw_alignment(axes):
    panel(axes, "1–3  Entropy-weighted alignment, cut into groups")
    axes.set(xlim=(-1.7, 12.3), ylim=(-0.35, 4.35))
    teacher_group, student_group, teacher_weights, student_weights = groups()
    top, bottom, height, gap = 2.75, 0.65, 0.62, 0.12
    x = 0.0
    for g in range(teacher_group.max() + 1):
        sides = {
            "teacher": [i for i, group in enumerate(teacher_group) if group == g],
            "student": [j for j, group in enumerate(student_group) if group == g],
        }
        texts = {
            "teacher": [TEACHER[i] for i in sides["teacher"]],
            "student": [STUDENT[j] for j in sides["student"]],
        }
        natural = {
            side: sum(0.13 * len(t) + 0.42 for t in words) + gap * (len(words) - 1) for side, words in texts.items()
        }
        width = max(1.0, *natural.values())
        for side, y, weights in (("teacher", top, teacher_weights), ("student", bottom, student_weights)):
            place = x
            extra = (width - natural[side]) / len(texts[side])
            for token, text in zip(sides[side], texts[side]):
                own = 0.13 * len(text) + 0.42 + extra
                box(axes, place, y, own, height, text, FILLS[g % 2])
                above = y + height + 0.16 if side == "teacher" else y - 0.16
                axes.text(
                    place + own / 2, above, str(weights[token]),
                    ha="center", va="bottom" if side == "teacher" else "top", size=8.5, color=INK,
                )  # fmt: skip
                place += own + gap
        axes.add_patch(
            Polygon(
                [(a, b) for a in (x, x + width) for b in (top - 0.05, bottom + height + 0.05)[:: 1 if a == x else -1]],
                fc=FILLS[g % 2], ec="none", alpha=0.55,
            )
        )  # fmt: skip
        axes.text(
            x + width / 2,
            (top + bottom + height) / 2,
            f"{g + 1}",
            ha="center",
            va="center",
            size=9,
            color=INK,
        )
        x += width + 0.28
    for y, name, weight, side in ((top, "teacher", "$w^T$", 1), (bottom, "student", "$w^S$", -1)):
        axes.text(-0.2, y + height / 2, name, ha="right", va="center", size=10, color=INK)
        axes.text(
            -0.2, y + height + 0.16 if side > 0 else y - 0.16, f"weights {weight}",
            ha="right", va="bottom" if side > 0 else "top", size=8.5, color=QUIET,
        )  # fmt: skip
    axes.text(-0.2, (top + bottom + height) / 2, "groups", ha="right", va="center", size=10, color=INK)
    axes.text(
        0, 4.3, r"$\mathrm{cost}(i,j)=\mathrm{lev}(a_i,b_j)\cdot w^T_i\cdot w^S_j$"
        r"$\qquad w=\lfloor 3\,\sigma(4h-2)+3\rfloor$,  $h$: entropy scaled to [0, 1]"
        r"$\qquad z_g=$ mean of the group's logits",
        size=9.5, va="top", color=INK,
    )  # fmt: skip


def draw_mapping(axes):
    panel(axes, "4  Contextual mapping of group 2, top k = 4")
    axes.set(xlim=(0, 7.3), ylim=(-0.25, 5.0))
    height, width, left, right = 0.56, 1.75, 0.15, 4.6
    rows = [3.55 - 0.75 * i for i in range(4)]
    outside = rows[-1] - 0.95
    for x, name, tokens in (
        (left, "teacher's $z^T_g$", TEACHER_TOP),
        (right, "student's $z^S_g$", STUDENT_TOP),
    ):
        axes.text(x + width / 2, rows[0] + height + 0.14, name, ha="center", va="bottom", size=9.5, color=INK)
        for token, y in zip(tokens, rows):
            box(axes, x, y, width, height, token, "white" if token == "␣vegan" else FILLS[1], size=9)
    box(axes, right, outside, width, height, "␣children", "white", size=9, style=":", color=QUIET)
    axes.text(
        right - 0.1,
        outside + height / 2 - 0.18,
        "not in its top k",
        ha="right",
        va="center",
        size=8,
        color=QUIET,
    )

    def line(a, b, style, label=None, rise=0.0):
        start, end = (left + width + 0.06, a + height / 2), (right - 0.06, b + height / 2)
        axes.annotate("", end, start, arrowprops={"arrowstyle": "<->", "ls": style, "color": INK, "lw": 1.3})
        if label:
            axes.text(
                (start[0] + end[0]) / 2,
                (start[1] + end[1]) / 2 + 0.07 + rise,
                label,
                ha="center",
                va="bottom",
                size=8,
                color=INK,
            )

    line(rows[0], rows[0], "--", "nearest string, 2/14 < θ")
    line(rows[1], rows[1], "-", "exact match")
    line(rows[3], rows[3], "-")
    axes.annotate(
        "", (right - 0.06, outside + height / 2), (left + width + 0.06, rows[2] + height / 2),
        arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.3},
    )  # fmt: skip
    axes.text(right + width + 0.08, rows[2] + height / 2, "no pair", ha="left", va="center", size=8, color=QUIET)


def draw_loss(axes):
    panel(axes, "5  Loss")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    lines = (
        (0.90, r"$P_\rightarrow$: pairs $(v,u)$ from the teacher's top k,  $P_\leftarrow$: from the student's", 9.5),
        (0.71, r"$q^T_d=\mathrm{softmax}(z^T_g[v]/\tau)$,  $q^S_d=\mathrm{softmax}(z^S_g[u]/\tau)$  over $P_d$", 10.5),
        (0.50, r"$\mathrm{KD}_g=\frac{\tau^2}{2}\left[\,\mathrm{KL}(q^T_\rightarrow\Vert q^S_\rightarrow)"
               r"+\mathrm{KL}(q^T_\leftarrow\Vert q^S_\leftarrow)\,\right]$", 12),
        (0.27, r"$L=\alpha\,\mathrm{CE}+(1-\alpha)\,\frac{1}{N}\sum_g |J_g|\,\mathrm{KD}_g$", 12),
        (0.08, r"$|J_g|$: the group's student tokens;  $N$: response tokens of the step", 9.5),
    )  # fmt: skip
    for y, text, size in lines:
        axes.text(0.0, y, text, va="center", size=size, color=INK)


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "method", "mathtext.fontset": "dejavusans"})
    figure = plt.figure(figsize=(10, 5.4))
    grid = figure.add_gridspec(
        2, 2, height_ratios=(1, 1), width_ratios=(1, 1.12), left=0.015, right=0.99, top=0.945, bottom=0.01,
        hspace=0.13, wspace=0.08,
    )  # fmt: skip
    draw_alignment(figure.add_subplot(grid[0, :]))
    draw_mapping(figure.add_subplot(grid[1, 0]))
    draw_loss(figure.add_subplot(grid[1, 1]))
    figure.savefig(Path(__file__).with_name("method.svg"), facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
