"""`python -m oreal_megatron` is `oreal`; torchrun starts it as `-m oreal_megatron`."""

import sys

from oreal_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
