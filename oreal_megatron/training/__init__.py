"""Reinforcement learning, supervised fine-tuning and step hooks."""
