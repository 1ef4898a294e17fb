from __future__ import annotations

import dspy
import pytest
import torch
from dspy.utils import DummyLM
from transformers import LlamaConfig, LlamaForCausalLM

from copa_harness.lm.embedded.pretrain.development_tasks import development_tasks, own_name_tasks
from copa_harness.lm.embedded.pretrain.measure import (
    LoraSettings,
    MeasuredModel,
    best_demos,
    with_lora,
)


@pytest.fixture(scope="module")
def model(tokenizer) -> MeasuredModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=4,
        bos_token_id=None,
        initializer_range=0.2,
    )
    return MeasuredModel(LlamaForCausalLM(config).eval(), tokenizer)


@pytest.fixture(scope="module")
def task():
    return development_tasks(0, "single")[0]


@pytest.mark.parametrize("form", ["float_fields", "str_fields", "single"])
def test_prompts_are_those_of_dspy_predict(model, form):
    task = development_tasks(0, form)[0]
    program, rows = task.program, task.train[:3]
    lm = DummyLM([{"answer": rows[0]["answer"]}])
    predict = dspy.Predict(program)
    predict.demos = [dspy.Example(**row) for row in rows[:2]]
    inputs = {name: value for name, value in rows[2].items() if name != "answer"}
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        predict(**inputs)
    messages = lm.history[-1]["messages"]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert model.tokenizer.decode(model.prompt_ids(program, rows[:2], rows[2])) == text


def test_padding_does_not_change_a_text(model):
    prompts = [[5, 9, 11, 13, 17], [5, 9, 11, 19, 23, 29, 31], [5, 9, 40]]
    together = model.generate(prompts, max_new_tokens=6)
    alone = []
    for prompt in prompts:
        with torch.no_grad():
            out = model.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        alone.append(model.tokenizer.decode(out[0, len(prompt) :].tolist()).split("<|end|>")[0])
    assert together == alone


def test_an_answer_that_does_not_parse_is_none(model, task):
    assert model.answers(task.program, [], task.test[:1]) == [None]


def test_demonstrations_are_chosen_by_validation_and_from_the_pool(model, task):
    rows = task.train[:8]
    demos = best_demos(model, task.program, rows[:6], rows[6:], n_demos=2, n_sets=2, seed=0)
    assert len(demos) == 2
    assert all(demo in rows[:6] for demo in demos)


def test_lora_lowers_the_loss_of_its_rows_and_leaves_the_base_alone(model, task):
    program, rows = task.program, task.train[:6]
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    settings = LoraSettings(epochs=8, learning_rate=1e-2, batch_size=3, n_demos=1)
    tuned = with_lora(model, program, rows, settings, seed=0)
    assert all(torch.equal(value, model.model.state_dict()[name]) for name, value in before.items())
    ids = (
        model.prompt_ids(program, [], rows[0])
        + model.tokenizer("[[ ## answer ## ]]\n", add_special_tokens=False).input_ids
    )
    with torch.no_grad():
        base, new = (m.model(torch.tensor([ids])).logits[0, -2].log_softmax(-1)[ids[-1]] for m in (model, tuned))
    assert new > base


def test_development_tasks_have_disjoint_rows_of_two_or_three_labels():
    for task in development_tasks(1):
        assert len(task.train) == len(task.test) == 75
        assert 2 <= len({row["answer"] for row in task.train}) <= 3
        assert all(0 <= row[name] <= 9.9 for row in task.train + task.test for name in task.program.input_fields)


def test_the_rule_of_a_development_task_answers_every_test_row_with_a_label():
    task = development_tasks(0)[2]
    first, second = task.program.input_fields
    assert task.rule.startswith(f"If {first} is below ")
    assert second in task.rule
    assert len(task.ruled) == len(task.test)
    assert set(task.ruled) <= {row["answer"] for row in task.train}


def test_own_name_tasks_have_typed_rows_and_words_no_episode_has():
    import re

    from copa_harness.lm.embedded.pretrain.worlds import OWN_TASK_WORDS, PLAIN_WORDS

    for task in own_name_tasks(0):
        assert len(task.train) == len(task.test) == 75
        for name, field in task.program.output_fields.items():
            values = {row[name] for row in task.train}
            assert {row[name] for row in task.test} <= values
            assert len(values) > 1
            assert field.annotation not in (bool, int) or all(isinstance(value, field.annotation) for value in values)
            words = set(re.findall("[a-z]+", name))
            assert words & OWN_TASK_WORDS, name
            assert not words & OWN_TASK_WORDS & set(PLAIN_WORDS)


def test_an_answer_is_right_only_when_every_output_is(model, monkeypatch):
    task = own_name_tasks(0)[1]
    rows = list(task.test[:4])
    texts = [model.answer_text(task.program, row) for row in rows]
    texts[1] = texts[1].replace(f"\n{rows[1]['severity']}\n", "\n9\n")
    texts[2] = texts[2].replace("[[ ## severity ## ]]", "")
    monkeypatch.setattr(model, "generate", lambda prompts: texts)
    assert model.accuracy(task.program, [], rows) == (0.5, 0.25)
