"""The backbone as one more step of a scikit-learn pipeline."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from features.errors import InputError, ViewMismatch
from features.store import FeatureStore
from features.views import AUTO, Request, View, fingerprint
from pipeline import readthrough
from pipeline.inputs import Images, cells

if TYPE_CHECKING:
    from features.backbones import Backbone

MISSING = ("error", "nan", "zeros")
COMBINE = ("concatenate", "mean")
_TYPES: dict[Any, tuple[str, ...]] = {
    str: ("backbone", "precision", "device"),
    str | None: ("layer", "pooling"),
    str | os.PathLike | None: ("weights", "store"),
}


class BackboneTransformer(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Images to the embeddings that ``permafrost extract`` makes of them.

    Images are paths, URLs, bytes of image files, PIL images, or uint8 arrays of shape (height, width, 3); as a list,
    an array, a Series or the columns of a DataFrame. PIL images are turned as their EXIF says, like files. Arrays may
    also be grey, (height, width), or RGBA.

    Nothing is learnt: `fit` finds out the size of the embeddings and the digest of the weights. The weights are no
    part of the estimator, its clones and its pickles; each process loads a backbone once, for all threads. A pickle
    that is used elsewhere gets its weights there, by the same parameters, and refuses others. If the weight file lies
    elsewhere there, or the store, say so with `set_params`.

    With a store, images whose embeddings it has are read but neither decoded nor embedded, and new embeddings are
    added to it every 2,048 images at the latest; its listing stays as it is. An image is known by the SHA-256 of its
    bytes; PIL images and arrays by that of their pixels as a PPM file, so that they share an embedding with such a file
    and no other. Threads and processes of one user on one machine embed an image once: while one of them fills the
    store, others wait for what they lack. To use all cores for that, fill it first, with ``permafrost extract`` or one
    `transform`. ``permafrost vacuum`` removes embeddings of images that are not in the listing. Relative paths are
    relative to the folder one works in, also those of a table that lies elsewhere. Processes that are forked, as by
    joblib's ``multiprocessing`` backend, may hang once their parent has embedded, since torch's threads do not survive
    a fork; joblib's own, ``loky``, do not.

    The model is never compiled here: for many images, ``permafrost extract`` is faster. Beside other work on the same
    cores, set ``OMP_WAIT_POLICY=passive`` before torch is imported, as the command line does.

    Parameters
    ----------
    backbone : str
        A torchvision classification model by its own name, or ``tiny``.
    weights : str or path, optional
        A member of the model's weights enum, ``untrained``, or a state-dict file.
    layer : str, optional
        A graph node; by default the penultimate layer.
    pooling : str, optional
        How a layer's places or tokens become one vector: ``avg``, ``max``, ``gem``, ``cls`` or ``flatten``.
    precision : str
        ``fp32``, ``bf16``, ``fp16``, or ``auto``: what the store's view has, or else what the hardware where it is
        fitted is made for and the backbone bears. In sixteen bits, an image may come out by a thousandth otherwise in
        another batch.
    store : str or path, optional
        A feature store, new or not.
    missing : str
        What becomes of None and NaN, and with a warning of images that cannot be read or decoded: ``error``, ``nan``,
        or ``zeros`` beside a further column for each image column, which is 1 where an image is missing.
    combine : str
        What becomes of several image columns: ``concatenate``, or the ``mean`` of those embeddings of a row that there
        are, missing only where there is none.
    device : str
        ``auto`` (a GPU where there is one), or a torch device.

    Attributes
    ----------
    view_ : features.views.View
        The exact spec of the embeddings, the digest of the weights included, and their size.
    n_features_in_ : int
        How many image columns there are.
    feature_names_in_ : numpy.ndarray
        Their names, if X had any.

    Examples
    --------
    >>> import pandas as pd
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> table = pd.read_csv("photos.csv")
    >>> model = make_pipeline(BackboneTransformer("tiny", store="new"), LogisticRegression())
    >>> model.fit("photos/" + table["file"], table["label"]).predict(["photos/test/blue/20.png"])
    array(['blue'], dtype=object)
    """

    def __init__(
        self,
        backbone: str = "tiny",
        *,
        weights: str | os.PathLike[str] | None = None,
        layer: str | None = None,
        pooling: str | None = None,
        precision: str = AUTO,
        store: str | os.PathLike[str] | None = None,
        missing: str = "error",
        combine: str = "concatenate",
        device: str = AUTO,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.pooling = pooling
        self.precision = precision
        self.store = store
        self.missing = missing
        self.combine = combine
        self.device = device

    def fit(self, X: Any, y: Any = None) -> BackboneTransformer:
        """Find out what the embeddings are; no image is read.

        Parameters
        ----------
        X : list, numpy.ndarray, Series or DataFrame
            Images, or several columns of images.
        y : ignored

        Raises
        ------
        InputError
            For a parameter that is unknown, for anything that is no image, and for a missing one if that is an error.
        BackboneError
            If the backbone cannot be loaded.
        StoreError
            If the store is none.
        """
        self._images(X, reset=True)
        self.view_ = self._find_view()
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Embed images.

        Parameters
        ----------
        X : list, numpy.ndarray, Series or DataFrame
            As in `fit`, with as many image columns.

        Returns
        -------
        numpy.ndarray
            float32, shape (rows, features); see `get_feature_names_out`.

        Raises
        ------
        InputError
            For anything that is no image, and for images that are missing or cannot be used if that is an error.
        BackboneError
            If the backbone cannot be loaded.
        ViewMismatch
            If its weights, or what becomes of images otherwise, are not what they were in `fit`.
        NonFinite
            If the backbone gives NaN or infinity.
        """
        check_is_fitted(self, "view_")
        images = self._images(X, reset=False)
        there, vectors, reasons = readthrough.embed(images, self.view_, self._store(), self._backbone)
        self._report(images, reasons)
        columns = self.n_features_in_
        return self._combined(there.reshape(-1, columns), vectors.reshape(-1, columns, self.view_.dim))

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the features: ``<column>_<dimension>`` and ``<column>_missing``, for means that of the backbone."""
        columns = OneToOneFeatureMixin.get_feature_names_out(self, input_features)
        if self.combine == "mean":
            columns = [self.view_.request.backbone]
        names = [f"{column}_{place}" for column in columns for place in range(self.view_.dim)]
        marks = [f"{column}_missing" for column in columns] if self.missing == "zeros" else []
        return np.array([*names, *marks], dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = True
        # Columns of images are taken, but the tag speaks of numbers.
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.input_tags.allow_nan = self.missing != "error"
        tags.transformer_tags.preserves_dtype = []
        return tags

    # What is asked for

    def _request(self) -> Request:
        weights = None if self.weights is None else os.fspath(self.weights)
        return Request.parse(self.backbone, weights, self.layer, self.precision, self.pooling)

    def _store(self) -> FeatureStore | None:
        return None if self.store is None else FeatureStore.open_or_new(os.fspath(self.store))

    def _find_view(self) -> View:
        """The store's own view of what is asked for, or what the loaded backbone gives."""
        request, store = self._request(), self._store()
        known = store.views().values() if store else ()
        alike = [view for view in known if request.same_as(view.request)]
        if alike:
            return min(alike, key=lambda view: view.name != request.view_name)
        backbone = readthrough.load(request, self.device)
        resolved = request.resolved(backbone.precision)
        return View(request.view_name, backbone.specs[0], backbone.dims[0], resolved)

    def _backbone(self) -> Backbone:
        view = self.view_
        request = self._request().resolved(view.request.precision)
        backbone = readthrough.load(request, self.device, view.spec["decode"])
        if fingerprint(backbone.specs[0]) != view.fingerprint:
            raise ViewMismatch(
                f"{self.backbone} gives other embeddings here than where this transformer was fitted: "
                f"{view.differences(backbone.specs[0])}; set_params the same weights, or fit again"
            )
        return backbone

    def _check_parameters(self) -> None:
        for name, known in (("missing", MISSING), ("combine", COMBINE)):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name}={value!r} is unknown; use {', '.join(known)}")
        for kind, names in _TYPES.items():
            for name in names:
                if not isinstance(value := getattr(self, name), kind):
                    wanted = "a path or URL" if name == "store" else "a text"
                    raise InputError(f"{name} is of type {type(value).__name__}; pass {wanted}")

    # Images

    def _images(self, X: Any, reset: bool) -> Images:
        self._check_parameters()
        grid = cells(X)
        named = getattr(X, "ndim", len(getattr(X, "shape", ()))) == 2
        validate_data(self, X if named else grid, reset=reset, skip_check_array=True)
        images = Images.of(grid)
        if self.missing == "error":
            self._report(images, {cell: "no image" for cell, place in enumerate(images.places) if place is None})
        return images

    def _report(self, images: Images, reasons: dict[int, str]) -> None:
        """Refuse cells that cannot be used, or warn of them, as the policy has it."""
        if not reasons:
            return
        first = min(reasons)
        row, column = divmod(first, self.n_features_in_)
        of = f" of column {self.feature_names_in_[column]!r}" if hasattr(self, "feature_names_in_") else ""
        told = (
            f"{len(reasons):,} of {len(images.places):,} images cannot be used; the first, row {row}{of}"
            f"{images.shown(first)}: {reasons[first]}"
        )
        if self.missing == "error":
            raise InputError(f"{told}; mend or leave out such rows, or say missing='nan' or 'zeros'")
        warnings.warn(f"{told}; they count as missing", stacklevel=4)

    def _combined(self, there: NDArray[np.bool_], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """From embeddings of shape (rows, columns, dim) to features."""
        vectors[~there] = 0
        if self.combine == "mean":
            vectors = vectors.sum(1, keepdims=True) / np.maximum(there.sum(1), 1).astype(np.float32)[:, None, None]
            there = np.asarray(there.any(1, keepdims=True))
        if self.missing == "nan":
            vectors[~there] = np.nan
        features = vectors.reshape(len(there), -1)
        return np.hstack([features, ~there], dtype=np.float32) if self.missing == "zeros" else features
