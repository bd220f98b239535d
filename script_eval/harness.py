"""`lm_eval` with the model loaded as everywhere here: adapters merged, room for each token, no pickles.

    python script_eval/harness.py run --model cdm --model_args '{"pretrained": "outputs/student"}' --tasks gsm8k …

`--model cdm` is the harness's own `hf` in all else, with the same arguments.
"""

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from modeling.models.language_model import LanguageModel


@register_model("cdm")
class LoadedModel(HFLM):
    """A causal language model on one device."""

    def _create_model(self, pretrained, dtype="auto", trust_remote_code=False, peft=None, **_) -> None:
        path = peft or pretrained
        self._model = LanguageModel(path, "model", trust_remote_code).load(str(dtype)).to(self.device)


if __name__ == "__main__":
    cli_evaluate()
