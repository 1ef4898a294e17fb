"""The pretraining run: one seeded, resumable recipe from nothing to exported Hugging Face files.

Batch s is a pure function of (seed, s), so a run killed at any step and started again goes on from its last checkpoint
and gives, in the same arithmetic, the same weights. Checkpoints are safetensors + JSON; the log is one JSON object per
line. Writing a file ``end_at`` with a step number into the run's folder moves the end (and with it the decay) there;
the executed recipe records it.

The matrices inside the layers are trained by Muon: momentum, then the nearest orthogonal matrix by five Newton-Schulz
steps (K. Jordan et al., "Muon: an optimizer for hidden layers", 2024). Matrices of one size are orthogonalised
together, which is what makes it cheap on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import platform
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast

from copa_harness.atomic_files import write_atomic
from copa_harness.lm.embedded.pretrain.batches import Batch, EpisodeMaker
from copa_harness.lm.embedded.pretrain.episodes import KINDS
from copa_harness.lm.embedded.pretrain.network import NetworkShape, TrainingNetwork
from copa_harness.lm.embedded.pretrain.objectives import TAPPED_LAYERS, Supervision, TensorBatch, to_tensors, token_loss
from copa_harness.lm.embedded.pretrain.recipe import Recipe
from copa_harness.lm.embedded.pretrain.tokenizer import (
    build_tokenizer,
    number_features,
    number_strings_of,
    save_tokenizer,
)

_MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz polynomial a x + b x^3 + c x^5."""


_TURN_BUCKETS = {"turn_0": (0, 1), "turns_1_3": (1, 4), "turns_4_7": (4, 8), "turns_8_on": (8, 10**6)}


class EpisodeBatches(Dataset[Batch]):
    """Batch number s of a recipe, made on demand."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        self._recipe = recipe
        lengths = {stage.at(parity).tokens for stage in recipe.stages for parity in (0, 1)}
        self._makers = {length: EpisodeMaker(tokenizer, n_tokens=length) for length in lengths}

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, step: int) -> Batch:
        _, stage = self._recipe.stage_at(step)
        return self._makers[stage.tokens].batch(stage.mix, stage.rows, seed=(self._recipe.seed, step))


@dataclass(slots=True)
class _Window:
    """Running sums since the last log line."""

    right: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    count: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        self.right[name] += value * weight
        self.count[name] += weight

    def means(self) -> dict[str, float]:
        return {name: round(self.right[name] / self.count[name], 4) for name in self.right if self.count[name]}


class PretrainingRun:
    """State of one run in one folder.

    Args:
        recipe: What to do.
        folder: Where checkpoint, log and export go; an existing checkpoint is resumed.
        n_workers: Processes that make episodes; 0 makes them in this one.
        start: Folder of an exported model of the same sizes whose weights are the first ones.
    """

    def __init__(
        self, recipe: Recipe, folder: pathlib.Path, *, n_workers: int, start: pathlib.Path | None = None
    ) -> None:
        self.recipe, self._folder, self._n_workers = recipe, folder, n_workers
        self._started_from: dict[str, str] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build_tokenizer(seed=recipe.seed)
        generator = torch.Generator().manual_seed(recipe.seed)
        vocabulary = self.tokenizer.get_vocab()
        numbers = number_strings_of(vocabulary)
        shape = NetworkShape(len(self.tokenizer), recipe.width, recipe.n_layers, recipe.n_heads, recipe.feed_forward)
        self.network = TrainingNetwork(
            shape,
            number_ids=np.array([vocabulary[number] for number in numbers]),
            number_features=number_features(numbers),
            tapped_layers=TAPPED_LAYERS,
            generator=generator,
        )
        self.supervision = Supervision(recipe.width, generator=generator)
        self._muon = Muon(self.network.hidden_matrices(), weight_decay=recipe.muon_decay)
        others = [*self.network.other_parameters(), *self.supervision.parameters()]
        self._adam = torch.optim.AdamW(
            others, lr=recipe.adam_rate, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, fused=True
        )
        self._cos, self._sin = self.network.rotary_tables()
        self.step, self.n_tokens, self.wall_s = 0, 0, 0.0
        self._commits = [_commit()]
        if (folder / "state.safetensors").exists():
            self._load()
        elif start is not None:
            self._start_from(start)

    def run(self, *, until: int | None = None, checkpoint_every: int = 300, log_every: int = 50) -> None:
        """Trains to the end of the recipe (or to step ``until``, without changing the schedule)."""
        forward = torch.compile(self.network, dynamic=False) if self.recipe.compiled else self.network
        batches = EpisodeBatches(self.recipe, self.tokenizer)
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=range(self.step, 10**9),
            num_workers=self._n_workers,
            collate_fn=_as_is,
            prefetch_factor=6 if self._n_workers else None,
            multiprocessing_context="fork" if self._n_workers else None,
        )
        window, started, wall_before = _Window(), time.perf_counter(), self.wall_s
        bar = tqdm(total=self._last_step(), initial=self.step, unit="step", mininterval=5.0)
        for batch in loader:
            if self.step >= (self._last_step() if until is None else until):
                break
            self._one_step(forward, to_tensors(batch), window)
            self.wall_s = wall_before + time.perf_counter() - started
            bar.update()
            if self.step % log_every == 0:
                self._log(window, bar)
                window = _Window()
            if self.step % checkpoint_every == 0:
                self.save()
        bar.close()
        self.save()

    def _one_step(self, forward: Any, batch: TensorBatch, window: _Window) -> None:
        _, stage = self.recipe.stage_at(self.step)
        share = self.recipe.rate_share(self.step, self._last_step())
        picked = batch.weights.reshape(-1).nonzero()[:, 0]
        targets, weights = batch.ids[:, 1:].reshape(-1)[picked], batch.weights.reshape(-1)[picked]
        cos, sin = self._cos[batch.positions][:, :, None], self._sin[batch.positions][:, :, None]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.recipe.mixed_precision):
            table = self.network.table()
            hidden, taps = forward(table, batch.ids[:, :-1].contiguous(), cos, sin)
            logits = hidden.reshape(-1, self.recipe.width)[picked] @ table.T
        loss = token_loss(logits, targets, weights)
        probe, pull, parts = self.supervision(
            taps,
            batch,
            name_layer=stage.name_layer,
            decide=stage.decide,
            word_table=table if stage.words else None,
            gather=stage.gather,
        )
        total = loss + stage.probe_weight * probe + stage.pull_weight * pull
        total.backward()
        torch.nn.utils.clip_grad_norm_([*self.network.parameters(), *self.supervision.parameters()], 1.0)
        for group in self._adam.param_groups:
            group["lr"] = self.recipe.adam_rate * share
        self._muon.step(self.recipe.muon_rate * share)
        self._adam.step()
        for parameter in [*self.network.parameters(), *self.supervision.parameters()]:
            parameter.grad = None
        self.step += 1
        self.n_tokens += batch.ids.shape[0] * (batch.ids.shape[1] - 1)
        self._measure(logits.detach(), targets, picked, batch, window)
        window.add("loss", loss.item())
        for name, value in parts.items():
            window.add(name, value)

    def _measure(self, logits: Tensor, targets: Tensor, picked: Tensor, batch: TensorBatch, window: _Window) -> None:
        """Accuracy of the first label token by turn, for stated rules, sentences and the rest, and of names."""
        named = batch.naming.reshape(-1)[picked]
        if named.any():
            right = (logits[named].argmax(-1) == targets[named]).float()
            window.add("name_tokens", right.mean().item(), len(right))
        turn = batch.turn.reshape(-1)[picked]
        first = turn >= 0
        right = (logits[first].argmax(-1) == targets[first]).float()
        kind = batch.kind[:, None].expand(batch.turn.shape).reshape(-1)[picked][first]
        ruled, text = kind == KINDS.index("rule"), kind == KINDS.index("text")
        for name, group in (("rule", ruled), ("text", text), ("demos", ~ruled & ~text)):
            for bucket, (low, high) in _TURN_BUCKETS.items():
                mask = group & (turn[first] >= low) & (turn[first] < high)
                n = int(mask.sum())
                if n:
                    window.add(f"{name}_{bucket}", right[mask].mean().item(), n)

    def _last_step(self) -> int:
        path = self._folder / "end_at"
        return int(path.read_text()) if path.exists() else self.recipe.total_steps

    def _log(self, window: _Window, bar: tqdm[Any]) -> None:
        record = {
            "step": self.step,
            "stage": self.recipe.stages[self.recipe.stage_at(self.step - 1)[0]].name,
            "tokens": self.n_tokens,
            "wall_s": round(self.wall_s, 1),
            "rate_share": round(self.recipe.rate_share(self.step, self._last_step()), 4),
            **window.means(),
        }
        with (self._folder / "log.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        bar.set_postfix(loss=record.get("loss"), demos=record.get("demos_turns_8_on"), rule=record.get("rule_turn_0"))

    def save(self) -> None:
        """Writes the checkpoint and the exported model, each by rename."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"supervision.{name}": value for name, value in self.supervision.state_dict().items()}
        tensors |= {f"muon.{i}": buffer for i, buffer in enumerate(self._muon.buffers)}
        for i, state in self._adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
        temporary = self._folder / "state.safetensors.tmp"
        progress = {"step": str(self.step), "n_tokens": str(self.n_tokens), "wall_s": str(self.wall_s)}
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=progress)
        os.replace(temporary, self._folder / "state.safetensors")
        write_atomic(self._folder / "run.json", json.dumps(self.manifest(), indent=1))
        self.export(self._folder / "export")

    def _load(self) -> None:
        from safetensors import safe_open

        path = self._folder / "state.safetensors"
        with safe_open(path, "pt") as stream:
            progress = stream.metadata()
        tensors = load_file(path)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

        self.network.load_state_dict(part("network."))
        # a probe that a later stage added is not in an older checkpoint; it begins as it does in a new run
        self.supervision.load_state_dict(part("supervision."), strict=False)
        for i, buffer in enumerate(self._muon.buffers):
            buffer.copy_(tensors[f"muon.{i}"])
        adam: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, value in part("adam.").items():
            index, key = name.split(".")
            adam[int(index)][key] = value
        self._adam.load_state_dict({**self._adam.state_dict(), "state": dict(adam)})
        self.step, self.n_tokens = int(progress["step"]), int(progress["n_tokens"])
        self.wall_s = float(progress["wall_s"])
        self._forget_lines_after(self.step)
        manifest = json.loads((self._folder / "run.json").read_text())
        before, self._started_from = manifest["commits"], manifest["started_from"]
        self._commits = [*before, *(commit for commit in self._commits if commit not in before)]

    @torch.no_grad()
    def _start_from(self, folder: pathlib.Path) -> None:
        """Takes over an exported model: its layers, and its embedding rows by the text of their tokens.

        A token that is new begins as the mean of what the older tokenizer makes of its text; the probes begin at zero,
        so that at first they teach the network nothing.
        """
        from transformers import AutoTokenizer

        state = load_file(folder / "model.safetensors")
        older = AutoTokenizer.from_pretrained(folder)
        rows, places = state["model.embed_tokens.weight"], older.get_vocab()
        for token, index in self.tokenizer.get_vocab().items():
            known = [places[token]] if token in places else older(token, add_special_tokens=False).input_ids
            self.network.embedding[index] = rows[known].mean(0)
        self.network.number_projection.zero_()
        self.network.final_norm.copy_(state["model.norm.weight"])
        for layer in range(self.recipe.n_layers):
            prefix = f"model.layers.{layer}."
            attention = [state[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
            feed = [state[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")]
            self.network.attention_in[layer].copy_(torch.stack(attention))
            self.network.attention_out[layer].copy_(state[f"{prefix}self_attn.o_proj.weight"])
            self.network.feed_in[layer].copy_(torch.stack(feed))
            self.network.feed_out[layer].copy_(state[f"{prefix}mlp.down_proj.weight"])
            self.network.attention_norm[layer].copy_(state[f"{prefix}input_layernorm.weight"])
            self.network.feed_norm[layer].copy_(state[f"{prefix}post_attention_layernorm.weight"])
        for probe in self.supervision.parameters():
            probe.zero_()
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        self._started_from = {"model.safetensors": digest}

    def _forget_lines_after(self, step: int) -> None:
        """Drops log lines of steps that were done after the checkpoint and will be done again."""
        path = self._folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            write_atomic(path, "".join(line + "\n" for line in kept))

    def manifest(self) -> dict[str, Any]:
        """What has been executed, for the model card."""
        return {
            "schema": 1,
            "recipe": self.recipe.ending_at(self._last_step()).to_json(),
            "steps": self.step,
            "tokens": self.n_tokens,
            "wall_s": round(self.wall_s, 1),
            "n_parameters": self._n_parameters(),
            "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "commits": self._commits,
            "started_from": self._started_from,
        }

    def _n_parameters(self) -> int:
        inside = sum(parameter.numel() for parameter in self.network.parameters())
        return int(inside - self.network.number_projection.numel())

    def export(self, folder: pathlib.Path) -> None:
        """Writes the model as plain Hugging Face files."""
        ids = self.tokenizer
        pad, end = int(ids.convert_tokens_to_ids("<|pad|>")), int(ids.convert_tokens_to_ids("<|end|>"))
        model = self.network.to_hf(pad_id=pad, end_id=end)
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=64, pad_token_id=pad, eos_token_id=end
        )
        model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)


def _as_is(batch: Batch) -> Batch:
    return batch


def _processor() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = pathlib.Path(__file__).resolve().parent
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"


class Muon:
    """Muon over parameters that are matrices or stacks of matrices.

    Args:
        parameters: Tensors of shape (out, in) or (n, out, in).
        momentum: Decay of the gradient average; Nesterov's form is used.
        weight_decay: Decoupled, per unit of learning rate.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], *, weight_decay: float, momentum: float = 0.95) -> None:
        self._parameters = parameters
        self._momentum, self._weight_decay = momentum, weight_decay
        self.buffers = [torch.zeros_like(parameter) for parameter in parameters]
        self._groups: dict[tuple[int, int], list[int]] = {}
        for i, parameter in enumerate(parameters):
            rows, columns = parameter.shape[-2:]
            self._groups.setdefault((min(rows, columns), max(rows, columns)), []).append(i)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update from the gradients in place."""
        for indices in self._groups.values():
            updates: list[Tensor] = []
            for i in indices:
                gradient = self._parameters[i].grad
                assert gradient is not None
                self.buffers[i].lerp_(gradient, 1 - self._momentum)
                update = gradient.lerp(self.buffers[i], self._momentum)
                update = update.view(-1, *update.shape[-2:])
                updates.append(update.mT if update.shape[-2] > update.shape[-1] else update)
            orthogonal = _orthogonalised(torch.cat(updates))
            start = 0
            for i in indices:
                parameter = self._parameters[i]
                n = parameter.numel() // (parameter.shape[-1] * parameter.shape[-2])
                update = orthogonal[start : start + n]
                start += n
                rows, columns = parameter.shape[-2:]
                update = (update.mT if rows > columns else update).reshape(parameter.shape)
                parameter.mul_(1 - learning_rate * self._weight_decay)
                parameter.add_(update, alpha=-learning_rate * max(1.0, rows / columns) ** 0.5)


def _orthogonalised(x: Tensor) -> Tensor:
    """Stack of (rows <= columns) matrices with all singular values drawn towards 1, in bfloat16 inside."""
    a, b, c = _MUON_COEFFICIENTS
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-9)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()
