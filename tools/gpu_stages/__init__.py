"""Stages of tools/gpu_acceptance.py: measurements on one GPU, each row beside its criterion."""
