"""Packs a tree of folders of pictures into one small file, which ``data=packed`` reads.

    python scripts/pack_pictures.py FOLDER --size 64 --output PACK.npz --sheet PACK.png

A picture is drawn on white, without its transparent margins, as large as fits into the square, and
padded with white. Links, pictures that cannot be read, nearly empty ones and copies of earlier ones
are left out. docs/training/experiments.md says how Debian's openclipart-png is packed.

A folder is a class if ``--least`` pictures are left in it and below it after the folders below that
are classes themselves; the pictures of any other folder belong to the folder above. What reaches
the top is the class ``other``, and so are the folders named by ``--other``. Folders below one that
``--join`` names are never classes.

The order of the pictures' SHA-256 chooses, in each class, those that are held out, and those that
are dropped beyond ``--most``: the same pictures always give the same file.
"""

import argparse
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.cli import one_line_errors
from training.data.packed import write_pack
from training.data.pictures import is_picture, read_picture
from training.images import grid, write_png
from training.validation import between, positive_integer

OTHER = "other"
WHITE = 247  # a pixel all of whose colours are lighter is paper
Classes = dict[str, list[Path]]  # name -> pictures


def classes_of(root: Path, least: int, join: Sequence[str], other: Sequence[str]) -> Classes:
    """Pictures by class, those classes first that have most; see the head of this file."""
    for name in (*join, *other):
        if not (root / name).is_dir():
            raise FileNotFoundError(f"there is no folder {name} in {root}")
    found: Classes = {}

    def visit(folder: Path, whole: bool) -> list[Path]:
        """The pictures that belong to the folder above."""
        name = folder.relative_to(root).as_posix()
        mine: list[Path] = []
        for path in sorted(folder.iterdir()):
            if path.is_symlink():
                continue
            if path.is_dir():
                mine += visit(path, whole or name in join)
            elif is_picture(path):
                mine.append(path)
        if folder == root:
            name = OTHER
        elif whole or name in other or len(mine) < least:
            return mine
        found[name] = mine
        return []

    visit(root, False)
    if not found[OTHER]:
        del found[OTHER]
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def drawn(picture: Image.Image, size: int) -> np.ndarray | None:
    """The picture on white. (S, S, 3) of bytes; None where there is nothing to see."""
    picture = picture.convert("RGBA")
    box = picture.getchannel("A").point([0] * 8 + [255] * 248).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    paper = Image.new("RGBA", picture.size, "white")
    paper.alpha_composite(picture)
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    small = paper.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), "white")
    square.paste(small, ((size - width) // 2, (size - height) // 2))
    return np.array(square)


def read_all(
    found: Classes, size: int, least_ink: float, dropped: Counter
) -> Iterator[tuple[str, bytes]]:
    """(class, the bytes of a picture (S, S, 3)), no two the same; what is left out is counted."""
    seen: set[bytes] = set()
    for name, files in found.items():
        for path in files:
            try:
                picture = read_picture(path)
            except ValueError as error:
                print(f"left out: {error}")
                dropped["unreadable"] += 1
                continue
            pixels = drawn(picture, size)
            if pixels is None or (pixels < WHITE).any(2).mean() < least_ink:
                dropped["empty"] += 1
            elif (content := pixels.tobytes()) in seen:
                dropped["copies"] += 1
            else:
                seen.add(content)
                yield name, content


def pack(root: Path, output: Path, options: argparse.Namespace) -> dict:
    """Writes the file; returns what it says of itself."""
    positive_integer("--size", options.size)
    positive_integer("--least", options.least)
    positive_integer("--most", options.most)
    between("--held-out", options.held_out, 0, 0.99, open_low=True)
    between("--least-ink", options.least_ink, 0, 1)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    found = classes_of(root, options.least, options.join, options.other)
    dropped = Counter(dict.fromkeys(("unreadable", "empty", "copies", "beyond_most"), 0))
    pictures: dict[str, list[bytes]] = {}
    for name, content in read_all(found, options.size, options.least_ink, dropped):
        pictures.setdefault(name, []).append(content)
    names = [name for name in found if len(pictures.get(name, [])) > 1]
    if not names:
        raise ValueError(f"{root} has no class of two pictures that can be packed")
    short = short_names(names)
    rows: list[tuple[bytes, int, bool]] = []
    for label, name in enumerate(names):
        order = sorted(pictures[name], key=lambda content: hashlib.sha256(content).digest())
        dropped["beyond_most"] += max(0, len(order) - options.most)
        order = order[: options.most]
        kept = max(1, round(options.held_out * len(order)))
        rows += [(content, label, i < kept) for i, content in enumerate(order)]
    contents, labels, held_out = (list(column) for column in zip(*rows, strict=True))
    images = np.frombuffer(b"".join(contents), np.uint8)
    images = images.reshape(-1, options.size, options.size, 3).transpose(0, 3, 1, 2)
    rules = {key: getattr(options, key) for key in RULES}
    counts = Counter(labels)
    about = {
        "source": options.source or root.name,
        "rules": rules,
        "left_out": dict(dropped),
        "classes": {short[name]: [name, counts[i]] for i, name in enumerate(names)},
    }
    classes = [short[name] for name in names]
    write_pack(output, images, np.array(labels), np.array(held_out), classes, about)
    if options.sheet:
        write_png(options.sheet, sheet(images, np.array(labels), options.columns))
    return about


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last folder of a class's path, or all of the path where two would be called the same."""
    last = Counter(name.rpartition("/")[2] for name in names)
    return {name: end if last[end := name.rpartition("/")[2]] == 1 else name for name in names}


def sheet(images: np.ndarray, labels: np.ndarray, columns: int) -> torch.Tensor:
    """The first pictures of each class, a class a row. (H, W, 3) of bytes"""
    size = images.shape[-1]
    rows = np.full((labels.max() + 1, columns, 3, size, size), 255, np.uint8)
    for label, row in enumerate(rows):
        some = images[labels == label][:columns]
        row[: len(some)] = some
    return grid(torch.from_numpy(rows.reshape(-1, 3, size, size)) / 127.5 - 1, columns)


RULES = ("size", "least", "most", "join", "other", "held_out", "least_ink")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of a tree of folders in one file.")
    parser.add_argument("folder", type=Path, help="its folders are the classes")
    parser.add_argument("--output", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--least", type=int, default=60, help="pictures that make a class")
    parser.add_argument("--most", type=int, default=10**9, help="pictures of a class")
    parser.add_argument("--join", nargs="*", default=[], help="folders kept whole")
    parser.add_argument("--other", nargs="*", default=[], help="folders that are no classes")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of each class")
    parser.add_argument("--least-ink", type=float, default=0.02, help="share of pixels not white")
    parser.add_argument("--source", default=None, help="what the pictures are, kept in the file")
    parser.add_argument("--sheet", type=Path, default=None, help="a picture of the classes")
    parser.add_argument("--columns", type=int, default=16, help="of the sheet")
    options = parser.parse_args()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # larger ones are left out
    with one_line_errors():
        about = pack(options.folder, options.output, options)
        for name, (folder, n) in about["classes"].items():
            print(f"{n:5} {name} ({folder})")
        print(f"left out: {json.dumps(about['left_out'])}")
        digest = hashlib.sha256(options.output.read_bytes()).hexdigest()
        print(f"{options.output}: {options.output.stat().st_size:,} bytes, SHA-256 {digest}")


if __name__ == "__main__":
    main()
