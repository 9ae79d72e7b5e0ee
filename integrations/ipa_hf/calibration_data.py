"""Calibration data: texts, conversations and images from files, as batches of model inputs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from ipa_core.errors import StreamError

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class _Text:
    """Text of a sample; a rendered one comes from the chat template, special tokens included."""

    content: str
    rendered: bool = False


class CalibrationData:
    """A random sample of a data set, as batches; can be iterated several times.

    Parameters
    ----------
    source : path
        A text file with one text per line; a ``.jsonl`` file whose objects have ``text`` (a
        string) or ``messages`` (for the chat template); or a folder of images.
    model : str
        Name or folder of the model, for its tokenizer or image processor.
    count : int
        Number of samples, drawn at random without replacement; all if there are fewer.
    batch_size, max_length, seed : int
        Samples per batch, tokens kept of each text, and the seed of the random choice.
    trust_remote_code : bool
        Whether code that comes with the model may run.

    Raises
    ------
    StreamError
        If the source is an empty folder, or a line of a ``.jsonl`` file has neither field.
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
            self._samples: Sequence[Any] = _draw(_image_files(source), count, seed)
            return
        self._processor = AutoTokenizer.from_pretrained(model, **options)
        if self._processor.pad_token is None:
            self._processor.pad_token = self._processor.eos_token
        self._encode = self._tokens
        texts = _draw(list(_lines(source)), count, seed)
        # Sorted by length, so that batches contain little padding.
        self._samples = sorted((self._text(source, *line) for line in texts), key=_length)

    def __len__(self) -> int:
        return -(-len(self._samples) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self._samples), self._batch_size):
            yield self._encode(self._samples[start : start + self._batch_size])

    def _tokens(self, texts: Sequence[_Text]) -> dict[str, Any]:
        """Return texts as tokens; a rendered conversation has its special tokens already."""
        options = {"truncation": True, "max_length": self._max_length}
        rows = [
            self._processor(text.content, add_special_tokens=not text.rendered, **options)
            for text in texts
        ]
        names = self._processor.model_input_names
        columns = {name: [row[name] for row in rows] for name in names if name in rows[0]}
        return dict(self._processor.pad(columns, return_tensors="pt"))

    def _images(self, files: Sequence[Path]) -> dict[str, Any]:
        from PIL import Image

        images = [Image.open(file).convert("RGB") for file in files]
        return dict(self._processor(images, return_tensors="pt"))

    def _text(self, source: Path, number: int, line: str) -> _Text:
        if source.suffix != ".jsonl":
            return _Text(line)
        try:
            row = json.loads(line)
            if "messages" in row:
                rendered = self._processor.apply_chat_template(row["messages"], tokenize=False)
                return _Text(str(rendered), rendered=True)
            return _Text(str(row["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StreamError(
                f"{source}, line {number}: expected a JSON object with 'text' or 'messages', "
                f"got {line[:60]!r}"
            ) from error


def _length(text: _Text) -> int:
    return len(text.content)


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    """Yield the non-empty lines with their line numbers."""
    with source.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.strip()


def _image_files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_ENDINGS]
    if not files:
        raise StreamError(f"{folder}: expected a folder of images {IMAGE_ENDINGS}, got none")
    return files


def _draw(samples: list[Any], count: int, seed: int) -> list[Any]:
    return random.Random(seed).sample(samples, min(count, len(samples)))
