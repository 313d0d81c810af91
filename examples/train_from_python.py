"""Train a Transformer-VQ on a folder of text from Python: python examples/train_from_python.py FOLDER RUN [STEPS]

What the command `vqkit train text` does, with a listener of your own in place of its bar.
"""

import sys
from dataclasses import replace
from pathlib import Path

from vqkit.data import Split
from vqkit.recipes import text
from vqkit.train import evaluate, train
from vqkit.train.events import Event, Progress


def show(event: Event) -> None:
    """Any function of one event can watch a run."""
    if isinstance(event, Progress):
        print(f"step {event.step}: {event.bits:.3f} {event.unit.name}")


def main(folder: str, run_dir: str, steps: str = "300") -> None:
    """A smaller model than the recipe's, so that this takes a minute or two."""
    recipe = text()
    config = replace(
        recipe,
        model=replace(recipe.model, dim=64, key_dim=32, value_dim=128, codebook_size=64, block_len=64, mem_len=64),
        data=replace(recipe.data, path=str(Path(folder).absolute()), sequence_len=128, validation_fraction=0.1, test_fraction=0.1),
        train=replace(recipe.train, steps=int(steps), warmup_steps=min(20, int(steps) - 1)),
    )
    result = train(config, run_dir, on_event=show)
    evaluation = evaluate(result.model, Split(result.run_dir / "data", "test"), chunk_len=config.data.sequence_len)
    print(f"test: {evaluation.bits:.3f} {evaluation.unit.name}; the weights are in {result.checkpoint}")


if __name__ == "__main__":
    main(*sys.argv[1:])
