"""JSONL to prompts, chat templates, sampling order."""
