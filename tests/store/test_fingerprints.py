"""Fingerprints: equal content gives equal ones in every process; whatever a metric or program reaches is in them."""

import functools
import importlib
import importlib.util
import linecache
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Literal

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copa_harness.documents import hash_json
from copa_harness.errors import ConfigurationError
from copa_harness.store.fingerprints import hash_examples, hash_source

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


class Row:
    def __init__(self, inputs, **values):
        self._values, self._input_keys = values, inputs

    def toDict(self):
        return dict(self._values)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=5))
def test_the_order_of_keys_does_not_matter(mapping):
    assert hash_json(mapping) == hash_json(dict(reversed(mapping.items())))


@given(json_values, json_values)
def test_equal_hashes_mean_equal_content(one, other):
    if hash_json(one) == hash_json(other):
        assert one == other or (one in (0, -0.0) and other in (0, -0.0))


def test_a_value_known_only_by_its_address_is_refused():
    with pytest.raises(TypeError, match="memory address"):
        hash_json({"x": object()})


def test_examples_differ_by_values_order_and_declared_inputs():
    one, two = Row({"q"}, q="a", y=1), Row({"q"}, q="b", y=1)
    assert hash_examples([one, two]) == hash_examples([one, two])
    assert hash_examples([one, two]) != hash_examples([two, one])
    assert hash_examples([one]) != hash_examples([Row({"q", "y"}, q="a", y=1)])
    assert hash_examples([one]) != hash_examples([Row({"q"}, q="a", y=2)])


def test_dspys_private_keys_do_not_count():
    assert hash_examples([Row({"q"}, q="a", dspy_uuid="1")]) == hash_examples([Row({"q"}, q="a", dspy_uuid="2")])


def test_dspy_examples_are_understood():
    examples = [dspy.Example(q="a", y=1).with_inputs("q")]
    assert hash_examples(examples) == hash_examples([Row({"q"}, q="a", y=1)])


def module(tmp_path, source, name="metric_module"):
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


METRIC = """
LIMIT = {limit}

def helper(text):
    return text.{method}()

class Judge:
    def __call__(self, a, b):
        return helper(a) == helper(b)

def metric(example, prediction, trace=None):
    return float(helper(example) == helper(prediction)) * LIMIT
"""


def variant(tmp_path, number, *, limit=1, method="lower"):
    folder = tmp_path / str(number)
    folder.mkdir()
    return module(folder, METRIC.format(limit=limit, method=method))


def test_a_metric_changes_with_its_helper_and_its_constants(tmp_path):
    base = variant(tmp_path, 1)
    same = variant(tmp_path, 2)
    helper = variant(tmp_path, 3, method="upper")
    limit = variant(tmp_path, 4, limit=2)
    assert hash_source(base.metric) == hash_source(same.metric)
    assert len({hash_source(m.metric) for m in (base, helper, limit)}) == 3


def test_a_callable_object_changes_with_what_its_class_mentions(tmp_path):
    base, helper = variant(tmp_path, 1), variant(tmp_path, 2, method="upper")
    assert hash_source(base.Judge()) == hash_source(base.Judge())
    assert hash_source(base.Judge()) != hash_source(helper.Judge())


def make(threshold):
    def metric(example, prediction):
        return prediction > threshold

    return metric


def test_a_closure_changes_with_what_it_closes_over():
    assert hash_source(make(1)) == hash_source(make(1))
    assert hash_source(make(1)) != hash_source(make(2))


def test_a_partial_changes_with_its_arguments():
    assert hash_source(functools.partial(make, 1)) == hash_source(functools.partial(make, 1))
    assert hash_source(functools.partial(make, 1)) != hash_source(functools.partial(make, 2))
    assert hash_source(functools.partial(make, threshold=1)) != hash_source(functools.partial(make, threshold=2))


def doubled(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return 2 * function(*arguments)

    return wrapper


def tripled(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return 3 * function(*arguments)

    return wrapper


def test_a_decorated_function_is_told_from_the_plain_one_and_from_another_decoration():
    def plain(x):
        return x

    assert len({hash_source(f) for f in (plain, doubled(plain), tripled(plain))}) == 3


def test_two_lambdas_on_one_line_are_told_apart():
    one, other = (lambda x: x + 1), (lambda x: x + 2)
    assert hash_source(one) != hash_source(other)


class Threshold:
    def __init__(self, limit):
        self.limit = limit

    def check(self, value):
        return value > self.limit


def test_a_bound_method_changes_with_the_state_of_its_object():
    assert hash_source(Threshold(1).check) == hash_source(Threshold(1).check)
    assert hash_source(Threshold(1).check) != hash_source(Threshold(2).check)


def test_a_function_without_source_falls_back_to_its_bytecode():
    def compiled(body):
        space = {"__name__": "nowhere"}
        exec(f"def f(x):\n    return {body}", space)
        return space["f"]

    assert hash_source(compiled("x + 1")) == hash_source(compiled("x + 1"))
    assert hash_source(compiled("x + 1")) != hash_source(compiled("x + 2"))


def test_functions_that_mention_each_other_end():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    assert hash_source(even) != hash_source(odd)


def test_builtins_go_by_name():
    assert hash_source(len) != hash_source(max)


def test_another_process_computes_the_same_hash(tmp_path):
    variant(tmp_path, 1)
    source = str(tmp_path / "1" / "metric_module.py")
    program = (
        "import importlib.util, sys\n"
        "from copa_harness.documents import hash_json; from copa_harness.store.fingerprints import hash_source\n"
        f"spec = importlib.util.spec_from_file_location('metric_module', {source!r})\n"
        "m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "print(hash_source(m.metric), hash_json({'a': {'x', 'y', 'z'}}))"
    )

    def answer(seed):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
        ).stdout

    assert answer("1") == answer("2")


# -- what a metric can reach


def project(tmp_path, files, name="metric_module"):
    """The module `name` of a project of the user's, loaded from these files in a process of this moment."""
    names = [Path(file).stem for file in files]
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    for file, source in files.items():
        (folder / file).write_text(textwrap.dedent(source))
    kept = {one: sys.modules.pop(one, None) for one in names}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    linecache.clearcache()
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for one, module_ in kept.items():
            sys.modules.pop(one, None)
            if module_ is not None:
                sys.modules[one] = module_


REACHED = {
    "a global mapping": ("WEIGHTS = {{'hit': {x}, 'miss': [0.0]}}", "WEIGHTS['hit']", (1.0, 0.5)),
    "a list in a global mapping": ("WEIGHTS = {{'hit': [1.0, {x}]}}", "WEIGHTS['hit'][1]", (1.0, 0.5)),
    "a global set of pairs": ("WEIGHTS = {{('a', {x}), ('b', 2)}}", "len(WEIGHTS)", (1.0, 0.5)),
    "an attribute of a global object": (
        "from types import SimpleNamespace\nCONFIG = SimpleNamespace(hit={x})",
        "CONFIG.hit",
        (1.0, 0.5),
    ),
    "an attribute of a global object of a class of one's own": (
        "class Config:\n    def __init__(self, hit):\n        self.hit = hit\nCONFIG = Config({x})",
        "CONFIG.hit",
        (1.0, 0.5),
    ),
    "an attribute in a slot": (
        "class Config:\n    __slots__ = ('hit', 'unset')\n    def __init__(self, hit):\n        self.hit = hit\n"
        "CONFIG = Config({x})",
        "CONFIG.hit",
        (1.0, 0.5),
    ),
    "a judge in slots": (
        "class Judge:\n    __slots__ = ('hit',)\n    def __init__(self, hit):\n        self.hit = hit\n"
        "    def __call__(self):\n        return self.hit\nJUDGE = Judge({x})",
        "JUDGE()",
        (1.0, 0.5),
    ),
    "functions in a list": (
        "def one():\n    return {x}\nCHECKS = [one]",
        "CHECKS[0]()",
        (1.0, 0.5),
    ),
    "what a static method mentions": (
        "HIT = {{'x': {x}}}\nclass Judge:\n    @staticmethod\n    def hit():\n        return HIT['x']",
        "Judge.hit()",
        (1.0, 0.5),
    ),
    "what a property mentions": (
        "HIT = [{x}]\nclass Judge:\n    @property\n    def hit(self):\n        return HIT[0]",
        "Judge().hit",
        (1.0, 0.5),
    ),
    "a cached helper": (
        "import functools\n@functools.lru_cache\ndef hit():\n    return {x}",
        "hit()",
        (1.0, 0.5),
    ),
    "a dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass Config:\n    hit: float = 1.0\nCONFIG = Config({x})",
        "CONFIG.hit",
        (1.0, 0.5),
    ),
    "a judge's instructions": (
        "import dspy\nJUDGE = dspy.Predict(dspy.Signature('answer -> good: bool', {x!r}))",
        "JUDGE(answer=1).good",
        ("Be kind.", "Be strict."),
    ),
    "the values a judge may give": (
        "import dspy\nfrom typing import Literal\nclass Judged(dspy.Signature):\n    answer: str = dspy.InputField()\n"
        "    good: Literal['yes', {x!r}] = dspy.OutputField()\nJUDGE = dspy.ChainOfThought(Judged)",
        "JUDGE(answer=1).good",
        ("no", "maybe"),
    ),
    "a judge's demonstrations": (
        "import dspy\nJUDGE = dspy.Predict('answer -> good')\nJUDGE.demos = [dspy.Example(answer='a', good={x!r})]",
        "JUDGE(answer=1).good",
        ("yes", "no"),
    ),
    "the temperature of a judge's model": (
        "import dspy\nJUDGE = dspy.Predict('answer -> good')\nJUDGE.lm = dspy.LM('openai/m', temperature={x})",
        "JUDGE(answer=1).good",
        (0.0, 1.0),
    ),
    "an array": ("import numpy\nHIT = numpy.arange(20_000) * {x}", "HIT[3]", (1, 2)),
    "a list of a class of one's own": (
        "class Hits(list):\n    def first(self):\n        return self[0] * {x}\nHITS = Hits([1])",
        "HITS.first()",
        (1.0, 0.5),
    ),
}


@pytest.mark.parametrize("place", REACHED)
def test_a_metric_changes_with_whatever_it_reaches(tmp_path, place):
    above, used, values = REACHED[place]

    def loaded(value):
        source = above.format(x=value) + f"\n\ndef metric(example, prediction, trace=None):\n    return {used}\n"
        return project(tmp_path, {"metric_module.py": source}).metric

    assert hash_source(loaded(values[0])) == hash_source(loaded(values[0]))
    assert hash_source(loaded(values[0])) != hash_source(loaded(values[1]))


@pytest.mark.parametrize(
    "imported",
    [
        ("from helpers import hit", "hit()"),
        ("import helpers", "helpers.hit()"),
        ("import helpers as h", "getattr(h, 'hi' + 't')()"),
        ("from helpers import HITS", "HITS['x']"),
        ("from helpers import Judge", "Judge().hit()"),
        ("from helpers import Base\nclass Judge(Base):\n    pass", "Judge().hit()"),
        ("from middle import hit", "hit()"),
        ("from helpers import hit as first\ndef hit():\n    return first()", "hit()"),
    ],
    ids=lambda imported: imported[0].partition("\n")[0] + " / " + imported[1],
)
def test_a_metric_changes_with_helpers_in_other_modules_of_the_project(tmp_path, imported):
    helpers = (
        "HITS = {{'x': {x}}}\n\ndef hit():\n    return HITS['x']\n\nclass Base:\n    def hit(self):\n"
        "        return hit()\n\nclass Judge(Base):\n    pass\n"
    )
    above, used = imported

    def loaded(value, more=""):
        return project(
            tmp_path,
            {
                "helpers.py": helpers.format(x=value) + more,
                "middle.py": "import helpers\n\ndef hit():\n    return helpers.hit()\n",
                "metric_module.py": f"{above}\n\ndef metric(example, prediction, trace=None):\n    return {used}\n",
            },
        ).metric

    assert hash_source(loaded(1.0)) == hash_source(loaded(1.0))
    assert hash_source(loaded(1.0)) != hash_source(loaded(0.5))
    if "getattr" not in used:
        assert hash_source(loaded(1.0)) == hash_source(loaded(1.0, more="\n\ndef another():\n    return 3\n"))


@pytest.mark.parametrize(
    "above",
    [
        "import threading\nHELD = threading.Lock()",
        "import logging\nHELD = logging.getLogger('judge')",
        "import numpy\nHELD = numpy.random.default_rng",
        "import json as HELD",
        "import types\nHELD = types.MappingProxyType({'a': 1})",
        "_CACHE = {'a': object()}\nHELD = 1",
        "import dspy\nHELD = dspy.LM('openai/m', api_key='sk-0123456789abcdef0123')",
        "import dspy\nHELD = dspy.ChatAdapter()",
        "import datetime, decimal\nHELD = [datetime.date(2026, 1, 1), decimal.Decimal('1.5'), b'bytes', range(3), ...]",
        "import enum\nclass HELD(enum.Enum):\n    A = 1",
        "import typing\nHELD = typing.Literal['a', 'b'] | None",
        "import re\nHELD = re.compile('a')",
        "class Loop:\n    pass\nHELD = Loop()\nHELD.held = [HELD]",
    ],
)
def test_what_has_no_content_or_goes_in_circles_is_no_trouble(tmp_path, above):
    used = "HELD, _CACHE" if "_CACHE" in above else "HELD"
    source = f"{above}\n\ndef metric(example, prediction, trace=None):\n    return {used}\n"
    one, other = (project(tmp_path, {"metric_module.py": source}).metric for _ in range(2))
    assert hash_source(one) == hash_source(other)


def test_what_nobody_can_tell_apart_is_refused_with_its_place_and_a_remedy(tmp_path):
    source = """
        import sqlite3
        class Judge:
            def __init__(self):
                self.known = [sqlite3.connect(":memory:")]
        JUDGE = Judge()
        def metric(example, prediction, trace=None):
            return JUDGE.known
    """
    with pytest.raises(
        ConfigurationError, match=r"metric > JUDGE > known > 0 is a sqlite3.Connection.*inside the func"
    ):
        hash_source(project(tmp_path, {"metric_module.py": source}).metric)


def test_a_program_changes_with_its_attributes_and_the_types_of_its_fields_and_not_with_its_models(tmp_path):
    def program(*, limit=1, values=("yes", "no"), lm=None, note="as written"):
        class Sort(dspy.Signature):
            text: str = dspy.InputField()
            kind: Literal[values] = dspy.OutputField()

        class Sorter(dspy.Module):
            def __init__(self):
                super().__init__()
                self.limit, self.options = limit, {"note": [note]}
                self.sort = dspy.Predict(Sort)

        built = Sorter()
        built.sort.lm = lm
        return built

    base = hash_source(program(), models=False)
    assert base == hash_source(program(), models=False)
    assert base == hash_source(program(lm=dspy.LM("openai/m")), models=False)
    assert base == hash_source(program().deepcopy(), models=False)
    compiled = program()
    compiled._compiled, compiled.copa_result = True, object()
    assert base == hash_source(compiled, models=False)
    others = [program(limit=2), program(values=("yes", "never")), program(note="otherwise")]
    demos = program()
    demos.sort.demos = [dspy.Example(text="a", kind="yes")]
    told = program()
    told.sort.signature = told.sort.signature.with_instructions("Be quick.")
    assert len({base, *(hash_source(one, models=False) for one in (*others, demos, told))}) == 6


def test_the_fingerprint_does_not_depend_on_the_hash_seed(tmp_path):
    source = """
        LABELS = {"red", "green", "blue", ("a", 1), ("b", 2), None}
        metric = (lambda e, p: p in {"red", "green", "blue", "yellow", "black"}) or (lambda e, p: 1)
        def judged(e, p):
            return p in {"red", "green", "blue", "yellow", "black"} and p in LABELS
        space = {"__name__": "nowhere"}
        exec("def compiled(e, p):\\n    return p in {'red', 'green', 'blue', 'yellow', 'black', 'white'}", space)
        compiled = space["compiled"]
    """
    (tmp_path / "metric_module.py").write_text(textwrap.dedent(source))
    program = (
        "import metric_module as m; from copa_harness.store.fingerprints import hash_source\n"
        "print(hash_source(m.metric), hash_source(m.judged), hash_source(m.compiled))"
    )

    def answer(seed):
        path = os.pathsep.join([str(tmp_path), *sys.path])
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": path}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    assert len({answer(seed) for seed in range(1, 5)}) == 1


def test_a_program_changes_with_the_functions_of_its_tools():
    def acting(step):
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b + step

        return dspy.ReAct("question -> answer", tools=[add])

    assert hash_source(acting(0), models=False) == hash_source(acting(0), models=False)
    assert hash_source(acting(0), models=False) != hash_source(acting(1), models=False)
