"""A folder of trained models and their results, so that a run that was cut off goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class Folder:
    """`results.json`, and `<name>.safetensors` for each training.

    Attributes:
        path: where it is; made if it is not there.
        results: the entry of each training, by its name.

    Args:
        path: see above.
        settings: what all trainings in it have in common.

    Raises:
        SystemExit: the folder is of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, float]) -> None:
        self.path, self._settings = path, settings
        self.results: dict[str, dict[str, Any]] = {}
        path.mkdir(parents=True, exist_ok=True)
        if (path / "results.json").exists():
            known = json.loads((path / "results.json").read_text())
            if known["settings"] != settings:
                raise SystemExit(
                    f"{path} has results for {known['settings']}, asked for are {settings}; give "
                    f"another --output, or remove that folder"
                )
            self.results = known["results"]

    def add(self, name: str, result: dict[str, Any], model: nn.Module) -> None:
        """Keeps a trained model and its result."""
        save_file(model.state_dict(), self.path / f"{name}.safetensors")
        self.results[name] = result
        kept = {"settings": self._settings, "results": self.results}
        (self.path / "results.json").write_text(json.dumps(kept, indent=1))

    def load(self, name: str, model: Model) -> Model:
        """The model with the weights of a training, in eval mode."""
        model.load_state_dict(load_file(self.path / f"{name}.safetensors"))
        return model.eval()
