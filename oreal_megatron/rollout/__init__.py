"""Rollouts from the colocated vLLM engine.

Environment variables that vLLM reads at import are set here: the engine runs in this process and binds no threads.
"""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
