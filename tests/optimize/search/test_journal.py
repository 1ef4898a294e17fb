"""The journal of an optimization: lines of JSON that Optuna reads, and that a repeated run agrees with."""

import json
import multiprocessing
import os
import pickle
import signal
import warnings

import optuna
import pytest

from copa_harness import COPA
from copa_harness.errors import CacheError, ConfigurationError
from copa_harness.lm.cache.store import CacheWarning, ResponseCache
from copa_harness.lm.gateway import Gateway
from copa_harness.optimize.search.journal import Journal, SharedJournal, exclusive_journal, open_journal


def optimized(toy, path, *, lm=None, **settings):
    settings = {"strategy": "p", "budget": 150, "n_demo_sets": 4, "n_rounds": 1, **settings}
    optimizer = COPA(metric=toy.metric, lm=lm or toy.lm(), journal=path, **settings)
    return optimizer.compile(toy.program(), trainset=toy.train, valset=toy.val).copa_result


def studies(path):
    with optuna_quiet():
        return optuna.get_all_study_summaries(open_journal(path))


class optuna_quiet:
    def __enter__(self):
        optuna.logging.set_verbosity(optuna.logging.ERROR)

    def __exit__(self, *error):
        optuna.logging.set_verbosity(optuna.logging.INFO)


def trials(path, name="step 1: p"):
    with optuna_quiet():
        return optuna.load_study(study_name=name, storage=open_journal(path)).get_trials()


def test_optuna_opens_it_with_readable_parameters_scores_and_attributes(toy, tmp_path):
    path = tmp_path / "studies" / "journal.jsonl"
    result = optimized(toy, path)
    found = trials(path)
    assert len(found) == result.n_trials
    assert {"self.demos", "self.instruction"} == set(found[0].params)
    assert any(trial.params["self.instruction"] == "rule" for trial in found)
    assert max(trial.value for trial in found if trial.user_attrs["outcome"] == "complete") == result.score_after
    complete = next(trial for trial in found if trial.user_attrs["outcome"] == "complete")
    assert len(complete.intermediate_values) == len(toy.val)
    study = studies(path)[0]
    assert study.user_attrs["strategy"] == "p"


def test_optunas_own_loader_reads_it_as_the_dashboard_does(toy, tmp_path):
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = tmp_path / "journal.jsonl"
    result = optimized(toy, path)
    content = path.read_bytes()
    with optuna_quiet():
        study = optuna.load_study(study_name="step 1: p", storage=JournalStorage(JournalFileBackend(str(path))))
        importances = optuna.importance.get_param_importances(study)
    assert set(importances) == {"self.demos", "self.instruction"}
    names = {name for trial in study.trials for name in trial.params.values()}
    assert all(len(name) < 40 for name in names)
    assert study.user_attrs["self.instruction = plain"] == "Tell the kind from the sizes."
    assert "If size is" in study.user_attrs["self.instruction = rule"]
    for trial in study.trials:
        last = trial.intermediate_values[max(trial.intermediate_values)]
        assert last == pytest.approx(trial.user_attrs["score"], abs=1e-3)
    assert study.best_value == result.score_after
    assert path.read_bytes() == content


def test_every_line_is_json_and_none_of_it_is_a_pickle(toy, tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("a pickle was read"))
    monkeypatch.setattr(pickle, "dumps", lambda *_, **__: pytest.fail("a pickle was written"))
    result = optimized(toy, path)
    monkeypatch.undo()
    lines = path.read_text().splitlines()
    assert len(lines) >= result.n_trials
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_the_same_optimization_again_adds_nothing(toy, tmp_path):
    path, lm = tmp_path / "journal.jsonl", toy.lm()
    first = optimized(toy, path, lm=lm)
    content = path.read_bytes()
    second = optimized(toy, path, lm=lm)
    assert path.read_bytes() == content
    assert (second.score_after, second.state, second.n_trials) == (first.score_after, first.state, first.n_trials)


def _killed_run(toy_answers, toy, path, cache, n_calls):
    calls = 0

    def answers(messages, model):
        nonlocal calls
        calls += 1
        if calls > n_calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return toy_answers(messages, model)

    optimized(toy, path, lm=_lm(answers, cache))


def _lm(answers, cache):
    from copa_harness.lm.scripted import ScriptedLM

    return ScriptedLM(answers, fingerprint=lambda model: f"toy:{model}", gateway=Gateway(cache=ResponseCache(cache)))


def _answers(messages, model):
    from tests.optimize.conftest import answer_of

    return {"kind": answer_of(messages, model)}


def test_a_killed_run_goes_on_in_its_journal_to_the_numbers_of_one_that_was_not(toy, tmp_path):
    path, cache = tmp_path / "journal.jsonl", tmp_path / "responses"
    process = multiprocessing.get_context("fork").Process(target=_killed_run, args=(_answers, toy, path, cache, 70))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    n_before = len(trials(path))
    resumed = optimized(toy, path, lm=_lm(_answers, cache))
    whole = optimized(toy, tmp_path / "whole.jsonl", lm=_lm(_answers, tmp_path / "other"))
    assert 0 < n_before < resumed.n_trials
    assert (resumed.score_after, resumed.state, resumed.charged_calls) == (
        whole.score_after,
        whole.state,
        whole.charged_calls,
    )
    ours, theirs = trials(path), trials(tmp_path / "whole.jsonl")
    assert [(t.params, t.value) for t in ours] == [(t.params, t.value) for t in theirs]
    assert all(trial.state.is_finished() for trial in ours)
    assert resumed.usage.paid_calls < whole.usage.paid_calls


def test_half_a_line_is_cut_off(toy, tmp_path):
    path, lm = tmp_path / "journal.jsonl", toy.lm()
    optimized(toy, path, lm=lm)
    content = path.read_bytes()
    path.write_bytes(content + b'{"op_code": 4, "wor')
    optimized(toy, path, lm=lm)
    assert path.read_bytes() == content


def _damaged(path):
    path.write_bytes(path.read_bytes()[:500] + b"garbage{{\n")
    return path.read_bytes()


def test_a_damaged_journal_is_moved_aside_and_the_run_ends_as_ever(toy, tmp_path):
    path, lm = tmp_path / "journal.jsonl", toy.lm()
    first = optimized(toy, path, lm=lm)
    for aside in ("journal.jsonl.damaged", "journal.jsonl.damaged-2"):
        damaged = _damaged(path)
        with pytest.warns(CacheWarning, match=f"is damaged .* moved to {aside} and a new one is begun") as told:
            again = optimized(toy, path, lm=lm)
        assert (again.score_after, again.n_trials) == (first.score_after, first.n_trials)
        assert (tmp_path / aside).read_bytes() == damaged
        assert len(trials(path)) == first.n_trials
        assert len([one for one in told if issubclass(one.category, CacheWarning)]) == 1


def test_where_warnings_are_errors_damage_ends_no_run_either(tmp_path, caplog):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"op_code":0,garbage\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert studies(path) == []
    assert "moved to journal.jsonl.damaged" in caplog.text


def test_whole_lines_that_tell_of_studies_which_are_not_there_are_damage_too(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"op_code":4,"worker_id":"w"}\n')
    with pytest.warns(CacheWarning, match=r"moved to journal\.jsonl\.damaged"):
        assert studies(path) == []
    assert (tmp_path / "journal.jsonl.damaged").exists()


def test_damage_done_while_it_is_being_written_is_told_in_our_words(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    with optuna_quiet():
        study = journal.study("p")
    path.write_bytes(path.read_bytes() + b"garbage{{\n" * 2)
    with pytest.raises(CacheError, match=r"was damaged while it was being written .* run again"):
        study.add(0, params={"a": "b"}, options={"a": ["b"]}, value=1.0, scores=[1.0], attributes={})


def test_a_journal_that_tells_another_story_is_kept_and_a_new_study_begun(toy, tmp_path, caplog):
    path = tmp_path / "journal.jsonl"
    optimized(toy, path)
    other = optimized(toy, path, seed=1)
    assert "is not the one that was taken now" in caplog.text
    assert {study.study_name for study in studies(path)} == {"step 1: p", "step 1: p, again 2"}
    assert len(trials(path, "step 1: p, again 2")) == other.n_trials


def test_something_else_in_its_place_is_refused(toy, tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text("this is\nno journal\n")
    with pytest.raises(CacheError, match="delete it, or name another file"):
        optimized(toy, path)


def test_a_journal_that_another_optimization_is_writing_is_refused(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("copa_harness.optimize.search.journal.ENTER_S", 0.1)
    path = tmp_path / "journal.jsonl"
    with exclusive_journal(path, attributes={}), pytest.raises(ConfigurationError, match="another process is writing"):
        optimized(toy, path)


@pytest.fixture
def database(postgres):
    from copa_harness.shared.database import SharedDatabase

    opened = SharedDatabase(postgres.database("journal"))
    yield opened
    opened.close()


def test_a_journal_in_a_database_has_the_lines_of_the_file_and_a_repeated_run_adds_none(toy, tmp_path, database):
    cache = Gateway(cache=ResponseCache(tmp_path / "responses"))
    optimized(toy, tmp_path / "journal.jsonl", lm=toy.lm(gateway=cache))
    for _ in range(2):
        optimized(toy, SharedJournal(database, "toy"), lm=toy.lm(gateway=cache))
        rows = database.get_all("study toy")
        (tmp_path / "copy.jsonl").write_bytes(b"\n".join(rows) + b"\n")
        pairs = list(zip(trials(tmp_path / "copy.jsonl"), trials(tmp_path / "journal.jsonl"), strict=True))
        assert pairs
        assert all((one.params, one.value) == (other.params, other.value) for one, other in pairs)
        assert len(rows) == len((tmp_path / "journal.jsonl").read_bytes().splitlines())


def test_a_damaged_journal_in_a_database_is_begun_anew_with_a_warning(database):
    SharedJournal(database, "toy").study("step")
    database.put("study toy", "00000000", b'{"op_code": 77}')
    with pytest.warns(CacheWarning, match="a new one is begun"):
        SharedJournal(database, "toy")
    assert database.get_all("study toy") == []
