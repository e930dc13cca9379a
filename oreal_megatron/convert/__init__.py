"""Hugging Face checkpoints to Megatron distributed checkpoints and back, streaming."""
