"""`lm_eval` with the model loaded as everywhere here: adapters merged, room for each token, no pickles.

With `--apply_chat_template` it is asked in its chat template as it was taught (see `modeling/text/chat.py`).

    python script_eval/harness.py run --model cdm --model_args '{"pretrained": "outputs/student"}' --tasks gsm8k …

`--model cdm` is the harness's own `hf` in all else, with the same arguments.
"""

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from modeling.models.language_model import LanguageModel
from modeling.text.chat import ChatTemplate


@register_model("cdm")
class LoadedModel(HFLM):
    """A causal language model on one device."""

    def _create_model(self, pretrained, dtype="auto", trust_remote_code=False, peft=None, **_) -> None:
        source = LanguageModel(peft or pretrained, "model", trust_remote_code)
        self._model = source.load(str(dtype)).to(self.device)
        self._model.generation_config.eos_token_id = list(source.stop_tokens)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        chat = ChatTemplate(self.tokenizer, "model", self.chat_template_args)
        return chat.question(chat_history) if add_generation_prompt else chat.render(chat_history, False)


if __name__ == "__main__":
    cli_evaluate()
