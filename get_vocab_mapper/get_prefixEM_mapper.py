"""Build a PrefixEM mapper: a teacher token without an exact match maps to the longest student token that
begins it, or to nothing.

Example:
  python get_vocab_mapper/get_prefixEM_mapper.py --teacher microsoft/Phi-3-mini-4k-instruct \\
      --student Qwen/Qwen2-1.5B-Instruct --output mappers/phi3_to_qwen2.safetensors
"""

from get_vocab_mapper.builder_cli import main

if __name__ == "__main__":
    main("prefixem", __doc__)
