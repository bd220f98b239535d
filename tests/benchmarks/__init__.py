PAIRS = ("phi-3:qwen2", "llama-3:gemma-2", "llama-3:opt", "qwen2:opt")  # TEACHER:STUDENT, real tokenizers
