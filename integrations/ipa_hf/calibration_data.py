"""Texts, conversations and images from files, as batches for a model of transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from ipa_core.errors import StreamError

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


class CalibrationData:
    """A sample of a data set, as batches; can be read again.

    Parameters
    ----------
    source : path
        A text file with one text in each line; a ``.jsonl`` file whose objects have ``text`` (a
        string) or ``messages`` (what a chat template takes); or a folder of images.
    model : str
        Name or folder of the model, for its tokenizer or image processor.
    count : int
        How many samples to draw, at random without repetition; all if there are fewer.
    batch_size, max_length, seed : int
        Samples in a batch, tokens of a text that are kept, and the seed of the draw.
    trust_remote_code : bool
        Whether code that comes with the model may run.

    Raises
    ------
    StreamError
        If the source is none of these, or a line is not as it should be.
    """

    def __init__(
        self,
        source: Path,
        model: str,
        *,
        count: int,
        batch_size: int,
        max_length: int,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        self._batch_size, self._max_length = batch_size, max_length
        options = {"trust_remote_code": trust_remote_code}
        self._encode: Callable[[Sequence[Any]], dict[str, Any]]
        if source.is_dir():
            self._processor = AutoImageProcessor.from_pretrained(model, **options)
            self._encode = self._images
            self._samples: Sequence[Any] = _drawn(_image_files(source), count, seed)
            return
        self._processor = AutoTokenizer.from_pretrained(model, **options)
        if self._processor.pad_token is None:
            self._processor.pad_token = self._processor.eos_token
        self._encode = self._tokens
        texts = _drawn(list(_lines(source)), count, seed)
        # Texts of about equal length together: no time is lost on padding.
        self._samples = sorted((self._text(source, *line) for line in texts), key=len)

    def __len__(self) -> int:
        return -(-len(self._samples) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self._samples), self._batch_size):
            yield self._encode(self._samples[start : start + self._batch_size])

    def _tokens(self, texts: Sequence[str]) -> dict[str, Any]:
        options = {"padding": True, "truncation": True, "max_length": self._max_length}
        return dict(self._processor(list(texts), return_tensors="pt", **options))

    def _images(self, files: Sequence[Path]) -> dict[str, Any]:
        from PIL import Image

        images = [Image.open(file).convert("RGB") for file in files]
        return dict(self._processor(images, return_tensors="pt"))

    def _text(self, source: Path, number: int, line: str) -> str:
        if source.suffix != ".jsonl":
            return line
        try:
            row = json.loads(line)
            if "messages" in row:
                return str(self._processor.apply_chat_template(row["messages"], tokenize=False))
            return str(row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise StreamError(
                f"{source}, line {number}: expected a JSON object with 'text' or 'messages', "
                f"got {line[:60]!r}"
            ) from error


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty, with their numbers."""
    with source.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.strip()


def _image_files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_ENDINGS]
    if not files:
        raise StreamError(f"{folder}: expected a folder of images {IMAGE_ENDINGS}, got none")
    return files


def _drawn(samples: list[Any], count: int, seed: int) -> list[Any]:
    return random.Random(seed).sample(samples, min(count, len(samples)))
