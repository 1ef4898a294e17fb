"""KNNFewShot: what the program did with an input's neighbours is shown, and an answer costs what it always did."""

import dspy
import numpy as np
import pytest

from copa_harness.optimize.dspy_optimizers.knn import TextVectors


def test_vectors_need_no_model_and_put_near_rows_first():
    texts = ["size: 1 | weight: 100", "size: 9 | weight: 100", "size: 5 | weight: 900"]
    vectors = TextVectors(texts)
    rows, query = vectors(texts), vectors(["size: 8.5 | weight: 150"])
    assert int(np.argmax(rows @ query[0])) == 1


def test_vectors_of_words_come_from_their_letters():
    texts = ["the parcel is late", "the refund is missing", "cannot log in"]
    vectors = TextVectors(texts)
    rows, query = vectors(texts), vectors(["my parcel came late"])
    assert int(np.argmax(rows @ query[0])) == 0


def test_a_stage_whose_inputs_no_example_holds_is_shown_the_programs_own_runs(stages):
    program = stages.compiled("knn_fewshot")
    assert program.copa_result.score_after > program.copa_result.score_before
    assert any(len(request.messages) > 2 for request in stages.tell_lm.requests)
    assert "16 bootstrapped" not in program.copa_result.notes[0]
    assert program.copa_result.notes[0].startswith("knn_fewshot: k=9, own vectors, 9 bootstrapped")


def test_an_answer_costs_one_call_of_each_stage(stages):
    program = stages.compiled("knn_fewshot")
    before = stages.look_lm.calls, stages.tell_lm.calls
    program(size="4.44", weight="3.33")
    assert (stages.look_lm.calls, stages.tell_lm.calls) == (before[0] + 1, before[1] + 1)


def test_an_example_is_not_shown_its_own_answer(stages):
    student = stages.program()
    program = stages.compiled("knn_fewshot", student=student)
    from_training = next(iter(program._copa_neighbours.knn.trainset))
    program(**from_training.inputs())
    asked = stages.look_lm.requests[-1].messages
    size = from_training.size
    shown = [m["content"] for m in asked[:-1] if f"## size ## ]]\n{size}\n" in m["content"]]
    assert len(asked) > 2
    assert shown == []


def test_without_calls_for_the_training_examples_labels_are_shown_and_that_is_said(stages):
    program = stages.compiled("knn_fewshot", budget=70, n_train=30)
    assert program.copa_result.charged_calls <= 70
    (note, *_) = program.copa_result.notes
    assert note.endswith("0 bootstrapped (running the 30 training examples is not affordable)")


@pytest.mark.parametrize("strategy", ["knn_fewshot -> w", "knn_fewshot -> bootstrap_finetune"])
def test_weights_can_be_trained_on_what_it_answers(stages, strategy):
    program = stages.compiled(strategy, budget=300, n_val=16)
    assert stages.tell_lm.provider.trained
    assert program.copa_result.score_after > program.copa_result.score_before


def test_the_trace_names_the_programs_own_predictors(stages):
    program = stages.compiled("knn_fewshot")
    with dspy.context(trace=[]):
        program(size="4.44", weight="3.33")
        traced = [id(step[0]) for step in dspy.settings.trace]
    assert traced == [id(program.look), id(program.tell)]
