"""``python -m copa_harness.lm.embedded.pretrain``: make the embedded model from nothing, or measure it.

python -m copa_harness.lm.embedded.pretrain train runs/first
python -m copa_harness.lm.embedded.pretrain train runs/second --start runs/first/export
python -m copa_harness.lm.embedded.pretrain measure runs/second
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
    parser.add_argument("verb", choices=("train", "measure"), help="run the recipe, or go on with it; write figures.md")
    parser.add_argument("folder", type=pathlib.Path, help="of the run; its export/ holds the model")
    parser.add_argument("--start", type=pathlib.Path, help="exported model to start from (recipe OWN_NAMES)")
    parser.add_argument("--until", type=int, help="stop after this step without changing the schedule")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the splits that are measured")
    options = parser.parse_args(arguments)

    import torch

    torch.set_num_threads(options.threads)
    if options.verb == "train":
        from copa_harness.lm.embedded.pretrain.recipe import FOUNDATION, OWN_NAMES
        from copa_harness.lm.embedded.pretrain.train import PretrainingRun

        recipe = OWN_NAMES if options.start else FOUNDATION
        PretrainingRun(recipe, options.folder, n_workers=1, start=options.start).run(until=options.until)
    else:
        from copa_harness.lm.embedded.pretrain.figures import write_figures
        from copa_harness.lm.embedded.pretrain.measure import load_model

        print(write_figures(load_model(options.folder / "export"), options.folder, seeds=options.seeds))  # noqa: T201


if __name__ == "__main__":
    main()
