"""An option is written once: a field added to a copy of its dataclass is found in every place that is derived."""

from dataclasses import make_dataclass

import pytest

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import copa_harness.pytest_options
import copa_harness.session.options
from copa_harness.errors import ConfigurationError
from copa_harness.judge.options import Gates
from copa_harness.optimize import COPA
from copa_harness.optimize import copa as copa_module
from copa_harness.optimize.options import SearchOptions
from copa_harness.option_fields import COUNT, SWITCH, Place, default_of, markdown_table, option, options_of, with_tables
from copa_harness.pytest_options import guides_below, rewrite_tables
from copa_harness.session import CopaSession
from copa_harness.session.options import OPTION_KINDS, Settings
from copa_harness.tune import options as lora_module
from copa_harness.tune.options import LoraSettings

STRICT = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

PYTHON_ONLY = Place(0)

HELP = "wishes granted along the way"

ROW = "| `{name}` | 3 | a whole number, 0 or more | wishes granted along the way |"

PROBE = """
import pytest

@pytest.fixture
def copa_task():
    return None

@pytest.mark.copa({marker})
def test_it(request):
    from copa_harness.fixtures import TEST_SETTINGS
    settings = request.node.stash[TEST_SETTINGS]
    print("got", {{**settings.gates, **settings.search}}.get("n_wishes", getattr(settings, "n_wishes", None)))
"""


@pytest.fixture
def with_one_more(monkeypatch):
    """Puts a copy of a dataclass with the option `n_wishes` in its place."""

    def put(kind, places=PYTHON_ONLY, **more):
        wish = option(3, check=COUNT, help=HELP, places=places, **more)
        copy = make_dataclass(kind.__name__, [("n_wishes", int, wish)], bases=(kind,), frozen=True, slots=True)
        monkeypatch.setitem(OPTION_KINDS, kind.__name__, copy)
        for module in (copa_harness.pytest_options, copa_harness.session.options, copa_module, lora_module):
            if getattr(module, kind.__name__, None) is kind:
                monkeypatch.setattr(module, kind.__name__, copy)
        return copy

    return put


@pytest.fixture
def got(pytester, monkeypatch):
    """What a test sees of `n_wishes`, or the errors of the run."""

    def run(*arguments, marker="", environment=None, ini=None):
        pytester.makepyfile(PROBE.format(marker=marker))
        pytester.makeini("[pytest]\n" + (f"copa_n_wishes = {ini}\n" if ini is not None else ""))
        with monkeypatch.context() as patch:
            if environment is not None:
                patch.setenv("COPA_N_WISHES", environment)
            result = pytester.runpytest_inprocess(*STRICT, "-rP", *arguments)
        found = [line.removeprefix("got ") for line in result.outlines if line.startswith("got ")]
        return found[0] if found else result.stderr.str() + result.stdout.str()

    return run


def markers_of(pytester):
    return pytester.runpytest_inprocess(*STRICT, "--markers").stdout.str()


def test_of_a_search_option(with_one_more, got, pytester):
    more = with_one_more(SearchOptions, default_of_places())
    assert got() == "None"  # nobody said anything, so it is left to COPA
    assert got(marker="n_wishes=5") == "5"
    assert got(marker="n_wishes=5", ini="4") == "5"
    assert got(ini="4") == "4"
    assert got(marker="n_wishes=5", ini="4", environment="6") == "6"
    assert "copa marker: n_wishes=-1; expected a whole number, 0 or more." in got(marker="n_wishes=-1")
    assert "Did you mean 'n_wishes'?" in got(marker="n_wish=1")
    assert ", n_wishes." in got(marker="zzz=1")
    assert "environment variable COPA_N_WISHES: got 'x', expected a whole number" in got(environment="x")
    assert "ini option copa_n_wishes: got 'x', expected a whole number" in got(ini="x")
    assert f"n_wishes: {HELP} (a whole number, 0 or more) [default: 3]" in markers_of(pytester)
    assert "copa_n_wishes" in pytester.runpytest_inprocess(*STRICT, "--help").stdout.str()
    optimizer = COPA(metric=len_metric, n_wishes=4)
    assert optimizer.settings.n_wishes == 4
    assert COPA.from_options(optimizer.settings, metric=len_metric).settings == optimizer.settings
    with pytest.raises(ConfigurationError, match="n_wishes='x'; expected a whole number, 0 or more"):
        COPA(metric=len_metric, n_wishes="x")
    with pytest.raises(ConfigurationError, match=r"COPA: unknown argument 'n_wishs'. Did you mean 'n_wishes'\?"):
        COPA(metric=len_metric, n_wishs=1)
    assert ROW.format(name="n_wishes") in markdown_table(more)


def default_of_places():
    return options_of(SearchOptions)["n_proposed"].places


def len_metric(example, prediction, trace=None):
    return 1.0


def test_of_a_gate(with_one_more, got, pytester, tmp_path):
    more = with_one_more(Gates, options_of(Gates)["max_calls"].places, example="2")
    assert got(marker="n_wishes=5", ini="4") == "5"
    assert got(ini="4", environment="6") == "4"  # nobody lowers a gate by an environment variable
    assert "copa marker: n_wishes=-1; expected a whole number, 0 or more." in got(marker="n_wishes=-1")
    assert "ini option copa_n_wishes: got 'x', expected a whole number" in got(ini="x")
    assert "Did you mean 'n_wishes'?" in got(marker="n_wish=1")
    assert f"n_wishes: {HELP} (a whole number, 0 or more) [default: 3]" in markers_of(pytester)
    with pytest.raises(ConfigurationError, match="gate n_wishes=-1: expected a whole number, 0 or more, such as 2"):
        more(n_wishes=-1)
    with pytest.raises(ConfigurationError, match=r"check\(\): n_wishes='x'; expected a whole number"):
        copa_harness.session.options.check_gates({"n_wishes": "x"}, where="copa_run.check()")
    assert ROW.format(name="n_wishes") in markdown_table(more)


def test_of_a_setting_of_the_session(with_one_more, got, pytester):
    more = with_one_more(Settings, options_of(Settings)["seed"].places, metavar="W")
    assert got() == "3"
    assert got("--copa-n-wishes=7", environment="6", ini="4", marker="n_wishes=5") == "7"
    assert got(environment="6", ini="4", marker="n_wishes=5") == "6"
    assert got(ini="4", marker="n_wishes=5") == "4"
    assert got(marker="n_wishes=5") == "5"
    assert "--copa-n-wishes: got 'x', expected a whole number, 0 or more." in got("--copa-n-wishes=x")
    assert f"n_wishes: {HELP} (a whole number, 0 or more) [default: 3]" in markers_of(pytester)
    pytester.runpytest_inprocess(*STRICT, "--help").stdout.fnmatch_lines(["*--copa-n-wishes=W*", "*[[]default: 3]*"])
    assert ROW.format(name="--copa-n-wishes W`, `n_wishes") in markdown_table(more)


def test_of_a_lora_setting(with_one_more, got):
    more = with_one_more(LoraSettings)
    assert "expected a whole number, 0 or more" in got(marker="lora={'n_wishes': -1}")
    assert "Did you mean 'n_wishes'?" in got(marker="lora={'n_wish': 1}")
    assert COPA(metric=len_metric, lora={"n_wishes": 2}).settings.lora == {"n_wishes": 2}
    assert ROW.format(name="n_wishes") in markdown_table(more)


# -- the options there are


@pytest.mark.parametrize("kind", OPTION_KINDS.values(), ids=OPTION_KINDS)
def test_every_option_says_what_it_is_in_a_line_and_its_default_is_a_value_of_it(kind):
    for name, one in options_of(kind).items():
        assert one.help, name
        assert "\n" not in one.line, name
        assert not one.help.endswith("."), name
        assert one.problem(one.default) is None, name
        assert bool(one.metavar) == (Place.COMMAND_LINE in one.places and one.check is not SWITCH), name


def test_what_a_person_may_say_in_several_places_is_one_option():
    said = [name for kind in ("Settings", "Gates", "SearchOptions") for name in reachable(OPTION_KINDS[kind])]
    assert len(said) == len(set(said))
    for name in ("seed", "threads"):  # arguments of COPA, and settings of a session
        assert default_of(SearchOptions, name) == default_of(Settings, name)


def reachable(kind):
    return [name for name, one in options_of(kind).items() if one.places]


def test_min_score_is_still_an_argument_of_copa():
    assert COPA(metric=len_metric, min_score=0.5).settings.pass_score == 0.5


def test_a_session_searches_as_its_settings_say(tmp_path):
    settings = Settings(root=tmp_path).merged(seed=3, budget="calls=9")
    with CopaSession(settings) as session:
        assert (session.settings.seed, session.settings.budget.calls) == (3, 9)
        assert session.settings.cache_dir == tmp_path / ".copa_cache"


# -- tables of the guides


def test_tables_are_written_in_place_and_once(tmp_path):
    guide = tmp_path / "guide.md"
    guide.write_text("before\n<!-- options: Gates -->\nold\n<!-- end options -->\nafter\n")
    assert rewrite_tables(guides_below(tmp_path)) == [guide]
    text = guide.read_text()
    assert text.startswith("before\n<!-- options: Gates -->\n\n| option | default | values | meaning |\n")
    assert text.endswith("|\n\n<!-- end options -->\nafter\n")
    assert all((f"| `{name}` |" in text) == bool(one.places) for name, one in options_of(Gates).items())
    assert rewrite_tables([guide]) == []


def test_a_table_of_nothing_known_is_refused():
    with pytest.raises(ConfigurationError, match="'Gatez'; expected one of Settings, Gates"):
        with_tables("<!-- options: Gatez --><!-- end options -->", OPTION_KINDS)
