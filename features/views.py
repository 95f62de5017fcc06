"""What a view is: the request as typed, the spec it resolves to, and the fingerprint that names the spec.

Nothing here needs torch, so that a run with nothing to do can tell so without it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from features.errors import BackboneError, ViewMismatch

PENULTIMATE = "penultimate"
UNTRAINED = "untrained"
TINY_WEIGHTS = Path(__file__).with_name("tiny.safetensors")

_WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
# torchvision never published IMAGENET1K_V1 for these two.
_OTHER_DEFAULTS = {
    "tiny": "V1",
    "vit_h_14": "IMAGENET1K_SWAG_E2E_V1",
    "regnet_y_128gf": "IMAGENET1K_SWAG_E2E_V1",
}


@dataclass(frozen=True)
class Request:
    """What the user asked for, resolved as far as it can be without torch.

    Attributes
    ----------
    backbone : str
        A torchvision classification model by its own name, or ``tiny``.
    weights : str
        A member of the model's weights enum, ``untrained``, or the absolute path of a state-dict file.
    weights_sha256 : str or None
        Digest of the weight file's bytes; None where torchvision's hub or a seed provides the weights.
    layer : str
        ``penultimate``, or the name of a graph node.
    precision : str
        ``fp32``: float32 throughout, without TF32.
    """

    backbone: str
    weights: str
    weights_sha256: str | None = None
    layer: str = PENULTIMATE
    precision: str = "fp32"

    @classmethod
    def parse(
        cls, backbone: str, weights: str | None = None, layer: str | None = None, precision: str = "fp32"
    ) -> Request:
        """Resolve the options of the command line.

        Raises
        ------
        BackboneError
            For an unknown precision or a weight file that is not there.
        """
        if precision != "fp32":
            raise BackboneError(f"precision {precision!r} is unknown; use fp32")
        weights = weights or _OTHER_DEFAULTS.get(backbone, "IMAGENET1K_V1")
        digest = None
        if weights.endswith(_WEIGHT_FILES) or "/" in weights:
            path = Path(weights).expanduser().resolve()
            weights, digest = str(path), file_sha256(path)
        elif backbone == "tiny" and weights != UNTRAINED:
            digest = file_sha256(TINY_WEIGHTS)
        return cls(backbone, weights, digest, layer or PENULTIMATE, precision)

    @property
    def is_file(self) -> bool:
        """Whether the weights come from a file of the user's."""
        return "/" in self.weights

    @property
    def view_name(self) -> str:
        """The default name of the view: backbone, weights and layer."""
        weights = Path(self.weights).stem if self.is_file else self.weights
        return "-".join(re.sub(r"[^\w.]+", "_", part) for part in (self.backbone, weights, self.layer))

    def same_as(self, other: Request) -> bool:
        """Whether both ask for the same weights, layer and precision, wherever the weight file lies."""

        def without_place(request: Request) -> Request:
            return replace(request, weights="") if request.is_file else request

        return without_place(self) == without_place(other)


@dataclass(frozen=True)
class View:
    """One spec's embeddings in a store.

    Attributes
    ----------
    name : str
        Name of its directory in the store.
    spec : dict
        Everything that decides an embedding's value: backbone, digest over the weights' tensors, layer,
        pooling, transform, decode policy, precision.
    dim : int
        Embedding size.
    request : Request
        What was typed to make it.
    """

    name: str
    spec: dict[str, Any]
    dim: int
    request: Request
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise BackboneError(
                f"view name {self.name!r} must be letters, digits, '_', '.' and '-', a letter or digit first"
            )
        object.__setattr__(self, "fingerprint", fingerprint(self.spec))

    def require(self, spec: dict[str, Any]) -> None:
        """Refuse any spec but this view's own.

        Raises
        ------
        ViewMismatch
            Naming what differs, with both values.
        """
        if fingerprint(spec) == self.fingerprint:
            return
        differences = "; ".join(
            f"{key} is {self.spec.get(key)!r}, asked for {spec.get(key)!r}"
            for key in sorted(self.spec | spec)
            if self.spec.get(key) != spec.get(key)
        )
        raise ViewMismatch(f"view {self.name!r} holds other embeddings: {differences}; use --view with a new name")

    def to_json(self) -> dict[str, Any]:
        """A description that `from_json` reads back."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "dim": self.dim,
            "spec": self.spec,
            "request": asdict(self.request),
        }

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> View:
        """The view that `to_json` described.

        Raises
        ------
        ViewMismatch
            If the description is damaged, or of a version of permafrost that knows more.
        """
        try:
            view = cls(described["name"], described["spec"], described["dim"], Request(**described["request"]))
            if view.fingerprint == described["fingerprint"]:
                return view
        except (KeyError, TypeError) as error:
            raise ViewMismatch(f"a view is described in a way that this permafrost cannot read ({error})") from None
        raise ViewMismatch(f"view {view.name!r} is damaged: its spec is not what its fingerprint stands for")


def fingerprint(spec: dict[str, Any]) -> str:
    """SHA-256 (hex) of the spec as canonical JSON: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a weight file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BackboneError(f"weight file {path} cannot be read: {error.strerror}") from None
