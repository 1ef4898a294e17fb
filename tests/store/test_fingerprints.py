import functools
import importlib.util
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copa_harness.documents import hash_json
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
    dspy = pytest.importorskip("dspy")
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
