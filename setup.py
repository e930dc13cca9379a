"""Two importable packages: oreal_megatron, and oreal_kernels from kernels/oreal_kernels.

`kernels/` itself has no __init__.py: as a top-level package it would shadow the PyPI package of that name.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "oreal_megatron/__init__.py").read_text())[1]

setup(
    name="oreal-megatron",
    version=VERSION,
    description="OREAL reinforcement learning of math reasoners on Megatron-core and colocated vLLM",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["oreal_megatron*"]) + find_packages("kernels", include=["oreal_kernels*"]),
    package_dir={"oreal_kernels": "kernels/oreal_kernels"},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "triton>=3.4",
        "megatron-core==0.16.1",
        "transformers>=5.5.3",
        "safetensors",
        "sentencepiece",
        "sympy",
        "mpmath",
        "httpx",
        "numpy",
        "packaging",
        "rich",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        # apex is never required and not named here: `pip install apex` fetches an unrelated package.
        "gpu": ["vllm>=0.26,<0.34", "transformer-engine[pytorch]"],
        "dev": ["pytest", "hypothesis", "ruff", "math-verify==0.9.0", "antlr4-python3-runtime==4.13.2"],
    },
    entry_points={"console_scripts": ["oreal = oreal_megatron.cli.main:main"]},
)
