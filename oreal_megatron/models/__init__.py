"""Architectures, tensor names and layouts of Hugging Face, Megatron and vLLM; one file per family."""
