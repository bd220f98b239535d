"""What four families' chat templates write, read off them by eye, and one training step's losses of such chats.

Shares no code with the project: prompts are put together by hand, a whole chat is tokenised with its end in one piece,
and distributions are float64.
"""

import torch
from torch import Tensor


def phi_3(system: str | None, turns: list[tuple[str, str]], question: str) -> str:
    """It has no system role."""
    text, front = "<s>", f"{system}\n\n" if system else ""
    for user, assistant in turns:
        text += f"<|user|>\n{front}{user}<|end|>\n<|assistant|>\n{assistant}<|end|>\n"
        front = ""
    return text + f"<|user|>\n{front}{question}<|end|>\n<|assistant|>\n"


def chatml(system: str, turns: list[tuple[str, str]], question: str) -> str:
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for user, assistant in turns:
        text += f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n"
    return text + f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def qwen2(system: str | None, turns: list[tuple[str, str]], question: str) -> str:
    return chatml(system or "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", turns, question)


def smollm2(system: str | None, turns: list[tuple[str, str]], question: str) -> str:
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return chatml(system or default, turns, question)


def llama_3(system: str | None, turns: list[tuple[str, str]], question: str) -> str:
    def block(role: str, content: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}<|eot_id|>"

    text = "<|begin_of_text|>" + (block("system", system) if system else "")
    for user, assistant in turns:
        text += block("user", user) + block("assistant", assistant)
    return text + block("user", question) + "<|start_header_id|>assistant<|end_header_id|>\n\n"


PROMPTS = {"phi-3": phi_3, "qwen2": qwen2, "llama-3": llama_3, "smollm2": smollm2}
ENDS = {"phi-3": "<|end|>", "qwen2": "<|im_end|>", "llama-3": "<|eot_id|>", "smollm2": "<|im_end|>"}


@torch.no_grad()
def response_logits(model, tokenizer, prompt: str, text: str, end: str) -> tuple[Tensor, list[int]]:
    """Float64 logits that predict the response, `[n, tokens of the tokenizer]`, and the response's tokens."""
    encoded = tokenizer(prompt + text + end, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    start = next(i for i, (_, stop) in enumerate(encoded["offset_mapping"]) if stop > len(prompt))
    logits = model(torch.tensor([ids])).logits[0].double()
    return logits[start - 1 : len(ids) - 1, : len(tokenizer)], ids[start:]


def cross_entropy(logits: Tensor, ids: list[int]) -> Tensor:
    """Of the tokens themselves: an end counts as the token that it is."""
    return torch.stack([row.logsumexp(0) - row[token] for row, token in zip(logits, ids)]).sum()


def with_one_end(logits: Tensor, stops: list[int], end: int) -> Tensor:
    """The distribution `[n, V]` in which ending is one category, the token `end`."""
    p = logits.softmax(-1)
    ending = p[:, stops].sum(-1)
    p[:, stops] = 0
    p[:, end] = ending
    return p


def uld(p_student: Tensor, p_teacher: Tensor) -> Tensor:
    """Sum over equal indices of the distance of sorted probabilities."""
    total = torch.zeros((), dtype=torch.float64)
    for p, q in zip(p_student, p_teacher):
        width = max(len(p), len(q))
        p, q = (torch.cat([x, x.new_zeros(width - len(x))]).sort(descending=True).values for x in (p, q))
        total += (p - q).abs().sum()
    return total


def kl(p: Tensor, q: Tensor, temperature: float) -> Tensor:
    """τ² Σ KL of softened distributions, categories that p rules out left out."""
    p, q = (x ** (1 / temperature) / (x ** (1 / temperature)).sum(-1, keepdim=True) for x in (p, q))
    there = p > 0
    return temperature**2 * (p[there] * (p[there] / q[there]).log()).sum()
