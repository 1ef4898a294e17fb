"""One model in memory: loading, what its batches may do, LoRA adapters side by side.

Base requests run on the model as loaded; LoRA requests on a second module tree that shares every base tensor and
carries the adapters, so neither disturbs the other, and a trainer gets a third such tree (`share_weights`).

What batches may do without changing an answer is tried out on a few random tokens when the model is loaded: each of
`ExactnessChecks` compares the logits of rows that share a batch with those each row gets from the library's model
alone.
"""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copa_harness.errors import ConfigurationError, OutOfMemoryError
from copa_harness.lm.embedded import embedded_model_path
from copa_harness.lm.local.attention import UnsupportedModel
from copa_harness.lm.local.decoding import LibraryReader, Reader, Row, next_logits
from copa_harness.lm.local.files import LoraFiles
from copa_harness.lm.local.llama import (
    FusedLora,
    LlamaDecoder,
    library_shape,
    read_lora_tensors,
    read_shape,
    read_special_ids,
    read_tensors,
    special_ids,
)
from copa_harness.lm.local.memory import Footprint, is_out_of_memory, oom_message

logger = logging.getLogger(__name__)

MAX_LORAS_IN_MEMORY = 32


@dataclass(frozen=True, slots=True)
class ExactnessChecks:
    """The checks of one model.

    Attributes:
        model: as transformers loads it.
        pad_id: any token.
        tolerance: largest difference of two logits, relative to the largest logit, that is taken for rounding.
        name: the model's, for messages.
    """

    model: Any
    pad_id: int
    tolerance: float
    name: str

    def batch_rules(self) -> tuple[bool, bool]:
        """Whether prompts of different lengths may share a batch, padded on the left; whether they may share a prefix.

        What is exact for this architecture's states, checked where it can be.
        """
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

        if getattr(self.model, "_is_stateful", False) or _rope_depends_on_length(self.model.config):
            return False, False
        kinds = {type(layer) for layer in self._new_cache().layers}
        # A multi-token continuation from a convolution state is exact in LFM2; other state-space models differ.
        if LinearAttentionLayer in kinds and kinds <= {DynamicLayer, LinearAttentionLayer}:
            return False, self.model.config.model_type == "lfm2"
        # A window holds only the prefix's last tokens, and padding behind it would push them out.
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            return False, False
        rules = (True, kinds == {DynamicLayer})
        if self._padding_is_exact(n_shared=6 if rules[1] else 0):
            return rules
        logger.warning("%s answers differently when padded; its requests are batched by equal length", self.name)
        return False, False

    def cascade_is_exact(self, reader: Reader) -> bool:
        """Whether three rows, two of them behind a shared prefix kept once, give the logits they give alone."""
        import torch

        head, short, long = self._probe(6)
        tails = [short[0].tolist(), long[0].tolist(), long[0].tolist()]
        try:
            with torch.inference_mode():
                cache = self._new_cache()
                self.model(head, attention_mask=torch.ones_like(head), past_key_values=cache, use_cache=True)
                shared = [((cache,), 6), ((cache,), 6), ((), 0)]
                rows = [Row(ids, shared=states, n_shared=n) for ids, (states, n) in zip(tails, shared, strict=True)]
                together = next_logits(reader, rows, device=self.model.device, pad_id=self.pad_id)
        except (UnsupportedModel, TypeError, ValueError, KeyError, RuntimeError, AttributeError) as reason:
            logger.info("%s goes without cascade attention: %s: %s", self.name, type(reason).__name__, reason)
            return False
        alone = [torch.cat([head, short], 1), torch.cat([head, long], 1), long]
        return self._same_logits(together, alone)

    def _padding_is_exact(self, *, n_shared: int) -> bool:
        """Whether two short prompts behind `n_shared` shared tokens, padded, give the logits they give alone."""
        import torch

        device = self.model.device
        head, short, long = self._probe(n_shared)
        mask = torch.ones(2, n_shared + 5, dtype=torch.long, device=device)
        mask[0, n_shared : n_shared + 3] = 0
        with torch.inference_mode():
            cache = self._new_cache()
            if n_shared:
                self.model(head, attention_mask=torch.ones_like(head), past_key_values=cache, use_cache=True)
                cache.batch_repeat_interleave(2)
            together = self.model(
                torch.cat([torch.cat([torch.full((1, 3), self.pad_id, device=device), short], 1), long]),
                past_key_values=cache,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, n_shared:],
                use_cache=True,
            ).logits[:, -1]
        return self._same_logits(together, [torch.cat([head, tail], 1) for tail in (short, long)])

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _probe(self, n_shared: int) -> list[Any]:
        """Random token ids of a shared prefix, a short and a long suffix (2 and 5 tokens), each [1, n]."""
        import torch

        vocab_size = self.model.get_input_embeddings().num_embeddings
        draw = torch.Generator().manual_seed(0)
        return [torch.randint(vocab_size, (1, n), generator=draw).to(self.model.device) for n in (n_shared, 2, 5)]

    def _same_logits(self, together: Any, prompts: Sequence[Any]) -> bool:
        """Whether the rows of `together` are the last logits of the prompts, each alone."""
        import torch

        with torch.inference_mode():
            alone = [self.model(ids, attention_mask=torch.ones_like(ids)).logits[0, -1] for ids in prompts]
        return all(
            bool((a - b).abs().max() <= self.tolerance * a.abs().max().clamp(min=1e-6))
            for a, b in zip(alone, together, strict=True)
        )


def _rope_depends_on_length(config: Any) -> bool:
    """Whether a token's position is encoded differently in longer inputs, so that longer company would change it."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [v for v in parameters.values() if isinstance(v, dict)]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


class LocalModel:
    """A causal language model in memory.

    Attributes:
        decoder: our own forward, for models that `llama` computes; None for others. The embedded model has only
            this until something asks for `model`, since importing transformers takes longer than all else.
        why_library: why transformers' forward is used; empty where `decoder` is.
        pads: whether prompts of different lengths may share a batch, padded on the left, without changing an answer.
        shares_prefix: whether a batch may start from the states of a prefix computed once.
        context_length: tokens of prompt and answer together that the model can hold.
        eos_ids: token ids that end an answer.
        lock: held while a batch is generated.
        cascades: whether batches may go through cascade attention (see `attention`): on CPUs, where it was measured
            to be faster, and where it gives this architecture's logits.
        footprint: bytes a token needs.

    Raises:
        ConfigurationError: the folder cannot be loaded as a causal language model, or the device is not there.
        OutOfMemoryError: the weights do not fit.
    """

    def __init__(self, directory: Path, *, device: str, dtype: str) -> None:
        import torch

        self.directory = directory
        self.dtype = dtype
        self.device = torch.device(device)
        self.lock = threading.Lock()
        self._loading = threading.RLock()
        self._library: Any = None
        self._with_loras: Any = None
        self._loras: OrderedDict[str, None] = OrderedDict()
        self._fused: OrderedDict[str, FusedLora | None] = OrderedDict()
        self.decoder: LlamaDecoder | None = None
        self.why_library = ""
        if self._may_compute and directory == embedded_model_path().resolve():
            shape = read_shape(directory)
            self.decoder = LlamaDecoder(shape, read_tensors(directory))
            self.context_length = shape.max_position_embeddings
            self.eos_ids, self.pad_id = read_special_ids(directory)
            self.footprint = Footprint.of(shape, item_bytes=4)
            self.pads = self.shares_prefix = self.cascades = True
        else:
            model = self.model
            config = model.config.get_text_config(decoder=True)
            self.context_length = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
            self.eos_ids, self.pad_id = self._special_ids
            self.footprint = Footprint.of(config, item_bytes=model.dtype.itemsize)
            checks = self._checks()
            self.pads, self.shares_prefix = checks.batch_rules()
            self.decoder, self.why_library = self._own_forward(checks)
            self.cascades = self.decoder is not None
            if self.pads and self.shares_prefix and self.device.type == "cpu" and not self.cascades:
                self.cascades = checks.cascade_is_exact(LibraryReader(model))
        logger.info("loaded %s: %s", directory.name, self.describe())

    @property
    def _may_compute(self) -> bool:
        return self.dtype == "float32" and self.device.type == "cpu"

    def _own_forward(self, checks: ExactnessChecks) -> tuple[LlamaDecoder | None, str]:
        """Our own forward over the library's weights, or why there is none."""
        if not self._may_compute:
            return None, "the own one is for float32 on CPUs"
        if not (self.pads and self.shares_prefix):
            return None, "its rows cannot share a batch"
        try:
            decoder = LlamaDecoder(library_shape(self.model), self.model.state_dict())
        except UnsupportedModel as reason:
            return None, str(reason)
        if not checks.cascade_is_exact(decoder):
            return None, "the own one gives other logits on this machine"
        return decoder, ""

    @property
    def model(self) -> Any:
        """The base model as transformers loads it, frozen, in evaluation mode; loaded by the first who asks."""
        with self._loading:
            if self._library is None:
                self._library = self._load()
                if self.decoder is not None and not self._checks().cascade_is_exact(self.decoder):
                    logger.error(
                        "%s: this package's own forward differs from that of transformers on this machine, and so may "
                        "answers given so far; from here on transformers' is used",
                        self.directory.name,
                    )
                    self.decoder, self.cascades = None, False
                    self.why_library = "the own one gives other logits on this machine"
            return self._library

    def _load(self) -> Any:
        import torch
        import transformers

        try:
            with _no_progress_bars():
                model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    self.directory,
                    dtype=getattr(torch, self.dtype),
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                )
            model.to(self.device)
        except (OSError, ValueError, KeyError, RuntimeError, AssertionError, MemoryError) as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(
                    f"memory on {self.device} does not suffice for the weights of {self.directory} in {self.dtype} "
                    f"({oom_message(error)}); remedy: a smaller model, --copa-dtype=bfloat16, another --copa-device, "
                    "or less else in that memory"
                ) from error
            raise ConfigurationError(
                f"could not load {self.directory} on {self.device} as a causal language model in {self.dtype}: "
                f"{error}; expected a folder that AutoModelForCausalLM loads without trust_remote_code"
            ) from error
        model.eval().requires_grad_(False)
        self._special_ids = special_ids(model.generation_config.to_dict(), model.config.to_dict())
        # `generate` fills what a call leaves open from this object; a folder's sampling settings must not leak in.
        model.generation_config = transformers.GenerationConfig(pad_token_id=self._special_ids[1])
        return model

    def _checks(self) -> ExactnessChecks:
        tolerance = 1e-3 if self.dtype == "float32" else 5e-2
        return ExactnessChecks(
            self._library, pad_id=self._special_ids[1], tolerance=tolerance, name=self.directory.name
        )

    def describe(self) -> str:
        """Class, size, dtype, device, and whose forward computes."""
        import torch

        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        if self.decoder is not None:
            name, n_parameters = self.decoder.shape.architecture, self.decoder.n_parameters
        else:
            name, n_parameters = type(self.model).__name__, sum(p.numel() for p in self.model.parameters())
        size = f"{n_parameters / 1e6:,.1f}M" if n_parameters >= 1e6 else f"{n_parameters / 1e3:.0f}k"
        forward = "own forward" if self.decoder is not None else f"transformers' forward ({self.why_library})"
        return f"{name}, {size}, {self.dtype} on {self.device}{threads}, {forward}"

    def fused(self, lora: LoraFiles) -> FusedLora | None:
        """A LoRA adapter for the decoder, whose batches may hold several; None where it must be left to peft."""
        if self.decoder is None:
            return None
        if lora.fingerprint not in self._fused:
            tensors = read_lora_tensors(lora)
            self._fused[lora.fingerprint] = None if tensors is None else FusedLora(tensors, self.decoder.shape)
        self._fused.move_to_end(lora.fingerprint)
        while len(self._fused) > MAX_LORAS_IN_MEMORY:
            self._fused.popitem(last=False)
        return self._fused[lora.fingerprint]

    def serving(self, lora: LoraFiles | None) -> Any:
        """The module to generate with: the base, or the shared tree with this LoRA adapter active.

        Only the thread that holds `lock` may call this, since it switches the active adapter.
        """
        if lora is None:
            return self.model
        import peft

        name = f"lora_{lora.fingerprint[:32]}"  # peft refuses dots in names
        if name not in self._loras:
            # The trainer stores float32 adapters; peft would otherwise keep them so beside a bfloat16 base.
            with silence_peft():
                if self._with_loras is None:
                    self._with_loras = peft.PeftModel.from_pretrained(
                        share_weights(self.model), str(lora.directory), adapter_name=name
                    )
                else:
                    self._with_loras.load_adapter(str(lora.directory), adapter_name=name)
            self._with_loras.to(self.device)
            self._with_loras.eval().requires_grad_(False)
        if self._with_loras.active_adapter != name:
            self._with_loras.set_adapter(name)
            self._with_loras.requires_grad_(False)
        self._loras[name] = None
        self._loras.move_to_end(name)
        while len(self._loras) > MAX_LORAS_IN_MEMORY:
            oldest, _ = self._loras.popitem(last=False)
            self._with_loras.delete_adapter(oldest)
        return self._with_loras.base_model.model

    def new_cache(self) -> Any:
        """An empty key-value cache of the kind this model uses."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)


@contextmanager
def silence_peft() -> Iterator[None]:
    """Silences what peft's own code provokes (it asks transformers 5 for a deprecated attribute)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def share_weights(model: Any) -> Any:
    """A new module tree around the very same parameter and buffer tensors: no memory, no interference of adapters."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silences transformers' progress bars while a model loads, and restores the user's choice."""
    from transformers.utils import logging as library_logging

    were_shown = library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            library_logging.enable_progress_bar()
