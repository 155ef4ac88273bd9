"""torch.compile for a model whose batches vary in shape, and one clear line where it fails."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_rlora.errors import UserError


def compile_in_place(model: nn.Module) -> None:
    """Let a model compile itself with inductor at its first call; its parameters keep their names.

    Rows and tokens of a batch are symbols of the graph, so neither text of another length nor the smaller batch at an
    epoch's end compiles anew; torch makes one more graph for batches of a single row only. On a GPU it makes one for
    lengths that are multiples of 8, which attention kernels treat in their own way, and one for the others. Training
    and evaluation have graphs of their own. Random numbers are drawn as without compilation, so dropout takes the very
    same masks.
    """
    model.compile(dynamic=True, options={"fallback_random": True})


@contextmanager
def explained_compile_errors() -> Iterator[None]:
    """Turn a failure to compile, for want of a C++ compiler or Triton above all, into one line.

    Raises:
        UserError: If the model called inside cannot be compiled.
    """
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import ShortenTraceback  # not above: only compiled models need to import it

        if isinstance(error, ShortenTraceback):
            cause = str(error).strip().partition("\n")[0]
            raise UserError(
                f"torch.compile failed ({cause[:300]}): it needs a C++ compiler, and on GPUs Triton; or leave out "
                "model.compile"
            ) from error
        raise
