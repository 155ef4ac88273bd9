"""Compiles every kernel of the fast step for an NVIDIA GPU that need not be there; prints their names.

A program of its own: elsewhere in the tests Triton interprets its kernels, which forgives what its compiler refuses.
"""

import sys

import torch
import triton
from graphed_cases import Shapes, build, hand_over, random_gradients
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lightning_rlora.optim import Riemannion, WhitenedRiemannion
from lightning_rlora.optim.cuda import products
from lightning_rlora.optim.cuda.bucket import Bucket
from lightning_rlora.optim.cuda.whitened_bucket import WhitenedBucket
from lightning_rlora.optim.groups import HYPERPARAMETERS, PairInGroup

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
compiled = set()


def compile_only(kernel, *args, grid, warmup, **kwargs):
    """In place of a launch: the kernel for these arguments is compiled, and nothing is run."""
    named = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(place,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
    key = (kernel.__name__, str(signature), str(constants), str(options))
    if key not in compiled:
        compiled.add(key)
        triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=options)
        print(kernel.__name__, flush=True)


JITFunction.run = compile_only
products._by_kernels = lambda x: True
rank = int(sys.argv[1])
for make, kind in ((Riemannion, Bucket), (WhitenedRiemannion, WhitenedBucket)):
    optimizer = build(
        make, [Shapes(1.0, rank, [(2 * rank + 32, 4 * rank), (rank + 3, 99)])], torch.float32, lr=0.01, relative=False
    )
    hand_over([optimizer], random_gradients(optimizer, torch.Generator().manual_seed(0)))
    optimizer.step()
    group = optimizer.param_groups[0]
    pairs = [PairInGroup(a, b, group) for a, b in zip(group["params"][::2], group["params"][1::2], strict=True)]
    numbers = torch.ones(1, len(HYPERPARAMETERS), dtype=torch.float64)
    bucket = kind(pairs, [group], optimizer.state, numbers)
    bucket.ready()
    bucket.find_gradients()
    bucket.begin()
    bucket.solve(torch.ones((), dtype=torch.float64))
    bucket.write(torch.tensor(True))
