"""Why there is no int8: products of one decode step of SmolLM2 in other arithmetics, and whole requests with them.

    python tests/benchmarks/bench_int8.py                        # products alone
    python tests/benchmarks/bench_int8.py --model FOLDER         # and requests, as `bench_engine_smollm2` makes them

One thread, CPU time, contenders in turn. "rows" are kernels with one scale for each token's input, since torch's own
take one for all tokens of a call. FBGEMM's quantized tensors are deprecated. Nothing is collected by pytest.
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))
import torch

warnings.simplefilter("ignore")

SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
N_LAYERS, VOCABULARY = 30, 49152


def rounded(weight):
    scales = weight.abs().amax(1).clamp(min=1e-12) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def fbgemm(weight):
    values, scales = rounded(weight)
    zeros = torch.zeros(len(scales), dtype=torch.long)
    tensor = torch._make_per_channel_quantized_tensor(values, scales.double(), zeros, 0)
    return torch.ops.quantized.linear_prepack(tensor, None)


def onednn(weight):
    values, scales = rounded(weight)
    return torch.ops.onednn.qlinear_prepack(values, None), scales, torch.zeros(len(scales), dtype=torch.int32)


def largest(x):
    return x.abs().amax(-1, keepdim=True).clamp_(min=1e-12)


def by_fbgemm_rows(x, weight):
    scales = largest(x)
    return torch.ops.quantized.linear_dynamic(x / scales, weight, False).mul_(scales)


def by_onednn_rows(x, weight):
    scales = largest(x)
    values = (x * (127 / scales)).add_(128.5).to(torch.uint8)
    fixed = (None, 1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise(values, 1 / 127, 128, *weight, *fixed).mul_(scales)


def by_mkldnn(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, None, "none", [], "").float()


CONTENDERS = {
    "float32": (lambda w: torch.ops.mkldnn._reorder_linear_weight(w, 32), by_mkldnn),
    "bfloat16": (lambda w: torch.ops.mkldnn._reorder_linear_weight(w.bfloat16(), 8), by_mkldnn),
    "int8pack_mm, bfloat16 inputs": (
        lambda w: (rounded(w)[0], rounded(w)[1].bfloat16()),
        lambda x, w: torch._weight_int8pack_mm(x.bfloat16(), *w),
    ),
    "FBGEMM": (fbgemm, lambda x, w: torch.ops.quantized.linear_dynamic(x, w, False)),
    "FBGEMM rows": (fbgemm, by_fbgemm_rows),
    "oneDNN rows": (onednn, by_onednn_rows),
}
"""How weights are laid out, and the product."""


class Product:
    """Stands for `llama._Product`."""

    prepare = by = None

    def __init__(self, weights, biases, *, packs):
        self.weight = type(self).prepare(torch.cat(list(weights)))
        self.bias = None if biases[0] is None else torch.cat(list(biases))

    def __call__(self, x, residual=None):
        product = type(self).by(x, self.weight)
        for added in (self.bias, residual):
            product = product if added is None else product + added
        return product


def products(rounds=7):
    weights = [torch.randn(n, k) * 0.02 for _ in range(N_LAYERS) for k, n in SHAPES]
    weights.append(torch.randn(VOCABULARY, SHAPES[0][0]) * 0.02)
    ready = {name: [prepare(w) for w in weights] for name, (prepare, _) in CONTENDERS.items()}
    for n_rows in (1, 2, 8, 24, 64):
        inputs = {k: torch.randn(n_rows, k) for k, _ in SHAPES}
        took = {name: [] for name in ready}
        for _ in range(rounds):
            for name, own in ready.items():
                began = time.process_time()
                for plain, weight in zip(weights, own, strict=True):
                    CONTENDERS[name][1](inputs[plain.shape[1]], weight)
                took[name].append(1e3 * (time.process_time() - began))
        print(f"{n_rows} rows, CPU ms:", {name: round(min(each), 1) for name, each in took.items()}, flush=True)


def requests(folder, rounds=2, n_requests=12):
    import bench_engine_smollm2 as smollm2

    from copa_harness.lm.local import executor, llama
    from copa_harness.lm.local.model import LocalModel
    from copa_harness.lm.local.scheduler import BatchGenerator
    from copa_harness.lm.local.tokenizer import read_tokenizer

    executor.NEAR_TIE = {}  # nothing is exact here, so nothing is looked at again
    generators = {}
    for name in ("float32", "FBGEMM rows", "oneDNN rows"):
        model = LocalModel(folder, device="cpu", dtype="float32")
        if name != "float32":
            own, (prepare, by) = llama._Product, CONTENDERS[name]
            llama._Product = type("Product", (Product,), {"prepare": staticmethod(prepare), "by": staticmethod(by)})
            model.decoder = llama.LlamaDecoder(llama.library_shape(model.model), model.model.state_dict())
            llama._Product = own
        generators[name] = BatchGenerator(model)
    tokenizer = read_tokenizer(folder)
    work = [smollm2.loads(tokenizer, turn, n_requests) for turn in range(rounds)]
    for kind in smollm2.TARGETS:
        took = {name: [] for name in generators}
        for load in (one[kind] for one in work):
            for name, generator in generators.items():
                began = time.process_time()
                n = len(smollm2.ours(generator, load))
                took[name].append(round(1e3 * (time.process_time() - began) / n))
        print(f"{kind}, CPU ms per request:", took, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of SmolLM2 in safetensors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        products()
        if options.model:
            requests(options.model)
