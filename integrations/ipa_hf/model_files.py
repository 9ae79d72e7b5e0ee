"""Models from files, whose faults are errors of a single line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from ipa_core.errors import FileFormatError, IPAError, MissingFileError

_LONGEST = 600


@contextmanager
def file_errors(expected: str, cure: str) -> Iterator[None]:
    """Turn errors of other libraries over a user's files into one of what was expected.

    Damaged files, code of models and chat templates raise errors of every class. An `ImportError`
    passes, as it names a package.

    Raises
    ------
    FileFormatError
        From any error within the context; the message names the line of code that raised it.
    """
    try:
        yield
    except (IPAError, ImportError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:_LONGEST]
        raise FileFormatError(
            f"expected {expected}, got {type(error).__name__}: {text} "
            f"({Path(frame.filename).name}:{frame.lineno}); {cure}"
        ) from error


def load_model(name: str, trust_remote_code: bool, allow_pickle: bool) -> torch.nn.Module:
    """Load a model as the class it was saved from, so that layer names match the trainer's.

    Raises
    ------
    MissingFileError
        If the name is that of a folder which is not there.
    FileFormatError
        If transformers cannot load the model.
    """
    check_model_name(name)
    options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": trust_remote_code}
    if not allow_pickle:
        options["use_safetensors"] = True
    with file_errors(f"a model of transformers in {name}", "save or download it again"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        loader = _model_class(config, trust_remote_code)
        model: torch.nn.Module = loader.from_pretrained(name, **options)
    return model


def check_model_name(name: str) -> None:
    """Check that a folder exists, if a name is that of a folder and none of a server.

    Raises
    ------
    MissingFileError
        If it does not.
    """
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).exists():
        raise MissingFileError(f"{name}: expected the folder of a model, got no such path")


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    """Return the class that a model was saved from; `AutoModel` if it is not known."""
    remote = [name for name in getattr(config, "auto_map", {}) if name.startswith("AutoModel")]
    if remote and trust_remote_code:
        return getattr(transformers, remote[0])
    architecture = str((config.architectures or [""])[0])
    saved = getattr(transformers, architecture, None)
    known = isinstance(saved, type) and issubclass(saved, transformers.PreTrainedModel)
    return saved if known else transformers.AutoModel
