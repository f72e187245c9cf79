"""A checkpoint's tensors and what its JSON files say: from a folder, a Hub repository or one file of weights."""

import difflib
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UserError, quiet_hub

PICKLES = (".bin", ".pth", ".pt", ".ckpt")  # read with weights_only=True, and only where they are local
ENDINGS = (".safetensors", ".npz", *PICKLES)
WRAPPERS = ("model_ema", "state_dict", "model")  # what training programs put their weights under, best first
INDEX = "model.safetensors.index.json"
# what readers of files raise that hold something else
FAULTS = (
    ValueError, OSError, EOFError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, SafetensorError,
    zipfile.BadZipFile,
)  # fmt: skip
TRAINING_STATE = ("state.json", "MANIFEST.json")  # beside the weights of what a run goes on from
FOLDER_WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.pth", "model.pth")


@dataclass
class Checkpoint:
    """What a checkpoint says: its name, config.json (empty where absent) and, once asked for, its other files."""

    name: str
    config: dict[str, Any]
    find_processor: Callable[[], Path | None]  # the local preprocessor_config.json, fetched when it is asked for
    find_weights: Callable[[], Path]
    notes: list[str] = field(default_factory=list)  # what was done to reach the tensors

    @cached_property
    def processor(self) -> dict[str, Any]:
        """preprocessor_config.json; empty where there is none."""
        file = self.find_processor()
        return {} if file is None or not file.is_file() else _read_json(self.name, file)

    def read_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by the names they were saved under. Raises UserError for a file that is no checkpoint."""
        file = self.find_weights()
        try:
            if file.name == INDEX:
                return self._read_shards(file)
            if file.suffix == ".npz":
                with np.load(file, allow_pickle=False) as arrays:
                    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            if file.suffix in PICKLES:
                return self._unwrapped(torch.load(file, map_location="cpu", weights_only=True))
            return self._without_module(load_file(file))
        except UserError:
            raise
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{self.name}: {file.name} holds more than tensors, and unpickling it could run any code; expected "
                "a file that torch.load(weights_only=True) reads. Save its state_dict as .safetensors."
            ) from error
        except FAULTS as error:
            raise UserError(f"{self.name} is damaged: {file.name}: {_said(error)}") from error

    def _read_shards(self, index: Path) -> dict[str, torch.Tensor]:
        shards = _shards_of(self.name, index)
        tensors: dict[str, torch.Tensor] = {}
        for shard in shards:
            if Path(shard).name != shard:
                raise UserError(f"{self.name} is damaged: {INDEX} names {shard!r}, which is no file beside it.")
            tensors |= load_file(index.with_name(shard))
        return self._without_module(tensors)

    def _unwrapped(self, loaded: Any) -> dict[str, torch.Tensor]:
        """The dictionary of tensors inside what training programs save, and without "module."."""
        while isinstance(loaded, dict) and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
            inner = next((name for name in WRAPPERS if isinstance(loaded.get(name), dict)), None)
            if inner is None:
                break
            others = ", ".join(sorted(str(name) for name in loaded if name != inner))
            self.notes.append(f"weights taken from {inner!r}" + (f" (beside it: {others})" if others else ""))
            loaded = loaded[inner]
        strangers = not isinstance(loaded, dict) or [k for k, v in loaded.items() if not isinstance(v, torch.Tensor)]
        if strangers:
            what = type(loaded).__name__ if strangers is True else f"entries that are none: {', '.join(strangers[:5])}"
            raise UserError(f"{self.name}: expected a state_dict, names and tensors; got {what}.")
        return self._without_module(dict(loaded))

    def _without_module(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Without the prefixes that DistributedDataParallel and torch.compile put before every name."""
        for prefix in ("module.", "_orig_mod."):
            if tensors and all(name.startswith(prefix) for name in tensors):
                self.notes.append(f"prefix {prefix!r} taken off all names")
                tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        return tensors


def open_checkpoint(name_or_path: str, hub: dict[str, Any] | None = None) -> Checkpoint:
    """The checkpoint of a folder, a file of weights, or a Hub repository.

    hub: revision, token, cache_dir and the like, for huggingface_hub. A file beside a config.json is read with it, as
    its folder would be. Raises UserError where there is no such checkpoint, or where it cannot be read.
    """
    path = Path(name_or_path).expanduser()
    if not name_or_path.strip():
        raise UserError("An empty name names no checkpoint: expected a folder, a file of weights or owner/name.")
    if path.is_file():
        return _open_file(name_or_path, path)
    if path.is_dir():
        return _open_folder(name_or_path, path)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1 or path.suffix in ENDINGS:
        raise UserError(f"{name_or_path}: there is no such folder or file.{_near(name_or_path)}")
    return _open_repository(name_or_path, hub or {})


def _open_file(name: str, path: Path) -> Checkpoint:
    _refuse_adapter(name, path.parent if path.name.startswith("adapter") else path)
    if path.suffix not in ENDINGS:
        raise UserError(f"{name}: expected a file of weights ({', '.join(ENDINGS)}), got {path.suffix or path.name!r}.")
    beside = path.with_name("config.json")
    if not beside.is_file():
        _refuse_training_state(name, path.parent)
    config = _read_json(name, beside) if beside.is_file() else {}
    notes = ["facts from the config.json beside it"] if config else []
    return Checkpoint(name, config, lambda: path.with_name("preprocessor_config.json"), lambda: path, notes)


def _refuse_adapter(name: str, folder: Path):
    if (folder / "adapter_config.json").is_file():
        merged = folder.parent / "model"
        hint = f" The model with it merged in is {merged}." if (merged / "config.json").is_file() else ""
        raise UserError(f"{name} is a LoRA adapter, which changes a model and is none by itself.{hint}")


def _refuse_training_state(name: str, folder: Path):
    if all((folder / file).is_file() for file in TRAINING_STATE):
        raise UserError(
            f"{name} is what training goes on from (--resume_from_checkpoint), without a config.json: of LoRA, a "
            "specimen or an older version. A finished run's model is in its model/."
        )


def _open_folder(name: str, folder: Path) -> Checkpoint:
    if (folder / "recipe.json").is_file() and (folder / "model" / "config.json").is_file():
        folder /= "model"  # of a finished run
    if not (folder / "config.json").is_file():
        _refuse_adapter(name, folder)
        _refuse_training_state(name, folder)
        files = [file.name for file in sorted(folder.iterdir()) if file.suffix in ENDINGS]
        hint = " Expected a run's folder, its model/, a checkpoint or a repository on the Hub."
        if files:
            hint = f" To read it without one, name the file itself: {folder / files[0]}."
        raise UserError(f"{name}: the folder has no config.json.{hint}")

    def weights() -> Path:
        found = next((folder / file for file in FOLDER_WEIGHTS if (folder / file).is_file()), None)
        if found is None:
            raise UserError(f"{name}: the folder has no model.safetensors, nor another of {', '.join(FOLDER_WEIGHTS)}.")
        return found

    config = _read_json(name, folder / "config.json")
    return Checkpoint(name, config, lambda: folder / "preprocessor_config.json", weights)


def _open_repository(name: str, hub: dict[str, Any]) -> Checkpoint:
    def weights() -> Path:
        file = _fetched(name, "model.safetensors", hub, optional=True)
        if file is not None:
            return file
        index = _fetched(name, INDEX, hub, optional=True)
        if index is None:
            raise UserError(_no_safetensors(name, hub))
        for shard in _shards_of(name, index):
            _fetched(name, shard, hub)
        return index

    config = _fetched(name, "config.json", hub)
    find_processor = partial(_fetched, name, "preprocessor_config.json", hub, optional=True)
    return Checkpoint(name, _read_json(name, config), find_processor, weights)


def _no_safetensors(name: str, hub: dict[str, Any]) -> str:
    token, revision = hub.get("token"), hub.get("revision")
    has_pickle = HfApi(token=token).file_exists(name, "pytorch_model.bin", revision=revision)
    if not has_pickle:
        return f"{name}: the Hub has no model.safetensors of it."
    return (
        f"{name} has its weights in pytorch_model.bin alone: a downloaded pickle is not opened, as it could run any "
        "code. Choose a revision with model.safetensors, or download the file yourself and name it."
    )


def _fetched(name: str, file_name: str, hub: dict[str, Any], optional: bool = False) -> Path | None:
    """The local copy of a repository's file; None where it is optional and the repository has none."""
    try:
        with quiet_hub():
            return Path(hf_hub_download(name, file_name, **hub))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{name}: no such folder or file, and no such model on the Hub.{_near(name)}") from error
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError too: it comes first
        if optional and file_name == "preprocessor_config.json":
            return None  # offline, what a timm repository never had cannot be told from what was not fetched
        raise UserError(f"{name}: no such folder or file, and the Hub cannot be reached.{_near(name)}") from error
    except EntryNotFoundError as error:
        if optional:
            return None
        raise UserError(f"{name}: not here, and the Hub has no {file_name} of it.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no branch, tag or commit {hub.get('revision')!r} on the Hub.") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{name}: the Hub does not give it: {error}") from error


def _near(name: str) -> str:
    """A hint at the run whose folder may be meant; empty where none is near."""
    path = Path(name).expanduser()
    runs = [record.parent.name for record in path.parent.glob("*/recipe.json")]
    close = difflib.get_close_matches(path.name, runs, n=1)
    return f" Did you mean {str(path.parent / close[0])!r}?" if close else ""


def _shards_of(name: str, index: Path) -> list[str]:
    shards = _read_json(name, index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{name} is damaged: {INDEX} has no weight_map, which says the file of each tensor.")
    return sorted(set(shards.values()))


def _said(error: Exception) -> str:
    """The error in one line."""
    text = " ".join(str(error).split())
    is_told = isinstance(error, (ValueError, OSError, RuntimeError, SafetensorError, zipfile.BadZipFile))
    return text if is_told else f"it holds something else ({type(error).__name__}: {text})"


def _read_json(name: str, file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{name} is damaged: {file.name}: {error}") from error
    if not isinstance(facts, dict):
        raise UserError(f"{name} is damaged: {file.name} holds no object.")
    return facts
