"""What a view is: the request as typed, the spec it resolves to, and the fingerprint that names the spec.

Nothing here needs torch, so that a run with nothing to do can tell so without it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from features.errors import BackboneError, ViewMismatch

AUTO = "auto"
PENULTIMATE = "penultimate"
UNTRAINED = "untrained"
TINY_WEIGHTS = Path(__file__).with_name("tiny.safetensors")

PRECISIONS = (AUTO, "fp32", "bf16", "fp16")
POOLINGS = ("avg", "max", "gem", "cls", "flatten")

_WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
# torchvision never published IMAGENET1K_V1 for these two.
_OTHER_DEFAULTS = {
    "tiny": "V2",
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
        ``fp32``, without TF32; ``bf16`` or ``fp16``; or ``auto``: what the view has, or for a new one what the hardware
        is made for and the backbone bears.
    pooling : str
        How a layer's places or tokens become one vector; the penultimate layer is pooled by the model itself.

    Examples
    --------
    >>> Request("resnet18", "IMAGENET1K_V1", layer="layer3", pooling="gem").view_name
    'resnet18-IMAGENET1K_V1-layer3-gem'
    """

    backbone: str
    weights: str
    weights_sha256: str | None = None
    layer: str = PENULTIMATE
    precision: str = "fp32"
    pooling: str = "avg"

    @classmethod
    def parse(
        cls,
        backbone: str,
        weights: str | None = None,
        layer: str | None = None,
        precision: str = AUTO,
        pooling: str | None = None,
    ) -> Request:
        """Resolve the options of the command line.

        Parameters
        ----------
        backbone : str
            A torchvision classification model by its own name, or ``tiny``.
        weights : str, optional
            A member of the model's weights enum, ``untrained``, or a state-dict file; ``IMAGENET1K_V1`` by default,
            or what comes with the package.
        layer : str, optional
            A graph node; by default the penultimate layer.
        precision : str
            ``fp32``, ``bf16``, ``fp16`` or ``auto``.
        pooling : str, optional
            ``avg``, ``max``, ``gem``, ``cls`` or ``flatten``; for layers other than the penultimate.

        Raises
        ------
        BackboneError
            For an unknown precision or pooling, and a weight file that is not there.

        Examples
        --------
        >>> Request.parse("resnet50").view_name
        'resnet50-IMAGENET1K_V1-penultimate'
        >>> Request.parse("resnet50", precision="double")
        Traceback (most recent call last):
        features.errors.BackboneError: precision 'double' is unknown; use auto, fp32, bf16, fp16
        """
        for what, value, known in (("precision", precision, PRECISIONS), ("pooling", pooling or "avg", POOLINGS)):
            if value not in known:
                raise BackboneError(f"{what} {value!r} is unknown; use {', '.join(known)}")
        if pooling and (layer or PENULTIMATE) == PENULTIMATE:
            raise BackboneError("the penultimate layer is pooled by the model itself; use --pooling with --layer NODE")
        weights = weights or _OTHER_DEFAULTS.get(backbone, "IMAGENET1K_V1")
        digest = None
        if weights.endswith(_WEIGHT_FILES) or "/" in weights:
            path = Path(weights).expanduser().resolve()
            weights, digest = str(path), file_sha256(path)
        elif backbone == "tiny" and weights != UNTRAINED:
            digest = file_sha256(TINY_WEIGHTS)
        return cls(backbone, weights, digest, layer or PENULTIMATE, precision, pooling or "avg")

    @property
    def is_file(self) -> bool:
        """Whether the weights come from a file of the user's."""
        return "/" in self.weights

    @property
    def view_name(self) -> str:
        """The default name of the view: backbone, weights and layer, and the pooling if it is not ``avg``."""
        weights = Path(self.weights).stem if self.is_file else self.weights
        pooling = () if self.pooling == "avg" else (self.pooling,)
        return "-".join(re.sub(r"[^\w.]+", "_", part) for part in (self.backbone, weights, self.layer, *pooling))

    def same_as(self, other: Request) -> bool:
        """Whether this asks for the weights, layer, pooling and precision of another, wherever the weight file lies."""

        def without_place(request: Request) -> Request:
            return replace(request, weights="") if request.is_file else request

        return without_place(self.resolved(other.precision)) == without_place(other)

    def resolved(self, precision: str) -> Request:
        """The same, with a precision in place of ``auto``."""
        return replace(self, precision=precision) if self.precision == AUTO else self


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

    def require(self, spec: dict[str, Any], remedy: str = "use --view with a new name") -> None:
        """Refuse any spec but this view's own.

        Raises
        ------
        ViewMismatch
            Naming what differs, with both values.
        """
        if fingerprint(spec) != self.fingerprint:
            told = self.differences(spec)
            raise ViewMismatch(f"view {self.name!r} holds other embeddings: {told}; {remedy}")

    def differences(self, spec: dict[str, Any]) -> str:
        """What another spec has otherwise, with both values."""
        return "; ".join(
            f"{key} is {self.spec.get(key)!r}, asked for {spec.get(key)!r}"
            for key in sorted(self.spec | spec)
            if self.spec.get(key) != spec.get(key)
        )

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


def asked(
    backbones: list[str], weights: str | None, layers: list[str] | None, precision: str, pooling: str | None
) -> list[Request]:
    """Every layer of every backbone, as the command line asks for them; `pooling` is for layers that need one."""
    layers = layers or [PENULTIMATE]
    pooled = pooling if set(layers) == {PENULTIMATE} else None
    return [
        Request.parse(backbone, weights, layer, precision, pooled if layer == PENULTIMATE else pooling)
        for backbone in backbones
        for layer in layers
    ]


def named(requests: list[Request], name: str | None = None) -> dict[str, Request]:
    """Requests by the names of their views, or one by the name given.

    Raises
    ------
    BackboneError
        If one name is given to several, or two come to the same name.
    """
    if name and len(requests) > 1:
        raise BackboneError(f"--view {name} names one view, but {len(requests)} are asked for; leave it away")
    views = {name or request.view_name: request for request in requests}
    if len(views) < len(requests):
        raise BackboneError(f"of {len(requests)} views asked for some have the same name: {', '.join(views)}")
    return views


def fingerprint(spec: dict[str, Any]) -> str:
    """SHA-256 (hex) of the spec as canonical JSON: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a weight file's bytes; read again only when size or time have changed."""
    try:
        status = path.stat()
        return _sha256(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise BackboneError(f"weight file {path} cannot be read: {error.strerror}") from None


@lru_cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
