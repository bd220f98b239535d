"""Build an EM mapper: a teacher token maps to the student token with the same text, or to nothing.

Example:
  python get_vocab_mapper/get_em_mapper.py --teacher microsoft/Phi-3-mini-4k-instruct \\
      --student Qwen/Qwen2-1.5B-Instruct --output mappers/phi3_to_qwen2.safetensors
"""

from get_vocab_mapper.builder_cli import build_and_save, parse_arguments

if __name__ == "__main__":
    arguments = parse_arguments(__doc__)

    from get_vocab_mapper.vocab_mapper import build_em  # heavy, so only once --help has been answered

    build_and_save(build_em, arguments)
