"""The pretraining run: one seeded, resumable recipe from nothing to exported Hugging Face files.

Batch s is a pure function of (seed, s), so a run killed at any step and started again goes on from its last checkpoint
and gives, in the same arithmetic, the same weights. Checkpoints are safetensors + JSON; the log is one JSON object per
line. The matrices inside the layers are trained by Muon, everything else by AdamW.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from copa_harness.atomic_files import write_atomic
from copa_harness.lm.embedded.pretrain.batches import Batch, EpisodeMaker
from copa_harness.lm.embedded.pretrain.episodes import KINDS
from copa_harness.lm.embedded.pretrain.network import TrainingNetwork
from copa_harness.lm.embedded.pretrain.objectives import Supervision, token_loss
from copa_harness.lm.embedded.pretrain.recipe import Recipe
from copa_harness.lm.embedded.pretrain.tokenizer import build_tokenizer, number_features, number_strings_of
from copa_harness.report.provenance import environment

_TURN_BUCKETS = {"turn_0": (0, 1), "turns_1_3": (1, 4), "turns_4_7": (4, 8), "turns_8_on": (8, 10**6)}


class EpisodeBatches(Dataset[Batch]):
    """Batch number s of a recipe, made on demand."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        self._recipe = recipe
        lengths = {stage.at(parity).tokens for stage in recipe.stages for parity in (0, 1)}
        self._makers = {length: EpisodeMaker(tokenizer, n_tokens=length) for length in lengths}

    def __len__(self) -> int:
        return self._recipe.total_steps

    def __getitem__(self, step: int) -> Batch:
        stage = self._recipe.stage_at(step)[1].at(step)
        return self._makers[stage.tokens].batch(stage.mix, stage.rows, seed=(self._recipe.seed, step))


class PretrainingRun:
    """State of one run in one folder.

    Args:
        recipe: What to do.
        folder: Where checkpoint, log and export go; an existing checkpoint is resumed.
        n_workers: Processes that make episodes; 0 makes them in this one, and does not compile the network.
        start: Folder of an exported model of the same sizes whose weights are the first ones.
    """

    def __init__(
        self, recipe: Recipe, folder: pathlib.Path, *, n_workers: int, start: pathlib.Path | None = None
    ) -> None:
        self.recipe, self.folder, self._n_workers = recipe, folder, n_workers
        self._started_from = ""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build_tokenizer(seed=recipe.seed)
        generator = torch.Generator().manual_seed(recipe.seed)
        vocabulary = self.tokenizer.get_vocab()
        numbers = number_strings_of(vocabulary)
        self.network = TrainingNetwork(
            recipe,
            n_tokens=len(self.tokenizer),
            number_ids=np.array([vocabulary[number] for number in numbers]),
            number_features=number_features(numbers),
            generator=generator,
        )
        self.supervision = Supervision(recipe.width, generator=generator)
        self._modules = torch.nn.ModuleDict({"network": self.network, "supervision": self.supervision})
        others = [*self.network.other_parameters(), *self.supervision.parameters()]
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(self.network.hidden_matrices(), weight_decay=recipe.muon_decay),
            "adam": torch.optim.AdamW(others, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, fused=True),
        }
        self._cos, self._sin = self.network.rotary_tables()
        self.step, self.n_tokens, self.wall_s = 0, 0, 0.0
        self._sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(2))
        if (folder / "state.safetensors").exists():
            self._load()
        elif start is not None:
            self._start_from(start)

    def run(self, *, until: int | None = None, checkpoint_every: int = 300, log_every: int = 50) -> None:
        """Trains to the end of the recipe, or to step ``until`` of it."""
        end = self.recipe.total_steps if until is None else until
        forward = torch.compile(self.network, dynamic=False) if self._n_workers else self.network
        loader = DataLoader(
            EpisodeBatches(self.recipe, self.tokenizer),
            batch_size=None,
            sampler=range(self.step, end),
            num_workers=self._n_workers,
            collate_fn=_as_is,
            prefetch_factor=6 if self._n_workers else None,
            multiprocessing_context="fork" if self._n_workers else None,
        )
        started = time.perf_counter() - self.wall_s
        for batch in (bar := tqdm(loader, total=end, initial=self.step, unit="step", mininterval=5.0)):
            self._one_step(forward, batch.each(torch.from_numpy))
            self.wall_s = time.perf_counter() - started
            if self.step % log_every == 0:
                bar.set_postfix(self._log())
            if self.step % checkpoint_every == 0:
                self.save()
        self.save()

    def _one_step(self, forward: Any, batch: Batch) -> None:
        stage = self.recipe.stage_at(self.step)[1].at(self.step)
        picked = batch.weights.reshape(-1).nonzero()[:, 0]
        targets, weights = batch.ids[:, 1:].reshape(-1)[picked], batch.weights.reshape(-1)[picked]
        cos, sin = self._cos[batch.positions][:, :, None], self._sin[batch.positions][:, :, None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            table = self.network.table()
            hidden, taps = forward(table, batch.ids[:, :-1].contiguous(), cos, sin)
            logits = hidden.reshape(-1, self.recipe.width)[picked] @ table.T
        loss = token_loss(logits, targets, weights)
        probe, pull = self.supervision(taps, batch, stage=stage, table=table)
        (loss + stage.probe_weight * probe + stage.pull_weight * pull).backward()
        torch.nn.utils.clip_grad_norm_(self._modules.parameters(), 1.0)
        share = self.recipe.rate_share(self.step)
        for name, rate in (("muon", self.recipe.muon_rate), ("adam", self.recipe.adam_rate)):
            for group in self._optimizers[name].param_groups:
                group["lr"] = rate * share
            self._optimizers[name].step()
        self._modules.zero_grad()
        self.step += 1
        self.n_tokens += batch.ids.shape[0] * (batch.ids.shape[1] - 1)
        self._measure(logits.argmax(-1) == targets, picked, batch)
        self._sums["loss"] += torch.tensor([loss.item(), 1.0])

    def _measure(self, right: Tensor, picked: Tensor, batch: Batch) -> None:
        """Accuracy of the first label token by turn, for stated rules, sentences and the rest, and of names."""
        turn = batch.turn.reshape(-1)[picked]
        kind = batch.kind[:, None].expand(batch.turn.shape).reshape(-1)[picked]
        ruled, text = kind == KINDS.index("rule"), kind == KINDS.index("text")
        groups = {"name_tokens": batch.naming.reshape(-1)[picked]}
        for name, group in (("rule", ruled), ("text", text), ("demos", ~ruled & ~text)):
            for bucket, (low, high) in _TURN_BUCKETS.items():
                groups[f"{name}_{bucket}"] = group & (turn >= low) & (turn < high)
        for name, group in groups.items():
            self._sums[name] += torch.stack([right[group].sum(), group.sum()])

    def _log(self) -> dict[str, float]:
        """Writes the means since the last line; returns some of them."""
        means = {name: round(float(a / n), 4) for name, (a, n) in self._sums.items() if n}
        self._sums.clear()
        record = {
            "step": self.step,
            "stage": self.recipe.stage_at(self.step - 1)[1].name,
            "tokens": self.n_tokens,
            "wall_s": round(self.wall_s, 1),
            **means,
        }
        with (self.folder / "log.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        return {name: means[name] for name in ("loss", "demos_turns_8_on", "rule_turn_0") if name in means}

    def save(self) -> None:
        """Writes the checkpoint, what was executed, and the exported model, each by rename."""
        tensors = dict(self._modules.state_dict())
        for optimizer, made in self._optimizers.items():
            for i, state in made.state_dict()["state"].items():
                tensors |= {f"{optimizer}.{i}.{name}": value for name, value in state.items()}
        temporary = self.folder / "state.safetensors.tmp"
        progress = {"step": str(self.step), "n_tokens": str(self.n_tokens), "wall_s": str(self.wall_s)}
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=progress)
        os.replace(temporary, self.folder / "state.safetensors")
        write_atomic(self.folder / "run.json", json.dumps(self.manifest(), indent=1))
        pad, end = self.tokenizer.convert_tokens_to_ids(["<|pad|>", "<|end|>"])
        model = self.network.to_hf(pad_id=pad, end_id=end)
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=64, pad_token_id=pad, eos_token_id=end
        )
        model.save_pretrained(self.folder / "export")
        self.tokenizer.save_pretrained(self.folder / "export")

    def _load(self) -> None:
        path = self.folder / "state.safetensors"
        with safe_open(path, "pt") as stream:
            progress = stream.metadata()
        states: dict[str, dict[int, dict[str, Tensor]]] = {name: defaultdict(dict) for name in self._optimizers}
        modules = {}
        for name, value in load_file(path).items():
            owner, _, rest = name.partition(".")
            if owner in states:
                index, key = rest.split(".")
                states[owner][int(index)][key] = value
            else:
                modules[name] = value
        self._modules.load_state_dict(modules)
        for owner, optimizer in self._optimizers.items():
            optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(states[owner])})
        self.step, self.n_tokens = int(progress["step"]), int(progress["n_tokens"])
        self.wall_s = float(progress["wall_s"])
        self._started_from = json.loads((self.folder / "run.json").read_text())["started_from"]
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        # steps that were done after the checkpoint will be done again
        write_atomic(log, "".join(line for line in lines if json.loads(line)["step"] <= self.step))

    @torch.no_grad()
    def _start_from(self, folder: pathlib.Path) -> None:
        """Takes over an exported model: its layers, and its embedding rows by the text of their tokens.

        A token that is new begins as the mean of what the older tokenizer makes of its text; the probes begin at zero,
        so that at first they teach the network nothing.
        """
        state = load_file(folder / "model.safetensors")
        older = AutoTokenizer.from_pretrained(folder)
        rows, places = state["model.embed_tokens.weight"], older.get_vocab()
        for token, index in self.tokenizer.get_vocab().items():
            known = [places[token]] if token in places else older(token, add_special_tokens=False).input_ids
            self.network.embedding[index] = rows[known].mean(0)
        self.network.number_projection.zero_()
        self.network.from_hf(state)
        for probe in self.supervision.parameters():
            probe.zero_()
        self._started_from = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    def manifest(self) -> dict[str, Any]:
        """What has been executed."""
        made_in = environment(root=pathlib.Path(__file__).parent, packages=("torch",))
        return {
            **made_in,
            "recipe": dataclasses.asdict(self.recipe),
            "steps": self.step,
            "tokens": self.n_tokens,
            "wall_s": round(self.wall_s, 1),
            "started_from": self._started_from,
        }


def _as_is(batch: Batch) -> Batch:
    return batch
