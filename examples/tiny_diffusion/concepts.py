"""Write held-out concepts as folders of pictures, one drawing for each style: subjects that the model has not seen.

python examples/tiny_diffusion/concepts.py --pictures pictures_*.parquet --output concepts carrot backpack
"""

import argparse
import re
from pathlib import Path

from pictures import Pictures, read_pictures
from PIL import Image


def write_concept(pictures: Pictures, name: str, output: Path) -> int:
    """The pictures of a name as PNG files, and how many they are."""
    folder = output / re.sub(r"\W+", "_", name)
    folder.mkdir(parents=True, exist_ok=True)
    found = [i for i, known in enumerate(pictures.names) if known == name and not pictures.variants[i]]
    for i in found:
        pixels = pictures.pixels[i].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{pictures.styles[i]}_{i}.png")
    return len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, nargs="+", required=True, help="parquet files; see pictures.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("names", nargs="+", help="as the pictures' column `name` has them")
    args = parser.parse_args()
    pictures = read_pictures(args.pictures, "test")
    for name in args.names:
        if not (count := write_concept(pictures, name, args.output)):
            parser.error(f"no held-out picture is called {name!r}")
        print(f"{name}: {count}")


if __name__ == "__main__":
    main()
