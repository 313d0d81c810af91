"""Kill runs at random instants for as long as you like: python tests/train/kill_many.py --count 1000 --ranks 2 --parallel fsdp

Every run that was killed is started again by the same command until it is done, and compared bit for bit with one that never was: weights,
codebooks, optimizer, carried state, metrics.jsonl. Ends with 1, and leaves the folders, where one differs.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from killed_runs import Launcher, Toll, errors_of, kill_at_random
from tiny_runs import tiny_config, write_texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), help="of the instants")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    options = parser.parse_args()
    folder, began = Path(tempfile.mkdtemp(prefix="kill_many_")), time.monotonic()
    config = tiny_config(write_texts(folder / "texts"), parallel=options.parallel)
    print(f"seed {options.seed}, {options.ranks} ranks, {options.parallel}", flush=True)

    hung = [0]

    def tell(toll: Toll) -> None:
        if not toll.differing:
            run_dir = folder / f"run_{toll.runs - 1:05d}"
            shutil.rmtree(run_dir)
            if toll.hung == hung[-1]:
                errors_of(run_dir).unlink()
            hung.append(toll.hung)
        if toll.runs % 50 == 0:
            print(_in_words(toll), flush=True)

    toll = kill_at_random(Launcher(options.ranks), config, folder, options.count, options.seed, tell)
    print(f"{_in_words(toll)}, in {time.monotonic() - began:.0f} s")
    if toll.differing:
        print(f"differing, see {folder}: {', '.join(toll.differing)}")
        return 1
    if toll.hung:
        print(f"what those that hung were doing: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def _in_words(toll: Toll) -> str:
    return (
        f"{toll.kills} kills ({toll.while_writing} while a checkpoint was written, {toll.of_one_rank} of one rank of several, "
        f"{toll.hung} survivors hung) of {toll.runs} runs"
    )


if __name__ == "__main__":
    sys.exit(main())
