"""Never a stale answer: whatever can change an answer changes its key, and repeats are cached and independent."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest
from dspy.lm15 import Config, Message, Request

from copa_harness.errors import ArtifactError, ConfigurationError
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import open_scope, repeated
from copa_harness.lm.engine import seed_of
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.files import write_manifest
from copa_harness.lm.metered import MeteredLM
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.testing.tiny_models import CHAT_TEMPLATE, write_tiny_model

PROMPT = "[[ ## question ## ]] 2.3 [[ ## answer ## ]]"


@pytest.fixture
def gateway(tmp_path):
    return Gateway(cache=ResponseCache(tmp_path / "responses"))


class Shop:
    """A local model on one shared cache, and how often it was really asked."""

    def __init__(self, folder, *, gateway, lora_dir):
        self.engine = TransformersEngine(folder, name="hf:tiny", lora_dir=lora_dir, device="cpu")
        self.lm = MeteredLM("hf:tiny", engine=self.engine, gateway=gateway, temperature=0.0, max_tokens=6)

    def ask(self, model="hf:tiny"):
        with open_scope("t") as scope:
            answer = self.lm.copy(model=model)(PROMPT)[0]
        return answer, scope.usage().paid_calls

    def plain(self, model="hf:tiny"):
        """The answer without any cache."""
        request = Request(model=model, messages=(Message.user(PROMPT),), config=Config(max_tokens=6, temperature=0.0))
        return self.engine.complete(request, seed=0).message.text


@pytest.fixture
def shop(tmp_path, gateway):
    return Shop(write_tiny_model(tmp_path / "model", seed=0), gateway=gateway, lora_dir=tmp_path / "lora")


def write_lora(directory, engine, *, seed):
    """A random LoRA adapter, as training would leave it at `directory`."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(engine.directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is to go
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weights in tuned.named_parameters():
            if "lora_" in name:
                weights.normal_(0.0, 1.0)
    tuned.save_pretrained(directory)
    write_manifest(directory, base_fingerprint=engine.fingerprint("hf:tiny"), details={})


def test_a_lora_adapter_trained_again_at_the_same_path_gives_no_stale_answer(shop, tmp_path):
    directory, answers, names = tmp_path / "lora" / "mine", [], []
    for seed in (1, 2):
        write_lora(directory, shop.engine, seed=seed)
        names.append(shop.engine.add_lora(directory))
        answer, paid = shop.ask(names[-1])
        assert paid == 1
        assert answer == shop.plain(names[-1])
        assert shop.ask(names[-1]) == (answer, 0)
        answers.append(answer)
    assert names[0] != names[1]
    assert answers[0] != answers[1]
    with pytest.raises((ArtifactError, ConfigurationError)):  # the old weights are gone, and nothing stands in for them
        shop.ask(names[0])


def test_other_base_weights_at_the_same_path_give_no_stale_answer_in_the_same_process(shop, tmp_path):
    before, _ = shop.ask()
    write_tiny_model(tmp_path / "model", seed=5)
    answer, paid = shop.ask()
    fresh = Shop(tmp_path / "model", gateway=Gateway(cache=None), lora_dir=tmp_path / "lora")
    assert paid == 1
    assert answer == fresh.plain() != before


def test_another_chat_template_gives_no_stale_answer(shop, tmp_path):
    before, _ = shop.ask()
    template = CHAT_TEMPLATE.replace("'<|' + m['role'] + '|>'", "'<|system|>' + m['role']")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = tmp_path / "model" / name
        if name.endswith("jinja") and path.exists():
            path.write_text(template)
        elif path.exists() and "chat_template" in (settings := json.loads(path.read_text())):
            path.write_text(json.dumps({**settings, "chat_template": template}))
    answer, paid = shop.ask()
    fresh = Shop(tmp_path / "model", gateway=Gateway(cache=None), lora_dir=tmp_path / "lora")
    assert paid == 1
    assert answer == fresh.plain() != before


@pytest.mark.usefixtures("no_gateways")
def test_the_model_behind_the_same_name_on_another_url_gives_no_stale_answer(stubs, tmp_path, gateway):
    with stubs.StubServer() as one, stubs.StubServer() as other:
        for stub, word in ((one, "one"), (other, "other")):
            stub.default.body = stubs.completion(word)
            lm = build_lm("openai/m", gateway=gateway, cache_dir=tmp_path, api_base=stub.url, api_key="k", max_tokens=9)
            assert [lm("hi")[0] for _ in range(2)] == [word, word]
        assert (one.n_requests, other.n_requests) == (1, 1)


@pytest.mark.usefixtures("no_gateways")
def test_another_url_in_the_environment_gives_no_stale_answer(stubs, tmp_path, gateway, monkeypatch):
    lm = build_lm("openai/m", gateway=gateway, cache_dir=tmp_path, api_key="k", max_tokens=9)
    first = lm.fingerprint
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:9/v1")
    assert lm.fingerprint != first


@pytest.mark.parametrize(
    "change", [{"temperature": 0.5}, {"max_tokens": 8}, {"top_p": 0.9}, {"stop": ["x"]}, {"seed": 3}]
)
def test_every_setting_that_is_sent_is_in_the_key(gateway, change):
    lm = ScriptedLM(lambda messages: "x", gateway=gateway, fingerprint="w", max_tokens=9)
    lm("hi")
    lm.copy(**change)("hi")
    assert lm.calls == 2


def test_an_answer_given_while_the_model_was_exchanged_is_not_kept(gateway):
    weights = {"now": "old"}

    def answer(messages):
        weights["now"] = "new"
        return "from who knows which"

    lm = ScriptedLM(answer, gateway=gateway, fingerprint=lambda model: weights["now"])
    lm("hi")
    weights["now"] = "old"
    lm("hi")
    assert lm.calls == 2


def test_repeats_are_independent_and_cached(tmp_path):
    def run():
        lm = ScriptedLM(
            lambda messages, seed: f"seed {seed}", gateway=Gateway(cache=ResponseCache(tmp_path / "r")), fingerprint="w"
        )
        found = []
        for index in range(5):
            with repeated(index):
                found.append(lm("hi")[0])
        return found, lm.calls

    first, asked = run()
    assert asked == len(set(first)) == 5
    assert run() == (first, 0)
    assert first[0] == f"seed {seed_of(None, 0)}"  # the plain run


def test_repeats_reach_the_threads_dspy_starts_and_keep_rollouts_apart():
    lm = ScriptedLM(lambda messages, seed: {"answer": str(seed)})
    examples = [dspy.Example(question=str(i), answer="").with_inputs("question") for i in range(4)]
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    for index in range(3):
        with repeated(index):
            dspy.Evaluate(devset=examples, metric=lambda *args: 1.0, num_threads=3, display_progress=False)(program)
    assert lm.calls == 12
    with repeated(1):
        seeds = [lm("x", rollout_id=rollout, temperature=1.0)[0] for rollout in (1, 2, 1)]
        candidates = lm("x", n=3, temperature=1.0)
    assert len(set(seeds)) == 2
    assert len(set(candidates)) == 3
    assert lm("x", n=3, temperature=1.0) != candidates


def test_repeats_of_a_run_ask_at_once_and_each_is_paid_once():
    lm = ScriptedLM(lambda messages, seed: str(seed))

    def ask(index):
        with repeated(index % 5):
            return lm("hi")[0]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    assert lm.calls == len(set(answers)) == 5


@pytest.mark.parametrize("index", [-1, 1.5, True, "2"])
def test_a_repeat_that_is_no_number_is_refused(index):
    with pytest.raises(ConfigurationError, match="got the repeat"), repeated(index):
        pass
