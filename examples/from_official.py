"""Sample from a checkpoint of the official Transformer-VQ: python examples/from_official.py CHECKPOINT FOLDER PROMPT [NUM_TOKENS]

CHECKPOINT is what the official script for enwik8 wrote; FOLDER is where the model goes, for every command to read.
"""

import sys

import vqkit
from vqkit.compat import OfficialSettings, load_official
from vqkit.models import save_weights


def main(checkpoint: str, folder: str, prompt: str, num_tokens: str = "200") -> None:
    """Block and window are those of the command that the official model was trained by; no array tells them."""
    loaded = load_official(checkpoint, OfficialSettings(block_len=512, mem_len=512, logit_scale=1.0))
    save_weights(loaded.model, loaded.config, folder)
    print(prompt + vqkit.load(folder).generate(prompt, int(num_tokens), temperature=0.8, seed=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
