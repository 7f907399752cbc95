"""GPU ops: each has a PyTorch twin, which is its meaning and runs everywhere, and a Triton kernel for CUDA tensors.

One file per op, all of one form: `<op>(…, impl=None)`, `<op>_torch`, `<op>_triton`, `CASES` and `make_inputs(case, device)`.
Triton is imported at the first launch of a kernel (launch.py), so this package works where Triton does not exist.
"""

from __future__ import annotations

OPS = {  # op -> its file; the parametrised test (tests/kernels/test_ops.py) and the benchmark (benchmarks/kernels.py) run over it
    "philox_u32": "vgen.kernels.philox",
    "choose_tokens": "vgen.kernels.choose_tokens",
    "vq_nearest": "vgen.kernels.vq_nearest",
}
