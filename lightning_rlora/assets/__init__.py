"""What the package carries: the embedded models, reached by names that begin with `embedded:`."""

from pathlib import Path

from lightning_rlora.errors import UserError

_FOLDER = Path(__file__).parent
_KINDS = ("config.json", "model_index.json")
"""What tells the folder of a language model, and of a diffusion pipeline."""


def resolve(name: str) -> str:
    """The folder of an embedded model; any other name (hub id, folder) as it is.

    Raises:
        UserError: If the name begins with `embedded:` and no such model is in the package.
    """
    if not name.startswith("embedded:"):
        return name
    models = {
        f"embedded:{path.parent.name}": path.parent for kind in _KINDS for path in sorted(_FOLDER.glob(f"*/{kind}"))
    }
    if name not in models:
        raise UserError(f"no model {name!r} in the package: there is {', '.join(models)}")
    return str(models[name])
