"""OREAL (arXiv 2502.06781): outcome-reward reinforcement learning of math reasoners on Megatron-core and vLLM.

Use it through the command line (`oreal --help`) and recipes, Python functions that return a `Config`:

    from oreal_megatron.config import Config, ModelConfig

    def my_run() -> Config:
        return Config(model=ModelConfig("path/to/hf_folder"))

Modules to start reading from: `config` (all settings), `loop` (the algorithm on one page), `records` (data of a step),
`protocols` (interfaces between packages), `session` (building and stopping the parts of a run).
"""

__version__ = "0.2.0"
