"""Build an EM mapper: a teacher token maps to the student token with the same text, or to nothing.

Example:
  python get_vocab_mapper/get_em_mapper.py --teacher microsoft/Phi-3-mini-4k-instruct \\
      --student Qwen/Qwen2-1.5B-Instruct --output mappers/phi3_to_qwen2.safetensors
"""

from get_vocab_mapper.builder_cli import main

if __name__ == "__main__":
    main("em", __doc__)
