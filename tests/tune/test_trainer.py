"""LoraTrainer: learns, repeats bit for bit, never trains twice, leaves nothing half-written."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import dspy
import peft
import pytest
import torch
import transformers
from dspy.lm15 import Config, Message, Request

from copa_harness.errors import (
    ArtifactError,
    ConfigurationError,
    ProviderError,
    TrainingDivergedError,
    TrainingError,
    TrainingMemoryError,
)
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local import model as local_model
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.files import WEIGHTS_FILE
from copa_harness.lm.local.model import silence_peft
from copa_harness.lm.metered import MeteredLM
from copa_harness.shared_files import SharedFiles, sharing_files
from copa_harness.tune import LoraSettings, LoraTrainer, RowDemos, TrainingRow, options, progress, render_rows
from copa_harness.tune.batches import BatchLoss
from copa_harness.tune.loop import relative_rate
from copa_harness.tune.rows import encode_row

QUICK = LoraSettings(rank=4, alpha=8, epochs=2, batch_size=4, warmup_steps=1)


def row(question: str, answer: str, variant: int = 0) -> TrainingRow:
    return TrainingRow(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), variant)


ROWS = tuple(row(f"question {i}", "red" if i % 2 else "green") for i in range(8))


def ask(engine, model, question, **config):
    request = Request(model=model, messages=(Message.user(question),), config=Config(max_tokens=8, **config))
    return engine.complete(request, seed=0)


@pytest.fixture
def trainer(engine):
    return LoraTrainer(engine, directory=engine.lora_dir)


def test_a_trained_adapter_answers_as_it_was_taught_and_the_base_does_not_change(engine, trainer):
    before = ask(engine, "hf:tiny", "question 1").text
    settings = LoraSettings(rank=8, epochs=30, batch_size=8, learning_rate=2e-2)
    adapter = trainer.train(ROWS, settings=settings, served_with="none")
    assert [ask(engine, adapter.model, f"question {i}").text for i in range(4)] == ["green", "red", "green", "red"]
    assert ask(engine, adapter.model, "question 1").finish_reason == "stop"
    assert ask(engine, "hf:tiny", "question 1").text == before


def test_answers_of_an_adapter_equal_those_of_peft_alone_also_beside_other_adapters(engine, trainer, tiny_folder):
    first, second = (
        trainer.train(ROWS, settings=LoraSettings(rank=4, epochs=3, learning_rate=3e-2, seed=seed), served_with="none")
        for seed in (0, 1)
    )
    models = ["hf:tiny", first.model, second.model] * 3
    with ThreadPoolExecutor(9) as pool:
        texts = list(pool.map(lambda model: ask(engine, model, "question zebra 5").text, models))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer("<|user|>question zebra 5<|assistant|>", add_special_tokens=False, return_tensors="pt")
    for i, adapter in enumerate((None, first, second)):
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
        if adapter:
            with silence_peft():
                model = peft.PeftModel.from_pretrained(model, str(adapter.directory))
        generated = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert texts[i::3] == [tokenizer.decode(generated, skip_special_tokens=True)] * 3
    assert len(set(texts)) == 3


def test_adapters_beyond_those_that_fit_in_memory_are_dropped_and_loaded_again(engine, trainer, monkeypatch):
    monkeypatch.setattr(local_model, "MAX_LORAS_IN_MEMORY", 1)
    models = [
        trainer.train(
            ROWS, settings=LoraSettings(rank=4, epochs=3, learning_rate=3e-2, seed=seed), served_with="none"
        ).model
        for seed in (2, 3)
    ]
    answers = [[ask(engine, model, f"question zebra {i}").text for model in models] for i in (5, 6) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]
    assert answers[0][0] != answers[0][1]


def test_the_same_training_repeats_bit_for_bit(engine, tmp_path):
    adapters = [
        LoraTrainer(engine, directory=tmp_path / name).train(ROWS, settings=QUICK, served_with="none") for name in "ab"
    ]
    assert adapters[0].fingerprint == adapters[1].fingerprint
    weights = [(adapter.directory / WEIGHTS_FILE).read_bytes() for adapter in adapters]
    assert weights[0] == weights[1]
    other_seed = LoraSettings(rank=4, alpha=8, epochs=2, batch_size=4, warmup_steps=1, seed=1)
    assert (
        LoraTrainer(engine, directory=tmp_path / "c").train(ROWS, settings=other_seed, served_with="none").fingerprint
        != adapters[0].fingerprint
    )


def test_a_finished_training_is_read_and_not_done_again(engine, trainer):
    with open_scope("first") as scope:
        first = trainer.train(ROWS, settings=QUICK, served_with="none")
    assert scope.usage().train_steps == first.train_steps == 4
    with open_scope("second") as scope:
        again = trainer.train(list(ROWS), settings=QUICK, served_with="none")
    assert scope.usage().train_steps == 0
    assert (first.trained_now, again.trained_now) == (True, False)
    assert (again.fingerprint, again.train_steps, again.final_loss) == (first.fingerprint, 4, first.final_loss)


@pytest.mark.parametrize("change", ["rows", "settings", "held_out", "served_with"])
def test_anything_that_shapes_a_training_makes_another_recipe(change, trainer):
    given = {"rows": ROWS, "settings": QUICK, "held_out": (), "served_with": "none"}
    other = {"rows": ROWS[:-1], "settings": LoraSettings(), "held_out": ROWS[:1], "served_with": "program"}
    changed = {**given, change: other[change]}
    assert trainer.recipe(changed.pop("rows"), **changed) != trainer.recipe(given.pop("rows"), **given)


def test_a_later_process_finds_an_adapter_by_its_name(trainer, engine, tiny_folder):
    adapter = trainer.train(ROWS, settings=QUICK, served_with="none")
    later = TransformersEngine(tiny_folder, name="hf:tiny", lora_dir=engine.lora_dir)
    assert later.fingerprint(adapter.model) == adapter.fingerprint
    assert ask(later, adapter.model, "question 1").text == ask(engine, adapter.model, "question 1").text


def test_the_manifest_says_how_and_for_which_prompts(trainer):
    adapter = trainer.train(ROWS, settings=QUICK, held_out=ROWS[:2], served_with="resample:9")
    manifest = json.loads((adapter.directory / "manifest.json").read_text())
    assert manifest["served_with"] == "resample:9"
    assert manifest["settings"]["rank"] == 4
    assert manifest["train_steps"] == 4
    assert len(manifest["losses"]) == len(manifest["held_out_losses"]) == 2
    assert set(manifest["files"]) == {WEIGHTS_FILE, "adapter_config.json"}
    assert adapter.directory.name == manifest["recipe"]


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "adapter_config.json", "manifest.json"])
def test_a_damaged_adapter_is_refused_by_the_engine_and_trained_again_by_the_trainer(name, engine, trainer):
    damaged = trainer.train(ROWS, settings=QUICK, served_with="none")
    before = (damaged.directory / WEIGHTS_FILE).read_bytes()
    engine.add_lora(damaged.directory)
    (damaged.directory / name).write_bytes(b"x" * 100)
    for act in (lambda: engine.fingerprint(damaged.model), lambda: ask(engine, damaged.model, "x")):
        with pytest.raises(ArtifactError, match="remedy: delete"):
            act()
    again = trainer.train(ROWS, settings=QUICK, served_with="none")
    assert (again.trained_now, again.model) == (True, damaged.model)
    assert (damaged.directory / WEIGHTS_FILE).read_bytes() == before
    assert ask(engine, damaged.model, "x").text is not None


def test_an_adapter_of_another_base_is_refused(trainer, tmp_path):
    from copa_harness.testing.tiny_models import write_tiny_model

    adapter = trainer.train(ROWS, settings=QUICK, served_with="none")
    other = TransformersEngine(write_tiny_model(tmp_path / "other", seed=5), name="hf:tiny", lora_dir=tmp_path)
    with pytest.raises(ArtifactError, match="trained for a base"):
        other.add_lora(adapter.directory)


def test_training_stops_early_and_keeps_the_best_epoch(trainer):
    settings = LoraSettings(rank=4, epochs=40, batch_size=8, learning_rate=3e-2, early_stop_patience=2)
    contrary = [row(f"question {i}", "green" if i % 2 else "red") for i in range(8)]
    adapter = trainer.train(ROWS, settings=settings, held_out=contrary, served_with="none")
    manifest = json.loads((adapter.directory / "manifest.json").read_text())
    losses = manifest["held_out_losses"]
    assert len(losses) < 40
    assert adapter.final_loss == min(losses) == losses[manifest["best_epoch"] - 1]


def test_a_large_model_says_what_the_training_cost_on_general_answers(trainer, monkeypatch):
    assert trainer.train(ROWS, settings=QUICK, served_with="none").general_losses == ()
    monkeypatch.setattr(options, "LARGE_FROM", 1)
    settings = LoraSettings(rank=4, epochs=12, batch_size=8, learning_rate=3e-2)
    adapter = trainer.train(ROWS, settings=settings, served_with="none")
    before, after = adapter.general_losses
    assert after != before > 0
    found = json.loads((adapter.directory / "manifest.json").read_text())["general_losses"]
    assert len(found) == 1 + 12
    assert (before, after) == (found[0], found[adapter.epoch])
    again = trainer.train(ROWS, settings=settings, served_with="none")
    assert again.general_losses == adapter.general_losses
    assert again.divergence == adapter.divergence > 0


def test_gradient_accumulation_gives_the_gradients_of_the_whole_batch(engine, tmp_path):
    losses = []
    for size in (None, 3):
        settings = LoraSettings(rank=4, epochs=3, batch_size=8, micro_batch_size=size)
        adapter = LoraTrainer(engine, directory=tmp_path / str(size)).train(ROWS, settings=settings, served_with="none")
        losses.append(json.loads((adapter.directory / "manifest.json").read_text())["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_no_rows_only_long_rows_and_a_diverging_loss_are_errors(trainer):
    with pytest.raises(TrainingError, match="0 rows"):
        trainer.train([], settings=QUICK, served_with="none")
    with pytest.raises(TrainingError, match="longer than 3 tokens"):
        trainer.train(ROWS, settings=LoraSettings(max_length=3), served_with="none")
    with pytest.raises(TrainingError, match="remedy: a learning rate"):
        trainer.train(ROWS, settings=LoraSettings(learning_rate=1e6, epochs=6, batch_size=2), served_with="none")
    assert not [path for path in trainer.directory.glob("*/*") if path.parent.name != ".locks"]


def test_over_long_rows_are_left_out_and_counted(trainer, caplog):
    long = row("zebra " * 60, "red")
    with caplog.at_level("WARNING"):
        adapter = trainer.train([*ROWS, long], settings=LoraSettings(epochs=1, max_length=60), served_with="none")
    assert adapter.n_over_long == 1
    assert "1 of 9 training rows" in caplog.text


def test_each_epoch_trains_on_the_next_variant(trainer):
    rows = [row(f"question {i}", "red", variant) for variant in range(2) for i in range(6)]
    adapter = trainer.train(rows, settings=LoraSettings(epochs=4, batch_size=6), served_with="resample:1")
    assert adapter.train_steps == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 0},
        {"epochs": 1.5},
        {"learning_rate": 0},
        {"max_length": 0},
        {"seed": -1},
        {"learnign_rate": 1},
        {"precision": "half"},
        {"held_out_share": 1},
        {"learning_rate": "fast"},
        {"target_modules": 3},
        {"learn_from_demos": 1},
    ],
)
def test_settings_out_of_range_or_misspelt_are_refused(changes):
    with pytest.raises(ConfigurationError, match="expected"):
        LoraSettings().replaced(changes)


def test_unknown_target_modules_are_a_clear_error(trainer):
    with pytest.raises(TrainingError, match="target_modules"):
        trainer.train(ROWS, settings=LoraSettings(target_modules=("nothing_like_it",)), served_with="none")


def test_loss_falls_on_the_answer_and_its_end_only(engine):
    encoded = encode_row(engine.chat, row("question 1", "red"), eos_ids=engine.eos_ids)
    assert engine.tokenizer.decode(encoded.ids[: encoded.n_prompt]) == "<|user|>question 1<|assistant|>"
    assert engine.tokenizer.decode(encoded.ids[encoded.n_prompt :]) == "red<|end|>"


def test_loss_falls_on_the_answers_of_demonstrations_when_asked(engine):
    messages = [
        {"role": "system", "content": "S"},
        *({"role": role, "content": text} for role, text in [("user", "q1"), ("assistant", "red")]),
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "Not supplied for this particular example."},
        *({"role": role, "content": text} for role, text in [("user", "q3"), ("assistant", "green")]),
    ]
    encoded = encode_row(engine.chat, TrainingRow(tuple(messages)), eos_ids=engine.eos_ids, learn_from_demos=True)
    learnt = engine.tokenizer.decode([encoded.ids[position] for position in encoded.targets])
    assert learnt == "red<|end|>green<|end|>"


def test_learning_from_demonstrations_learns_what_they_answer(engine, trainer):
    turns = [part for i in range(4) for part in (("user", f"question {i}"), ("assistant", "red" if i % 2 else "green"))]
    rows = [TrainingRow(tuple({"role": role, "content": text} for role, text in turns))]
    settings = LoraSettings(rank=8, epochs=60, learning_rate=2e-2, learn_from_demos=True)
    adapter = trainer.train(rows, settings=settings, served_with="program")
    assert ask(engine, adapter.model, "question 0").text == "green"  # the first demonstration, behind none


def test_a_template_that_ends_turns_with_more_than_the_end_token_trains_up_to_it(tiny_folder, tmp_path):
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    engine = TransformersEngine(tiny_folder, name="m", lora_dir=tmp_path, chat_template=template)
    encoded = encode_row(engine.chat, row("question 1", "red"), eos_ids=engine.eos_ids)
    assert engine.tokenizer.decode(encoded.ids[encoded.n_prompt :]) == "red<|end|>"


def test_a_template_that_rewrites_the_prompt_once_answered_is_refused(tiny_folder, tmp_path):
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ ' Answer:' }}{% endif %}"
    )
    engine = TransformersEngine(tiny_folder, name="m", lora_dir=tmp_path, chat_template=template)
    with pytest.raises(TrainingError, match="finished conversation differently"):
        encode_row(engine.chat, row("question 1", "red"), eos_ids=engine.eos_ids)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [relative_rate(step, 5, 30) for step in range(31)]
    assert rates[0] == pytest.approx(1 / 6)
    assert max(rates) == rates[5] == 1.0
    assert rates[-1] == 0.0


def test_a_recipe_asked_for_by_many_at_once_is_trained_once(engine):
    with ThreadPoolExecutor(4) as pool:
        trainers = [LoraTrainer(engine, directory=engine.lora_dir) for _ in range(4)]
        adapters = list(pool.map(lambda trainer: trainer.train(ROWS, settings=QUICK, served_with="none"), trainers))
    assert sum(adapter.trained_now for adapter in adapters) == 1
    assert len({adapter.model for adapter in adapters}) == 1


def test_rows_of_a_program_train_and_serve_end_to_end(engine, trainer, program, examples):
    rows = render_rows(program, examples[:4:3], demos=RowDemos("none", seed=0))["self"]
    settings = LoraSettings(epochs=40, batch_size=2, learning_rate=2e-2)
    adapter = trainer.train(rows, settings=settings, served_with="none")
    lm = MeteredLM(adapter.model, engine=engine, gateway=Gateway(cache=None), max_tokens=40)
    with dspy.context(lm=lm):
        assert [program(**example.inputs()).colour for example in examples[:4:3]] == ["red"] * 2


def test_a_loss_that_is_no_number_stops_the_training_and_says_what_to_change(trainer, monkeypatch):
    real = BatchLoss.sum
    monkeypatch.setattr(BatchLoss, "sum", lambda self, rows: real(self, rows) * float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"loss is nan .* step 1 of 4; remedy: a learning rate below 0.003"):
        trainer.train(ROWS, settings=QUICK, served_with="none")


def test_a_loss_that_grows_stops_the_training_at_the_end_of_that_epoch(trainer, monkeypatch):
    real, factors = BatchLoss.sum, iter(2.0**n for n in range(50))
    monkeypatch.setattr(BatchLoss, "sum", lambda self, rows: real(self, rows) * next(factors))
    settings = LoraSettings(rank=4, epochs=50, batch_size=8)
    with open_scope("run") as scope, pytest.raises(TrainingDivergedError, match=r"diverged: .* in epoch [234]; remedy"):
        trainer.train(ROWS, settings=settings, served_with="none")
    assert scope.usage().train_steps <= 4


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes.\nframe #0: c10"), MemoryError()]
)
def test_a_step_that_memory_does_not_hold_says_what_takes_less_and_keeps_the_epochs_done(error, trainer, monkeypatch):
    real, n_sums = BatchLoss.sum, 0

    def little_memory(self, rows):
        nonlocal n_sums
        n_sums += 1
        if n_sums == 4:
            raise error
        return real(self, rows)

    monkeypatch.setattr(BatchLoss, "sum", little_memory)
    with open_scope("run") as scope, pytest.raises(TrainingMemoryError, match=r"cpu .* step 4, up to 4 rows at") as it:
        trainer.train(ROWS, settings=QUICK, served_with="none")
    assert re.search(r"remedy: a smaller micro_batch_size, a smaller max_length", str(it.value))
    assert "frame #0" not in str(it.value)
    assert not isinstance(it.value, ProviderError)
    assert scope.usage().train_steps == 3
    assert trainer.train(ROWS, settings=QUICK, served_with="none").steps_now == 2


def test_gradients_are_clipped_before_every_step(trainer, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def measured(self, *args):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.cat([each.flatten() for each in gradients]))))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    trainer.train(ROWS, settings=QUICK.replaced({"max_grad_norm": 1e6}), served_with="none")
    assert max(norms) > 0.02
    norms.clear()
    trainer.train(ROWS, settings=QUICK.replaced({"max_grad_norm": 0.01}), served_with="none")
    assert len(norms) == 4
    assert max(norms) <= 0.01001


def test_progress_is_told_in_plain_lines_with_the_time_to_go(trainer, monkeypatch, caplog):
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    with caplog.at_level("INFO"):
        trainer.train(ROWS, settings=QUICK, served_with="none")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("LoRA step")]
    assert len(lines) == 4
    assert all(re.fullmatch(r"LoRA step \d of 4, epoch [12], loss \d+\.\d{3}, \d+ s to go", line) for line in lines)
    assert lines[-1].endswith("0 s to go")


def test_a_training_that_another_machine_finished_is_taken_and_not_done_again(engine, tmp_path):
    with sharing_files(SharedFiles(str(tmp_path / "shared"))):
        first = LoraTrainer(engine, directory=tmp_path / "one").train(ROWS, settings=QUICK, served_with="none")
        other = LoraTrainer(engine, directory=tmp_path / "other").train(ROWS, settings=QUICK, served_with="none")
        assert (first.trained_now, other.trained_now, other.steps_now) == (True, False, 0)
        assert other.fingerprint == first.fingerprint
        weights = tmp_path / "shared" / "lora" / first.recipe / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        third = LoraTrainer(engine, directory=tmp_path / "third").train(ROWS, settings=QUICK, served_with="none")
        assert third.trained_now
        assert third.fingerprint == first.fingerprint
        fourth = LoraTrainer(engine, directory=tmp_path / "fourth").train(ROWS, settings=QUICK, served_with="none")
        assert not fourth.trained_now  # what was shared is whole again
