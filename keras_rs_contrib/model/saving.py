"""How a two-tower model is built, saved and loaded."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, Self

import keras
import numpy as np

from keras_rs_contrib.arguments import explains_keywords, on_host
from keras_rs_contrib.distribution import num_replicas
from keras_rs_contrib.model.access import alone, shared
from keras_rs_contrib.model.archive import check_weights_file
from keras_rs_contrib.model.checksums import Checksums
from keras_rs_contrib.model.extending import extended
from keras_rs_contrib.model.one_writer import in_one_process
from keras_rs_contrib.model.recommend import RecommendingModel
from keras_rs_contrib.model.training_data import ARRAYS


class SavedModel(RecommendingModel):
    """A recommending model that remembers the features that it has seen, and builds its weights for them.

    Attributes:
        candidate_tower: embeds candidates. Set by the constructor of a subclass.
        candidate_id: name of the feature with the ids of candidates, or `None`.
        cross_batch_memory: a layer with weights that depend on the embeddings, or `None`.
    """

    candidate_tower: keras.layers.Layer
    candidate_id: str | None
    cross_batch_memory: keras.layers.Layer | None
    # Shape, without the batch, and dtype of each feature, by name.
    _seen_features: dict[str, tuple[tuple[int, ...], str]]
    # Dtypes of the features while the model is called, by name.
    _dtypes: dict[str, str] | None = None
    # Named by `checksums.ATTRIBUTE`.
    _zz_checksums: Checksums

    @shared
    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, and notes the shapes and dtypes of the features."""
        dtypes = {}
        if isinstance(features, dict):
            arrays = {name: x for name, x in features.items() if hasattr(x, "dtype")}
            dtypes = {name: keras.backend.standardize_dtype(x.dtype) for name, x in arrays.items()}
            names = self.model_inputs.names
            for name in [*names.of_query, *names.of_candidate, self.candidate_id]:
                if name in arrays and name not in self._seen_features:
                    self._seen_features[name] = (tuple(arrays[name].shape[1:]), dtypes[name])
        with self._setting(_dtypes=dtypes):
            return super().__call__(features, *args, **kwargs)

    def build(self, features_shape: Any) -> None:
        """Creates the weights of the model.

        Args:
            features_shape: dict of the shapes of the features, with the batch, such as `{"user_id": (None,)}`.

        Raises:
            TypeError: if it is not a dict.
            ValueError: if features are missing, or the towers cannot take them.
        """
        names = self.model_inputs.names
        if not isinstance(features_shape, dict):
            raise TypeError(
                "A two-tower model is built with a dict of shapes. Received: "
                f"{features_shape!r}. Name them, such as {{{names.of_query[0]!r}: (None,)}}."
            )
        if self._dtypes is not None:
            # Keras is calling the model. If it fails here, it fails in the call, with a better message.
            with contextlib.suppress(Exception):
                self._trace(features_shape, self._dtypes)
            return
        names.check(features_shape, names.of_query)
        # Dtypes are unknown. Ids are more frequent, and most layers take integers as well.
        ids = dict.fromkeys(features_shape, "int32")
        try:
            self._trace(features_shape, ids)
        except Exception:
            numbers = {name: dtype if name == self.candidate_id else "float32" for name, dtype in ids.items()}
            try:
                self._trace(features_shape, numbers)
            except Exception as error:
                raise ValueError(
                    "The towers must take features of the given shapes. Received: "
                    f"{features_shape}, with which they fail: {error} Call the model on a batch instead of `build`."
                ) from error

    def _trace(self, shapes: dict[str, Any], dtypes: dict[str, str]) -> None:
        # Any size of the batch will do that the devices divide.
        size = num_replicas()
        tensors = {
            name: keras.KerasTensor((size, *shapes[name][1:]), dtypes[name]) for name in dtypes if name in shapes
        }
        self.compute_output_spec(tensors)

    @explains_keywords
    def extend(self, new: dict[str, Any], *, candidates: Any = None, candidate_ids: Any = None) -> Self:
        """Returns a larger copy of the model, for users and items that are new since training.

        This model does not change. All that it has learned is copied to the last bit: rows, the state of the optimizer,
        sampling probabilities, what is known of the training data. Old rows keep their numbers, and new ones follow.
        They begin as those of a new model: rows with values of the table's initializer, their optimizer slots as in a
        new optimizer, their sampling probability with 0. Training goes on with `fit`.

        The tables that grow are those that a tower looks up by the feature as it is, in a `keras.layers.Embedding`, a
        `ShardedEmbedding` or a `RowSparseEmbedding`. Hashed ids do not grow their table. The larger model is created
        from the config of this one, under the distribution in force, which may be another than before.

        The index of an embedding grows with it. So does that of a tower whose only feature is the candidate id. That of
        another tower needs the catalogue, in `candidates`, if there are new candidates; otherwise, it stays as it is.

        Args:
            new: dict by the names of features. For a feature with a vocabulary, its new names, as a list, a Series or
                an array; names that are known and duplicates are ignored. Other features that share the vocabulary
                grow too. For a feature without one, the new number of rows, an int. An empty dict copies the model.
            candidates: as in `ShardedBruteForceRetrieval.refresh`, the features of the whole catalogue, old and new,
                with names where features have a vocabulary. `None` for the previous ones.
            candidate_ids: `[num_candidates]` ids, as in `ShardedBruteForceRetrieval.refresh`, or names. Old rows of an
                embedding keep their ids, which come first.

        Returns:
            A model of the same type, compiled like this one.

        Raises:
            TypeError: if `new` is not a dict, or a value is of the wrong type.
            ValueError: if the model has no such feature, there would be fewer rows than before, no table is found,
                candidates are missing or do not fit, or the config of a layer or of `compile` does not describe it.

        Example:
        ```python
        users, movies = Vocabulary(["ann", "bob"]), Vocabulary(["Alien", "Heat", "Up"])
        model = TwoTowerModel(
            keras.layers.Embedding(len(users), 8),
            keras.layers.Embedding(len(movies), 8),
            query_features="user",
            candidate_features="movie",
            vocabularies={"user": users, "movie": movies},
        )
        model.compile("adam")
        model.fit({"user": ["ann", "bob"], "movie": ["Heat", "Up"]}, verbose=0)
        model = model.extend({"user": ["eve"], "movie": ["Brazil"]})
        model.fit({"user": ["eve"], "movie": ["Brazil"]}, verbose=0)
        ```
        """
        larger: Self = extended(self, new, candidates, candidate_ids)
        return larger

    def refresh_before_saving(self) -> None:
        """Refreshes the index, if that is possible."""
        if self.retrieval is not None and not self.retrieval.is_tied and self.retrieval.has_candidates:
            try:
                self.refresh_index()
            except ValueError as error:
                # The trained weights are worth saving even with a stale index.
                warnings.warn(f"The model is saved with a stale index. {error}", stacklevel=2)

    def save_own_variables(self, store: Any) -> None:
        """Saves the model's own weights, and refreshes the index first if possible."""
        self.refresh_before_saving()
        super().save_own_variables(store)
        for name, array in self._training_data.to_arrays().items():
            store[name] = array

    def load_own_variables(self, store: Any) -> None:
        """Loads the model's own weights, and what it knows of the training data.

        In files of version 0.1, a checksum of another kind is one of them. It is ignored: the index counts as fresh.
        """
        # Keras's store is not iterable.
        values = {name: store[name] for name in list(store.keys())}
        self._training_data.take_arrays({name: np.asarray(values.pop(name)) for name in ARRAYS if name in values})
        store = values
        is_old = list(store.keys()) == ["0"] and self.retrieval is not None and not self.retrieval.is_tied
        if not is_old:
            super().load_own_variables(store)

    def save_assets(self, dir_path: str) -> None:
        """Writes nothing, and notes the folder of the assets, which get checksums."""
        self._zz_checksums.note_assets(dir_path)

    @shared
    @in_one_process
    def save(self, *args: Any, **kwargs: Any) -> None:
        """Saves the model: see `keras.Model.save`."""
        super().save(*args, **kwargs)

    @shared
    def get_weights(self) -> list[np.ndarray[Any, Any]]:
        """Returns the values of all weights: see `keras.Model.get_weights`."""
        return list(map(on_host, self.weights))

    @shared
    @in_one_process
    def save_weights(self, *args: Any, **kwargs: Any) -> None:
        """Saves the weights: see `keras.Model.save_weights`. Raises `ValueError` if the model has none yet."""
        self._check_has_weights()
        super().save_weights(*args, **kwargs)

    @alone
    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Loads the weights: see `keras.Model.load_weights`.

        Raises:
            ValueError: if the model has no weights yet, or those in the file differ from their checksum.
        """
        self._check_has_weights()
        check_weights_file(filepath)
        if self.compiled and not self.optimizer.built:
            # Keras would skip the state of the optimizer.
            self.optimizer.build(self.trainable_variables)
        super().load_weights(filepath, *args, **kwargs)

    def _check_has_weights(self) -> None:
        layers = (self.query_tower, self.candidate_tower, self.retrieval, self.cross_batch_memory)
        for layer in layers:
            if layer is not None and not layer.built:
                raise ValueError(
                    "A model must be built before its weights are saved or loaded: Keras would skip the others. "
                    f"Received: {layer.name!r}, which is not built. Call the model on a batch with the features of "
                    "both towers first."
                )

    def get_build_config(self) -> dict[str, Any] | None:
        """Returns the shape and dtype of each feature that the model has seen, and that files have checksums."""
        return {"features": self._seen_features, "has_checksums": True} if self._seen_features else None

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the towers for the features in `config`."""
        features = config.get("features", {})
        if all(name in features for name in self.model_inputs.names.of_query):
            self({name: keras.KerasTensor((1, *shape), dtype) for name, (shape, dtype) in features.items()})
