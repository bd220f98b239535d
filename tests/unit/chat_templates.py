"""Chat templates with the habits of real families, made by hand, and tokenizers that have their tokens."""

from transformers import PreTrainedTokenizerFast

from tests.unit.tokenizer_zoo import byte_level_bpe, sentencepiece_bpe

# Each writes <|end|> or EOS behind an answer; see the names.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # an empty block of thoughts is prefilled, and earlier answers lose theirs
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DATED = (
    "<|im_start|>system\nToday is {{ date_string if date_string is defined else strftime_now('%d %b %Y') }}."
    "{% if messages[0].role == 'system' %}{{ '\n' + messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "<|im_end|>\n" + CHATML
)
TURNS = (  # no system role, turns must alternate, BOS and trim in the template, an end that is not EOS
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "<start>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
INST = (  # no generation prompt, a space in front of the answer, EOS behind it, a system message is dropped
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_HEADER = (  # ChatML without its generation prompt
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
PLAIN = (  # nothing that is a token
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def with_tokens(tokenizer: PreTrainedTokenizerFast, template: str | None, *tokens: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    return tokenizer


def chatml_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """EOS is <|endoftext|>; the template writes <|im_end|>."""
    return with_tokens(byte_level_bpe(), template, "<|im_start|>", "<|im_end|>")


def turns_tokenizer(template: str | None = TURNS) -> PreTrainedTokenizerFast:
    """Adds BOS; EOS is </s>; the template writes <end_of_turn>."""
    return with_tokens(sentencepiece_bpe(), template, "<start>", "<end_of_turn>")
