"""``python -m copa_harness.pretrain``: make the embedded model from nothing, or measure it.

    python -m copa_harness.pretrain train --folder runs/embedded
    python -m copa_harness.pretrain evaluate --folder runs/embedded
    python -m copa_harness.pretrain card --folder runs/embedded --into copa_harness/lm/embedded
"""

from __future__ import annotations

import argparse
import pathlib


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs one verb; heavy imports happen after parsing."""
    parser = argparse.ArgumentParser(prog="python -m copa_harness.pretrain", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="run the recipe, or go on with it")
    train.add_argument("--folder", type=pathlib.Path, required=True)
    train.add_argument("--recipe", type=pathlib.Path, default=None, help="JSON recipe; default: the shipped one")
    train.add_argument("--threads", type=int, default=2)
    train.add_argument("--workers", type=int, default=1)
    train.add_argument("--until", type=int, default=None, help="stop after this step without changing the schedule")
    options = parser.parse_args(arguments)
    if options.verb == "train":
        import json

        import torch

        from copa_harness.pretrain.recipe import SHIPPED, Recipe
        from copa_harness.pretrain.train import PretrainingRun

        torch.set_num_threads(options.threads)
        recipe = Recipe.from_json(json.loads(options.recipe.read_text())) if options.recipe else SHIPPED
        PretrainingRun(recipe, options.folder, n_workers=options.workers).run(until=options.until)


if __name__ == "__main__":
    main()
