"""Build a MinED mapper: a teacher token without an exact match maps to the student token at the smallest
edit distance (FuseLLM, arXiv 2401.10491).

Example:
  python get_vocab_mapper/get_MinED_mapper.py --teacher microsoft/Phi-3-mini-4k-instruct \\
      --student Qwen/Qwen2-1.5B-Instruct --output mappers/phi3_to_qwen2.safetensors
"""

from get_vocab_mapper.builder_cli import main

if __name__ == "__main__":
    main("mined", __doc__)
