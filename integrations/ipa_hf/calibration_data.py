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
from ipa_core.io.paths import input_file
from ipa_hf.model_files import check_model_name, file_errors

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
        string) or ``messages`` (for the chat template); or a folder of images. Empty texts are
        left out.
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
        If there are no texts or images, a line of a ``.jsonl`` file has neither field, or the
        tokenizer gives no tokens.
    FileFormatError
        If the tokenizer or image processor cannot be loaded, or cannot read a sample.
    PathError
        If a file cannot be read.
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
        check_model_name(model)
        cure = "save it into the folder of the model, or give data of another kind"
        if source.is_dir():
            with file_errors(f"the image processor of {model}", cure):
                self._processor = AutoImageProcessor.from_pretrained(model, **options)
            self._encode = self._images
            self._samples: Sequence[Any] = _draw(_image_files(source), count, seed)
            return
        with file_errors(f"the tokenizer of {model}", cure):
            self._processor = AutoTokenizer.from_pretrained(model, **options)
            if self._processor.pad_token is None:
                self._processor.pad_token = self._processor.eos_token
        if self._processor.pad_token is None:
            raise StreamError(
                f"expected a tokenizer with a padding or end token in {model}, got one without; "
                "set its pad_token and save it"
            )
        self._encode = self._tokens
        drawn = _draw(list(_lines(source)), count, seed)
        texts = [text for line in drawn if (text := self._text(source, *line)).content.strip()]
        if not texts:
            raise StreamError(f"{source}: expected a text in each line, got none")
        # Sorted by length, so that batches contain little padding.
        self._samples = sorted(texts, key=_length)

    def __len__(self) -> int:
        return -(-len(self._samples) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self._samples), self._batch_size):
            samples = self._samples[start : start + self._batch_size]
            with file_errors("samples that the tokenizer or image processor takes", "mend them"):
                batch = self._encode(samples)
            yield batch

    def _tokens(self, texts: Sequence[_Text]) -> dict[str, Any]:
        """Return texts as tokens; a rendered conversation has its special tokens already."""
        options = {"truncation": True, "max_length": self._max_length}
        rows = [
            self._processor(text.content, add_special_tokens=not text.rendered, **options)
            for text in texts
        ]
        rows = [row for row in rows if row["input_ids"]]
        if not rows:
            raise StreamError(
                f"expected texts with tokens, got none in {texts[0].content[:60]!r} and others of "
                "its batch; use the tokenizer of the model"
            )
        names = self._processor.model_input_names
        columns = {name: [row[name] for row in rows] for name in names if name in rows[0]}
        return dict(self._processor.pad(columns, return_tensors="pt"))

    def _images(self, files: Sequence[Path]) -> dict[str, Any]:
        from PIL import Image

        images = []
        for file in files:
            with file_errors(f"an image in {file}", "remove or replace the file"):
                images.append(Image.open(file).convert("RGB"))
        return dict(self._processor(images, return_tensors="pt"))

    def _text(self, source: Path, number: int, line: str) -> _Text:
        if source.suffix != ".jsonl":
            return _Text(line)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        row = row if isinstance(row, dict) else {}
        if isinstance(row.get("messages"), list):
            taken = f"messages that the chat template takes, in {source}, line {number}"
            with file_errors(taken, "mend the line, or the template of the tokenizer"):
                rendered = self._processor.apply_chat_template(row["messages"], tokenize=False)
            return _Text(str(rendered), rendered=True)
        if not isinstance(row.get("text"), str):
            raise StreamError(
                f"{source}, line {number}: expected a JSON object with 'text' or 'messages', a "
                f"string or a list, got {line[:60]!r}"
            )
        return _Text(row["text"])


def _length(text: _Text) -> int:
    return len(text.content)


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    """Yield the non-empty lines with their line numbers."""
    with (
        file_errors(f"a text file in UTF-8 in {source}", "save the file in UTF-8"),
        source.open(encoding="utf-8") as file,
    ):
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.strip()


def _image_files(folder: Path) -> list[Path]:
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_ENDINGS]
    files = [input_file(path) for path in paths if not path.is_dir()]
    if not files:
        raise StreamError(f"{folder}: expected a folder of images {IMAGE_ENDINGS}, got none")
    return files


def _draw(samples: list[Any], count: int, seed: int) -> list[Any]:
    return random.Random(seed).sample(samples, min(count, len(samples)))
