"""Responses of a student to the prompts of a JSONL file, sampled or greedy.

    python script_eval/generate.py --model outputs/student --data data/dolly/valid.jsonl --output dolly.jsonl --seed 10
    torchrun --nproc_per_node 8 script_eval/generate.py …        # the same text, on eight devices of one machine

`--model` is a folder, a hub name, or the folder of a LoRA adapter. Each row of the output has the number of its prompt
(`row`, from 0), the `response` up to the first stop token (see `modeling/text/ends.py`), its `tokens`, whether it
`ended` by itself, and whether its prompt was `cut`.

With `--chat` each prompt is a user's message, in the model's chat template, as a student of chats was taught, or a list
of messages that ends with a user's. A prompt that is filled into the Alpaca template is asked as its instruction and
input.

What a row's text depends on. `--max_length` counts as in DSKD (arXiv 2406.17328): half of it is for the prompt, which
is cut to `--max_prompt_length`, and the rest for the response, however short the prompt. A token is drawn with two
random numbers that depend on the seed, the row and the position alone. So a response does not depend on where a run was
interrupted or on the number of processes: these change neither the numbers nor which rows are batched together. The
batch size does change that, and with it the rounding of the logits; where a draw falls close to the border between two
tokens, the text may then differ from there on. The same holds for another device, dtype or library version.

An interrupted run, started again, resumes at the first missing row. Its settings are kept beside the output
(`.settings.json`); a run with other settings is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from eval_records import (
    RowFile,
    add_loading_arguments,
    file_digest,
    model_fingerprint,
    read_lines,
    require_same_settings,
    versions,
    write_json,
)
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modeling.errors import user_input
from modeling.models.language_model import LanguageModel
from modeling.text.chat import ChatTemplate
from modeling.text.encoder import put_in_front
from modeling.text.messages import read_messages
from modeling.text.rows import question_of

BLOCK = 512  # columns of the vocabulary that `draw` sums first


# ---------------------------------------------------------------------------------------------------------- sampling


def draw(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """One token a row, with the given probabilities, from two uniform random numbers a row.

    The vocabulary is cut into blocks. The first number chooses a block by its total, the second a token in it: sums
    over a whole vocabulary in float32 would lose the rare tokens.

    Args:
        probabilities: float [rows, vocabulary], at least 0; they need not sum to 1.
        numbers: float [rows, 2], from 0, and below 1.

    Returns:
        int64 [rows]
    """
    rows, vocabulary = probabilities.shape
    padded = torch.nn.functional.pad(probabilities, (0, -vocabulary % BLOCK))
    blocks = padded.view(rows, -1, BLOCK)
    block = _first_above(blocks.sum(-1), numbers[:, 0])
    chosen = blocks[torch.arange(rows, device=blocks.device), block]
    return block * BLOCK + _first_above(chosen, numbers[:, 1])


def _first_above(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """In each row, the first place at which the running total of the weights exceeds that share of their sum."""
    totals = weights.cumsum(-1)
    # So far below 1 that the product stays below the total in float32.
    target = numbers.clamp(max=1 - 2**-22)[:, None] * totals[:, -1:]
    return (totals <= target).sum(-1)


def random_numbers(seed: int, rows: Sequence[int], positions: int) -> torch.Tensor:
    """float32 [rows, positions, 2], from 0, and below 1: those of a row depend on the seed and its number alone."""
    return torch.from_numpy(
        np.stack([np.random.default_rng((seed, row)).random((positions, 2), dtype=np.float32) for row in rows])
    )


class RowSampling(LogitsProcessor):
    """Leaves one token a row: the one drawn with the numbers of its row and position.

    It is the last in the list. The search that follows takes the largest logit, so that it is a sample.
    """

    def __init__(self, numbers: torch.Tensor, prompt_length: int):
        self.numbers, self.prompt_length = numbers, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1] - self.prompt_length
        tokens = draw(scores.float().softmax(-1), self.numbers[:, position])
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def sampling_steps(args: argparse.Namespace, numbers: torch.Tensor, prompt_length: int) -> LogitsProcessorList:
    """What happens to the logits before the largest is taken; nothing with --greedy."""
    steps = LogitsProcessorList()
    if args.greedy:
        return steps
    if args.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(args.temperature))
    if args.top_k > 0:
        steps.append(TopKLogitsWarper(args.top_k))
    if args.top_p < 1.0:
        steps.append(TopPLogitsWarper(args.top_p))
    steps.append(RowSampling(numbers, prompt_length))
    return steps


# ------------------------------------------------------------------------------------------------- model and prompts


def this_device(use_cpu: bool) -> torch.device:
    """This process's accelerator, whichever kind torch finds, or the CPU."""
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
    torch.accelerator.set_device_index(device.index)
    return device


def load_model(args: argparse.Namespace, device: torch.device):
    """Model and tokenizer, as a training script would load them; an adapter is merged into the model below it."""
    source = LanguageModel(args.model, "model", args.trust_remote_code)
    _ = source.config  # what is wrong with its files is said first
    model = source.load(args.dtype).to(device).eval()
    model.generation_config.eos_token_id = list(source.stop_tokens)
    return model, source.tokenizer


def asked(prompt: str | list, tokenizer, args: argparse.Namespace) -> str:
    """A prompt as the model is given it: with --chat, in its chat template.

    Args:
        prompt: text, or messages, of which ValueError says what cannot be read.
    """
    if not args.chat:
        return prompt
    if not tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer of {args.model} has no chat template.")
    messages = [{"role": "user", "content": question_of(prompt)}] if isinstance(prompt, str) else prompt
    messages = read_messages(messages, args.system)
    if messages[-1]["role"] != "user":
        raise ValueError("its prompt does not end with a user's message")
    return ChatTemplate(tokenizer, "model", args.template_kwargs).question(messages)


def eos_ids(model, tokenizer) -> list[int]:
    """The tokens that end a response: the tokenizer's EOS, and those that the model's own settings name."""
    of_model = model.generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    ids = sorted({i for i in (tokenizer.eos_token_id, *of_model) if i is not None})
    if not ids:
        raise ValueError("The tokenizer declares no EOS token. Set eos_token in its tokenizer_config.json.")
    return ids


def prompt_ids(tokenizer, prompt: str, longest: int, cut_right: bool) -> tuple[list[int], bool]:
    """The prompt's tokens, at most `longest`, and whether some were cut off.

    What the tokenizer adds in front (BOS) stays, unless the prompt begins with it; what it adds behind (EOS) is left
    out, as in training. Cutting on the left keeps the end of the template, "### Response:"; cutting on the right loses
    it.
    """
    bos = put_in_front(tokenizer)
    adds = not (bos and prompt.startswith(bos))
    encoding = tokenizer(prompt, add_special_tokens=adds, return_special_tokens_mask=True, verbose=False)
    ids, added = encoding["input_ids"], encoding["special_tokens_mask"]
    content = [place for place, special in enumerate(added) if not special]
    if not content:
        raise ValueError(f"A prompt has no tokens: {prompt[:80]!r}.")
    front, text = ids[: content[0]], ids[content[0] : content[-1] + 1]
    room = longest - len(front)
    cut = len(text) > room
    if cut:
        text = text[:room] if cut_right else text[-room:]
    return front + text, cut


def padded_left(prompts: Sequence[list[int]], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(prompt, device=device) for prompt in prompts]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    return {"input_ids": pad(ids, padding_value=pad_id), "attention_mask": pad([torch.ones_like(i) for i in ids])}


# --------------------------------------------------------------------------------------------------------- generation


def generate_batch(
    model, tokenizer, args: argparse.Namespace, seed: int, rows: Sequence[int], prompts: Sequence
) -> list[dict]:
    """The output rows of one batch. `prompts` are `(tokens, cut)`, as `prompt_ids` gives them."""
    longest_response = args.max_length - args.max_prompt_length
    ends = eos_ids(model, tokenizer)
    pad_id = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch = padded_left([tokens for tokens, _ in prompts], pad_id, model.device)
    prompt_length = batch["input_ids"].shape[1]
    # Sampling is a step on the logits (RowSampling), so that the search itself is greedy in every case.
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=longest_response,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        eos_token_id=ends,
        pad_token_id=pad_id,
    )
    numbers = random_numbers(seed, rows, longest_response).to(model.device)
    steps = sampling_steps(args, numbers, prompt_length)
    with torch.inference_mode():
        sequences = model.generate(**batch, generation_config=config, logits_processor=steps)
    results = []
    for row, (_, cut), tokens in zip(rows, prompts, sequences[:, prompt_length:].tolist()):
        length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        text = tokenizer.decode(tokens[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        results.append({"row": row, "response": text, "tokens": length, "ended": length < len(tokens), "cut": cut})
    return results


def batches_of(prompts: Sequence, batch_size: int) -> list[list[int]]:
    """Row numbers, longest prompts first: rows of like length together, and too little memory shows at once.

    They depend on the prompts and the batch size alone: an interrupted run finds the very same ones again.
    """
    rows = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row][0]), row))
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def generate_file(model, tokenizer, args: argparse.Namespace, seed: int, prompts: Sequence, output: Path) -> None:
    """All rows of one seed. Of a batch that was only partly written, what is missing is generated with the others."""
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    file = RowFile(output)
    done = file.done()
    missing = [rows for rows in batches_of(prompts, args.batch_size)[rank::processes] if not done.issuperset(rows)]
    tokens, start = 0, time.monotonic()
    progress = tqdm(missing, desc=output.name, unit="batch", disable=rank != 0)
    for rows in progress:
        results = generate_batch(model, tokenizer, args, seed, rows, [prompts[row] for row in rows])
        file.append(result for result in results if result["row"] not in done)
        tokens += sum(result["tokens"] for result in results)
        progress.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens a second")
    file.finish(len(prompts))


def settings_of(args: argparse.Namespace, seed: int) -> dict:
    """Everything that the text depends on, but for the device and the libraries."""
    left_out = {"output", "use_cpu", "trust_remote_code"}  # where it goes, and how; not what it is
    if args.greedy:
        left_out |= {"temperature", "top_p", "top_k"}
    return {
        **{name: value for name, value in vars(args).items() if name not in left_out},
        "chat": args.chat or None,  # as a folder has it that was made before there was this setting
        "seed": None if args.greedy else seed,
        "model_fingerprint": model_fingerprint(args.model),
        "data_sha256": file_digest(Path(args.data)),
        "prompts_cut_on": "right" if args.dskd_compat else "left",
    }


def run(args: argparse.Namespace) -> None:
    device = this_device(args.use_cpu)
    # On an accelerator a step of few prompts takes as long as one of many: it waits for launches.
    args.batch_size = args.batch_size or (16 if device.type == "cpu" else 128)
    rows = read_lines(Path(args.data), args.limit)
    kinds = {type(row.get("prompt")) if isinstance(row, dict) else None for row in rows}
    if not kinds <= {str, list}:
        raise ValueError(f"{args.data}: every row needs a prompt, a string (with --chat, or a list of messages).")
    if list in kinds and not args.chat:
        raise ValueError(f"{args.data}: its prompts are messages. Give --chat (CHAT=1), for the chat template.")
    unfinished = {}
    for seed in args.seed:
        output = Path(args.output.replace("{seed}", str(seed)))
        require_same_settings(output.with_suffix(".settings.json"), settings_of(args, seed), str(output))
        if len(RowFile(output).done()) < len(rows):
            unfinished[seed] = output
    if not unfinished:
        return
    model, tokenizer = load_model(args, device)
    texts = []
    for number, row in enumerate(rows, 1):
        with user_input(f"{args.data}, row {number}"):
            texts.append(asked(row["prompt"], tokenizer, args))
    prompts = [prompt_ids(tokenizer, text, args.max_prompt_length, args.dskd_compat) for text in texts]
    for seed, output in unfinished.items():
        # The environment is no setting: it may change between two parts of a run.
        write_json(output.with_suffix(".environment.json"), {"device": device.type, "versions": versions()})
        generate_file(model, tokenizer, args, seed, prompts, output)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="A folder, a hub name, or the folder of a LoRA adapter.")
    add("--data", required=True, help="JSONL file; each row has a prompt: text, or with --chat messages.")
    add("--output", required=True, help="JSONL file of the responses. {seed} in it is replaced by the seed.")
    add("--seed", type=int, nargs="+", default=[10], help="One or more; several need {seed} in --output. Default 10.")
    add("--max_length", type=int, default=512, help="Tokens of prompt and response in all. Default 512.")
    add("--max_prompt_length", type=int, help="A longer prompt is cut. By default half of --max_length.")
    add("--temperature", type=float, default=1.0, help="Divides the logits. Above 0. Default 1.")
    add("--top_p", type=float, default=1.0, help="Only the likeliest tokens of this total probability. Default 1: all.")
    add("--top_k", type=int, default=0, help="Only so many of the likeliest tokens. Default 0: all.")
    add("--greedy", action="store_true", help="Always the likeliest token. Without it the responses are sampled.")
    add("--batch_size", type=int, help="Prompts a device and forward. Default 128; on a CPU 16.")
    add("--limit", type=int, help="Only the first so many rows.")
    add(
        "--dskd_compat",
        action="store_true",
        help="Two habits of DSKD's evaluation: no 6-gram is repeated, and prompts are cut on the right, not the left.",
    )
    add("--chat", action="store_true", help="Ask in the model's chat template, the prompt being a user's message.")
    add("--system", help="With --chat: a system message in front, as in training.")
    add("--template_kwargs", type=json.loads, help="With --chat: what the template is given besides, a JSON object.")
    add("--use_cpu", action="store_true", help="Leave accelerators alone.")
    add_loading_arguments(parser)
    args = parser.parse_args(argv)
    if args.max_prompt_length is None:
        args.max_prompt_length = args.max_length // 2
    args.no_repeat_ngram_size = 6 if args.dskd_compat else 0
    for wrong, message in (
        (not 1 < args.max_prompt_length < args.max_length, "--max_prompt_length must lie between 1 and --max_length"),
        (args.temperature <= 0, "--temperature must be above 0; for the likeliest token give --greedy"),
        (not 0 < args.top_p <= 1, "--top_p must be above 0, and at most 1"),
        (args.top_k < 0, "--top_k must be 0 or more"),
        (args.batch_size is not None and args.batch_size < 1, "--batch_size must be 1 or more"),
        (args.limit is not None and args.limit < 1, "--limit must be 1 or more"),
        (args.chat and args.dskd_compat, "--dskd_compat cuts off the end of a prompt, which --chat needs"),
        (not args.chat and (args.system or args.template_kwargs), "--system and --template_kwargs go with --chat"),
        (not isinstance(args.template_kwargs, dict | None), "--template_kwargs must be a JSON object"),
        (len(args.seed) > 1 and "{seed}" not in args.output, "several seeds need {seed} in --output"),
    ):
        if wrong:
            parser.error(message)
    return args


if __name__ == "__main__":
    try:
        run(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
