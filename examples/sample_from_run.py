"""Let a trained model write: python examples/sample_from_run.py RUN PROMPT [NUM_TOKENS]"""

import sys

import vqkit


def main(run_dir: str, prompt: str, num_tokens: str = "200") -> None:
    """Pieces of text come as they are written."""
    model = vqkit.load(run_dir)
    print(prompt, end="")
    for piece in model.stream(prompt, int(num_tokens), temperature=0.8, seed=1):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
