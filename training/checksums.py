"""A CRC-32 of a whole file inside that file: it survives copying, and every byte is covered.

A checkpoint is a ZIP archive; its checksum is the comment at the end of the archive, which other
readers pass over. An exported file is safetensors, where nothing may follow the tensors; its
checksum is a value of fixed width in the header, which counts as zeros in the sum. Files of earlier
versions have neither: of such a checkpoint the archive's own CRC-32 of each record is verified, and
such an exported file is read as it is.

CRC-32 costs a tenth of the write. It finds what disks, memory and networks do to a file, not what a
person does: for that, no file is more than data (``registry``).
"""

import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

MARK = b"flash-jvp crc32 "
DIGITS = 8
COMMENT = len(MARK) + DIGITS
NAME = "flash_jvp_crc32"
BETWEEN = '":"'
ZEROS = b"0" * DIGITS
PART = 1 << 20


class Sealed:
    """Passes an archive that is written in one go on to ``file``, with the checksum as comment."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, 0
        self.held = b""  # the last two bytes: the length of the comment, if nothing follows

    def write(self, data: bytes | memoryview) -> int:
        view, size = memoryview(data), len(data)
        if size < 2:
            view = memoryview(self.held + bytes(view))
        else:
            self._pass_on(self.held)
        self._pass_on(view[:-2])
        self.held = bytes(view[-2:])
        return size

    def _pass_on(self, data: bytes | memoryview) -> None:
        self.sum = zlib.crc32(data, self.sum)
        self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def __enter__(self) -> "Sealed":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            return
        if self.held != b"\0\0":
            raise RuntimeError("torch.save did not end a checkpoint as an archive without comment")
        length = struct.pack("<H", COMMENT)
        self.file.write(length + MARK + _digits(zlib.crc32(length, self.sum)))


def verify(path: Path) -> bool:
    """Whether a file of weights, of whatever kind, has this project's checksum.

    Raises:
        ValueError: its bytes are not those that were written.
    """
    if path.suffix == ".safetensors":
        return verify_safetensors(path)
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\3\4"
    return archive and verify_checkpoint(path)


def verify_checkpoint(path: Path) -> bool:
    """As ``verify``, of a checkpoint."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - COMMENT))
        comment = file.read()
        if comment.startswith(MARK):
            if _sum_of(file, size - COMMENT) != comment[len(MARK) :]:
                raise ValueError(damaged(path))
            return True
    try:  # of an earlier version
        with zipfile.ZipFile(path) as archive:
            whole = not archive.comment and archive.testzip() is None
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError):
        whole = False
    if not whole:
        raise ValueError(damaged(path))
    return False


def sealed_safetensors(save: Callable[[dict[str, str]], bytes], metadata: dict[str, str]) -> bytes:
    """``save(metadata)`` with the checksum among the metadata."""
    content = save(metadata | {NAME: ZEROS.decode()})
    start, stop = _place(content)
    return content[:start] + _digits(zlib.crc32(content)) + content[stop:]


def verify_safetensors(path: Path) -> bool:
    """As ``verify``, of an exported file."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            return False  # no safetensors: the reader says it
        start += file.read(length)
        if NAME.encode() not in start:
            return False  # of an earlier version
        first, last = _place(start)
        digest = start[first:last]
        sum = zlib.crc32(start[:first] + ZEROS + start[last:])
        while part := file.read(PART):
            sum = zlib.crc32(part, sum)
    if _digits(sum) != digest:
        raise ValueError(damaged(path))
    return True


def damaged(path: Path) -> str:
    what = "export it again" if path.suffix == ".safetensors" else "take an earlier one of its run"
    return (
        f"{path} is damaged: its bytes are not those that were written (wrong checksum); copy"
        f" the file again from where it came, or {what}"
    )


def _sum_of(file: BinaryIO, size: int) -> bytes:
    file.seek(0)
    sum = 0
    while size and (part := file.read(min(PART, size))):
        sum = zlib.crc32(part, sum)
        size -= len(part)
    return _digits(sum)


def _digits(sum: int) -> bytes:
    return f"{sum:0{DIGITS}x}".encode()


def _place(header: bytes) -> tuple[int, int]:
    """Where the digits stand."""
    start = header.index(NAME.encode()) + len(NAME) + len(BETWEEN)
    return start, start + len(ZEROS)
