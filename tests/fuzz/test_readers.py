"""Every reader of a file against bytes that a fuzzer makes of a sound one: read, or one clear error of ours.

pytest tests/fuzz/test_readers.py                              a few hundred mutants of each file
python tests/fuzz/test_readers.py baseline corpus/             with atheris, guided by coverage, until it is ended
    -max_total_time=600                                        (any option of libFuzzer; pip install atheris)
"""

import gc
import json
import random
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from types import FunctionType

import pytest

from copa_harness.documents import from_json, parse_json, to_json
from copa_harness.errors import ArtifactError, CacheError, ConfigurationError
from copa_harness.lm.cache.answers import decode_answer, encode_answer
from copa_harness.lm.cache.store import CacheWarning
from copa_harness.lm.local.sources.gguf import check_gguf
from copa_harness.report.history import compare_reports, read_report, report_text
from copa_harness.results import Interval
from copa_harness.store.artifacts import load_artifact, save_artifact
from copa_harness.store.baselines import Baseline, diff_baselines, read_baseline, save_baseline
from copa_harness.store.stages import StageStore
from copa_harness.strategy import parse_strategy

BASELINE = Baseline(
    task="t",
    name="p",
    split="test",
    lm="m",
    score=0.5,
    interval=Interval(0.1, 0.9, 0.95, "wilson"),
    scores={"a": 1.0, "b": 0.0},
    outcomes={"b": "unparsed"},
    fingerprints={"data": "d", "split": "s", "metric": "m"},
    repeats={"a": (1.0, None)},
    requests={"a": "0123"},
)

KEY = "ab" * 32


@cache
def folder():
    return Path(tempfile.mkdtemp(prefix="copa-readers-"))


def baseline(data):
    path = folder() / "baseline.json"
    path.write_bytes(data)
    read = read_baseline(path)
    diff_baselines(BASELINE, read).text()
    save_baseline(folder() / "again", read)


def report(data):
    path = folder() / "latest.json"
    path.write_bytes(data)
    read = read_report(path)
    report_text(read)
    compare_reports(read, read)


def stage(data):
    store = StageStore(folder() / "stages")
    path = store.path("k")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    store.get("k")


def artifact(data):
    place = folder() / "artifact"
    if not place.exists():
        save_artifact(place, program_state={"p": {}}, lora_directory=None, manifest={"task": "t"})
    (place / "manifest.json").write_bytes(data)
    load_artifact(place)


def journal(data):
    import optuna

    from copa_harness.optimize.search.journal import open_journal

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place = folder() / "studies"
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    (place / "j.jsonl").write_bytes(data)
    storage = open_journal(place / "j.jsonl")
    for study in storage.get_all_studies():
        storage.get_all_trials(study._study_id)


def answer(data):
    decode_answer(KEY, data)


def gguf(data):
    path = folder() / "model.gguf"
    path.write_bytes(data)
    check_gguf(path)


def strategy(data):
    parse_strategy(data.decode("utf-8", "surrogateescape"))


def document(data):
    from_json(Baseline, parse_json(data))


def sound(name):
    """Bytes that the reader reads, as its writer wrote them."""
    if name == "document":
        return json.dumps(to_json(BASELINE)).encode()
    if name == "baseline":
        return save_baseline(folder() / "sound", BASELINE).read_bytes()
    if name == "report":
        from copa_harness.report.files import write_reports
        from tests.cli.test_reports import FULL

        write_reports(folder() / "sound", [FULL], environment={"seed": 1})
        return (folder() / "sound" / "latest.json").read_bytes()
    if name == "stage":
        store = StageStore(folder() / "stages")
        store.put("k", {"result": {"a": [1, {"b": None}]}})
        return store.path("k").read_bytes()
    if name == "artifact":
        place = save_artifact(folder() / "a", program_state={"p": {}}, lora_directory=None, manifest={"task": "t"})
        return (place / "manifest.json").read_bytes()
    if name == "journal":
        from copa_harness.optimize.search.journal import Journal

        made = Journal(folder() / "sound.jsonl")
        made.study("s", attributes={"a": 1})
        return (folder() / "sound.jsonl").read_bytes()
    if name == "answer":
        return encode_answer(KEY, {"a": [1, "x"]})
    if name == "gguf":
        import numpy
        from gguf import GGUFWriter

        writer = GGUFWriter(folder() / "sound.gguf", "llama")
        writer.add_block_count(1)
        writer.add_token_list(["a", "b"])
        writer.add_tensor("token_embd.weight", numpy.zeros((2, 32), dtype=numpy.float32))
        for step in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
            writer.close,
        ):
            step()
        return (folder() / "sound.gguf").read_bytes()
    return b"w -> p -> MIPROv2"


READERS = {
    "baseline": (baseline, ArtifactError),
    "report": (report, ArtifactError),
    "stage": (stage, ()),
    "artifact": (artifact, ArtifactError),
    "journal": (journal, CacheError),
    "answer": (answer, ValueError),
    "gguf": (gguf, ConfigurationError),
    "strategy": (strategy, ConfigurationError),
    "document": (document, ValueError),
}


def read(name, data):
    """Use a reader on bytes; what it may not raise goes through."""
    reader, refusals = READERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            reader(data)
        except refusals as error:
            str(error).encode()


def mutant(data, chance):
    """Some bytes changed, put in, repeated or left out; of numbers and words sometimes others."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at, to = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        how = chance.randrange(7)
        if how == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            data[at:at] = chance.choice(
                (b"\xff", b"\0", b"[", b"{", b'"', b"-", b"9" * 30, b"1e999", b"null", b"NaN", b"\\ud83d")
            )
        elif how == 2:
            del data[at : min(to, at + 20)]
        elif how == 3:
            data[at:at] = data[at : min(to, at + 50)] * chance.choice((1, 2, 100))
        elif how == 4:
            del data[at:]
        elif how == 5 and at < len(data):
            data[at] = chance.randrange(256)
        else:
            words = json.dumps(chance.choice((None, True, -1, 0.5, [], {}, "x"))).encode()
            data[at : min(to, at + 6)] = words
        data = data or bytearray(b"x")
    return bytes(data)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_reads_or_refuses_what_a_fuzzer_makes(name):
    whole, chance = sound(name), random.Random(7)
    READERS[name][0](whole)
    for _ in range(30 if name == "journal" else 300):
        read(name, mutant(whole, chance))


def test_no_flipped_byte_changes_a_number_that_is_read():
    chance, n_read, n_refused = random.Random(5), 0, 0
    program = folder() / "a" / "program.json"
    sound("artifact")
    cases = {
        "baseline": (sound("baseline"), lambda: (lambda b: (b.score, sorted(b.scores.values())))(read_baseline(path))),
        "stage": (sound("stage"), lambda: StageStore(folder() / "stages").get("k")),
        "answer": (sound("answer"), lambda: decode_answer(KEY, path.read_bytes())),
        "program": (program.read_bytes(), lambda: load_artifact(program.parent).program_state),
    }
    for name, (whole, value) in cases.items():
        path = {"stage": StageStore(folder() / "stages").path("k"), "program": program}.get(name, folder() / name)
        path.write_bytes(whole)
        expected = value()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ chance.randrange(1, 256)]) + whole[at + 1 :])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                try:
                    got = value()
                except (ArtifactError, ValueError):
                    got = None
            assert got in (None, expected), (name, at, path.read_bytes()[max(0, at - 20) : at + 20])
            n_read, n_refused = n_read + 1, n_refused + (got is None)
        path.write_bytes(whole)
    assert n_refused > n_read / 3 > 100


def main():
    import atheris

    name = sys.argv.pop(1)
    corpus = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("-")))
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "sound").write_bytes(sound(name))
    for found in gc.get_objects():  # of the package alone: all that DSPy loads would take minutes
        if isinstance(found, FunctionType) and str(found.__module__).startswith("copa_harness"):
            atheris.instrument_func(found)
    atheris.Setup(sys.argv, lambda data: read(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
