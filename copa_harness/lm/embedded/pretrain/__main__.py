"""``python -m copa_harness.lm.embedded.pretrain``: make the embedded model from nothing, or measure it.

python -m copa_harness.lm.embedded.pretrain train --folder runs/embedded
python -m copa_harness.lm.embedded.pretrain train --folder runs/more --start copa_harness/lm/embedded
python -m copa_harness.lm.embedded.pretrain evaluate --folder runs/embedded
python -m copa_harness.lm.embedded.pretrain develop --folder runs/embedded
python -m copa_harness.lm.embedded.pretrain card --folder runs/embedded --into copa_harness/lm/embedded
"""

from __future__ import annotations

import argparse
import pathlib


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs one verb; heavy imports happen after parsing."""
    parser = argparse.ArgumentParser(
        prog="python -m copa_harness.lm.embedded.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="run the recipe, or go on with it")
    train.add_argument("--folder", type=pathlib.Path, required=True)
    train.add_argument("--recipe", type=pathlib.Path, default=None, help="JSON recipe; default: a shipped one")
    train.add_argument(
        "--start", type=pathlib.Path, default=None, help="exported model to start from (recipe OWN_NAMES)"
    )
    train.add_argument("--threads", type=int, default=2)
    train.add_argument("--workers", type=int, default=1)
    train.add_argument("--until", type=int, default=None, help="stop after this step without changing the schedule")
    measure = verbs.add_parser("evaluate", help="measure a finished run on the three tasks (resumes cell by cell)")
    measure.add_argument("--folder", type=pathlib.Path, required=True)
    measure.add_argument("--sizes", type=int, nargs="+", default=[75, 30, 15], help="numbers of labelled rows")
    measure.add_argument("--threads", type=int, default=2)
    measure.add_argument(
        "--part", type=int, nargs=2, default=[0, 1], metavar=("I", "N"), help="every N-th cell from I on"
    )
    develop = verbs.add_parser("develop", help="measure a finished run on the held-out development tasks")
    develop.add_argument("--folder", type=pathlib.Path, required=True)
    develop.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    card = verbs.add_parser("card", help="write the model card and copy the files into the package")
    card.add_argument("--folder", type=pathlib.Path, required=True)
    card.add_argument("--into", type=pathlib.Path, required=True)
    options = parser.parse_args(arguments)
    if options.verb == "train":
        import json

        import torch

        from copa_harness.lm.embedded.pretrain.recipe import OWN_NAMES, WHOLE, Recipe
        from copa_harness.lm.embedded.pretrain.train import PretrainingRun

        torch.set_num_threads(options.threads)
        recipe = OWN_NAMES if options.start else WHOLE
        if options.recipe:
            recipe = Recipe.from_json(json.loads(options.recipe.read_text()))
        run = PretrainingRun(recipe, options.folder, n_workers=options.workers, start=options.start)
        run.run(until=options.until)
    elif options.verb == "evaluate":
        import torch

        from copa_harness.lm.embedded.pretrain.evaluate import SETTINGS, evaluate
        from copa_harness.lm.embedded.pretrain.measure import load_model

        torch.set_num_threads(options.threads)
        model = load_model(options.folder / "export")
        evaluate(
            model, options.folder / "cells", settings=SETTINGS, sizes=tuple(options.sizes), part=tuple(options.part)
        )
    elif options.verb == "develop":
        from copa_harness.lm.embedded.pretrain.card import development_table, own_name_table
        from copa_harness.lm.embedded.pretrain.measure import load_model

        model, seeds = load_model(options.folder / "export"), tuple(options.seeds)
        (options.folder / "own_names.md").write_text(own_name_table(model, seeds=seeds))
        (options.folder / "development.md").write_text(development_table(model, seeds=seeds))
    else:
        from copa_harness.lm.embedded.pretrain.card import ship, write_card

        text = write_card(options.folder, options.folder / "cells", options.folder / "development.md")
        ship(options.folder, options.into, text)


if __name__ == "__main__":
    main()
