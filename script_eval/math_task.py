"""Prepares a folder for `lm_eval`: its GSM8K task with the training template as prompt, and the model's arguments.

The task includes the harness's own, so that answers are extracted and compared exactly as there. With local files it
points at these. Refuses a folder that was started with other settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import lm_eval.tasks
from eval_records import file_digest, model_fingerprint, read_json, require_same_settings, write_json

from modeling.text.rows import alpaca_prompt

TASK = "gsm8k_training_template"


def task_definition(data_dir: Path | None, chat: bool) -> dict:
    """The task, as the harness's YAML has it. `doc_to_text` is a Jinja template; in a chat, the question alone."""
    definition = {
        "include": str(Path(lm_eval.tasks.__file__).with_name("gsm8k") / "gsm8k.yaml"),
        "task": TASK,
        "doc_to_text": "{{question}}" if chat else alpaca_prompt("{{question}}"),
    }
    if data_dir is not None:
        files = {split: str((data_dir / f"{split}.jsonl").resolve()) for split in ("train", "test")}
        definition |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    return definition


def model_arguments(model: str, dtype: str, template_kwargs: dict | None = None) -> dict:
    """Of the harness's hf model. An adapter is named beside the model that it was trained on."""
    chat = {"chat_template_args": template_kwargs} if template_kwargs else {}
    adapter = Path(model, "adapter_config.json")
    if adapter.is_file():
        base = read_json(adapter)["base_model_name_or_path"]
        return {"pretrained": base, "peft": model, "tokenizer": model, "dtype": dtype, **chat}
    return {"pretrained": model, "dtype": dtype, **chat}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="Gets tasks/, model_args.json and settings.json.")
    add("--model", required=True)
    add("--dtype", default="auto")
    add("--data_dir", type=Path, help="With train.jsonl and test.jsonl. By default the hub's.")
    add("--num_fewshot", type=int, required=True)
    add("--max_new_tokens", type=int, required=True)
    add("--batch_size", required=True)
    add("--limit", type=int)
    add("--chat", action="store_true", help="Asked in the model's chat template.")
    add("--template_kwargs", type=json.loads, help="What that template is given besides, a JSON object.")
    add("--further_arguments", default="", help="What is given to the harness besides.")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in ("folder", "data_dir")}
    settings["chat"] = args.chat or None  # as a folder has it that was made before there was this setting
    settings["model_fingerprint"] = model_fingerprint(args.model)
    try:
        if args.data_dir:
            settings["data_sha256"] = file_digest(args.data_dir / "test.jsonl")
        require_same_settings(args.folder / "settings.json", settings, str(args.folder))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    # JSON is YAML as well.
    write_json(args.folder / "tasks" / f"{TASK}.yaml", task_definition(args.data_dir, args.chat))
    arguments = model_arguments(args.model, args.dtype, args.template_kwargs)
    write_json(args.folder / "model_args.json", arguments)
