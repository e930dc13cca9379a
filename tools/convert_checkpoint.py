"""The same as `oreal convert`, for those who look for a script:

python tools/convert_checkpoint.py to-megatron HF_DIR OUT --tp 4 --pp 2
python tools/convert_checkpoint.py to-hf runs/my_run/checkpoints/step_000090/policy OUT
python tools/convert_checkpoint.py check A B
"""

import sys

from oreal_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
