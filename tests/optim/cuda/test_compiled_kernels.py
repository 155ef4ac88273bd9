"""The kernels as the GPU's compiler sees them, wherever the tests run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_rlora

pytest.importorskip("triton", reason="the fast step is written in Triton")

HERE = Path(__file__).parent
KERNELS = Path(lightning_rlora.__file__).parent / "optim" / "cuda"


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """For small ranks and larger ones, which take other kernels; 30 s on one core."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(KERNELS.parents[2])}
    compilers = [
        subprocess.Popen(
            [sys.executable, HERE / "compile_kernels.py", rank],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("12", "40")
    ]
    names = set()
    for compiler in compilers:
        out, errors = compiler.communicate(timeout=300)
        assert compiler.returncode == 0, errors[-3000:]
        names |= set(out.split())
    launched = set(re.findall(r"^ +(_\w+)\[", "".join(path.read_text() for path in KERNELS.glob("*.py")), re.MULTILINE))
    assert len(launched) > 8
    assert launched <= names
