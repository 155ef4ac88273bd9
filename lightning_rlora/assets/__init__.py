"""What the package carries: the embedded models, reached by names that begin with `embedded:`."""

from pathlib import Path

from lightning_rlora.errors import UserError

_FOLDER = Path(__file__).parent


def resolve(name: str) -> str:
    """The folder of an embedded model; any other name (hub id, folder) as it is.

    Raises:
        UserError: If the name begins with `embedded:` and no such model is in the package.
    """
    if not name.startswith("embedded:"):
        return name
    folder = _FOLDER / name.removeprefix("embedded:")
    if not (folder / "config.json").is_file():
        known = ", ".join(f"embedded:{path.parent.name}" for path in sorted(_FOLDER.glob("*/config.json")))
        raise UserError(f"no model {name!r} in the package: there is {known}")
    return str(folder)
